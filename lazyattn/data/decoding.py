"""The text that new tokens add to a prompt.

Decoders of the SentencePiece family take the first space of a text away, so that a
continuation decoded by itself would lose it: " sat" after "the cat" comes out as "sat".
Here it is what the text of all tokens has more than that of the prompt.
"""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What this module needs of a tokenizer; `Tokenizer` has it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""

    def unsettled(self, ids: Sequence[int]) -> int:
        """Returns how many of the last ids may read differently once others follow."""


# What an unfinished UTF-8 sequence decodes to.
_REPLACEMENT = "\ufffd"


# Tokens of a prompt that are decoded again with each continuation: a long prompt's text is
# not needed whole to see what comes after it.
_TAIL = 64


class Continuation:
    """What follows one prompt.

    The prompt and its continuation are together the decoding of all ids. Only where a
    tokenizer has changed the prompt, by a normalizer, that is true of the prompt's
    decoding instead.
    """

    def __init__(self, tokenizer: Decoder, before: Sequence[int], prompt: str | None = None):
        """Looks at a prompt.

        Args:
          tokenizer: of the ids.
          before: the prompt's ids.
          prompt: the text that was encoded to `before`; None: what `before` decodes to. It
            may end in white space that the tokenizer left out.
        """
        self._tokenizer = tokenizer
        decoded = tokenizer.decode(before)
        self._left_out = ""
        if prompt is not None and prompt.startswith(decoded):
            self._left_out = prompt[len(decoded) :]
        cut = max(0, len(before) - _TAIL)
        while run := tokenizer.unsettled(before[:cut]):
            cut -= run
        self._before, self._start = before[cut:], tokenizer.decode(before[cut:])
        if not self._start.strip():  # the space of what follows would be taken for the first
            self._before, self._start = before, decoded

    def text(self, new: Sequence[int]) -> str:
        """Returns the text that ids add to the prompt's."""
        whole = self._tokenizer.decode([*self._before, *new])
        if not whole.startswith(self._start):
            # Bytes that are no character have made the prompt's last one unreadable.
            return self._tokenizer.decode(new)
        added = whole[len(self._start) :]
        if self._left_out.startswith(added):  # so far it only repeats the white space
            return ""
        return added.removeprefix(self._left_out)

    def settled(self, new: Sequence[int]) -> str:
        """Returns what of the text stays as it is, whatever ids follow."""
        settled = new[: len(new) - self._tokenizer.unsettled(new)]
        return self.text(settled).rstrip(_REPLACEMENT)
