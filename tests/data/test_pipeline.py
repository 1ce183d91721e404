import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest

from lazyattn.data.packing import FIELDS
from lazyattn.data.pipeline import train_iterator, validation_batches
from lazyattn.errors import InputError


def _take(iterator, n):
    return list(itertools.islice(iterator, n))


def _assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == set(FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name])


def _join(batches):
    """Returns batches one after the other as one."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in FIELDS}


def _keys(batches):
    """Returns each row as one hashable value."""
    return [
        tuple(np.concatenate([batch[name][i] for name in FIELDS]).tolist())
        for batch in batches
        for i in range(batch["inputs"].shape[0])
    ]


def _all_rows(rows):
    return _keys([rows.block(0, len(rows))])


@pytest.fixture(scope="module")
def steps(config, prepared):
    """Returns a number of batches that takes two epochs and a bit."""
    return 2 * len(prepared.train) // config.batch_size + 3


def test_shapes_and_types(config, prepared):
    for batch in _take(train_iterator(prepared, config), 2):
        for array in batch.values():
            assert array.shape == (config.batch_size, config.sequence_length)
            assert array.dtype == np.int32
            assert type(array) is np.ndarray


def test_every_epoch_has_every_row_once_in_a_new_order(config, prepared):
    rows = len(prepared.train)
    assert rows % config.batch_size != 0  # so that batches span epochs
    seen = _keys(_take(train_iterator(prepared, config), 3 * rows // config.batch_size + 1))
    epochs = [seen[i * rows : (i + 1) * rows] for i in range(3)]
    expected = _all_rows(prepared.train)
    for order in epochs:
        assert sorted(order) == sorted(expected)
    assert len({tuple(order) for order in [expected, *epochs]}) == 4


def test_order_follows_the_seed_and_nothing_else(config, prepared):
    first = _take(train_iterator(prepared, config), 9)
    _assert_equal(first, _take(train_iterator(prepared, config), 9))
    ahead = dataclasses.replace(config, prefetch=3)
    _assert_equal(first, _take(train_iterator(prepared, ahead), 9))
    other = dataclasses.replace(config, shuffle_seed=1)
    rows = len(prepared.train)
    of_other = _keys(_take(train_iterator(prepared, other), rows // config.batch_size))
    second_epoch = _keys(_take(train_iterator(prepared, config), 2 * rows // config.batch_size))
    assert of_other[:8] != _keys(first)[:8]
    assert of_other[:8] != second_epoch[rows : rows + 8]  # nor the same orders, an epoch later


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed_will_do(config, prepared, seed):
    next(train_iterator(prepared, dataclasses.replace(config, shuffle_seed=seed)))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_anywhere_goes_on_exactly(config, prepared, steps, prefetch):
    config = dataclasses.replace(config, prefetch=prefetch)
    whole = _take(train_iterator(prepared, config), steps + 3)
    for stop in range(steps):
        iterator = train_iterator(prepared, config)
        _take(iterator, stop)
        state = json.dumps(iterator.get_state())
        del iterator
        fresh = train_iterator(prepared, config)
        _take(fresh, stop % 3)  # restoring must undo what was read before
        fresh.set_state(json.loads(state))
        assert fresh.step == stop
        _assert_equal(_take(fresh, 3), whole[stop : stop + 3])


def test_the_state_is_what_was_taken_not_what_was_read_ahead(config, prepared):
    iterator = train_iterator(prepared, dataclasses.replace(config, prefetch=4))
    iterator.start_prefetch()
    assert iterator.get_state()["step"] == 0
    next(iterator)
    assert iterator.get_state()["step"] == 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_batch_of_one(config, prepared, steps, processes):
    whole = _take(train_iterator(prepared, config), steps)
    parts = [
        _take(train_iterator(prepared, config, process_index=p, process_count=processes), steps)
        for p in range(processes)
    ]
    for part in parts[0]:
        assert part["inputs"].shape == (config.batch_size // processes, config.sequence_length)
    joined = [_join(step) for step in zip(*parts, strict=True)]
    _assert_equal(joined, whole)


def test_a_state_restores_on_another_number_of_processes(config, prepared):
    saved = train_iterator(prepared, config, process_index=1, process_count=2)
    _take(saved, 5)
    parts = [train_iterator(prepared, config, process_index=p, process_count=4) for p in range(4)]
    for part in parts:
        part.set_state(saved.get_state())
    whole = _take(train_iterator(prepared, config), 7)[5:]
    _assert_equal([_join([next(part) for part in parts]) for _ in range(2)], whole)


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"shuffle_seed": 1}], ids=str)
def test_a_state_of_other_data_is_refused(config, prepared, change):
    state = train_iterator(prepared, dataclasses.replace(config, **change)).get_state()
    iterator = train_iterator(prepared, config)
    with pytest.raises(InputError, match="The checkpoint was made with other data"):
        iterator.set_state(state)
    with pytest.raises(InputError, match="The checkpoint was made with other data"):
        iterator.set_state({})


def test_grain_checkpointing_works(config, prepared, tmp_path):
    iterator = train_iterator(prepared, config)
    _take(iterator, 5)
    grain.checkpoint.CheckpointHandler().save(tmp_path, iterator)
    restored = train_iterator(prepared, config)
    grain.checkpoint.CheckpointHandler().restore(tmp_path, restored)
    _assert_equal(_take(restored, 2), _take(iterator, 2))


def test_reader_processes_give_the_same_batches(config, prepared):
    whole = _take(train_iterator(prepared, config), 12)
    config = dataclasses.replace(config, num_workers=2, prefetch=2)
    iterator = train_iterator(prepared, config)
    try:
        iterator.set_state({**iterator.get_state(), "step": 3})
        _assert_equal(_take(iterator, 6), whole[3:9])
        assert iterator.get_state()["step"] == 9
    finally:
        iterator.close()


def test_a_closed_iterator_is_closed(config, prepared):
    iterator = train_iterator(prepared, config)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_too_few_rows_for_a_batch(config, prepared):
    rows = len(prepared.train)
    next(train_iterator(prepared, dataclasses.replace(config, batch_size=rows)))
    with pytest.raises(InputError, match=rf"batch_size is {rows + 1}, but .* only {rows} training"):
        train_iterator(prepared, dataclasses.replace(config, batch_size=rows + 1))


@pytest.mark.parametrize(
    "read", [train_iterator, lambda *a, **k: list(validation_batches(*a, **k))]
)
def test_processes_that_do_not_fit(config, prepared, read):
    with pytest.raises(InputError, match="batch_size is 8, but it must be a multiple of"):
        read(prepared, config, process_index=0, process_count=3)
    with pytest.raises(InputError, match="process_index is 2, but it must be at least 0"):
        read(prepared, config, process_index=2, process_count=2)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_validation_reads_every_row_once_and_pads(config, prepared, processes):
    parts = [
        list(validation_batches(prepared, config, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    joined = [_join(step) for step in zip(*parts, strict=True)]
    rows = len(prepared.validation)
    assert rows % config.batch_size != 0  # so that the last batch is padded
    assert len(joined) == -(-rows // config.batch_size)
    for batch in joined:
        assert batch["inputs"].shape == (config.batch_size, config.sequence_length)
        assert batch["inputs"].dtype == np.int32
    keys = _keys(joined)
    assert keys[:rows] == _all_rows(prepared.validation)
    assert all((array[rows:] == 0).all() for array in _join(joined).values())
