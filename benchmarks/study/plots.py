"""The pictures of docs/results.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.summary import Group


def draw(found: Mapping[str, Group], folder: Path) -> dict[str, Path]:
    """Draws all pictures there are numbers for; returns them by name.

    Args:
      found: runs by variant, in the order of the legend.
      folder: where they go.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, function in _PICTURES.items():
        path = folder / f"study_{name}.png"
        if function(found, path):
            drawn[name] = path
    return drawn


def _panels(found: Mapping[str, Group], number: int) -> tuple[Any, Any, dict[str, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * number + 2.2, 3.8), layout="constrained")
    panels = figure.subplots(1, number, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.6)
    palette, size = ("tab20", 20) if len(found) > 10 else ("tab10", 10)
    colors = {name: matplotlib.colormaps[palette](i % size) for i, name in enumerate(found)}
    return figure, panels, colors


def _finish(figure: Any, panels: Any, path: Path) -> bool:
    handles, labels = panels[0].get_legend_handles_labels()
    if not labels:
        return False
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def mean_curve(
    points: Sequence[Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Returns x, mean and standard error (0 for one seed) of curves that share their x."""
    curves = [np.asarray(own, float) for own in points if own]
    curves = [curve for curve in curves if curve.ndim == 2 and curve.shape == curves[0].shape]
    curves = [curve for curve in curves if np.array_equal(curve[:, 0], curves[0][:, 0])]
    if not curves:
        return None
    y = np.stack([curve[:, 1] for curve in curves])
    error = y.std(axis=0, ddof=1) / len(y) ** 0.5 if len(y) > 1 else np.zeros(y.shape[1])
    return curves[0][:, 0], y.mean(axis=0), error


def _loss(found: Mapping[str, Group], path: Path) -> bool:
    figure, panels, colors = _panels(found, 2)
    for name, group in found.items():
        curve = mean_curve([[[p[0], p[2]] for p in line.get("curve", [])] for line in group.lines])
        if curve is None:
            continue
        tokens, loss, _ = curve
        line = group.lines[0]
        settings = line["settings"]["data"]
        step = settings["batch_size"] * settings["sequence_length"]
        ms = group.stat("ms_per_step")
        panels[0].plot(tokens / 1e6, loss, color=colors[name], label=name, lw=1.2)
        if ms is not None:
            seconds = tokens / step * ms.mean / 1000
            panels[1].plot(seconds, loss, color=colors[name], lw=1.2)
    ends = [panel.get_lines() for panel in panels]
    last = [x.get_ydata()[-1] for x in ends[0]]
    if last:
        for panel in panels:
            panel.set_ylim(min(last) - 0.1, max(last) + 1.2)
    panels[0].set_xlabel("million tokens")
    panels[1].set_xlabel("seconds, at the measured time of a step of trained weights")
    panels[0].set_ylabel("training loss, nats a token")
    return _finish(figure, panels, path)


def _positions(found: Mapping[str, Group], path: Path) -> bool:
    figure, panels, colors = _panels(found, 2)
    for name, group in found.items():
        for panel, key in zip(panels, ("val_by_position", "val_4x_by_position"), strict=True):
            curve = mean_curve([_centers(line.get(key)) for line in group.lines])
            if curve is not None:
                label = name if panel is panels[0] else None
                panel.errorbar(*curve, color=colors[name], label=label, lw=1.2, ms=3, fmt="o-")
    for panel, title in zip(panels, ("rows as in training", "four times as long"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of its document that a prediction sees")
        panel.set_title(title, fontsize=10)
    panels[0].set_ylabel("validation loss, nats a token")
    return _finish(figure, panels, path)


def _centers(buckets: Any) -> Any:
    return [[(b[0] * b[1]) ** 0.5, b[2]] for b in buckets or []]


def _retrieval(found: Mapping[str, Group], path: Path) -> bool:
    figure, panels, colors = _panels(found, 2)
    for name, group in found.items():
        for panel, key in zip(panels, ("copy", "passkey"), strict=True):
            curve = mean_curve([by_distance(line.get(key)) for line in group.lines])
            if curve is not None:
                label = name if panel is panels[0] else None
                panel.errorbar(*curve, color=colors[name], label=label, lw=1.2, ms=3, fmt="o-")
    for panel, title in zip(
        panels, ("copying, nats a token", "pass keys, share right"), strict=True
    ):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("distance, tokens")
        panel.set_title(title, fontsize=10)
    return _finish(figure, panels, path)


def by_distance(values: Mapping[str, float] | None) -> list[list[float]]:
    """Returns [distance, value] in order, what has no distance left out."""
    found = [(int(name), x) for name, x in (values or {}).items() if name.isdigit()]
    return [[distance, x] for distance, x in sorted(found) if x is not None]


def _visited(found: Mapping[str, Group], path: Path) -> bool:
    figure, panels, colors = _panels(found, 1)
    for name, group in found.items():
        # A line a seed: runs look when their program is ready, not always at the same step.
        for number, line in enumerate(group.lines):
            points = [(p[0], p[1]) for p in line.get("visited_in_training", [])]
            if line.get("visited_4096") is not None:
                points.append((line["tokens"], line["visited_4096"]))
            if points:
                x, y = np.asarray(points, float).T
                label = None if number else name
                panels[0].plot(x / 1e6, y, "o-", ms=3, lw=1.0, color=colors[name], label=label)
    panels[0].set_ylim(0, 1.05)
    panels[0].set_xlabel("million tokens")
    panels[0].set_ylabel("share of the causal tiles visited, 4,096 tokens")
    return _finish(figure, panels, path)


_PICTURES = {
    "loss": _loss,
    "positions": _positions,
    "retrieval": _retrieval,
    "visited": _visited,
}
