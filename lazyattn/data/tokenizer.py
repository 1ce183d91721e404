"""Text to token ids and back."""

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Int32

from lazyattn import buckets
from lazyattn.data.codecs import Codec, SentencePiece, TokenizerJson, read_codec
from lazyattn.data.coverage import coverage
from lazyattn.data.manifest import write_whole
from lazyattn.data.text_files import check_unicode
from lazyattn.errors import InputError, require

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")

# What a tokenizer's file is called in a folder of ours.
FILE_NAMES = (TokenizerJson.file_name, SentencePiece.file_name)

# Beside it, as the Hugging Face libraries write it: "eos_token" there names the end of a
# document. Ours has it only where the name isn't the one in `_ENDS` that would be found.
CONFIG_NAME = "tokenizer_config.json"

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
      eos_token: name of the end of a document, where it had to be given; None: the file
        alone tells.
      change: an example: a text, and what comes back; None: there is none.
    """

    def __init__(self, codec: Codec, eos_token: str | None = None, named_by: str = "eos_token"):
        """Wraps a tokenizer.

        Args:
          codec: the tokenizer.
          eos_token: name of the special token that ends a document; None: the first of
            the names that are known.
          named_by: the flag or file that says so, for errors.

        Raises:
          InputError: if it has no token for the end of a document, or can't represent
            every text.
        """
        self._codec = codec
        self.kind, self.file_name = codec.kind, codec.file_name
        self.vocab_size = codec.vocab_size
        known = _first(_ENDS, codec.special)
        if eos_token is not None and eos_token not in codec.special:
            raise InputError(
                f"{named_by} is {eos_token!r}, but the tokenizer has no such special token"
                f"{_nearest(eos_token, codec.special)}."
            )
        end = known if eos_token is None else codec.special[eos_token]
        if end is None:
            raise InputError(
                f"The tokenizer has no token {EOS} for the end of a document; its special tokens"
                f" must have that or one of {', '.join(_ENDS[1:])}, or else `--eos_token` of"
                f' preparing, or "eos_token" in a {CONFIG_NAME} beside it, must name one.'
            )
        self.eos_id = end
        self.eos_token = eos_token if end != known else None
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
    def load(cls, path: str | Path, eos_token: str | None = None) -> "Tokenizer":
        """Reads a `tokenizer.json` or a SentencePiece model; the content tells which.

        Args:
          path: the file, or a folder that has it under one of `FILE_NAMES`. What a
            `tokenizer_config.json` beside it says of the end of a document holds.
          eos_token: name of the special token that ends a document, as `--eos_token`
            has it; None: the file beside it, or the names that are known.

        Raises:
          InputError: if there is no such file, it is no tokenizer, or one this class
            can't use, or has no token of that name.
        """
        buckets.check_readable("the tokenizer", path)
        in_bucket = buckets.is_bucket(path)
        file = buckets.bucket_path("the tokenizer", path) if in_bucket else Path(path).expanduser()
        file = next((file / name for name in FILE_NAMES if (file / name).is_file()), file)
        try:
            content = file.read_bytes()
        except OSError as error:
            why = error.strerror or "nothing is there"
            raise InputError(f"The tokenizer {str(path)!r} cannot be read ({why}).") from error
        try:
            codec = read_codec(content)
        except ValueError as error:
            raise InputError(
                f"{str(path)!r} is neither a tokenizer.json nor a SentencePiece model ({error})."
            ) from error
        named_by = "--eos_token"
        if eos_token is None:
            beside = file.with_name(CONFIG_NAME)
            eos_token, named_by = _named_end(beside), f"eos_token in {str(beside)!r}"
        tokenizer = cls(codec, eos_token, named_by)
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
        """Writes the file, byte for byte as it was loaded; `eos_token` is not part of it."""
        Path(path).write_bytes(self._codec.content)

    def save_in(self, folder: Path, name: str | None = None) -> Path:
        """Writes all that `load` needs into a folder: the file, and `eos_token` beside it.

        Each file is there whole or not at all, the tokenizer's own last.

        Args:
          folder: where to.
          name: what to call the tokenizer's file; None: `file_name`.

        Returns:
          The tokenizer's file.
        """
        path = folder / (name or self.file_name)
        if self.eos_token is not None:
            text = json.dumps({"eos_token": self.eos_token}, indent=2) + "\n"
            write_whole(folder / CONFIG_NAME, text.encode())
        write_whole(path, self._codec.content)
        return path

    def name_of(self, special_id: int) -> str:
        """Returns what a special token is called."""
        return next(name for name, index in self._codec.special.items() if index == special_id)

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

    def same_ids(self, other: "Tokenizer") -> bool:
        """Returns whether another gives the same ids for every text, as far as files tell.

        What a `tokenizer.json` adds around a text for others, and its layout, may differ.
        """
        if self.fingerprint == other.fingerprint:
            return True
        if not self.kind == other.kind == "tokenizer.json":
            return False
        mine, theirs = (json.loads(x._codec.content.decode("utf-8-sig")) for x in (self, other))
        around = dict.fromkeys(("post_processor", "padding", "truncation"))
        return mine | around == theirs | around

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self._codec.content).hexdigest()


def _named_end(path: Path) -> str | None:
    """Returns what a `tokenizer_config.json` calls the end of a document; None: nothing.

    Raises:
      InputError: if the file can't be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r}, which may name the end of a document, is no JSON; restore it, or"
            " remove it if it isn't the tokenizer's."
        ) from error
    named = content.get("eos_token") if isinstance(content, dict) else None
    if isinstance(named, dict):  # older libraries keep the whole token
        named = named.get("content")
    return named if isinstance(named, str) and named else None


def _nearest(name: str, special: Iterable[str]) -> str:
    """Returns the rest of a sentence: which names a missing one may stand for."""
    names = sorted(special)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; the closest are {', '.join(map(repr, close))}"
    if not names:
        return "; it has none"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; it has {', '.join(map(repr, names[:8]))}{more}"


def _first(names: Sequence[str], special: dict[str, int]) -> int | None:
    return next((special[name] for name in names if name in special), None)
