"""Rows of Parquet files, in bounded memory, as far as they can be read."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_BATCH_ROWS = 64  # decoded at once
_BUFFER = 1 << 20  # bytes


class DamagedFileError(Exception):
    """A part of a range can't be read; the message says why.

    It is raised when all that can be read has been.

    Attributes:
      lost: documents that could not be read; None: nobody knows how many.
    """

    def __init__(self, reason: str, lost: int | None = None):
        super().__init__(reason)
        self.lost = lost


def open_parquet(path: str) -> pq.ParquetFile:
    """Opens a Parquet file to be read piece by piece.

    Raises:
      DamagedFileError: if it is none or has lost its end.
    """
    try:
        # By its bytes: a name may be no UTF-8, which the library would want it to be.
        file = pa.OSFile(os.fsencode(path), "rb")
        return pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(reason(error)) from error


def parquet_rows(
    file: pq.ParquetFile, fields: Sequence[str | None], start: int, stop: int
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yields row numbers and what the fields hold, text as bytes; None for no field.

    Where a row group is damaged, those after it go on.

    Raises:
      DamagedFileError: at the end, if one was.
    """
    damage: list[str] = []
    lost = 0
    for group, begin, end in _row_groups(file.metadata, start, stop):
        place = max(begin, start)
        end = min(end, stop)
        try:
            for values in _group_rows(file, group, place - begin, end - begin, fields):
                yield place, values
                place += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last, in a chat
            damage.append(f"row {place:,}: {reason(error)}")
            lost += end - place
    if damage:
        raise DamagedFileError("; ".join(damage), lost)


def _row_groups(metadata: pq.FileMetaData, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, first row and end of the row groups that hold some rows."""
    begin = 0
    for group in range(metadata.num_row_groups):
        end = begin + metadata.row_group(group).num_rows
        if begin < stop and start < end:
            yield group, begin, end
        begin = end


def _group_rows(
    file: pq.ParquetFile, group: int, start: int, stop: int, fields: Sequence[str | None]
) -> Iterator[tuple[Any, ...]]:
    """Yields what the fields hold in some rows of a row group."""
    columns = [field for field in fields if field is not None]
    place = 0
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
        begin, end = max(start - place, 0), min(stop - place, batch.num_rows)
        place += batch.num_rows
        if begin < end:
            values = (
                [None] * (end - begin)
                if field is None
                else _plain(batch.column(batch.schema.get_field_index(field))[begin:end])
                for field in fields
            )
            yield from zip(*values, strict=True)
        if place >= stop:
            return


def _plain(column: pa.Array) -> list[Any]:
    """Returns a column as Python values, text as bytes: it may be no valid UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def reason(error: BaseException) -> str:
    """Returns what a library said, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
