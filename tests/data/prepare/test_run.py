import collections
import dataclasses
import fcntl
import json
import re
import resource

import pytest

from lazyattn.data import manifest
from lazyattn.data.corpus import is_validation
from lazyattn.data.prepare import inputs
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.shards import Shards
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.data.prepare.corpora import make_documents, write_jsonl, write_parquet

SELECTION = Selection(min_int_score=3, validation_fraction=0.2)
CORPUS = [make_documents(300, 1), make_documents(150, 2), make_documents(80, 3)]


@pytest.fixture(scope="module", autouse=True)
def small_units():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_SMALLEST", 5000)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(folder / "a.parquet", CORPUS[0])
    write_jsonl(folder / "b.jsonl", CORPUS[1])
    write_jsonl(folder / "c.jsonl.zst", CORPUS[2])
    return folder


def _preparation(corpus, output, **changes):
    settings = {
        "inputs": (str(corpus),),
        "output": str(output),
        "tokenizer": "train",
        "vocab_size": 300,
        "selection": SELECTION,
        "num_workers": 1,
    }
    return Preparation(**(settings | changes))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    return prepare_shards(_preparation(corpus, tmp_path_factory.mktemp("out") / "shards"))


def _texts(folder, split):
    tokenizer = Tokenizer.load(folder / manifest.read(folder).tokenizer.file)
    return [tokenizer.decode(ids) for ids in Shards(folder, split)]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_document_once_in_its_split_and_in_order(prepared):
    expected = {True: [], False: []}
    for document in (d for part in CORPUS for d in part if d["int_score"] >= 3):
        expected[is_validation(document["id"], 0.2)].append(document["text"])
    assert min(map(len, expected.values())) > 20
    assert _texts(prepared.folder, "train") == expected[False]
    assert _texts(prepared.folder, "validation") == expected[True]


def test_the_manifest_says_it_all(prepared):
    content = manifest.verify(prepared.folder, deep=True)
    assert content == prepared.manifest
    assert set(_files(prepared.folder)) == {
        "manifest.json",
        "tokenizer.json",
        *(shard.file for split in content.splits.values() for shard in split.shards),
    }
    kept = [d for part in CORPUS for d in part if d["int_score"] >= 3]
    assert sum(split.documents for split in content.splits.values()) == len(kept)
    assert sum(s.bytes for s in content.splits.values()) == sum(
        len(d["text"].encode()) for d in kept
    )
    for name, split in content.splits.items():
        assert split.tokens == sum(ids.size for ids in Shards(prepared.folder, name))
    assert content.skipped == {"low_score": sum(map(len, CORPUS)) - len(kept)}
    assert [(source.file, source.documents) for source in content.sources] == [
        ("a.parquet", 300),
        ("b.jsonl", 150),
        ("c.jsonl.zst", 80),
    ]
    assert content.settings["min_int_score"] == 3
    assert content.settings["validation_fraction"] == 0.2
    assert content.tokenizer.end_of_document == 2
    assert len(content.splits["train"].shards) > 3
    assert len(content.splits["validation"].shards) == 1
    assert prepared.tokens == sum(split.tokens for split in content.splits.values())


def test_the_tokenizer_saw_training_documents_alone(prepared):
    texts = _texts(prepared.folder, "train")
    tokenizer = Tokenizer.load(prepared.folder / "tokenizer.json")
    assert Tokenizer.train(texts, 300).fingerprint == tokenizer.fingerprint


def test_processes_make_no_difference(corpus, prepared, tmp_path):
    """Nor does an environment where units are cut small: workers get them as they are."""
    other = prepare_shards(_preparation(corpus, tmp_path / "out", num_workers=2))
    assert _files(other.folder) == _files(prepared.folder)
    assert (other.bytes, other.tokens) == (prepared.bytes, prepared.tokens)


def test_a_finished_folder_stays_as_it_is(corpus, prepared, monkeypatch):
    monkeypatch.setattr("lazyattn.data.prepare.run.process_all", None)
    before = _files(prepared.folder)
    again = prepare_shards(_preparation(corpus, prepared.folder))
    assert again.seconds == 0 and again.manifest == prepared.manifest
    assert _files(prepared.folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 301}, "tokenizer = .*300.* and not .*301"),
        ({"shard_mb": 7}, "with shard_mb = 512 and not 7"),
        (
            {"selection": dataclasses.replace(SELECTION, min_int_score=None)},
            "with min_int_score = 3 and not None; give another --output or delete that folder",
        ),
        ({"inputs": ("a.parquet",)}, "from other files or from files that have changed since"),
    ],
    ids=str,
)
def test_other_settings_are_other_data(corpus, prepared, change, message):
    if "inputs" in change:
        change = {"inputs": (str(corpus / change["inputs"][0]),)}
    before = _files(prepared.folder)
    with pytest.raises(InputError, match=message):
        prepare_shards(_preparation(corpus, prepared.folder, **change))
    assert _files(prepared.folder) == before


def test_a_folder_with_other_things_is_left_alone(corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"must be a new or empty folder.*holds thesis\.tex"):
        prepare_shards(_preparation(corpus, tmp_path))
    assert list(_files(tmp_path)) == ["thesis.tex"]


def test_two_at_once(corpus, prepared, tmp_path):
    work = tmp_path / ".preparation"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is preparing it right now"):
            prepare_shards(_preparation(corpus, tmp_path))


def test_no_room_to_write(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"--output is '.*file', but nothing can be written"):
        prepare_shards(_preparation(corpus, tmp_path / "file"))


def test_a_full_disk(corpus, prepared, tmp_path):
    """Stood in for by a limit on the size of files."""
    preparation = _preparation(corpus, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        with pytest.raises(InputError, match=r"nothing can be written there \(.*File too large"):
            prepare_shards(preparation)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _files(prepare_shards(preparation).folder) == _files(prepared.folder)


def test_a_given_tokenizer(corpus, prepared, tmp_path):
    Tokenizer.train(["aa bb aa bb"], 261).save(tmp_path / "own.json")
    other = prepare_shards(
        _preparation(corpus, tmp_path / "out", tokenizer=str(tmp_path / "own.json"))
    )
    assert other.manifest.tokenizer.vocab_size == 261
    assert _texts(other.folder, "train") == _texts(prepared.folder, "train")
    with pytest.raises(InputError, match="were made with different tokenizers"):
        manifest.require_same_tokenizer(["a", "b"], [prepared.manifest, other.manifest])


class TestFaults:
    """Everything that can be wrong with a corpus, in one folder."""

    @pytest.fixture
    def damaged(self, corpus, tmp_path):
        folder = tmp_path / "corpus"
        path = write_parquet(folder / "a.parquet", CORPUS[0])
        path.write_bytes(path.read_bytes()[:-50])
        lines = [{"id": "good", "text": "a good one " * 9, "int_score": 3}]
        lines += [{"id": f"more{i}", "text": f"another {i}", "int_score": 4} for i in range(20)]
        lines += [{"id": "x", "int_score": 4}, {"text": "t", "int_score": 4}, {"id": "y"}]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        content += b'{"id": "\xff"}\n{"id": "z", "text": "\\ud800", "int_score": 5}\n{"id": \n'
        (folder / "b.jsonl").write_bytes(content)
        return folder

    def test_skipped_and_counted_and_told(self, damaged, tmp_path, capsys):
        done = prepare_shards(_preparation(damaged, tmp_path / "out"))
        assert done.manifest.skipped == {
            "invalid_json": 1,
            "invalid_unicode": 2,
            "missing_id": 1,
            "missing_score": 1,
            "missing_text": 1,
        }
        assert sum(split.documents for split in done.manifest.splits.values()) == 21
        assert [source.documents for source in done.manifest.sources] == [0, 27]
        assert "Parquet" in done.manifest.sources[0].error
        told = capsys.readouterr().err
        assert "a.parquet: can't be read (" in told
        assert "b.jsonl, byte 1,155: missing_text" in told or ": missing_text" in told
        assert "b.jsonl: 3 more documents" in told

    def test_fatal(self, damaged, tmp_path):
        settings = {"on_fault": "fail", "output": str(tmp_path / "out")}
        with pytest.raises(InputError, match=r"a.parquet can't be read .*--on_fault=skip leaves"):
            prepare_shards(_preparation(damaged, **settings))
        (damaged / "a.parquet").unlink()
        settings["output"] = str(tmp_path / "other")
        with pytest.raises(InputError, match=r"b\.jsonl, byte .*: missing_text; --on_fault=skip"):
            prepare_shards(_preparation(damaged, **settings))
        # What was begun can be gone on with, faults skipped.
        settings["on_fault"] = "skip"
        assert prepare_shards(_preparation(damaged, **settings)).manifest.skipped

    def test_a_damaged_row_group(self, tmp_path, capsys):
        path = write_parquet(tmp_path / "in" / "a.parquet", CORPUS[0], row_group_size=100)
        content = bytearray(path.read_bytes())
        content[4:1000] = b"\xff" * 996
        path.write_bytes(content)
        done = prepare_shards(
            _preparation(tmp_path / "in", tmp_path / "out", selection=Selection())
        )
        assert done.manifest.skipped == {"unreadable": 100}
        assert done.manifest.sources[0].documents == 300
        assert "row 0: " in done.manifest.sources[0].error
        assert "a part can't be read" in capsys.readouterr().err
        texts = collections.Counter(_texts(done.folder, "train"))
        texts.update(_texts(done.folder, "validation"))
        assert texts == collections.Counter(d["text"] for d in CORPUS[0][100:])

    def test_nothing_is_left(self, corpus, tmp_path):
        selection = dataclasses.replace(SELECTION, min_int_score=9)
        with pytest.raises(InputError, match=r"No training document is left; skipped: .'low_score"):
            prepare_shards(_preparation(corpus, tmp_path / "out", selection=selection))

    @pytest.mark.parametrize(
        ("field", "message"),
        [
            (
                {"id_field": "x"},
                "{'missing_id': 300}; --id_field= goes by the hash of the text.",
            ),
            ({"text_field": "x"}, "{'missing_text': 300}; --text_field names the"),
        ],
    )
    def test_a_field_that_none_has(self, tmp_path, field, message):
        write_jsonl(tmp_path / "in" / "a.jsonl", CORPUS[0])
        selection = Selection(**field)
        with pytest.raises(InputError, match=re.escape(message)):
            prepare_shards(_preparation(tmp_path / "in", tmp_path / "out", selection=selection))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "--input is '', but it must be files to prepare"),
        ({"output": ""}, "--output is '', but it must be the folder"),
        ({"tokenizer": ""}, "--tokenizer is '', but it must be a tokenizer.json"),
        ({"tokenizer": "none.json"}, "The tokenizer 'none.json' cannot be read"),
        ({"vocab_size": 5}, "--vocab_size is 5, but it must be at least 260"),
        ({"shard_mb": 0}, "--shard_mb is 0, but it must be at least 1"),
        ({"num_workers": -1}, "--num_workers is -1, but it must be at least 0"),
        ({"on_fault": "cry"}, "--on_fault is 'cry', but it must be skip or fail"),
    ],
    ids=str,
)
def test_bad_settings(corpus, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        prepare_shards(_preparation(corpus, **({"output": tmp_path / "out"} | change)))
    assert not (tmp_path / "out").exists()
