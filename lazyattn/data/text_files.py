"""Text as files hold it: UTF-8, a byte-order mark or none, JSON lines.

Every reader of text goes through here, so that all take the same files and say the
same about the others.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lazyattn.errors import InputError

# Some editors and exports begin a UTF-8 file with it. It is no part of the text.
BYTE_ORDER_MARK = "\ufeff"


def read_bytes(path: Path, name: str) -> bytes:
    """Returns what a file holds.

    Args:
      path: the file.
      name: the flag or setting that names it, for errors.

    Raises:
      InputError: if it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{name} is {str(path)!r}, which cannot be read ({error.strerror})."
        ) from error


def read_text(path: Path, name: str) -> str:
    """Returns the text of a UTF-8 file, less a byte-order mark; line ends stay as they are.

    Args:
      path, name: as in `read_bytes`.

    Raises:
      InputError: if it can't be read or is not UTF-8, with the place.
    """
    try:
        return read_bytes(path, name).decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is {str(path)!r}, which is not UTF-8 at byte {error.start}."
        ) from error


def json_objects(
    path: Path, name: str, wanted: str = "JSON object"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON-lines file.

    A line ends with "\\n" or "\\r\\n" and with nothing else: U+2028, U+2029 and U+0085
    may stand inside a JSON string. Blank lines are skipped.

    Args:
      path, name: as in `read_bytes`.
      wanted: what a line should be, for errors.

    Yields:
      How a sentence about the line begins, and the object.

    Raises:
      InputError: naming the first line that is not UTF-8 or no JSON object.
    """
    for number, line in enumerate(read_bytes(path, name).split(b"\n"), 1):
        place = f"{name} is {str(path)!r}, whose line {number}"
        try:
            item = parse_line(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not UTF-8 at its byte {error.start}.") from error
        except (ValueError, RecursionError):
            item = None
        if item is BLANK:
            continue
        if not isinstance(item, dict):
            raise InputError(f"{place} is no {wanted}.")
        yield place, item


def json_lines(path: Path, name: str, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the first of some fields that each object of a JSON-lines file has as a string.

    Args:
      path, name: as in `json_objects`.
      fields: names of fields, the preferred one first.

    Yields:
      The field's name and the string, valid Unicode.

    Raises:
      InputError: as `json_objects`, and naming the first line that has none of the fields
        as a string, or half of a surrogate pair in it.
    """
    wanted = f"JSON object with a string {' or '.join(fields)}"
    for place, item in json_objects(path, name, wanted):
        field = next((field for field in fields if isinstance(item.get(field), str)), None)
        if field is None:
            raise InputError(f"{place} is no {wanted}.")
        check_unicode(item[field], f"{place} has a {field} that")
        yield field, item[field]


# What `parse_line` makes of a line with nothing in it.
BLANK = object()


def parse_line(line: bytes) -> Any:
    """Returns what a line of JSON holds, or `BLANK`.

    A byte-order mark is skipped: it begins a file, and a line where files were joined.

    Raises:
      UnicodeDecodeError: if it is not UTF-8.
      ValueError, RecursionError: if it is no JSON.
    """
    text = line.decode().removeprefix(BYTE_ORDER_MARK)
    return json.loads(text) if text.strip() else BLANK


def check_unicode(text: str, what: str) -> None:
    """Checks that a text can be written as UTF-8.

    Half of a surrogate pair can't. JSON can spell one (`"\\ud800"`), and Python puts one
    in place of each byte of the command line that is no UTF-8.

    Args:
      text: the text.
      what: how the sentence begins, continuing "is not valid Unicode ...".

    Raises:
      InputError: with the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        hint = f", which was byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else ""
        raise InputError(
            f"{what} is not valid Unicode: character {error.start} is half of a surrogate pair"
            f" (U+{code:04X}{hint})."
        ) from error
