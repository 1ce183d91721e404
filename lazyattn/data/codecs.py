"""The two libraries that turn text into token ids, behind one interface."""

import codecs
import functools
import json
from collections.abc import Container, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

from lazyattn.data.words import WordTable, can_cut
from lazyattn.errors import InputError

_SPACE = "\u2581"  # how SentencePiece writes a space


class Codec(Protocol):
    """What a tokenizer of any library can do.

    Attributes:
      kind: name of the format: "tokenizer.json" or "sentencepiece".
      file_name: what a file of it is called in a folder of ours.
      content: the file.
      special: ids of the tokens that no text gives, by name.
      unknown_id: the id that stands for what can't be represented; None: none does.
      vocab_size: number of ids.
    """

    kind: str
    file_name: str
    content: bytes
    special: dict[str, int]
    unknown_id: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out, and ids that no token has."""

    def normalized(self, text: str) -> str:
        """Returns the text that is cut into tokens, its spaces written as spaces."""

    def unsettled(self, ids: Sequence[int]) -> int:
        """Returns how many of the last ids may read differently once others follow.

        Not counted is that an unfinished character reads as U+FFFD.
        """

    def sizes(self) -> Int32[np.ndarray, " vocab"]:
        """Returns the bytes of UTF-8 each id stands for, 0 for special tokens."""


class TokenizerJson:
    """A `tokenizer.json` of the `tokenizers` library."""

    kind = "tokenizer.json"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes):
        """Reads a file's content.

        Raises:
          ValueError: if it is no tokenizer.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        self.content = content
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # in a text they are text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: index for index, token in added.items() if token.special}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown_id = vocabulary.get(unknown) if isinstance(unknown, str) else None
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        can = can_cut(json.loads(content.decode("utf-8-sig")))
        self._words = WordTable(self._encode_batch) if can else None

    def encode(self, text: str) -> list[int]:
        """As `Codec`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Codec`; encoded in parallel unless TOKENIZERS_PARALLELISM is "false"."""
        return self._encode_batch(texts) if self._words is None else self._words.encode(texts)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """As `Codec`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def normalized(self, text: str) -> str:
        """As `Codec`."""
        normalizer = self._tokenizer.normalizer
        return (text if normalizer is None else normalizer.normalize_str(text)).replace(_SPACE, " ")

    def unsettled(self, ids: Sequence[int]) -> int:
        """As `Codec`; a run of single bytes that is no UTF-8 as a whole is lost whole."""
        run = 0
        while run < len(ids) and ids[len(ids) - 1 - run] not in self._ends_a_run:
            run += 1
        return run

    def sizes(self) -> Int32[np.ndarray, " vocab"]:
        """As `Codec`."""
        sizes = np.zeros(self.vocab_size, np.int32)
        added = self._tokenizer.get_added_tokens_decoder()
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in added:
                # Byte-level: a character stands for a byte.
                sizes[index] = len(token) if self._byte_level else _piece_size(token)
            elif not added[index].special:
                sizes[index] = len(token.encode())
        return sizes

    @functools.cached_property
    def _byte_level(self) -> bool:
        return self._decodes_by("ByteLevel")

    @functools.cached_property
    def _ends_a_run(self) -> Container[int]:
        """Ids after which the text before them is settled."""
        if not self._decodes_by("ByteFallback"):
            return range(self.vocab_size)
        # Special tokens, and ids that no token has, leave no trace between two bytes.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = set(self.special.values())
        return {i for token, i in vocabulary.items() if not _is_single_byte(token)} - special

    def _decodes_by(self, kind: str) -> bool:
        return _contains(json.loads(self.content).get("decoder"), kind)


class SentencePiece:
    """A model file of SentencePiece."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, content: bytes):
        """Reads a file's content.

        Raises:
          ValueError: if it is no model.
          InputError: if the library isn't installed.
        """
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(
                "The tokenizer is a SentencePiece model, but the package sentencepiece isn't"
                " installed; `pip install sentencepiece` adds it."
            ) from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(" ".join(str(error).split())) from error
        self.content = content
        self.vocab_size = self._model.get_piece_size()
        pieces = range(self.vocab_size)
        self.special = {
            self._model.id_to_piece(index): index
            for index in pieces
            if self._model.is_control(index)
        }
        bytes_covered = any(self._model.is_byte(index) for index in pieces)
        self.unknown_id = None if bytes_covered else self._model.unk_id()

    def encode(self, text: str) -> list[int]:
        """As `Codec`."""
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Codec`."""
        return [self._model.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """As `Codec`."""
        # A model may have room for more ids than there are; the library refuses those.
        return self._model.decode([index for index in ids if index < self.vocab_size])

    def normalized(self, text: str) -> str:
        """As `Codec`."""
        return self._model.normalize(text).replace(_SPACE, " ")

    def unsettled(self, ids: Sequence[int]) -> int:
        """As `Codec`; what this library has decoded once stays."""
        del ids
        return 0

    def sizes(self) -> Int32[np.ndarray, " vocab"]:
        """As `Codec`."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for index in range(self.vocab_size):
            if self._model.is_byte(index):
                sizes[index] = 1
            elif not (
                self._model.is_control(index)
                or self._model.is_unused(index)
                or self._model.is_unknown(index)
            ):
                sizes[index] = _piece_size(self._model.id_to_piece(index))
        return sizes


def read_codec(content: bytes) -> Codec:
    """Returns the tokenizer that a file holds, told by its content.

    Raises:
      ValueError: if it is none.
      InputError: if its library isn't installed.
    """
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        return TokenizerJson(content)
    return SentencePiece(content)


def _piece_size(piece: str) -> int:
    """Returns the bytes that a piece of SentencePiece's kind stands for."""
    return 1 if _is_single_byte(piece) else len(piece.replace(_SPACE, " ").encode())


def _is_single_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _contains(part: Any, kind: str) -> bool:
    """Returns whether a part of a tokenizer.json is of a type, or has a step that is."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_contains(value, kind) for value in part.values())
    return isinstance(part, list) and any(_contains(value, kind) for value in part)
