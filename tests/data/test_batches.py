import collections
import dataclasses
import functools
import itertools
import json
import threading
from concurrent import futures

import grain
import numpy as np
import pytest

from lazyattn.data import streams
from lazyattn.data.config import DataConfig
from lazyattn.data.packing import FIELDS
from lazyattn.data.pipeline import (
    TrainingData,
    packing_report,
    train_iterator,
    validation_batches,
)
from lazyattn.errors import InputError
from tests.data.fake_documents import BOS, EOS, PAD, FakeDocuments, made_up

packings = pytest.mark.parametrize("packing", ["split", "first_fit"])


class Shifted(FakeDocuments):
    """Documents of another source: their tokens are above a million."""

    def read(self, indices):
        return [ids + 1_000_000 for ids in super().read(indices)]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", {"split": 5, "first_fit": 7})


@pytest.fixture(params=["one", "mixture"])
def data(request):
    if request.param == "one":
        return _data(made_up(90))
    return _data(made_up(50, seed=1), Shifted(made_up(30, seed=2).lengths), weights=(1.0, 3.0))


def _data(*sources, weights=(1.0,)):
    validation = tuple(made_up(17, seed=9) for _ in sources)
    ids = (BOS, EOS, PAD)
    return TrainingData(None, ids, sources, validation, weights, {}, "fingerprint")


def _config(packing="split", **changes):
    settings = {"path": "DIR", "sequence_length": 16, "batch_size": 8, "prefetch": 0}
    return DataConfig(packing=packing, **{**settings, **changes})


def _take(iterator, n):
    return list(itertools.islice(iterator, n))


def _join(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in FIELDS}


def _assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == set(FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name])


def _parts(data, config, processes, **kwargs):
    return [
        train_iterator(data, config, process_index=p, process_count=processes, **kwargs)
        for p in range(processes)
    ]


@packings
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_together_read_the_batch_of_one(data, packing, processes):
    config = _config(packing)
    whole = _take(train_iterator(data, config), 30)
    for batch in whole:
        assert all(a.shape == (8, 16) and a.dtype == np.int32 for a in batch.values())
    parts = [_take(part, 30) for part in _parts(data, config, processes)]
    _assert_equal([_join(step) for step in zip(*parts, strict=True)], whole)


@packings
def test_resuming_anywhere_goes_on_exactly(data, packing):
    config = _config(packing, prefetch=3)
    whole = _take(train_iterator(data, config), 25)
    for stop in (0, 1, 9, 22):
        iterator = train_iterator(data, config)
        _take(iterator, stop)
        state = json.dumps(iterator.get_state())
        iterator.close()
        fresh = train_iterator(data, config)
        _take(fresh, stop % 3)  # restoring must undo what was read before
        fresh.set_state(json.loads(state))
        assert fresh.step == stop
        _assert_equal(_take(fresh, 3), whole[stop : stop + 3])


def test_the_state_is_what_was_taken_not_what_was_read_ahead(data):
    iterator = train_iterator(data, _config(prefetch=4))
    start = iterator.get_state()
    iterator.start_prefetch()
    assert iterator.get_state() == start
    next(iterator)
    plain = train_iterator(data, _config())
    next(plain)
    assert iterator.get_state() == plain.get_state() != start


def _merged(parts):
    """Returns the state of all processes, as `gather` makes it."""
    states = [part.get_state() for part in parts]
    return states[0] | {"cursors": [cursor for state in states for cursor in state["cursors"]]}


@packings
def test_going_on_with_other_numbers_of_processes_is_exact(data, packing):
    config = _config(packing)
    whole = _take(train_iterator(data, config), 24)
    state, step = None, 0
    for processes in (2, 1, 4, 8, 1):
        parts = _parts(data, config, processes)
        for part in parts:
            if state is not None:
                part.set_state(state)
        for _ in range(4):
            _assert_equal([_join([next(part) for part in parts])], [whole[step]])
            step += 1
        state = _merged(parts)
        assert state["step"] == step


def test_gathered_states_are_of_all_processes(data):
    """Four processes, each two of which read the same rows, exchange them by a barrier."""
    config, everyone = _config("first_fit"), threading.Barrier(4)
    shelf: dict[int, np.ndarray] = {}

    def gather(process, mine):
        shelf[process] = mine
        everyone.wait(10)
        return np.concatenate([shelf[p] for p in range(4)])

    def state(process):
        iterator = train_iterator(
            data,
            config,
            process_index=process // 2,
            process_count=2,
            gather=functools.partial(gather, process),
        )
        _take(iterator, 5)
        return iterator.get_state()

    alone = train_iterator(data, config)
    _take(alone, 5)
    with futures.ThreadPoolExecutor(4) as threads:
        for found in threads.map(state, range(4)):
            assert found == alone.get_state()


def test_streams_that_take_turns(data):
    """Row r is filled by stream 3r, 3r + 1, 3r + 2, 3r, ...; the rest is as with one stream."""
    config = _config(streams_per_row=3, prefetch=2)
    whole = _take(train_iterator(data, config), 12)
    wide = _config(batch_size=24)
    if len(data.train) == 1:  # with several, the mixture goes by the row's number
        many = _take(train_iterator(data, wide), 4)
        for step, batch in enumerate(whole):
            for name in FIELDS:
                np.testing.assert_array_equal(batch[name], many[step // 3][name][step % 3 :: 3])
    state, step = None, 0
    for processes in (2, 1, 8):
        parts = _parts(data, config, processes)
        for part in parts:
            if state is not None:
                part.set_state(state)
        for _ in range(4):
            _assert_equal([_join([next(part) for part in parts])], [whole[step]])
            step += 1
        state = json.loads(json.dumps(_merged(parts)))
        for part in parts:
            part.close()
    with pytest.raises(InputError, match="of some processes only, and not of rows 4 to 7"):
        parts = _parts(data, config, 2)
        parts[1].set_state(parts[0].get_state())


def test_states_of_other_processes(data):
    parts = _parts(data, _config(), 2)
    states = [part.get_state() for part in parts]
    with pytest.raises(InputError, match="of some processes only, and not of rows 4 to 7"):
        parts[1].set_state(states[0])
    with pytest.raises(InputError, match="of some processes only, and not of rows 0 to 3"):
        parts[0].set_state(states[1])


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4},
        {"shuffle_seed": 1},
        {"packing": "first_fit"},
        {"long_documents": "truncate"},
        {"sequence_length": 8},
        {"streams_per_row": 2},
    ],
    ids=str,
)
def test_a_state_of_other_data_is_refused(data, change):
    state = train_iterator(data, _config(**change)).get_state()
    with pytest.raises(InputError, match="The checkpoint was made with other data"):
        train_iterator(data, _config()).set_state(state)
    other = dataclasses.replace(data, fingerprint="another")
    with pytest.raises(InputError, match="The checkpoint was made with other data"):
        train_iterator(other, _config()).set_state(train_iterator(data, _config()).get_state())


# tests/data/test_folders.py has worker processes by default.
@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    # In a worker the windows have their full size, so here they need it, too.
    streams.WINDOW.update(split=32, first_fit=128)
    data = _data(made_up(50, seed=1), Shifted([40] * 30), weights=(1.0, 3.0))
    config = _config("first_fit", batch_size=5, streams_per_row=2)
    whole = _take(train_iterator(data, config), 9)
    iterator = train_iterator(data, dataclasses.replace(config, num_workers=2, prefetch=2))
    plain = train_iterator(data, config)
    try:
        _take(plain, 3)
        iterator.set_state(plain.get_state())
        _assert_equal(_take(iterator, 5), whole[3:8])
        _take(plain, 5)
        assert iterator.get_state() == plain.get_state()
    finally:
        iterator.close()


class Vanishing(FakeDocuments):
    """Documents of which one can't be read any more."""

    def read(self, indices):
        if 11 in indices:
            raise InputError("The data shard DIR/train-00001-of-00002.arrayrecord is gone.")
        return super().read(indices)


@pytest.mark.parametrize(
    "reader",
    [{}, {"prefetch": 2}, pytest.param({"num_workers": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_what_a_reader_cannot_read_is_said_by_the_iterator(reader):
    iterator = train_iterator(_data(Vanishing([20] * 40)), _config(**reader))
    with pytest.raises(InputError, match=r"^The data shard .* is gone\.$"):
        _take(iterator, 20)
    # What came before can be saved and gone on from.
    restored = train_iterator(_data(FakeDocuments([20] * 40)), _config())
    restored.set_state(iterator.get_state())
    assert restored.step == iterator.step
    next(restored)
    iterator.close()


def test_an_epoch_has_every_token_once():
    documents = made_up(90)
    ends = [0] * 8
    iterator = train_iterator(_data(documents), _config())
    found = collections.Counter()
    while min(ends) < -(-90 // 8):
        batch = next(iterator)
        for stream, row in enumerate(batch["targets"]):
            if ends[stream] * 8 + stream < 90:
                found.update(row[row > EOS].tolist())
        ends = [cursors[0][0] for cursors in iterator.get_state()["cursors"]]
    every = np.concatenate(documents.read(range(90))).tolist()
    assert set(found) == set(every)
    # A row may begin in one epoch and end in the next; all else comes once.
    assert sum(found.values()) - len(every) < 8 * 16


def test_a_mixture_has_its_weights_in_every_stretch():
    data = _data(made_up(50), Shifted([30] * 70), weights=(1.0, 3.0))
    iterator = train_iterator(data, _config())
    tokens = [np.concatenate([b["targets"] for b in _take(iterator, 50)]) for _ in range(4)]
    for stretch in tokens:
        rows = (stretch.max(axis=1) > 1_000_000).mean()
        assert rows == pytest.approx(0.75, abs=0.01)
    # No row has documents of two sources.
    for row in np.concatenate(tokens):
        assert np.unique(row[row > EOS] > 1_000_000).size == 1


@packings
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_validation_reads_every_token_once_and_pads(data, packing, processes):
    config = _config(packing)
    parts = [
        list(validation_batches(data, config, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    joined = [_join(step) for step in zip(*parts, strict=True)]
    _assert_equal(joined, list(validation_batches(data, config)))
    targets = np.concatenate([batch["targets"] for batch in joined])
    real = np.concatenate([batch["segment_ids"] for batch in joined]) > 0
    expected = np.concatenate([ids for d in data.validation for ids in d.read(range(17))])
    assert sorted(targets[targets > EOS]) == sorted(expected)
    assert real.sum() == expected.size + 17 * len(data.validation)
    assert all(batch["inputs"].shape == (8, 16) for batch in joined)
    assert not real[-1].any() or real.any(axis=1).all()  # padding rows come last


def test_validation_cuts_long_documents_as_training_does(data):
    batches = list(validation_batches(data, _config("first_fit", long_documents="truncate")))
    lengths = [min(n + 1, 16) for d in data.validation for n in d.lengths]
    assert sum((batch["segment_ids"] > 0).sum() for batch in batches) == sum(lengths)


def test_grain_checkpointing_works(data, tmp_path):
    iterator = train_iterator(data, _config())
    _take(iterator, 5)
    grain.checkpoint.CheckpointHandler().save(tmp_path, iterator)
    restored = train_iterator(data, _config())
    grain.checkpoint.CheckpointHandler().restore(tmp_path, restored)
    _assert_equal(_take(restored, 2), _take(iterator, 2))


def test_the_part_of_the_pipeline_that_is_grains_keeps_its_state(data):
    iterator = train_iterator(data, _config("first_fit"))
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.LimitIterDataset(iterator._dataset(), 5)
    )


def test_a_report_for_each_source(data):
    reports = packing_report(data, _config("first_fit"))
    assert len(reports) == len(data.train)
    assert all(0.5 < report.efficiency < 1 for report in reports)
