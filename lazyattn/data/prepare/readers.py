"""Documents of one range of one file, whatever its format, in bounded memory."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lazyattn.data.parquet import DamagedFileError, open_parquet, parquet_rows, reason
from lazyattn.data.prepare.selection import INVALID_JSON, INVALID_UNICODE, Selection
from lazyattn.data.text_files import BLANK, parse_line

_BUFFER = 1 << 20  # bytes
LONGEST_LINE = 1 << 28  # bytes of a JSON line; more is no document


@dataclasses.dataclass(frozen=True)
class Unit:
    """A range of a file that is prepared as one piece of work.

    Attributes:
      index: which piece of all, in the order of the corpus.
      path: of the file.
      kind: its format: "parquet", "jsonl", "jsonl.zst", "jsonl.gz" or "tfds".
      start, stop: rows of a Parquet file, bytes of a jsonl one, documents of a TFDS
        split; 0 and the file's size where it can only be read from its beginning.
      weight: bytes of work, for the progress bar.
      split: of the TFDS dataset; "" for other formats.
    """

    index: int
    path: str
    kind: str
    start: int
    stop: int
    weight: int
    split: str = ""

    def name(self, place: int) -> str:
        """Returns what to call a document found at `place`."""
        return f"{self.path}, {'row' if self.kind in ('parquet', 'tfds') else 'byte'} {place:,}"


class Row(NamedTuple):
    """What was found at one place.

    Attributes:
      place: row, or byte of the (decompressed) file.
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
