"""Lines of runs by variant: means over seeds, their errors, and the worst."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stat:
    """A number over seeds.

    Attributes:
      mean: the mean.
      error: its standard error; None: there is one seed only.
      worst: the largest.
      count: seeds.
    """

    mean: float
    error: float | None
    worst: float
    count: int

    def text(self, digits: int = 3) -> str:
        """Returns the mean and its error."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def stat(values: Iterable[float | None]) -> Stat | None:
    """Returns the statistics of numbers; None: there is none."""
    found = [float(x) for x in values if x is not None]
    if not found:
        return None
    mean = sum(found) / len(found)
    error = None
    if len(found) > 1:
        variance = sum((x - mean) ** 2 for x in found) / (len(found) - 1)
        error = math.sqrt(variance / len(found))
    return Stat(mean, error, max(found), len(found))


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one variant that differ in their seed alone.

    Attributes:
      variant: its name.
      learning_rate: of all of them.
      lines: the runs, by seed.
    """

    variant: str
    learning_rate: float
    lines: tuple[Line, ...]

    def stat(self, get: str | Callable[[Line], Any]) -> Stat | None:
        """Returns the statistics of a key, or of what a function gets out of a line."""
        return stat(line.get(get) if isinstance(get, str) else get(line) for line in self.lines)


def latest(lines: Sequence[Line]) -> list[Line]:
    """Returns the last line of each run."""
    return list({str(line.get("id")): line for line in lines}.values())


def good(lines: Sequence[Line], *, everything: bool = True) -> list[Line]:
    """Returns the lines that have numbers; `everything`: those that have all of them."""
    return [
        line
        for line in latest(lines)
        if "error" not in line
        and line.get("val") is not None
        and (not everything or line.get("measure") == "all")
    ]


def main_tokens(lines: Sequence[Line]) -> int | None:
    """Returns the tokens of a run that most runs have that are measured in full."""
    counts = Counter(int(line["tokens"]) for line in good(lines))
    return max(counts, key=lambda tokens: (counts[tokens], tokens)) if counts else None


def groups(lines: Sequence[Line], tokens: int) -> dict[str, Group]:
    """Returns the runs of a number of tokens that are measured in full, by variant.

    Where a variant has several learning rates or settings, the one with the most seeds
    counts, and of those the one with the lowest loss.
    """
    parts: dict[tuple[Any, ...], dict[int, Line]] = {}
    for line in good(lines):
        if int(line["tokens"]) == tokens:
            settings = str(line.get("id")).replace(f"seed={line['seed']} ", "")
            key = line["variant"], float(line["learning_rate"]), settings
            parts.setdefault(key, {})[int(line["seed"])] = line
    found: dict[str, Group] = {}
    for (variant, rate, _), by_seed in parts.items():
        group = Group(variant, rate, tuple(by_seed[seed] for seed in sorted(by_seed)))
        if variant not in found or _rank(group) < _rank(found[variant]):
            found[variant] = group
    return found


def _rank(group: Group) -> tuple[int, float]:
    val = group.stat("val")
    return -len(group.lines), math.inf if val is None else val.mean
