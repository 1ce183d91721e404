"""Prepared data in a bucket: written there, and read."""

import dataclasses
import json

import pytest

from lazyattn.data import manifest
from lazyattn.data.config import DataConfig
from lazyattn.data.documents import is_prepared, read_prepared, read_texts
from lazyattn.data.pipeline import prepare
from lazyattn.data.prepare.run import Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from tests.bucket_fake import URL, Store, bucket
from tests.data.prepare.corpora import jsonl, make_documents

__all__ = ["bucket"]

OUT = f"{URL}/data/shards"


@pytest.fixture
def corpus(bucket):
    """A folder of two files in the bucket."""
    store = Store(skip_instance_cache=True)
    for number in range(2):
        lines = jsonl(make_documents(60, number))
        lines = lines if isinstance(lines, bytes) else lines.encode()
        store.pipe_file(f"bucket/corpus/{number}.jsonl", lines)
    store.pipe_file("bucket/corpus/notes.txt", b"none of it")
    return f"{URL}/corpus"


def _preparation(corpus, output=OUT, **changes):
    settings = {
        "inputs": (corpus,),
        "output": str(output),
        "tokenizer": "train",
        "vocab_size": 300,
        "selection": Selection(validation_fraction=0.2),
        "num_workers": 1,
    }
    return Preparation(**(settings | changes))


def _left(tmp_path):
    """Returns what is left of the work on this machine."""
    return [file for file in (tmp_path / "cache" / "outputs").rglob("*") if file.is_file()]


def test_it_is_what_a_folder_of_this_machine_gets(bucket, corpus, tmp_path):
    here = prepare_shards(_preparation(corpus, tmp_path / "shards"))
    there = prepare_shards(_preparation(f"{corpus}/*.jsonl"))
    assert there.manifest == here.manifest and str(there.folder) == OUT
    assert list(bucket.store)[-1] == "bucket/data/shards/manifest.json"
    assert _left(tmp_path) == []
    config = DataConfig(path=OUT, sequence_length=32)
    of_here = prepare(dataclasses.replace(config, path=str(here.folder)))
    assert prepare(config).fingerprint == of_here.fingerprint
    bucket.reads.clear()
    prepare(config)
    assert bucket.reads == []
    # And again: nothing is done.
    assert prepare_shards(_preparation(f"{corpus}/*.jsonl")).finished_before
    with pytest.raises(InputError, match=r"^--output is 's3://bucket/data/shards', which was"):
        prepare_shards(_preparation(f"{corpus}/*.jsonl", shard_mb=7))


def test_one_that_is_stopped_while_it_is_copied_goes_on(bucket, corpus, tmp_path, monkeypatch):
    put = Store.put_file

    def stops(self, source, target, **named):
        if source.endswith(manifest.NAME):
            raise OSError("the machine is gone")
        put(self, source, target, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "put_file", stops)
        with pytest.raises(InputError, match=r"^'s3://.*' can't be written \(OSError: the machine"):
            prepare_shards(_preparation(corpus))
    assert len(bucket.store) > 5
    with pytest.raises(InputError, match=r"^data.path is 's3:.*', but .* has no manifest.json"):
        prepare(DataConfig(path=OUT))
    assert "bucket/data/shards/manifest.json" not in bucket.store and _left(tmp_path)
    done = prepare_shards(_preparation(corpus))
    assert not done.finished_before and _left(tmp_path) == []
    assert manifest.verify(OUT, deep=True) == done.manifest


def test_a_folder_with_something_else_is_refused(corpus):
    with pytest.raises(InputError, match=r"^--output is 's3://bucket/corpus', .*it holds 0.jsonl"):
        prepare_shards(_preparation(corpus, corpus))


def test_texts_and_tokenizers(bucket, corpus, tmp_path):
    prepared = prepare_shards(_preparation(corpus))
    texts = read_texts(f"{corpus}/0.jsonl")
    lines = bucket.store["bucket/corpus/0.jsonl"].getvalue().splitlines()
    assert [text.text for text in texts] == [json.loads(line)["text"] for line in lines]
    tokenizer = Tokenizer.load(f"{OUT}/tokenizer.json")
    assert tokenizer.fingerprint == prepared.manifest.tokenizer.sha256
    assert is_prepared(OUT) and not is_prepared(corpus)
    bucket.reads.clear()
    found = read_prepared("x", [OUT], tokenizer)
    assert len(found.documents) == prepared.manifest.splits["validation"].documents
    assert not any("train-" in name for name in bucket.reads)
    (tmp_path / "again").mkdir()
    again = _preparation(corpus, tmp_path / "again" / "x", tokenizer=f"{OUT}/tokenizer.json")
    assert prepare_shards(again).manifest.tokenizer.sha256 == tokenizer.fingerprint


def test_what_is_not_there_is_one_sentence(bucket):
    with pytest.raises(InputError, match=r"^--text is 's3://bucket/x.txt', but it must be a file"):
        read_texts(f"{URL}/x.txt")
    with pytest.raises(InputError, match=r"^--input is 's3://bucket/\*.txt', but it must be fold"):
        prepare_shards(_preparation(f"{URL}/*.txt"))
    with pytest.raises(InputError, match=r"^The tokenizer 's3://bucket/t.json' cannot be read"):
        Tokenizer.load(f"{URL}/t.json")
