"""Text to token ids and back."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Int32

from lazyattn.data.codecs import Codec, SentencePiece, TokenizerJson, read_codec
from lazyattn.data.coverage import coverage
from lazyattn.data.text_files import check_unicode
from lazyattn.errors import InputError, require

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")

# What a tokenizer's file is called in a folder of ours.
FILE_NAMES = (TokenizerJson.file_name, SentencePiece.file_name)

# What other people's tokenizers call theirs; the first one there is counts. A
# tokenizer without a beginning or padding uses its end for it, as GPT-2 does.
_BEGINNINGS = (BOS, "<s>", "<|begin_of_text|>", "<bos>")
_ENDS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
_PADDINGS = (PAD, "<pad>", "<|padding|>", "<|finetune_right_pad_id|>", "[PAD]")

# What a tokenizer that adds a space or normalises gives back changed.
_PROBE = "Don't  panic:\n\ttab, e\u0301 \u00e9 \ufb01 \u4f60\u597d \U0001f600\r\n <|eos|> end "

# Fingerprints of the tokenizers that this process has warned of: a run reads its own
# several times.
_warned: set[str] = set()


class Tokenizer:
    """A `tokenizer.json` of the `tokenizers` library, or a SentencePiece model.

    One that is trained here is byte-level BPE with `SPECIAL_TOKENS`, and gives any
    valid Unicode text back unchanged: `decode(encode(text)) == text`. Text that looks
    like a special token is encoded as the text it is, so no document can forge the end
    of one. `encode` adds no special tokens.

    Attributes:
      pad_id, bos_id, eos_id: ids of padding, beginning and end of a document; 0, 1 and
        2 where trained here.
      vocab_size: number of ids, special tokens included.
      kind: "tokenizer.json" or "sentencepiece".
      file_name: what `save` should call it in a folder: "tokenizer.json" or
        "tokenizer.model".
      changes_text: whether it normalises, so that `decode` gives another text back and
        `bytes_per_token` counts the bytes of that one.
      change: an example: a text, and what comes back; None: there is none.
    """

    def __init__(self, codec: Codec):
        """Wraps a tokenizer.

        Raises:
          InputError: if it has no token for the end of a document, or can't represent
            every text.
        """
        self._codec = codec
        self.kind, self.file_name = codec.kind, codec.file_name
        self.vocab_size = codec.vocab_size
        end = _first(_ENDS, codec.special)
        if end is None:
            raise InputError(
                f"The tokenizer has no token {EOS} for the end of a document; its special tokens"
                f" must have that or one of {', '.join(_ENDS[1:])}."
            )
        self.eos_id = end
        beginning, padding = _first(_BEGINNINGS, codec.special), _first(_PADDINGS, codec.special)
        self.bos_id = end if beginning is None else beginning
        self.pad_id = end if padding is None else padding
        tried = coverage(codec)
        if tried.lost:
            raise InputError(
                f"The tokenizer can't represent every text: it loses {tried.losses()}; it must be"
                " byte-level and know all 256 bytes, or have tokens for single bytes"
                " (byte_fallback)."
            )
        ids = self.encode(_PROBE)
        found, size = self.decode(ids), int(self.bytes_per_token[ids].sum())
        self.change = tried.changed or (None if found == _PROBE else (_PROBE, found))
        self.changes_text = self.change is not None or size - len(_PROBE.encode()) not in (0, 1)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns byte-level BPE; the same texts give the same one, byte for byte.

        Args:
          texts: valid Unicode.
          vocab_size: ids in all: 3 special tokens, 256 bytes, and merges. Fewer if the
            texts have no more pairs to merge.

        Raises:
          InputError: if vocab_size has no room for the bytes and special tokens.
        """
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        smallest = len(alphabet) + len(SPECIAL_TOKENS)
        require(vocab_size >= smallest, "vocab_size", vocab_size, f"at least {smallest}")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(TokenizerJson(tokenizer.to_str(pretty=False).encode()))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json` or a SentencePiece model; the content tells which.

        Raises:
          InputError: if there is no such file, it is no tokenizer, or one this class
            can't use.
        """
        try:
            content = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise InputError(
                f"The tokenizer {str(path)!r} cannot be read ({error.strerror})."
            ) from error
        try:
            codec = read_codec(content)
        except ValueError as error:
            raise InputError(
                f"{str(path)!r} is neither a tokenizer.json nor a SentencePiece model ({error})."
            ) from error
        tokenizer = cls(codec)
        if tokenizer.changes_text and tokenizer.fingerprint not in _warned:
            _warned.add(tokenizer.fingerprint)
            example = "its tokens don't add up to the text"
            if tokenizer.change is not None:
                example = "{!a} comes back as {!a}".format(*tokenizer.change)
            logging.warning(
                "The tokenizer %s changes text (%s): bits per byte count the bytes of what it"
                " gives back.",
                path,
                example,
            )
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the file, byte for byte as it was loaded."""
        Path(path).write_bytes(self._codec.content)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens.

        Raises:
          InputError: if it is not valid Unicode.
        """
        check_unicode(text, "A text to tokenize")
        return self._codec.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, encoded in parallel where the library can.

        Raises:
          InputError: as `encode`.
        """
        for text in texts:
            check_unicode(text, "A text to tokenize")
        return self._codec.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out, and ids that no token has.

        Bytes that are no valid UTF-8, as where a sequence ends within a character,
        become U+FFFD.
        """
        return self._codec.decode([int(i) for i in ids])

    def unsettled(self, ids: Sequence[int]) -> int:
        """Returns how many of the last ids may read differently once others follow.

        Not counted is that an unfinished character reads as U+FFFD.
        """
        return self._codec.unsettled(ids)

    @functools.cached_property
    def bytes_per_token(self) -> Int32[np.ndarray, " vocab"]:
        """Bytes of UTF-8 each id stands for, 0 for special tokens.

        Summed over `encode(text)` it is `len(text.encode())`; one more for a tokenizer
        that begins every text with a space it takes away again.
        """
        sizes = self._codec.sizes()
        sizes.flags.writeable = False
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self._codec.content).hexdigest()


def _first(names: Sequence[str], special: dict[str, int]) -> int | None:
    return next((special[name] for name in names if name in special), None)
