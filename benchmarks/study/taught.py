"""The table of softmax runs that were taught to be lazy, from the lines of `uptrain`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.study.summary import Line, good, stat

# What runs start from, and the variant that is the control.
BASE = "softmax"


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Returns rows of a table: kinds of runs by tokens and variant, means over seeds."""
    kinds: dict[tuple[Any, ...], list[Line]] = {}
    for line in good(lines):
        kinds.setdefault(_kind(line), []).append(line)
    rows = []
    before = [(line["base"], line.get("before", {})) for line in good(lines)]
    bases = list({base: line for base, line in before if "sink" in line}.values())
    if bases:
        rows.append(["0", f"`{BASE}`, as it was", "", "", *_cells(bases, {})])
    for kind in sorted(kinds):
        tokens, _, name, rate, ramp = kind
        controls = {line["seed"]: line for line in kinds.get((tokens, *_CONTROL, rate, 0.0), [])}
        about = [f"{tokens / 1e6:g}M", name, f"{rate:g}", f"{ramp:g}" if ramp else ""]
        rows.append([*about, *_cells(kinds[kind], {} if name == _CONTROL[1] else controls)])
    return rows


# Of a kind: whether it is lazy, and its name.
_CONTROL = False, f"`{BASE}`"


def _kind(line: Line) -> tuple[int, bool, str, float, float]:
    share = line["settings"].get("teaching", {}).get("slope_share", 1.0)
    name = f"`{line['variant']}`" + ("" if share == 1 else f", slopes times {share:g}")
    ramp = round(line["ramp_steps"] * 65_536 / line["tokens"], 1)
    rate = float(line["learning_rate"])
    return int(line["tokens"]), line["variant"] != BASE, name, rate, ramp


HEAD = (
    "tokens | attention | learning rate | ramp | seeds | loss | over softmax | rows of 16,384"
    " | sink | visited at 4,096 | live | copy from 512 back | from 2,048 | pass key at 512"
    " | at 2,048"
)


def _cells(lines: Sequence[Line], controls: Mapping[int, Line]) -> list[str]:
    def over(line: Line) -> float | None:
        control = controls.get(line.get("seed", -1))
        return None if control is None else line["val"] - control["val"]

    cells = [str(len(lines))]
    gets: list[tuple[Callable[[Line], Any], int]] = [
        (lambda line: line["val"], 3),
        (over, 3),
        (lambda line: line["val_4x"], 2),
        (lambda line: line["sink"], 4),
        (lambda line: line["visited_4096"], 2),
        (lambda line: line["live_4096"], 2),
    ]
    for key, digits in (("copy", 2), ("passkey", 2)):
        gets += [(functools.partial(_at, key, distance), digits) for distance in ("512", "2048")]
    for get, digits in gets:
        found = stat(get(line) for line in lines)
        cells.append("" if found is None else found.text(digits))
    return cells


def _at(key: str, distance: str, line: Line) -> float | None:
    return line[key].get(distance)
