"""Text that no one has made into shards: the same road as any folder of them."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lazyattn.data import sources
from lazyattn.data.corpus import is_validation
from lazyattn.data.packing import FIELDS
from lazyattn.data.pipeline import prepare, train_iterator, validation_batches
from lazyattn.data.prepare.source import prepare_source
from lazyattn.errors import InputError


def _take(iterator, n):
    return list(itertools.islice(iterator, n))


def _assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == set(FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name])


def _texts(config, held_out):
    return [
        document.text
        for document in sources.documents(config.source)
        if is_validation(document.id, config.validation_fraction) == held_out
    ]


def test_batches_of_text_are_those_of_its_shards(config, prepared, cache):
    """The folder in the cache, named as data.path, gives the same."""
    shards = dataclasses.replace(config, path=str(prepare_source(config, cache)))
    _assert_equal(
        _take(train_iterator(prepared, config), 20),
        _take(train_iterator(prepare(shards), shards), 20),
    )
    _assert_equal(
        list(validation_batches(prepared, config)),
        list(validation_batches(prepare(shards), shards)),
    )


def test_shapes_and_types(config, prepared):
    for batch in _take(train_iterator(prepared, config), 2):
        for array in batch.values():
            assert array.shape == (config.batch_size, config.sequence_length)
            assert array.dtype == np.int32
            assert type(array) is np.ndarray


def test_validation_has_every_held_out_document_once(config, prepared):
    texts = _texts(config, True)
    assert texts
    batches = list(validation_batches(prepared, config))
    targets = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
    ends = np.flatnonzero(targets == prepared.tokenizer.eos_id)
    found = [prepared.tokenizer.decode(ids) for ids in np.split(targets, ends + 1)[:-1]]
    assert found == texts
    assert prepared.counts["validation"].targets == targets.size
    assert prepared.counts["validation"].documents == len(texts)


def test_more_rows_in_a_batch_than_there_are_documents(config, prepared):
    many = dataclasses.replace(config, batch_size=3 * prepared.counts["train"].documents)
    for batch in _take(train_iterator(prepared, many), 3):
        assert (batch["segment_ids"] > 0).all()


def test_order_follows_the_seed_and_nothing_else(config, prepared):
    first = _take(train_iterator(prepared, config), 9)
    _assert_equal(first, _take(train_iterator(prepared, config), 9))
    ahead = dataclasses.replace(config, prefetch=3)
    _assert_equal(first, _take(train_iterator(prepared, ahead), 9))
    other = dataclasses.replace(config, shuffle_seed=1)
    assert (next(train_iterator(prepared, other))["inputs"] != first[0]["inputs"]).any()


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed_will_do(config, prepared, seed):
    next(train_iterator(prepared, dataclasses.replace(config, shuffle_seed=seed)))


def test_resuming_in_another_process_is_exact(config, source, cache, tmp_path):
    """The state goes through a file, and the data is opened anew."""
    whole = _take(train_iterator(prepare(config, cache), config), 12)
    iterator = train_iterator(prepare(config, cache), config)
    _take(iterator, 9)
    state = tmp_path / "state.json"
    state.write_text(json.dumps([iterator.get_state(), dataclasses.asdict(config), str(cache)]))
    program = (
        "import json, sys, numpy as np\n"
        "from lazyattn.data.config import DataConfig\n"
        "from lazyattn.data.pipeline import prepare, train_iterator\n"
        "state, config, cache = json.load(open(sys.argv[1]))\n"
        "config = DataConfig(**config)\n"
        "iterator = train_iterator(prepare(config, cache), config)\n"
        "iterator.set_state(state)\n"
        "np.savez(sys.argv[1] + '.npz', **next(iterator))\n"
    )
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(state)], check=True, cwd=root)
    with np.load(f"{state}.npz") as found:
        _assert_equal([dict(found)], [whole[9]])


def test_a_state_of_rows_packed_ahead_is_too_old(config, prepared):
    """So the state was while text was packed into rows before training."""
    iterator = train_iterator(prepared, config)
    with pytest.raises(InputError, match="of an older version, which read text in another order"):
        iterator.set_state({"step": 7, "data": "abc/8/0"})
    with pytest.raises(InputError, match="The checkpoint was made with other data"):
        iterator.set_state({})


def test_a_closed_iterator_is_closed(config, prepared):
    iterator = train_iterator(prepared, config)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize(
    "read", [train_iterator, lambda *a, **k: list(validation_batches(*a, **k))]
)
def test_processes_that_do_not_fit(config, prepared, read):
    with pytest.raises(InputError, match="batch_size is 8, but it must be a multiple of"):
        read(prepared, config, process_index=0, process_count=3)
    with pytest.raises(InputError, match="process_index is 2, but it must be at least 0"):
        read(prepared, config, process_index=2, process_count=2)
