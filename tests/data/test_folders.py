import dataclasses
import itertools

import numpy as np
import pytest

from lazyattn.data.config import DataConfig
from lazyattn.data.packing import FIELDS
from lazyattn.data.pipeline import (
    TrainingData,
    prepare,
    train_iterator,
    unigram_entropy,
    validation_batches,
)
from lazyattn.data.shards import Shards
from lazyattn.errors import InputError
from tests.data.shard_folders import texts, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return [str(write_folder(root / name, seed)) for seed, name in enumerate(("web", "code"))]


def _config(folders, **changes):
    sources = tuple((folder, 1.0 + i) for i, folder in enumerate(folders))
    settings = {"sources": sources, "sequence_length": 32, "batch_size": 4, "prefetch": 0}
    return DataConfig(**{**settings, **changes})


def test_what_is_opened_is_what_was_written(folders):
    opened = prepare(_config(folders))
    assert isinstance(opened, TrainingData)
    assert [len(source) for source in opened.train] == [60, 60]
    assert opened.weights == (1.0, 2.0)
    tokens = [sum(ids.size for ids in Shards(folder, "train")) for folder in folders]
    assert opened.counts["train"].documents == 120
    assert opened.counts["train"].targets == sum(tokens) + 120
    assert opened.tokenizer.decode(opened.train[1].read([7])[0]) == texts(75, seed=1)[7]
    assert opened.fingerprint != prepare(_config(folders[:1])).fingerprint
    assert opened.fingerprint == prepare(_config(folders, packing="first_fit")).fingerprint


def test_checksums_are_compared_if_asked_for(tmp_path):
    folder = write_folder(tmp_path / "data")
    config = _config([str(folder)])
    path = folder / "train-00000-of-00006.arrayrecord"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # padding: nothing reads it
    path.write_bytes(content)
    prepare(config)
    with pytest.raises(InputError, match="its SHA-256 is another"):
        prepare(dataclasses.replace(config, verify_checksums=True))


def test_from_files_to_batches_and_on_in_worker_processes(folders):
    config = _config(folders, packing="first_fit")
    whole = list(itertools.islice(train_iterator(prepare(config), config), 12))
    config = dataclasses.replace(config, num_workers=2, prefetch=2)
    plain = train_iterator(prepare(config), dataclasses.replace(config, num_workers=0))
    iterator = train_iterator(prepare(config), config)
    for _ in range(5):
        next(plain)
    iterator.set_state(plain.get_state())
    try:
        for expected, found in zip(whole[5:], iterator, strict=False):
            for name in FIELDS:
                np.testing.assert_array_equal(found[name], expected[name])
            next(plain)
        assert iterator.get_state() == plain.get_state()
    finally:
        iterator.close()
        plain.close()


def test_unigram_entropy_of_shards(folders):
    config = _config(folders)
    prepared = prepare(config)
    targets = {"train": [], "validation": []}
    for split, found in targets.items():
        for source in getattr(prepared, split):
            for ids in source.read(range(len(source))):
                found += [*ids.tolist(), prepared.tokenizer.eos_id]
    counts = np.bincount(targets["train"], minlength=prepared.tokenizer.vocab_size) + 1
    nats = np.log(counts.sum()) - np.log(counts)
    assert unigram_entropy(prepared) == pytest.approx(nats[targets["validation"]].mean())
    real = sum((b["segment_ids"] > 0).sum() for b in validation_batches(prepared, config))
    assert real == len(targets["validation"])


def test_other_tokenizers_are_not_mixed(folders, tmp_path):
    other = str(write_folder(tmp_path / "other", vocab_size=290))
    with pytest.raises(InputError, match="different tokenizers"):
        prepare(_config([folders[0], other]))
    with pytest.raises(InputError, match=r"data\.tokenizer is .*, but it must be None or the tok"):
        prepare(_config(folders, tokenizer=other + "/tokenizer.json"))
    prepare(_config(folders, tokenizer=folders[1] + "/tokenizer.json"))


def test_a_file_that_is_missing_or_changed_is_named(tmp_path):
    folder = write_folder(tmp_path / "a", train=12)
    config = DataConfig(path=str(folder))
    shard = folder / "train-00001-of-00002.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"train-00001-of-00002\.arrayrecord' is not the file"):
        prepare(config)
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00001-of-00002\.arrayrecord' is named by"):
        prepare(config)
    with pytest.raises(InputError, match="is no folder of tokenised shards"):
        prepare(DataConfig(path=str(tmp_path / "nowhere")))


def test_a_split_without_documents(tmp_path):
    folder = write_folder(tmp_path / "a", validation=0)
    with pytest.raises(InputError, match="has no validation documents"):
        prepare(DataConfig(path=str(folder)))


def test_a_file_that_vanishes_while_it_is_needed(tmp_path):
    folder = write_folder(tmp_path / "a")
    config = DataConfig(path=str(folder), sequence_length=32, batch_size=4)
    iterator = train_iterator(prepare(config), config)
    (folder / "train-00004-of-00006.arrayrecord").unlink()
    with pytest.raises(
        InputError, match=r"^'.*train-00004-of-00006\.arrayrecord' cannot be read .*\.$"
    ):
        for _ in range(100):
            next(iterator)
    iterator.close()


def test_a_folder_of_shards_as_source_is_told_apart(folders):
    with pytest.raises(InputError, match=r"give it as data\.path"):
        prepare(DataConfig(source=folders[0]))
