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


def added_text(
    tokenizer: Decoder, before: Sequence[int], new: Sequence[int], prompt: str | None = None
) -> str:
    """Returns the text that tokens add to those before them.

    The prompt and what is returned are together the decoding of all ids. Only where a
    tokenizer has changed the prompt, by a normalizer, that is true of the prompt's
    decoding instead.

    Args:
      tokenizer: of the ids.
      before: the prompt's ids.
      new: the ids that follow.
      prompt: the text that was encoded to `before`; None: what `before` decodes to. It
        may end in white space that the tokenizer left out.
    """
    whole = tokenizer.decode([*before, *new])
    if prompt is not None:
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        if prompt.startswith(whole):  # so far it repeats the white space that was left out
            return ""
    start = tokenizer.decode(before)
    if whole.startswith(start):
        return whole[len(start) :]
    # Bytes that are no character have made the prompt's last one unreadable.
    return tokenizer.decode(new)


def settled_text(
    tokenizer: Decoder, before: Sequence[int], new: Sequence[int], prompt: str | None = None
) -> str:
    """Returns what of `added_text` stays as it is, whatever ids follow."""
    settled = new[: len(new) - tokenizer.unsettled(new)]
    return added_text(tokenizer, before, settled, prompt).rstrip(_REPLACEMENT)
