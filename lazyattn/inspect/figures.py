"""The figures' numbers as plain data, fit for JSON: what the page draws and nothing else."""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lazyattn.checkpoint.load import TrainedModel
from lazyattn.inspect.cache import cache_data
from lazyattn.inspect.measure import Measured
from lazyattn.inspect.sequences import LENGTH, THRESHOLD, InsertedToken, SinkMetric
from lazyattn.inspect.tiles import SIZES, cost_over_softmax
from lazyattn.inspect.weights import cell_size
from lazyattn.model.accounting import parameter_counts
from lazyattn.model.distance_bias import bias_arguments
from lazyattn.model.parameters import stack_blocks
from pallas_kernels import bias as bias_lib

_SPAN = 0.95
_MAPS = 12
_CURVE_POINTS = 160

_ByHead = Float[np.ndarray, "layers heads"]


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What was measured of a model.

    Attributes:
      measured: on rows of text.
      sink: the sink metric.
      inserted: the inserted-token test.
      rows: rows of text.
      length: tokens of a row.
      tokens: the first row's, for people.
    """

    measured: Measured
    sink: SinkMetric
    inserted: InsertedToken
    rows: int
    length: int
    tokens: list[str]


def model_data(
    label: str,
    model: TrainedModel,
    found: Inspected,
    heads: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Returns all that the page shows of a model.

    Args:
      label: what the page calls it.
      model: the model.
      found: what was measured.
      heads: (layer, head) of the attention maps; none: some of all layers. Those that
        the model lacks are left out.
    """
    config = model.experiment.model
    matrices = head_matrices(found.measured, config.attention.has_offset)
    learned = _learned(model, found.length)
    if "offset" in learned:
        matrices["offset"] = learned["offset"]
    heads = heads or default_heads(matrices["mean_distance"])
    return {
        "label": label,
        "step": model.step,
        "variant": config.attention.variant,
        "parameters": parameter_counts(model.params)["total"],
        "layers": config.num_layers,
        "heads": config.attention.num_heads,
        "trained_length": model.experiment.data.sequence_length,
        "skip_mass": config.attention.skip_mass,
        "has_offset": config.attention.has_offset,
        "rows": found.rows,
        "length": found.length,
        "tokens": found.tokens,
        "matrices": {name: _plain(values) for name, values in matrices.items()},
        "summary": summary(found, matrices),
        "allocation": _allocation(found.measured),
        "distance": _distance(found.measured),
        "bias": learned.get("bias"),
        "cache": cache_data(model),
        "sink": {
            "by_position": _plain(found.sink.by_position),
            "first_weight": _plain(found.sink.first_weight),
            "sequences": found.sink.sequences,
            "length": LENGTH,
            "threshold": THRESHOLD,
        },
        "inserted": {
            "places": list(found.inserted.places),
            "weight": _plain(found.inserted.weight.mean(axis=2)),
            "before": _plain(found.inserted.before.mean(axis=2)),
        },
        "states": {
            name: _plain(found.measured.states[name])
            for name in ("cosine", "top", "median", "token", "dimension")
        },
        "rollout": _rollout(found.measured),
        "maps": [
            _map(found.measured, found.length, layer, head)
            for layer, head in heads
            if layer < config.num_layers and head < config.attention.num_heads
        ],
    }


def head_matrices(measured: Measured, has_offset: bool) -> dict[str, _ByHead]:
    """Returns the numbers that every layer and head has one of.

    Returns:
      zeros (share of visible pairs), silent (share of queries that attend to nothing),
      mass (mean sum of a query's weights), first_token (mean weight, of later queries),
      first_share (of the surviving weight), entropy_softmax and entropy (nats),
      mean_distance and span (tokens; the distance within which 95% of the surviving
      weight lies), reach (largest distance with any weight), and for tiles of 64 and
      128: visited, live, inference and training (cost over softmax attention).
    """
    sums, tiles = measured.sums, measured.tiles
    by_distance = sums["distance"]
    total = np.maximum(by_distance.sum(axis=-1), 1e-30)
    index = np.arange(by_distance.shape[-1])
    within = np.cumsum(by_distance, axis=-1) / total[..., None]
    kept = {
        "zeros": sums["zeros"] / sums["pairs"],
        "silent": 1 - sums["attending"] / sums["queries"],
        "mass": sums["mass"] / sums["queries"],
        "first_token": sums["first"] / np.maximum(sums["later"], 1),
        "first_share": sums["first"] / np.maximum(sums["mass_later"], 1e-30),
        "entropy_softmax": sums["entropy_softmax"] / sums["queries"],
        "entropy": sums["entropy"] / np.maximum(sums["attending"], 1),
        "mean_distance": (by_distance * index).sum(axis=-1) / total,
        # Past the end only where nothing has any weight.
        "span": np.minimum((within < _SPAN).sum(axis=-1), index[-1]) * (total > 1e-30),
        "reach": np.where(by_distance > 0, index, 0).max(axis=-1),
    }
    for size in SIZES:
        visited = tiles[f"visited_{size}"] / tiles[f"causal_{size}"]
        live = tiles[f"live_{size}"] / tiles[f"causal_{size}"]
        cost = cost_over_softmax(visited, live, has_offset)
        kept |= {
            f"visited_{size}": visited,
            f"live_{size}": live,
            f"inference_{size}": cost["inference"],
            f"training_{size}": cost["training"],
        }
    return kept


def summary(found: Inspected, matrices: dict[str, _ByHead]) -> dict[str, float]:
    """Returns the means over layers and heads, and the scalars of the whole model."""
    names = ["zeros", "silent", "mass", "first_token", "entropy", "span"]
    for what in ("visited", "live", "inference", "training"):
        names += [f"{what}_{size}" for size in SIZES]
    states = found.measured.states
    numbers = {name: matrices[name].mean() for name in names}
    # Of all the attention there is: heads that keep little count for little.
    sums = found.measured.sums
    numbers["first_share"] = sums["first"].sum() / max(sums["mass_later"].sum(), 1e-30)
    numbers["sink"] = found.sink.by_position[0]
    numbers["cosine"] = states["cosine"][-1]
    numbers["massive"] = (states["top"][:, 0] / np.maximum(states["median"], 1e-30)).max()
    numbers["rollout_first"] = found.measured.rollout_first[-1]
    return {name: _plain(value) for name, value in numbers.items()}


def default_heads(mean_distance: _ByHead) -> tuple[tuple[int, int], ...]:
    """Returns the heads whose maps are drawn: all, or of three layers from near to far."""
    layers, heads = mean_distance.shape
    if layers * heads <= _MAPS:
        return tuple((layer, head) for layer in range(layers) for head in range(heads))
    some = sorted({0, layers // 2, layers - 1})
    each = min(heads, _MAPS // len(some))
    found = []
    for layer in some:
        order = np.argsort(mean_distance[layer], kind="stable")
        places = np.linspace(0, heads - 1, each).round().astype(int)
        found += [(layer, int(head)) for head in order[places]]
    return tuple(found)


def summary_table(models: Sequence[dict[str, Any]]) -> str:
    """Returns the summaries of models side by side, for the terminal."""
    shown = {
        "zeros": ("exact zeros", "{:.1%}"),
        "silent": ("queries that attend to nothing", "{:.1%}"),
        "mass": ("weight kept of 1", "{:.3f}"),
        "first_token": ("mean weight on the first token", "{:.4f}"),
        "sink": ("sink metric, first token", "{:.1%}"),
        "live_64": ("live tiles of 64 x 64", "{:.1%}"),
        "visited_64": ("visited tiles of 64 x 64", "{:.1%}"),
        "training_64": ("training cost over softmax, counted", "{:.2f}"),
        "span": ("span, tokens", "{:.0f}"),
        "cosine": ("mean cosine of last states", "{:.3f}"),
    }
    width = max(12, *(len(model["label"]) + 2 for model in models))
    lines = [" " * 38 + "".join(f"{model['label']:>{width}}" for model in models)]
    for name, (text, form) in shown.items():
        values = (form.format(model["summary"][name]) for model in models)
        lines.append(f"{text:38}" + "".join(f"{value:>{width}}" for value in values))
    return "\n".join(lines)


def _allocation(measured: Measured) -> list[list[float]]:
    """Returns for each layer the mean weight of later queries on the first token, elsewhere,
    and what was removed of 1."""
    sums = measured.sums
    later = np.maximum(sums["later"], 1)
    first = (sums["first"] / later).mean(axis=1)
    elsewhere = (sums["mass_later"] / later).mean(axis=1) - first
    return _plain(np.stack([first, elsewhere, 1 - first - elsewhere], axis=-1))


def _distance(measured: Measured) -> dict[str, Any]:
    """Returns the share of surviving weight within each of some distances, by head."""
    by_distance = measured.sums["distance"]
    within = np.cumsum(by_distance, axis=-1)
    within /= np.maximum(within[..., -1:], 1e-30)
    at = _log_spaced(by_distance.shape[-1])
    return {"at": at.tolist(), "within": _plain(within[..., at])}


def _learned(model: TrainedModel, length: int) -> dict[str, Any]:
    """Returns tau by layer and head, and each head's bias at some distances."""
    config = model.experiment.model
    params = model.params if config.scan_layers else stack_blocks(model.params)
    attention = jax.device_get(params["blocks"]["attention"])
    found: dict[str, Any] = {}
    if config.attention.has_offset:
        found["offset"] = np.asarray(attention["offset"], np.float64)
    if config.attention.has_bias:
        bias = bias_arguments(attention, config.attention)
        table, slope = bias["distance_bias"], bias.get("distance_slope")
        far = max(length, model.experiment.data.sequence_length)
        curves = np.stack(
            [
                np.asarray(bias_lib.expand(rows, None if slope is None else slope[i], far))
                for i, rows in enumerate(table)
            ]
        )
        at = _log_spaced(far)
        found["bias"] = {
            "at": at.tolist(),
            "curves": _plain(curves[..., at]),
            "table": table.shape[-1],
            "tail": slope is not None,
        }
    return found


def _log_spaced(length: int) -> Any:
    return np.unique(np.geomspace(1, length, _CURVE_POINTS).round().astype(int)) - 1


def _rollout(measured: Measured) -> dict[str, Any]:
    length, columns = measured.rollout.shape
    size = cell_size(length)
    starts = np.arange(0, length, size)
    counts = np.diff([*starts, length])
    cells = np.add.reduceat(measured.rollout, starts, axis=0) / counts[:, None]
    return {
        "rows": len(starts),
        "columns": columns,
        "image": _image(cells, float(cells.max())),
        "largest": _plain(cells.max()),
        "first": _plain(measured.rollout_first),
    }


def _map(measured: Measured, length: int, layer: int, head: int) -> dict[str, Any]:
    cell = cell_size(length)
    cells = -(-length // cell)
    image = measured.maps[layer, head, :cells, :cells]
    return {
        "layer": layer,
        "head": head,
        "cells": cells,
        "cell": cell,
        "image": _image(image, 1.0),
    }


def _image(values: Float[np.ndarray, "rows columns"], largest: float) -> str:
    """Returns a byte a cell, base64: 0 exactly 0, else 1 to 255 as the square root grows."""
    share = np.sqrt(np.clip(values / max(largest, 1e-30), 0, 1))
    level = np.where(values > 0, 1 + np.round(254 * share), 0)
    return base64.b64encode(level.astype(np.uint8).tobytes()).decode()


def _plain(values: Any) -> Any:
    """Returns numbers as Python has them, to five digits; what isn't finite as None."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [_plain(value) for value in values]
    number = float(values)
    return float(f"{number:.5g}") if np.isfinite(number) else None
