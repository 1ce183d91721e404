import collections

import numpy as np
import pytest

from lazyattn.data import streams
from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.packing import FIELDS, Format
from lazyattn.data.streams import Stream, measure_packing
from tests.data.fake_documents import BOS, EOS, PAD, FakeDocuments, made_up, packed, segments

LENGTH = 16
packings = pytest.mark.parametrize("packing", ["split", "first_fit"])
long = pytest.mark.parametrize("long_documents", ["split", "truncate"])


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(streams, "WINDOW", {"split": 5, "first_fit": 7})


def _format(packing="split", long_documents="split", length=LENGTH):
    return Format(length, packing, long_documents, BOS, EOS, PAD)


def _stream(documents, format, stream=0, number=1, cursor=(0, 0)):
    order = DocumentOrder(len(documents), seed=0)
    return Stream(documents, order, format, stream=stream, streams=number, cursor=cursor)


def _rows(stream, number, length=LENGTH):
    rows = {name: np.full((number, length), -1, np.int32) for name in FIELDS}
    cursors = [stream.cursor]
    for row in range(number):
        stream.fill(rows, row)
        cursors.append(stream.cursor)
    return rows, cursors


def _in_order(documents, number):
    """Returns the first documents of the order."""
    order = DocumentOrder(len(documents), seed=0)
    return documents.read([order[i] for i in range(number)])


def test_split_is_the_whole_corpus_packed_at_once():
    documents = made_up(50)
    rows, _ = _rows(_stream(documents, _format()), 60)
    expected = packed(_in_order(documents, 50), _format())
    for name in FIELDS:
        np.testing.assert_array_equal(rows[name], expected[name][:60])


def test_a_window_of_first_fit_is_its_documents_packed_at_once():
    documents = made_up(50)
    rows, cursors = _rows(_stream(documents, _format("first_fit")), 40)
    end = next(i for i, (document, _) in enumerate(cursors) if document)
    expected = packed(_in_order(documents, cursors[end][0]), _format("first_fit"))
    assert end == expected["inputs"].shape[0] >= 7
    for name in FIELDS:
        np.testing.assert_array_equal(rows[name][:end], expected[name])


def _pairs(documents, document, long_documents):
    ids = np.arange(documents.lengths[document]) + (document + 1) * 1000
    pairs = list(zip([BOS, *ids], [*ids, EOS], strict=True))
    return pairs[:LENGTH] if long_documents == "truncate" else pairs


@packings
@long
def test_each_pair_of_each_document_once_in_every_epoch(packing, long_documents):
    documents, number = made_up(40, longest=50), 3
    order = DocumentOrder(40, seed=0)
    for index in range(number):
        rows, cursors = _rows(
            _stream(documents, _format(packing, long_documents), index, number), 60
        )
        if packing == "first_fit":  # up to the end of a window
            end = max(row for row, (_, used) in enumerate(cursors) if used == 0)
            rows, cursors = {name: rows[name][:end] for name in FIELDS}, cursors[: end + 1]
        used, offset = cursors[-1]
        places = [index + n * number for n in range(used + 1)]
        assert places[-1] >= 2 * 40  # two epochs are over
        expected = collections.Counter()
        for place in places[:-1]:
            expected.update(_pairs(documents, order[place], long_documents))
        expected.update(_pairs(documents, order[places[-1]], long_documents)[:offset])
        real = rows["segment_ids"] > 0
        found = zip(rows["inputs"][real].tolist(), rows["targets"][real].tolist(), strict=True)
        assert collections.Counter(found) == expected


@packings
@long
def test_rows_are_well_formed(packing, long_documents):
    rows, _ = _rows(_stream(made_up(40), _format(packing, long_documents)), 60)
    ids = rows["segment_ids"]
    assert (np.diff((ids == 0).astype(int), axis=1) >= 0).all()  # padding comes last
    assert (ids[:, 0] == 1).all()
    assert np.isin(np.diff(ids, axis=1)[ids[:, 1:] > 0], [0, 1]).all()  # 1, 1, 2, 3, 3, ...
    for name in FIELDS:
        assert rows[name].dtype == np.int32
        assert (rows[name][ids == 0] == 0).all()  # PAD, too
    for inputs, targets, positions in segments(rows):
        np.testing.assert_array_equal(positions, np.arange(positions.size))
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert BOS not in inputs[1:] and EOS not in targets[:-1]
        owners = {token // 1000 for token in (*inputs, *targets) if token > EOS}
        assert len(owners) <= 1


@packings
@long
def test_going_on_from_any_row(packing, long_documents):
    documents, format = made_up(30, seed=1), _format(packing, long_documents)
    whole, cursors = _rows(_stream(documents, format, 1, 2), 50)
    for start in range(47):
        rows, _ = _rows(_stream(documents, format, 1, 2, cursors[start]), 3)
        for name in FIELDS:
            np.testing.assert_array_equal(rows[name], whole[name][start : start + 3])


@packings
def test_how_many_are_read_at_a_time_does_not_show(packing, monkeypatch):
    documents, format = made_up(30, seed=2), _format(packing)
    whole, _ = _rows(_stream(documents, format), 40)
    monkeypatch.setattr(streams, "_FIRST_READ", 1)
    if packing == "split":
        monkeypatch.setattr(streams, "WINDOW", {"split": 3})
    other, _ = _rows(_stream(documents, format), 40)
    for name in FIELDS:
        np.testing.assert_array_equal(other[name], whole[name])


def test_documents_of_nothing_and_of_many_rows():
    documents = FakeDocuments([0, 0, 200, 0])
    rows, _ = _rows(_stream(documents, _format("first_fit")), 14)
    assert max(positions.size for _, _, positions in segments(rows)) == LENGTH
    rows, _ = _rows(_stream(FakeDocuments([0]), _format()), 2)
    np.testing.assert_array_equal(rows["inputs"], BOS)
    np.testing.assert_array_equal(rows["targets"], EOS)
    np.testing.assert_array_equal(rows["segment_ids"][0], np.arange(1, LENGTH + 1))


def test_small_integers_stay_small_until_they_are_rows():
    class Narrow(FakeDocuments):
        def read(self, indices):
            return [np.full(3, 65_000, np.uint16) for _ in indices]

    rows, _ = _rows(_stream(Narrow([3]), _format()), 2)
    assert rows["targets"].max() == rows["inputs"].max() == 65_000


def test_the_report_says_what_packing_does():
    documents = made_up(200)
    order = DocumentOrder(200, 0)
    split = measure_packing(documents, order, _format("split"))
    assert split.efficiency == 1 and split.cut_off == 0 and split.rows >= 10
    fitted = measure_packing(documents, order, _format("first_fit"))
    rows, _ = _rows(_stream(documents, _format("first_fit")), fitted.rows)
    assert fitted.efficiency == pytest.approx((rows["segment_ids"] > 0).mean())
    assert 0.5 < fitted.efficiency < 1
    cut = measure_packing(documents, order, _format("first_fit", "truncate"))
    assert 0.3 < cut.cut_off < 0.7
