import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from lazyattn.data import sources
from lazyattn.data.corpus import is_validation
from lazyattn.data.packing import FIELDS
from lazyattn.data.prepare import prepare
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def _texts(prepared, rows):
    """Returns the text of rows packed by `split`, which keeps the order."""
    targets = rows.column("targets")[rows.column("segment_ids") > 0]
    ends = np.flatnonzero(targets == prepared.tokenizer.eos_id)
    return [prepared.tokenizer.decode(ids) for ids in np.split(targets, ends + 1)[:-1]]


def test_each_split_holds_its_documents_exactly(config, prepared):
    splits = {True: [], False: []}
    for document in sources.documents(config.source):
        splits[is_validation(document.id, config.validation_fraction)].append(document.text)
    assert splits[True] and splits[False]
    assert _texts(prepared, prepared.validation) == splits[True]
    assert _texts(prepared, prepared.train) == splits[False]


def test_counts_add_up(config, prepared):
    for name, rows in {"train": prepared.train, "validation": prepared.validation}.items():
        counts = prepared.counts[name]
        counted = rows.column("segment_ids") > 0
        sizes = prepared.tokenizer.bytes_per_token[rows.column("targets")[counted]]
        assert counts.bytes == sizes.sum()
        assert counts.targets == counts.tokens - counts.documents == counted.sum()
        assert counts.rows == len(rows)
        assert counts.packing_efficiency == counted.mean()
    documents = list(sources.documents(config.source))
    assert sum(c.documents for c in prepared.counts.values()) == len(documents)
    assert sum(c.bytes for c in prepared.counts.values()) == sum(
        len(d.text.encode()) for d in documents
    )


def test_the_tokenizer_saw_training_documents_alone(config, prepared):
    texts = [
        d.text
        for d in sources.documents(config.source)
        if not is_validation(d.id, config.validation_fraction)
    ]
    assert Tokenizer.train(texts, config.vocab_size).fingerprint == prepared.tokenizer.fingerprint


def test_the_manifest_says_it_all(config, prepared):
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    content = manifest["content"]
    assert content["settings"]["schema"] >= 1
    assert content["settings"]["sequence_length"] == config.sequence_length
    assert content["tokenizer_fingerprint"] == prepared.tokenizer.fingerprint
    assert content["counts"]["train"] == dataclasses.asdict(prepared.counts["train"])
    assert set(manifest["files"]) == {"train.npy", "validation.npy", "tokenizer.json"}


def _no_build(monkeypatch):
    def refuse(source):
        raise AssertionError("prepared again")

    monkeypatch.setattr("lazyattn.data.sources.documents", refuse)


def test_prepared_once(config, prepared, monkeypatch):
    _no_build(monkeypatch)
    same = dataclasses.replace(config, batch_size=2, shuffle_seed=9, num_workers=3, prefetch=7)
    again = prepare(same, prepared.folder.parent)
    assert again.folder == prepared.folder
    assert again.fingerprint == prepared.fingerprint
    assert again.counts == prepared.counts


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 280},
        {"sequence_length": 24},
        {"packing": "first_fit"},
        {"validation_fraction": 0.4},
    ],
    ids=str,
)
def test_other_settings_are_other_data(config, prepared, cache_dir, change):
    other = prepare(dataclasses.replace(config, **change), cache_dir)
    assert other.folder.name != prepared.folder.name
    assert other.fingerprint != prepared.fingerprint


def test_the_length_of_rows_does_not_change_the_tokenizer(config, prepared, cache_dir):
    other = prepare(dataclasses.replace(config, sequence_length=24), cache_dir)
    assert other.tokenizer.fingerprint == prepared.tokenizer.fingerprint


def test_preparing_elsewhere_gives_the_same_bytes(config, prepared, cache_dir):
    other = prepare(config, cache_dir)
    assert other.fingerprint == prepared.fingerprint
    for name in ("train.npy", "validation.npy", "tokenizer.json", "manifest.json"):
        assert (other.folder / name).read_bytes() == (prepared.folder / name).read_bytes()


def test_changed_text_is_prepared_anew(config, source, tmp_path, cache_dir):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = dataclasses.replace(config, source=str(copy))
    before = prepare(config, cache_dir)
    (copy / "000.txt").write_text("something else entirely")
    after = prepare(config, cache_dir)
    assert after.fingerprint != before.fingerprint


def test_a_given_tokenizer_is_used(config, prepared, cache_dir, tmp_path):
    tokenizer = Tokenizer.train(["aa bb aa bb"], 261)
    tokenizer.save(tmp_path / "tokenizer.json")
    given = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    other = prepare(given, cache_dir)
    assert other.tokenizer.fingerprint == tokenizer.fingerprint
    assert _texts(other, other.train) == _texts(prepared, prepared.train)


def test_damaged_rows_are_made_again(config, prepared, cache_dir):
    path = prepare(config, cache_dir).folder / "train.npy"
    path.write_bytes(path.read_bytes()[:-100])
    again = prepare(config, cache_dir)
    for name in FIELDS:
        np.testing.assert_array_equal(again.train.column(name), prepared.train.column(name))


def test_the_default_folder_follows_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("LAZYATTN_CACHE", str(tmp_path / "mine"))
    assert prepare(config).folder.parent == tmp_path / "mine"


KILLED = """
import os, signal, sys
from lazyattn.data import rows
from lazyattn.data.config import DataConfig
from lazyattn.data.prepare import prepare

write = rows.PackedRows.write
def die(path, *args):
    write(path, *args)
    os.kill(os.getpid(), signal.SIGKILL)
rows.PackedRows.write = die
prepare(DataConfig(**eval(sys.argv[1])), sys.argv[2])
"""


def test_a_killed_preparation_is_redone(config, prepared, cache_dir):
    command = [sys.executable, "-c", KILLED, repr(dataclasses.asdict(config)), str(cache_dir)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = os.listdir(cache_dir)
    assert len(left) == 1 and left[0].startswith(".building-")
    again = prepare(config, cache_dir)
    assert again.fingerprint == prepared.fingerprint
    assert len(again.train) == len(prepared.train)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": "wikipedia"}, "data.source is 'wikipedia', but it must be 'stdlib' or"),
            ({"tokenizer": "/no/such.json"}, "The tokenizer '/no/such.json' cannot be read"),
            ({"validation_fraction": 1e-9}, "leaves no validation document among the 40 of"),
            ({"validation_fraction": 1 - 1e-9}, "leaves no train document among the 40 of"),
        ],
        ids=str,
    )
    def test_bad_settings(self, config, cache_dir, change, message):
        with pytest.raises(InputError, match=message):
            prepare(dataclasses.replace(config, **change), cache_dir)
        assert not cache_dir.exists() or os.listdir(cache_dir) == []

    def test_unwritable_cache(self, config, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(InputError, match=r"The data cache folder .* cannot be written to"):
            prepare(config, tmp_path / "file")
