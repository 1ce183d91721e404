import dataclasses
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazyattn.data.parquet import DamagedFileError, open_parquet
from lazyattn.data.prepare import readers
from lazyattn.data.prepare.readers import Unit, read_unit
from lazyattn.data.prepare.selection import Selection
from tests.data.prepare import corpora
from tests.data.prepare.corpora import jsonl, make_documents, write_jsonl, write_parquet

SELECTION = Selection(min_int_score=1)
DOCUMENTS = make_documents(230)


def _unit(path, kind, start, stop):
    return Unit(0, str(path), kind, start, stop, weight=1)


def _found(unit, selection=SELECTION):
    """Returns (id, text, score) of a unit's documents, as str and int."""
    return [
        tuple(v.decode() if isinstance(v, bytes) else v for v in (row.id, row.text, row.score))
        for row in read_unit(unit, selection)
    ]


EXPECTED = [(d["id"], d["text"], d["int_score"]) for d in DOCUMENTS]


@pytest.mark.parametrize("bounds", [[0, 230], [0, 100, 230], [0, 1, 99, 101, 164, 229, 230]])
def test_ranges_of_rows(tmp_path, bounds):
    path = write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    found = []
    for start, stop in itertools.pairwise(bounds):
        rows = list(read_unit(_unit(path, "parquet", start, stop), SELECTION))
        assert [row.place for row in rows] == list(range(start, stop))
        assert rows[-1].done == 1.0
        found += _found(_unit(path, "parquet", start, stop))
    assert found == EXPECTED


def test_ranges_of_bytes_at_every_place(tmp_path):
    """Wherever a file is cut, each line is read once."""
    documents = make_documents(5, words=6)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    path.write_bytes(b"\n" + path.read_bytes().rstrip())  # an empty line; no newline at the end
    size = path.stat().st_size
    expected = [(d["id"], d["text"], d["int_score"]) for d in documents]
    for cut in range(1, size):
        parts = [_found(_unit(path, "jsonl", 0, cut)), _found(_unit(path, "jsonl", cut, size))]
        assert parts[0] + parts[1] == expected
    places = [row.place for row in read_unit(_unit(path, "jsonl", 0, size), SELECTION)]
    assert all(path.read_bytes()[place : place + 1] == b"{" for place in places)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz"])
def test_lines_as_other_systems_write_them(tmp_path, kind, monkeypatch):
    """A byte-order mark, "\\r\\n", and separators of lines that end none in JSON."""
    texts = ["one\u2028two\u2029three\u0085four", "b"]
    items = (json.dumps({"text": t, "id": t}, ensure_ascii=False).encode() for t in texts)
    lines = b"\xef\xbb\xbf" + b"\r\n\r\n".join(items) + b"\r\n \r\n\xef\xbb\xbf"
    monkeypatch.setattr(corpora, "jsonl", lambda _: lines)
    path = write_jsonl(tmp_path / f"a.{kind}", [])
    rows = list(read_unit(_unit(path, kind, 0, path.stat().st_size), Selection()))
    assert [(row.text, row.fault) for row in rows] == [(text, None) for text in texts]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz"])
@pytest.mark.parametrize("buffer", [1 << 20, 100])
def test_compressed_lines(tmp_path, kind, buffer, monkeypatch):
    monkeypatch.setattr(readers, "_BUFFER", buffer)
    path = write_jsonl(tmp_path / f"a.{kind}", DOCUMENTS)
    assert _found(_unit(path, kind, 0, path.stat().st_size)) == EXPECTED


def test_bad_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 100)
    lines = [
        (b'{"id": "1", "text": "a"}', None),
        (b'{"id": "2", "text": "caf\xe9"}', "invalid_unicode"),
        (b'{"id": "3", "text": ', "invalid_json"),
        (b'["a list"]', "invalid_json"),
        (b'{"id": "4", "text": "' + b"x" * 300 + b'"}', "invalid_json"),
        (b"[" * 90, "invalid_json"),
        (b'{"id": "5", "text": "' + b"y" * 76 + b'"}', None),  # 100 bytes with the newline
        (b'{"id": "6"}', None),
        (b'{"id": "7", "text": "cut o', "invalid_json"),
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    rows = list(read_unit(_unit(path, "jsonl", 0, path.stat().st_size), Selection()))
    assert [row.fault for row in rows] == [fault for _, fault in lines]
    assert [row.id for row in rows if row.fault is None] == ["1", "5", "6"]
    assert rows[-2].text is None


@pytest.mark.parametrize("kind", ["jsonl.zst", "jsonl.gz"])
def test_a_truncated_stream(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(readers, "_BUFFER", 1000)
    path = write_jsonl(tmp_path / f"a.{kind}", make_documents(3000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = []
    with pytest.raises(DamagedFileError, match="Truncated compressed stream") as error:
        for row in read_unit(_unit(path, kind, 0, path.stat().st_size), Selection()):
            assert row.fault is None
            rows.append(row)
    assert 0 < len(rows) < 3000
    assert error.value.lost is None


def test_a_damaged_row_group(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    rows = []
    with pytest.raises(DamagedFileError) as error:
        for row in read_unit(_unit(path, "parquet", 0, 230), Selection()):
            rows.append(row.id.decode())
    assert rows == [d["id"] for d in [*DOCUMENTS[:100], *DOCUMENTS[200:]]]
    assert error.value.lost == 100
    assert str(error.value).startswith("row 100: ")
    assert len(_found(_unit(path, "parquet", 200, 230), Selection())) == 30


def test_a_truncated_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedFileError, match="Parquet"):
        open_parquet(str(path))


def test_invalid_unicode_in_a_string_column(tmp_path):
    """Nothing stops a writer of Parquet from calling any bytes a string."""
    text = pa.array([b"fine", b"caf\xe9", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text, "id": pa.array([1, 2, 3])}), tmp_path / "a.parquet")
    rows = list(read_unit(_unit(tmp_path / "a.parquet", "parquet", 0, 3), Selection()))
    assert [(row.text, row.id) for row in rows] == [(b"fine", 1), (b"caf\xe9", 2), (None, 3)]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_types_of_columns(tmp_path, kind):
    table = pa.table({"text": pa.array(["a", "b"]).cast(kind), "id": ["1", "2"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_unit(_unit(tmp_path / "a.parquet", "parquet", 0, 2), Selection())
    assert [row.text for row in rows] == [b"a", b"b"]


def test_how_a_place_is_called():
    unit = _unit("x.parquet", "parquet", 0, 1)
    assert unit.name(1234) == "x.parquet, row 1,234"
    assert dataclasses.replace(unit, kind="jsonl").name(7) == "x.parquet, byte 7"
    assert len(jsonl(DOCUMENTS).splitlines()) == 230
