import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lazyattn.data.packing import FIELDS, Format
from tests.data.fake_documents import packed

BOS, EOS, PAD = 1, 2, 7
LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=30)
examples = hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
packings = pytest.mark.parametrize("packing", ["split", "first_fit"])


def _documents(lengths):
    """Returns documents in which every token occurs once, so that it can be traced."""
    ends = np.cumsum(lengths)
    return [list(range(100 + e - n, 100 + e)) for e, n in zip(ends, lengths, strict=True)]


def _pack(documents, length, packing):
    format = Format(length, packing, "split", BOS, EOS, PAD)
    return packed([np.asarray(ids, np.int32) for ids in documents], format)


def _segments(rows):
    """Yields (row, inputs, targets, positions) of each segment, in order."""
    for row in range(rows["inputs"].shape[0]):
        ids = rows["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            at = ids == segment
            yield row, *(rows[name][row][at] for name in ("inputs", "targets", "positions"))


@packings
@examples
@hypothesis.given(lengths=LENGTHS, length=st.integers(1, 17))
def test_every_pair_of_every_document_once_and_in_order(packing, lengths, length):
    documents = _documents(lengths)
    rows = _pack(documents, length, packing)
    # Each segment must be a run of one document's pairs; the runs must tile it.
    runs = {d: [] for d in range(len(documents))}
    empty = [d for d, n in enumerate(lengths) if n == 0]
    owner = {token: d for d, ids in enumerate(documents) for token in ids}
    for _, inputs, targets, _ in _segments(rows):
        known = [owner[t] for t in (*inputs, *targets) if t >= 100]
        assert len(set(known)) <= 1  # no segment mixes documents
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        d = known[0] if known else empty.pop(0)
        runs[d].append((inputs.tolist(), targets.tolist()))
    for d, ids in enumerate(documents):
        pieces = sorted(runs[d], key=lambda run: [BOS, *ids].index(run[0][0]))
        assert [token for inputs, _ in pieces for token in inputs] == [BOS, *ids]
        assert [token for _, targets in pieces for token in targets] == [*ids, EOS]


@packings
@examples
@hypothesis.given(lengths=LENGTHS, length=st.integers(1, 17))
def test_rows_are_well_formed(packing, lengths, length):
    rows = _pack(_documents(lengths), length, packing)
    assert tuple(rows) == FIELDS
    number = rows["inputs"].shape[0]
    for array in rows.values():
        assert array.shape == (number, length)
        assert array.dtype == np.int32
    ids = rows["segment_ids"]
    padding = ids == 0
    assert number == 0 or not padding[:, 0].any()  # no row is empty
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # padding comes last
    steps = np.diff(ids, axis=1)
    assert np.isin(steps[~padding[:, 1:]], [0, 1]).all()  # 1, 1, 2, 3, 3, ...
    assert (ids[:, :1] <= 1).all()
    for _, inputs, _, positions in _segments(rows):
        np.testing.assert_array_equal(positions, np.arange(inputs.size))
    for name, value in {"inputs": PAD, "targets": PAD, "positions": 0}.items():
        assert (rows[name][padding] == value).all()


@examples
@hypothesis.given(lengths=LENGTHS, length=st.integers(1, 17))
def test_split_fills_all_rows_but_the_last(lengths, length):
    rows = _pack(_documents(lengths), length, "split")
    pairs = sum(lengths) + len(lengths)
    assert rows["inputs"].shape[0] == -(-pairs // length)
    assert (rows["segment_ids"][:-1] > 0).all()


@examples
@hypothesis.given(lengths=LENGTHS, length=st.integers(1, 17))
def test_first_fit_is_first_fit(lengths, length):
    """Against the definition: the first row with room, tried one by one."""
    rows = _pack(_documents(lengths), length, "first_fit")
    used: list[int] = []
    segments: list[list[int]] = []
    for n in lengths:
        pairs = n + 1
        for size in [length] * (pairs // length) + [pairs % length] * (pairs % length > 0):
            row = next((r for r, u in enumerate(used) if u + size <= length), len(used))
            if row == len(used):
                used.append(0)
                segments.append([])
            used[row] += size
            segments[row].append(size)
    assert rows["inputs"].shape[0] == len(used)
    for row, sizes in enumerate(segments):
        expected = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        np.testing.assert_array_equal(rows["segment_ids"][row][: used[row]], expected)
        assert (rows["segment_ids"][row][used[row] :] == 0).all()


def test_split_by_hand():
    rows = _pack([[10, 11], [20, 21]], 4, "split")
    np.testing.assert_array_equal(rows["inputs"], [[1, 10, 11, 1], [20, 21, 7, 7]])
    np.testing.assert_array_equal(rows["targets"], [[10, 11, 2, 20], [21, 2, 7, 7]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 2], [1, 1, 0, 0]])
    np.testing.assert_array_equal(rows["positions"], [[0, 1, 2, 0], [0, 1, 0, 0]])


def test_first_fit_by_hand():
    rows = _pack([[10, 11], [20, 21], []], 4, "first_fit")
    np.testing.assert_array_equal(rows["inputs"], [[1, 10, 11, 1], [1, 20, 21, 7]])
    np.testing.assert_array_equal(rows["targets"], [[10, 11, 2, 2], [20, 21, 2, 7]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 2], [1, 1, 1, 0]])
