"""Numbers for people: "1 batch", "2,000 batches", "3m05s"."""


def quantity(number: int, one: str, several: str | None = None) -> str:
    """Returns a number and its noun.

    Args:
      number: at least 0.
      one: the noun of 1.
      several: that of any other number; None: `one` and an s.
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def duration(seconds: float) -> str:
    """Returns a time for people, such as "3m05s", "2h03m" or "4d05h"."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"
