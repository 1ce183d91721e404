"""The registered rule (docs/study.md), applied to lines of runs."""

import dataclasses
import math
from collections.abc import Sequence

from benchmarks.study.summary import Group, Line, Stat, good, groups, stat

BASE = "softmax"
MAX_LENGTH_LOSS = 0.02
MAX_VISITED = {"visited_4096": 0.55, "visited_16384": 0.30}
SWEEP_TOKENS = 30_000_000


@dataclasses.dataclass(frozen=True)
class Check:
    """One condition.

    Attributes:
      passed: None where it can't be told.
      text: the numbers behind it, or what is missing.
    """

    passed: bool | None
    text: str


@dataclasses.dataclass(frozen=True)
class Row:
    """What the rule says of a variant.

    Attributes:
      group: its runs.
      val: loss at equal tokens.
      ms: milliseconds a step.
      equal: loss at equal time; None: it can't be told.
      checks: by name: copying, length, visited_4096, visited_16384.
    """

    group: Group
    val: Stat
    ms: Stat | None
    equal: float | None
    checks: dict[str, Check]

    @property
    def passes(self) -> bool:
        """Whether it may win."""
        return self.equal is not None and all(check.passed for check in self.checks.values())


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of the rule.

    Attributes:
      tokens: of the runs that were compared.
      gain: nats gained for each factor of e in tokens; None: not known.
      gain_from: variants that `gain` is the mean over.
      rows: by loss at equal time, best first; those without it last.
      winner: name of the variant; None: none passes.
    """

    tokens: int
    gain: float | None
    gain_from: tuple[str, ...]
    rows: tuple[Row, ...]
    winner: str | None


def apply(lines: Sequence[Line], tokens: int, sweep_tokens: int = SWEEP_TOKENS) -> Verdict:
    """Returns the verdict on the runs of `tokens` tokens.

    Args:
      lines: of all runs, sweeps too.
      tokens: of the runs to compare.
      sweep_tokens: of shorter runs, for what more tokens are worth.
    """
    found = groups(lines, tokens)
    gain, gain_from = worth_of_tokens(lines, sweep_tokens, tokens)
    base = found.get(BASE)
    rows = []
    for group in found.values():
        val = group.stat("val")
        assert val is not None
        ms = group.stat("ms_per_step")
        checks = {"copying": _copying(group, base), "length": _length(group)}
        checks |= {name: _visited(group, name, most) for name, most in MAX_VISITED.items()}
        rows.append(Row(group, val, ms, _at_equal_time(val, ms, base, gain), checks))
    rows.sort(key=lambda row: (math.inf if row.equal is None else row.equal, row.val.mean))
    winner = next((row.group.variant for row in rows if row.passes), None)
    return Verdict(tokens, gain, gain_from, tuple(rows), winner)


def worth_of_tokens(
    lines: Sequence[Line], few: int, many: int
) -> tuple[float | None, tuple[str, ...]]:
    """Returns the nats gained for each factor of e in tokens, and the variants it is from.

    Between runs of `few` and `many` tokens of one variant and its learning rates, mean over
    both's seeds and then over such pairs.
    """
    by_kind: dict[tuple[str, float, str], dict[int, list[float]]] = {}
    for line in good(lines, everything=False):
        if int(line["tokens"]) in (few, many):
            factor = line.get("settings", {}).get("optimizer", {}).get("log_slope_factor")
            kind = str(line["variant"]), float(line["learning_rate"]), str(factor)
            own = by_kind.setdefault(kind, {})
            own.setdefault(int(line["tokens"]), []).append(float(line["val"]))
    gains: dict[str, list[float]] = {}
    for (variant, *_), own in by_kind.items():
        if few in own and many in own and few != many:
            fall = sum(own[few]) / len(own[few]) - sum(own[many]) / len(own[many])
            gains.setdefault(variant, []).append(fall / math.log(many / few))
    if not gains:
        return None, ()
    means = [sum(values) / len(values) for values in gains.values()]
    return sum(means) / len(means), tuple(sorted(gains))


def _at_equal_time(
    val: Stat, ms: Stat | None, base: Group | None, gain: float | None
) -> float | None:
    base_ms = None if base is None else base.stat("ms_per_step")
    if ms is None or base_ms is None or gain is None:
        return None
    return val.mean - gain * math.log(base_ms.mean / ms.mean)


def _copying(group: Group, base: Group | None) -> Check:
    if base is None:
        return Check(None, f"no run of {BASE}")
    if group.variant == base.variant:
        return Check(True, "it is what others are held against")
    distances = [
        name
        for name in (base.lines[0].get("copy") or {})
        if name != "nothing" and name in (group.lines[0].get("copy") or {})
    ]
    if not distances:
        return Check(None, "copying not measured")
    worst, passed = None, True
    for name in distances:
        excess = copy_excess(group, base, name)
        if excess is None:
            return Check(None, f"copying from {name} back not measured")
        difference, error = excess
        passed &= difference <= error
        if worst is None or difference - error > worst[1] - worst[2]:
            worst = name, difference, error
    assert worst is not None
    return Check(passed, f"{worst[1]:+.3f} ± {worst[2]:.3f} at {worst[0]}")


def copy_excess(group: Group, base: Group, distance: str) -> tuple[float, float] | None:
    """Returns how much worse a variant copies than another, and the standard error of that.

    Over seeds where both have several, else over the rows that were copied.
    """
    own, other = (part.stat(lambda line: line["copy"].get(distance)) for part in (group, base))
    if own is None or other is None:
        return None
    if own.error is not None and other.error is not None:
        return own.mean - other.mean, math.hypot(own.error, other.error)
    errors = [
        stat((line.get("copy_error") or {}).get(distance) for line in part.lines)
        for part in (group, base)
    ]
    if None in errors:
        return None
    return own.mean - other.mean, math.hypot(*(error.mean for error in errors if error))


def _length(group: Group) -> Check:
    lost = group.stat(
        lambda line: None if line.get("val_4x") is None else line["val_4x"] - line["val"]
    )
    if lost is None:
        return Check(None, "longer rows not measured")
    return Check(lost.mean <= MAX_LENGTH_LOSS, f"{lost.mean:+.3f}")


def _visited(group: Group, name: str, most: float) -> Check:
    share = group.stat(name)
    if share is None:
        return Check(None, f"{name} not measured")
    return Check(share.mean <= most, f"{share.mean:.3f}")
