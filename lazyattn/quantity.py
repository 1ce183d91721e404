"""Numbers with what they count, for people: "1 batch", "2,000 batches"."""


def quantity(number: int, one: str, several: str | None = None) -> str:
    """Returns a number and its noun.

    Args:
      number: at least 0.
      one: the noun of 1.
      several: that of any other number; None: `one` and an s.
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"
