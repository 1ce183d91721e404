"""Documents of one range of one file, whatever its format, in bounded memory."""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lazyattn.data.parquet import DamagedFileError, open_parquet, parquet_rows, reason
from lazyattn.data.prepare.hub import HubDataset, hub_rows
from lazyattn.data.prepare.selection import (
    INVALID_JSON,
    INVALID_UNICODE,
    UNREADABLE,
    Selection,
)
from lazyattn.data.text_files import BLANK, BYTE_ORDER_MARK, parse_line

_BUFFER = 1 << 20  # bytes
LONGEST_LINE = 1 << 28  # bytes of a JSON line; more is no document


@dataclasses.dataclass(frozen=True)
class Unit:
    """A range of a file that is prepared as one piece of work.

    Attributes:
      index: which piece of all, in the order of the corpus.
      path: of the file.
      kind: its format: "parquet", "jsonl", "jsonl.zst", "jsonl.gz", "json", "csv",
        "txt", "tfds" or "hub".
      start, stop: rows of a Parquet file, bytes of a jsonl one, documents of a TFDS
        split, files of a dataset on the hub; 0 and the file's size where it can only be
        read from its beginning.
      weight: bytes of work, for the progress bar.
      split: of the TFDS dataset; "" for other formats.
      texts: .txt files, a document each, of which `path` is the first; () for other
        formats.
      goes_to: the split of all its documents; "": their ids decide.
      hub: the dataset on the Hugging Face hub; None for other formats.
    """

    index: int
    path: str
    kind: str
    start: int
    stop: int
    weight: int
    split: str = ""
    texts: tuple[str, ...] = ()
    goes_to: str = ""
    hub: HubDataset | None = None

    def name(self, place: int) -> str:
        """Returns what to call a document found at `place`."""
        if self.texts:
            return self.texts[place]
        if self.hub is not None:
            return f"{self.hub.url}, file {self.start}, row {place:,}"
        return f"{self.path}, {'byte' if self.kind.startswith('jsonl') else 'row'} {place:,}"


class Row(NamedTuple):
    """What was found at one place.

    Attributes:
      place: row, byte of the (decompressed) file, or number of the .txt file.
      text, id, score: what the fields hold, None where there is nothing.
      fault: why nothing could be read; None: something was.
      done: share of the unit that was read with this, 0 to 1.
    """

    place: int
    text: Any
    id: Any
    score: Any
    fault: str | None
    done: float


def read_unit(unit: Unit, selection: Selection) -> Iterator[Row]:
    """Yields the documents of a range, always in the same order.

    Raises:
      DamagedFileError: at the end, if the file is damaged; what was yielded is good.
    """
    if unit.kind == "parquet":
        return _parquet(unit, selection)
    if unit.kind == "tfds":
        return _tfds(unit, selection)
    if unit.hub is not None:
        return _hub(unit.hub, unit, selection)
    if unit.kind in _WHOLE:
        return _WHOLE[unit.kind](unit, selection)
    return _jsonl(unit, selection)


def _parquet(unit: Unit, selection: Selection) -> Iterator[Row]:
    file = open_parquet(unit.path)
    for place, values in parquet_rows(file, selection.fields, unit.start, unit.stop):
        done = (place + 1 - unit.start) / (unit.stop - unit.start)
        text, id, score = values
        yield Row(place, text, id, score, None, done)


def _jsonl(unit: Unit, selection: Selection) -> Iterator[Row]:
    """Yields the lines that begin within the unit."""
    compression = {"jsonl.zst": "zstd", "jsonl.gz": "gzip"}.get(unit.kind)
    try:
        with Path(unit.path).open("rb", buffering=_BUFFER) as raw:
            if compression is None:
                yield from _lines(unit, selection, raw, raw)
            else:
                with pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression) as stream:
                    yield from _lines(unit, selection, _Buffered(stream), raw)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DamagedFileError(reason(error)) from error


def _lines(unit: Unit, selection: Selection, file: Any, raw: Any) -> Iterator[Row]:
    compressed = file is not raw
    place = 0 if compressed else unit.start
    if place:  # the line that is under way belongs to the unit before
        raw.seek(place - 1)
        place += len(_line(raw)[0]) - 1
    while compressed or place < unit.stop:
        line, size = _line(file)
        if not size:
            return
        at = raw.tell() if compressed else place + size - unit.start
        row = _parsed(line if size == len(line) else None, place, selection)
        if row is not None:
            yield row._replace(done=min(1.0, at / max(1, unit.stop - unit.start)))
        place += size


def _line(file: Any) -> tuple[bytes, int]:
    """Returns a line, or the beginning of one that is too long, and how long it is."""
    line = file.readline(LONGEST_LINE)
    size = len(line)
    while len(line) and not line.endswith(b"\n") and size % LONGEST_LINE == 0:
        more = file.readline(LONGEST_LINE)
        if not more:
            break
        size += len(more)
        if more.endswith(b"\n"):
            break
    return line, size


def _parsed(line: bytes | None, place: int, selection: Selection) -> Row | None:
    """Returns what a line holds; None: nothing.

    Args:
      line: the line; None: it is too long to be read.
      place: where it begins.
      selection: what is read.
    """
    try:
        content = None if line is None else parse_line(line)
    except UnicodeDecodeError:
        return Row(place, None, None, None, INVALID_UNICODE, 0.0)
    except (ValueError, RecursionError):
        return Row(place, None, None, None, INVALID_JSON, 0.0)
    if content is BLANK:
        return None
    if not isinstance(content, dict):
        return Row(place, None, None, None, INVALID_JSON, 0.0)
    text, id, score = (None if field is None else content.get(field) for field in selection.fields)
    return Row(place, text, id, score, None, 0.0)


def _texts(unit: Unit, selection: Selection) -> Iterator[Row]:
    """Yields files, each a document that goes by the hash of its text."""
    del selection
    done = 0
    for place, path in enumerate(unit.texts):
        try:
            content = Path(path).read_bytes()
        except OSError:
            yield Row(place, None, None, None, UNREADABLE, done / unit.weight)
            continue
        done += len(content)
        text = content.removeprefix(BYTE_ORDER_MARK.encode())
        name = hashlib.sha256(text).hexdigest()
        yield Row(place, text, name, None, None, min(1.0, done / unit.weight))


def csv_header(path: str) -> list[str]:
    """Returns the names of a .csv file's columns.

    Raises:
      DamagedFileError: if they can't be read.
    """
    try:
        with Path(path).open("rb") as raw:
            return next(csv.reader(_decoded(raw)), [])
    except (OSError, csv.Error) as error:
        raise DamagedFileError(reason(error)) from error


def _csv(unit: Unit, selection: Selection) -> Iterator[Row]:
    """Yields the lines of a table; a byte that is no UTF-8 makes its text invalid Unicode."""
    csv.field_size_limit(LONGEST_LINE)
    try:
        with Path(unit.path).open("rb") as raw:
            # Without `strict` a file that was cut off in a quoted field seems whole.
            for place, row in enumerate(csv.DictReader(_decoded(raw), strict=True)):
                text, id, score = (
                    None if field is None else row.get(field) for field in selection.fields
                )
                yield Row(place, text, id, _number(score), None, min(1.0, raw.tell() / unit.stop))
    except (OSError, csv.Error) as error:
        raise DamagedFileError(reason(error)) from error


def _decoded(raw: Any) -> io.TextIOWrapper:
    """Returns a file's text in lines that end with "\\n"; half a surrogate for a bad byte."""
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _number(score: str | None) -> float | None:
    try:
        return None if score is None else float(score)
    except ValueError:
        return None


def _json(unit: Unit, selection: Selection) -> Iterator[Row]:
    """Yields the objects of an array, or objects that stand one after the other."""
    try:
        with Path(unit.path).open("rb") as raw:
            for place, content in enumerate(_json_values(_decoded(raw))):
                if not isinstance(content, dict):
                    yield Row(place, None, None, None, INVALID_JSON, 0.0)
                    continue
                text, id, score = (
                    None if field is None else content.get(field) for field in selection.fields
                )
                yield Row(place, text, id, score, None, min(1.0, raw.tell() / unit.stop))
    except OSError as error:
        raise DamagedFileError(reason(error)) from error


def _json_values(file: io.TextIOWrapper) -> Iterator[Any]:
    scan = json.JSONDecoder().raw_decode
    held, at, between = "", 0, " \t\r\n"
    more = True
    while True:
        while at < len(held) and held[at] in between:
            at += 1
        if at < len(held) and held[at] == "[" and between == " \t\r\n":
            between += ",]"  # of the one array
            at += 1
            continue
        value, end = None, -1
        if at < len(held):
            try:
                value, end = scan(held, at)
            except (json.JSONDecodeError, RecursionError) as error:
                if not more or len(held) - at > LONGEST_LINE:
                    raise DamagedFileError(f"no JSON: {reason(error)}") from error
        if end >= 0:
            yield value
            at = end
        elif more:
            # As much as is held, so that a long object is not tried too often.
            content = file.read(max(_BUFFER, len(held) - at))
            held, at, more = held[at:] + content, 0, bool(content)
        else:
            return


# Files that are read from beginning to end.
_WHOLE = {"txt": _texts, "csv": _csv, "json": _json}


class _Buffered:
    """`readline` for a stream of Arrow's, which has none."""

    def __init__(self, stream: pa.NativeFile):
        self._stream = stream
        self._held = b""
        self._at = 0

    def readline(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            end = self._held.find(b"\n", self._at) + 1
            stop = min(end or len(self._held), self._at + limit - size)
            parts.append(self._held[self._at : stop])
            size += stop - self._at
            self._at = stop
            if (end and stop == end) or size == limit:
                return b"".join(parts)
            self._held, self._at = self._stream.read(_BUFFER), 0
            if not self._held:
                return b"".join(parts)


def _hub(dataset: HubDataset, unit: Unit, selection: Selection) -> Iterator[Row]:
    rows = hub_rows(dataset, unit.start, selection.fields)
    for place, (text, id, score) in enumerate(rows):
        yield Row(place, text, id, score, None, 0.0)  # nobody knows how many there are


def _tfds(unit: Unit, selection: Selection) -> Iterator[Row]:
    from lazyattn.data.fineweb_edu import open_dataset

    source = open_dataset(Path(unit.path).parent).as_data_source(unit.split)
    for place in range(unit.start, unit.stop):
        try:
            document = source[place]
        except Exception as error:  # the library raises nothing narrower
            raise DamagedFileError(reason(error), unit.stop - place) from error
        text, id, score = (
            None if field is None else document.get(field) for field in selection.fields
        )
        if isinstance(score, np.generic):
            score = score.item()
        done = (place + 1 - unit.start) / (unit.stop - unit.start)
        yield Row(place, text, id, score, None, done)
