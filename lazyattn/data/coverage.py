"""Does a tokenizer keep every byte of a text?"""

from typing import NamedTuple

from lazyattn.data.codecs import Codec


class Coverage(NamedTuple):
    """What became of the characters that were tried.

    Attributes:
      tried: how many there were.
      lost: those that don't come back, other than by the tokenizer's own normalizer.
      changed: a text that the tokenizer gives back otherwise, and what it gives; None:
        there was none.
    """

    tried: int
    lost: list[str]
    changed: tuple[str, str] | None

    def losses(self) -> str:
        """Returns what is lost, for a sentence."""
        shown = sorted(self.lost, key=lambda c: (not c.isprintable(), c.isspace()))[:4]
        names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in shown)
        return f"{len(self.lost):,} of {self.tried:,} characters tried, such as {names}"


# Texts that many a tokenizer gives back changed.
_TEXTS = ("Don't", "a  b", "a\n\tb", "e\u0301", "\u00e9", "\ufb01", "\u4f60\u597d", "\r\n", " end ")

# Every byte that UTF-8 has is in one of these: all that need one or two bytes, and one
# for each byte that begins a longer one.
_CHARACTERS = [
    *map(chr, range(0x800)),
    *(bytes([0xE0 + i, 0xA0 if i == 0 else 0x80, 0x80]).decode() for i in range(16) if i != 0xD),
    "\ud7a3",
    *(bytes([0xF0 + i, 0x90 if i == 0 else 0x80, 0x80, 0x80]).decode() for i in range(5)),
]


def coverage(codec: Codec) -> Coverage:
    """Tries a tokenizer on every byte that a text can have."""
    lost, changed = [], None
    for text in _TEXTS:
        found = codec.decode(codec.encode(text))
        if found != text and changed is None:
            changed = text, found
    # All at once first, which takes a tokenizer that keeps everything a moment.
    whole = " ".join(f"a{character}b" for character in _CHARACTERS)
    ids = codec.encode(whole)
    if codec.unknown_id in ids or not _same(codec.decode(ids), whole):
        for character in _CHARACTERS:
            text = f"a{character}b"
            ids = codec.encode(text)
            found = codec.decode(ids)
            if codec.unknown_id not in ids and _same(found, text):
                continue
            if codec.unknown_id in ids or not _same(found, codec.normalized(text)):
                lost.append(character)
            elif changed is None:
                changed = text, found
    return Coverage(len(_CHARACTERS), lost, changed)


def _same(found: str, text: str) -> bool:
    """Returns whether two texts are the same but for a space that one of them begins with."""
    return found.removeprefix(" ") == text.removeprefix(" ")
