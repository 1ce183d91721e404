"""Which documents of a corpus are kept, and in which split: one function for all ways."""

import dataclasses
import hashlib
from typing import Any

from lazyattn.data.corpus import is_validation
from lazyattn.data.prepare.chat import chat_text, check_template
from lazyattn.errors import InputError, require

# Why a document may be left out. All but the first are faults of the data, and fatal
# if so wished.
LOW_SCORE = "low_score"
MISSING_SCORE = "missing_score"
MISSING_TEXT = "missing_text"
EMPTY_TEXT = "empty_text"
MISSING_ID = "missing_id"
INVALID_UNICODE = "invalid_unicode"
INVALID_JSON = "invalid_json"
UNREADABLE = "unreadable"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is read of each document and which ones are kept.

    Attributes:
      text_field: name of the column or key that holds the text.
      id_field: of the one that holds an id, unique and never changing; the split a
        document belongs to depends on it alone. "": the text's SHA-256 is its id.
      score_field: of the one that holds a score of quality.
      min_int_score: the lowest score that is kept; None: all are, scores aren't read.
      validation_fraction: share of documents held out, by the hash of their ids.
      chat_template: how a message of a chat becomes text, as `chat.chat_text` has it;
        then `text_field` holds a list of messages. None: it holds text.
    """

    text_field: str = "text"
    id_field: str = "id"
    score_field: str = "int_score"
    min_int_score: int | None = None
    validation_fraction: float = 0.005
    chat_template: str | None = None

    def __post_init__(self):
        require(
            0 <= self.validation_fraction < 1,
            "validation_fraction",
            self.validation_fraction,
            "at least 0 and below 1",
        )
        if self.chat_template is not None:
            check_template(self.chat_template)
        require(bool(self.text_field), "text_field", self.text_field, "the name of a field")
        require(
            self.min_int_score is None or bool(self.score_field),
            "score_field",
            self.score_field,
            "the name of a field if min_int_score is given",
        )

    @property
    def fields(self) -> tuple[str, str | None, str | None]:
        """Names of text, id and score; None for what isn't read."""
        return (
            self.text_field,
            self.id_field or None,
            self.score_field if self.min_int_score is not None else None,
        )


@dataclasses.dataclass(frozen=True)
class Selected:
    """A document that is kept.

    Attributes:
      split: "train" or "validation".
      id: its id.
      text: its text, valid Unicode.
      size: bytes of the text as UTF-8.
    """

    split: str
    id: str
    text: str
    size: int


def select(text: Any, id: Any, score: Any, selection: Selection, split: str = "") -> Selected | str:
    """Returns a document with its split, or why it is left out.

    Args:
      text: what was found: str, UTF-8 bytes, or anything else if the data is bad.
      id: what was found; any str, bytes or int can be one.
      score: what was found.
      selection: what to keep.
      split: where it goes; "": its id decides.
    """
    if selection.min_int_score is not None:
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            return MISSING_SCORE
        if score < selection.min_int_score:
            return LOW_SCORE
    try:
        if selection.chat_template is not None:
            text = chat_text(text, selection.chat_template)
        content = _utf8(text)
        if content is None:
            return MISSING_TEXT
        text = content.decode()
        if not text.strip():
            return EMPTY_TEXT
        if not selection.id_field:
            name = hashlib.sha256(content).hexdigest()
        else:
            id = str(id).encode() if type(id) is int else _utf8(id)
            if not id:
                return MISSING_ID
            name = id.decode()
    except UnicodeError:
        return INVALID_UNICODE
    if not split:
        held_out = is_validation(name, selection.validation_fraction)
        split = "validation" if held_out else "train"
    return Selected(split, name, text, len(content))


def require_fields(names: list[str], selection: Selection, file: str) -> None:
    """Checks that a file has the columns that are to be read.

    Raises:
      InputError: naming the missing one and the flag that says it.
    """
    flags = ("text_field", "id_field", "score_field")
    for flag, field in zip(flags, selection.fields, strict=True):
        if field is not None and field not in names:
            hint = (
                "; --id_field= goes by the hash of the text instead" if flag == "id_field" else ""
            )
            raise InputError(
                f"--{flag} is {field!r}, but {file} has no such column, only"
                f" {', '.join(names)}{hint}."
            )


def _utf8(value: Any) -> bytes | None:
    """Returns text as bytes; None if it is no text.

    Raises:
      UnicodeError: for a str with lone surrogates.
    """
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else None
