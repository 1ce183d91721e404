import os
import pickle
import resource
import threading

import grain
import numpy as np
import pytest

from lazyattn.data import manifest, shards
from lazyattn.data.manifest import Manifest, Split, TokenizerRecord
from lazyattn.data.shards import Shards
from lazyattn.errors import InputError

TOKENIZER = b'{"made": "up"}'


def documents(number, seed=0, vocab_size=300):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(0, 40)) for _ in range(number)]


def write_folder(folder, train, validation, dtype="uint16", tokenizer=TOKENIZER):
    """Writes a folder of shards: `train` and `validation` are lists of lists of documents."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for name, parts in {"train": train, "validation": validation}.items():
        written = [
            shards.write_shard(
                folder / shards.shard_name(name, i, len(parts)),
                [(ids, 3 * len(ids)) for ids in part],
                dtype,
            )
            for i, part in enumerate(parts)
        ]
        splits[name] = Split(tuple(written))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    digest = manifest.file_sha256(folder / "tokenizer.json")
    record = TokenizerRecord("tokenizer.json", "tokenizer.json", digest, 300, 1, 2, 0)
    Manifest("a test", record, dtype, splits, (), {"min_int_score": None}, {}).write(folder)
    return folder


@pytest.fixture(scope="module")
def all_documents():
    return documents(50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, all_documents):
    d = all_documents
    return write_folder(tmp_path_factory.mktemp("shards"), [d[:7], d[7:8], d[8:40]], [d[40:]])


def test_documents_come_back(folder, all_documents):
    train, validation = Shards(folder, "train"), Shards(folder, "validation")
    assert (len(train), len(validation)) == (40, 10)
    for found, expected in zip([*train, *validation], all_documents, strict=True):
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, expected)


def test_in_any_order(folder, all_documents):
    order = np.random.default_rng(1).permutation(40)
    for found, index in zip(Shards(folder, "train").read(order), order, strict=True):
        np.testing.assert_array_equal(found, all_documents[index])
    for index in (-1, 40):
        with pytest.raises(IndexError):
            Shards(folder, "train")[index]


def test_a_record_is_little_endian_ids(tmp_path):
    from array_record.python import array_record_module

    for dtype, record in (("uint16", b"\x01\x02\xff\xff"), ("uint32", b"\x01\x02\0\0\xff\xff\0\0")):
        shard = shards.write_shard(tmp_path / "x", [([513, 65535], 5)], dtype)
        reader = array_record_module.ArrayRecordReader(str(tmp_path / "x"))
        assert reader.read([0]) == [record]
        assert (shard.documents, shard.tokens, shard.bytes) == (1, 2, 5)
        assert shard.size == os.path.getsize(tmp_path / "x")


def test_wide_ids(tmp_path):
    assert shards.token_dtype(2**16) == "uint16"
    assert shards.token_dtype(2**16 + 1) == "uint32"
    write_folder(tmp_path, [[[70000, 1]]], [[[2]]], dtype="uint32")
    np.testing.assert_array_equal(Shards(tmp_path, "train")[0], [70000, 1])
    for ids, dtype in (([65536], "uint16"), ([-1], "uint32")):
        with pytest.raises(ValueError, match="A token id is outside"):
            shards.write_shard(tmp_path / "x", [(ids, 1)], dtype)
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "manifest.json"  # no leftovers


def test_the_same_documents_are_the_same_bytes(folder, all_documents, tmp_path):
    d = all_documents
    other = write_folder(tmp_path, [d[:7], d[7:8], d[8:40]], [d[40:]])
    for path in folder.iterdir():
        assert (other / path.name).read_bytes() == path.read_bytes()
    assert manifest.read(folder).fingerprint == manifest.read(other).fingerprint


def test_grain_reads_them_in_other_processes_and_threads(folder, all_documents):
    source = Shards(folder, "train")
    source[3]
    source = pickle.loads(pickle.dumps(source))
    read = list(grain.MapDataset.source(source).to_iter_dataset())
    for found, expected in zip(read, all_documents[:40], strict=True):
        np.testing.assert_array_equal(found, expected)
    failures = []

    def check(seed):
        for index in np.random.default_rng(seed).integers(0, 40, 100):
            if not np.array_equal(source[index], all_documents[index]):
                failures.append(index)

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_unknown_split(folder):
    with pytest.raises(InputError, match="split is 'test', but it must be one of train, valid"):
        Shards(folder, "test")


def test_a_damaged_shard_is_named(folder, all_documents, tmp_path):
    write_folder(tmp_path, [all_documents[:20]], [all_documents[20:]])
    path = tmp_path / "train-00000-of-00001.arrayrecord"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"train-00000-of-00001.arrayrecord' cannot be read"):
        Shards(tmp_path, "train")[0]


def test_more_shards_than_a_process_may_open(tmp_path, all_documents):
    write_folder(tmp_path, [[document] for document in all_documents[:40]], [all_documents[40:]])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, hard))
        source = Shards(tmp_path, "train")
        for found, expected in zip(source, all_documents[:40], strict=True):
            np.testing.assert_array_equal(found, expected)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
