"""Byte-level BPE: text to token ids and back, exactly."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32

from lazyattn.errors import InputError, require

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")

# What a tokenizer that isn't byte-level, adds a space or normalises gets wrong.
_PROBE = "Don't  panic:\n\ttab, e\u0301 \u00e9 \ufb01 \u4f60\u597d \U0001f600\r\n <|eos|> end "


class Tokenizer:
    """A byte-level BPE tokenizer with the special tokens `SPECIAL_TOKENS`.

    Any valid Unicode text comes back unchanged: `decode(encode(text)) == text`. Text
    that looks like a special token is encoded as the text it is, so no document can
    forge the end of one. `encode` adds no special tokens.

    Attributes:
      pad_id, bos_id, eos_id: ids of the special tokens; 0, 1 and 2 where trained here.
      vocab_size: number of ids, special tokens included.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Wraps a tokenizer.

        Args:
          tokenizer: a byte-level one that knows the special tokens.

        Raises:
          InputError: if it lacks a special token or changes text.
        """
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        for token in SPECIAL_TOKENS:
            if token not in vocabulary:
                raise InputError(
                    f"The tokenizer has no token {token}; it must have {', '.join(SPECIAL_TOKENS)}."
                )
        self.pad_id, self.bos_id, self.eos_id = (vocabulary[token] for token in SPECIAL_TOKENS)
        self.vocab_size = 1 + max(vocabulary.values())
        ids = self.encode(_PROBE)
        size = int(self.bytes_per_token[ids].sum())
        if self.decode(ids) != _PROBE or size != len(_PROBE.encode()):
            raise InputError(
                "The tokenizer changes text; it must be byte-level BPE with no normaliser and no"
                " added space, so that decoding gives back what was encoded."
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns a tokenizer; the same texts give the same one, byte for byte.

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
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Raises:
          InputError: if there is no such file, it is no tokenizer, or one this class
            can't use.
        """
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"The tokenizer {str(path)!r} cannot be read ({reason}).") from error
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{str(path)!r} is not a tokenizer.json ({error}).") from error
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`, which the `tokenizers` library reads, too."""
        Path(path).write_text(self._json, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, encoded in parallel."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out.

        Bytes that are no valid UTF-8, as where a sequence ends within a character,
        become U+FFFD.
        """
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @functools.cached_property
    def bytes_per_token(self) -> Int32[np.ndarray, " vocab"]:
        """Bytes of UTF-8 each id stands for, 0 for special tokens.

        Summed over `encode(text)` it is `len(text.encode())`.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        added = self._tokenizer.get_added_tokens_decoder()
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in added:
                sizes[index] = len(token)  # byte-level: a character stands for a byte
            elif not added[index].special:
                sizes[index] = len(token.encode())
        sizes.flags.writeable = False
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's JSON, in hexadecimal."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @functools.cached_property
    def _json(self) -> str:
        return self._tokenizer.to_str(pretty=False)
