import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest

from lazyattn.data import manifest, sources
from lazyattn.data.corpus import is_validation
from lazyattn.data.pipeline import prepare
from lazyattn.data.prepare.source import prepare_source
from lazyattn.data.shards import Shards
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def _texts(folder, split):
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return [tokenizer.decode(ids) for ids in Shards(folder, split)]


def _documents(config, held_out):
    return [
        document.text
        for document in sources.documents(config.source)
        if is_validation(document.id, config.validation_fraction) == held_out
    ]


def test_each_split_holds_its_documents_exactly(config, prepared, cache):
    folder = prepare_source(config, cache)
    for split, held_out in {"train": False, "validation": True}.items():
        texts = _documents(config, held_out)
        assert texts and _texts(folder, split) == texts
        counts = manifest.read(folder).splits[split]
        assert counts.documents == prepared.counts[split].documents == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert counts.tokens + len(texts) == prepared.counts[split].targets


def test_the_tokenizer_saw_training_documents_alone(config, prepared):
    trained = Tokenizer.train(_documents(config, False), config.vocab_size)
    assert trained.fingerprint == prepared.tokenizer.fingerprint


def test_prepared_once(config, prepared, cache, monkeypatch):
    def refuse(source):
        raise AssertionError("prepared again")

    monkeypatch.setattr("lazyattn.data.sources.documents", refuse)
    same = {"batch_size": 2, "shuffle_seed": 9, "num_workers": 3, "prefetch": 7}
    packed = {"sequence_length": 24, "packing": "first_fit", "long_documents": "truncate"}
    again = prepare(dataclasses.replace(config, **same, **packed), cache)
    assert again.fingerprint == prepared.fingerprint
    assert again.counts == prepared.counts


@pytest.mark.parametrize("change", [{"vocab_size": 280}, {"validation_fraction": 0.4}], ids=str)
def test_other_settings_are_other_data(config, prepared, cache, change):
    other = prepare(dataclasses.replace(config, **change), cache)
    assert other.fingerprint != prepared.fingerprint


def test_preparing_elsewhere_gives_the_same_bytes(config, prepared, cache, cache_dir):
    one, other = prepare_source(config, cache), prepare_source(config, cache_dir)
    assert one.name == other.name
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert "manifest.json" in names and "tokenizer.json" in names and len(names) == 4
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert os.listdir(cache_dir) == [other.name]  # no documents are left beside it


def test_changed_text_is_prepared_anew(config, source, tmp_path, cache_dir):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = dataclasses.replace(config, source=str(copy))
    before = prepare(config, cache_dir)
    (copy / "000.txt").write_text("something else entirely")
    assert prepare(config, cache_dir).fingerprint != before.fingerprint


def test_a_given_tokenizer_is_used(config, cache, cache_dir, tmp_path):
    tokenizer = Tokenizer.train(["aa bb aa bb"], 261)
    tokenizer.save(tmp_path / "tokenizer.json")
    given = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    folder = prepare_source(given, cache_dir)
    assert Tokenizer.load(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint
    assert prepare(given, cache_dir).tokenizer.fingerprint == tokenizer.fingerprint
    assert _texts(folder, "train") == _texts(prepare_source(config, cache), "train")


def test_damaged_shards_are_made_again(config, cache, cache_dir):
    path = prepare_source(config, cache_dir) / "train-00000-of-00001.arrayrecord"
    path.write_bytes(path.read_bytes()[:-100])
    assert _texts(prepare_source(config, cache_dir), "train") == _documents(config, False)


def test_the_default_folder_follows_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("LAZYATTN_CACHE", str(tmp_path / "mine"))
    assert prepare_source(config).parent == tmp_path / "mine"


KILLED = """
import os, signal, sys
from lazyattn.data.config import DataConfig
from lazyattn.data.prepare import assemble
from lazyattn.data.prepare.source import prepare_source

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
assemble.name_shards = die
prepare_source(DataConfig(**eval(sys.argv[1])), sys.argv[2])
"""


def test_a_killed_preparation_is_redone(config, prepared, cache_dir):
    command = [sys.executable, "-c", KILLED, repr(dataclasses.asdict(config)), str(cache_dir)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = os.listdir(cache_dir)
    assert len(left) == 1 and left[0].startswith(".building-")
    assert prepare(config, cache_dir).fingerprint == prepared.fingerprint


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
