"""`--mode=plot`: loss against tokens and time, several runs in one picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazyattn import buckets
from lazyattn.errors import InputError, bad_value
from lazyattn.paths import results
from lazyattn.plot.curves import Curves, names, read
from lazyattn.quantity import duration

_FORMATS = ("svg", "png")


def plot(runs: Sequence[str], output: str | os.PathLike[str] | None = None) -> list[Path]:
    """Draws the losses of runs; prints where the pictures are and what they end at.

    Args:
      runs: their folders.
      output: folder for `loss.svg` and `loss.png`; None: `plot` in the first run's.

    Returns:
      The pictures.

    Raises:
      InputError: if there is no run, matplotlib is missing, or `output` can't be written to.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--mode=plot needs matplotlib, which is not installed; pip install matplotlib."
        ) from None
    found = [read(path, name) for path, name in zip(runs, names(list(runs)), strict=True)]
    target = results(None if output is None else os.fspath(output), runs[0], "plot")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    _draw(figure, found)
    svg, png = (f"loss.{kind}" for kind in _FORMATS)
    try:
        with buckets.written(target) as work:
            work.mkdir(parents=True, exist_ok=True)
            # No date and no random names: the same runs give the same file.
            with matplotlib.rc_context({"svg.hashsalt": "lazyattn"}):
                figure.savefig(work / svg, metadata={"Date": None})
            figure.savefig(work / png, dpi=150)
    except OSError as error:
        allowed = f"a folder that can be written to ({error.strerror})"
        raise bad_value("--output", str(target), allowed) from None
    for curves in found:
        print(_line(curves))
    paths = [target / svg, target / png]
    print("\n".join(map(str, paths)))
    return paths


def _draw(figure: Any, found: Sequence[Curves]) -> None:
    """Draws two panels, with what differs in the horizontal axis."""
    most_tokens = max(curves.training[-1, 0] for curves in found)
    most_seconds = max(curves.training[-1, 1] for curves in found)
    axes = ((0, *_tokens_unit(most_tokens)), (1, *_time_unit(most_seconds)))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (column, unit, label) in zip(panels, axes, strict=True):
        for number, curves in enumerate(found):
            color = f"C{number % 10}"
            for points, style in ((curves.training, "-"), (curves.validation, "o")):
                panel.plot(
                    *(points[:, column] / unit, points[:, 2], style),
                    **{"color": color, "ms": 4, "lw": 1.2, "alpha": 0.7 if style == "-" else 1.0},
                    label=curves.name if style == "-" else None,
                )
        panel.set_xlabel(label)
        panel.grid(alpha=0.25, lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss, nats a token (dots: validation)")
    low, high = _range(found)
    panels[0].set_ylim(low, high)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _range(found: Sequence[Curves]) -> tuple[float, float]:
    """Returns the losses shown: all but the steep fall of the first twentieth."""
    parts = []
    for curves in found:
        late = curves.training[:, 0] >= curves.training[-1, 0] / 20
        parts += [curves.training[late, 2], curves.validation[:, 2]]
    shown = np.concatenate(parts)
    margin = 0.05 * (shown.max() - shown.min()) or 0.1
    return float(shown.min() - margin), float(shown.max() + margin)


def _tokens_unit(most: float) -> tuple[float, str]:
    for unit, name in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if most >= unit:
            return unit, f"{name}tokens"
    return 1.0, "tokens"


def _time_unit(most: float) -> tuple[float, str]:
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if most >= 2 * unit:
            return unit, f"{name} of training"
    return 1.0, "seconds of training"


def _line(curves: Curves) -> str:
    tokens, seconds, loss = curves.training[-1]
    text = (
        f"{curves.name}: {curves.steps:,} steps, {tokens:,.0f} tokens in {duration(seconds)},"
        f" loss {loss:.4f}"
    )
    if len(curves.validation):
        text += f", validation {curves.validation[-1, 2]:.4f}"
    return text
