"""Byte-level BPE word by word: what a tokenizer gives, looked up where a word came before.

Words come again and again, and the library does them all anew: splitting by its pattern
costs it more than a table costs us. GPT-2's pattern never has a token across the places
where `_WORDS` cuts, whatever lies before and after them, and looks at nothing before:

- a token with a character that is no white space ends where white space begins;
- of white space before a word, all but the last character is one token by `\\s+(?!\\S)`,
  at the end of a text, too;
- letters end where a digit or a mark begins, and digits where anything else does;
- marks end where a letter or a digit begins, but for "'", with which "'s" begins.

The last two are used between characters of ASCII alone.
"""

import array
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_WORDS = re.compile(
    r"\s?[A-Za-z]++(?![^\x00-\x7f])"
    r"|\s?[0-9]++(?![^\x00-\x7f])"
    r"|\s?[!-&(-/:-@\[-`{-~]++(?=[A-Za-z0-9\s]|\Z)"
    r"|\s?\S+|\s+(?!\S)"
)
_NO_SPACE = re.compile("[\x1c-\x1f]")  # white space to Python, but not to the library
_LARGEST = 1 << 26  # bytes of a table, roughly
_ENTRY = 200  # bytes that an entry takes besides its word

Encode = Callable[[Sequence[str]], list[list[int]]]


def can_cut(settings: dict[str, Any]) -> bool:
    """Returns whether a tokenizer gives the ids of its words one after the other.

    Args:
      settings: a `tokenizer.json`. It must be BPE after GPT-2's pattern, as what is
        trained here is, with no normalizer and no added tokens but special ones.
    """
    before = settings.get("pre_tokenizer") or {}
    model = settings.get("model") or {}
    return (
        before.get("type") == "ByteLevel"
        and before.get("add_prefix_space") is False
        and before.get("use_regex", True) is True
        and settings.get("normalizer") is None
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token.get("special") for token in settings.get("added_tokens") or ())
    )


class WordTable:
    """Ids of words that came before; forgotten when there are too many."""

    def __init__(self, encode: Encode):
        """Starts empty.

        Args:
          encode: ids of each of some texts, by the library.
        """
        self._encode = encode
        self._ids: dict[str, bytes] = {}
        self._size = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, equal to what the library gives."""
        words = [[text] if _NO_SPACE.search(text) else _WORDS.findall(text) for text in texts]
        if self._size > _LARGEST:
            self._ids, self._size = {}, 0
        known = self._ids  # another thread may start a new table
        new = list(set().union(*words) - known.keys())
        for word, ids in zip(new, self._encode(new), strict=True):
            known[word] = array.array("I", ids).tobytes()
            self._size += len(word) + 4 * len(ids) + _ENTRY
        return [
            np.frombuffer(b"".join([known[word] for word in text]), np.uintc).tolist()
            for text in words
        ]
