"""The definition of Lazy Attention in numpy and float64, gradients and error bounds included.

It shares no code with the package: formulas are those of docs/lazy_attention.md, written down
once more, with quadratic memory.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a call should give.

    Attributes:
      results: "out" and the gradient of every float argument.
      scales: for each the sum of the absolute values of what is added up for it: a relative
        error e of all softmax weights alike changes a result by about e times that.
      spreads: the root of the sum of squares instead, for roundings that are independent.
      blind: [batch, length, heads], rows that see nothing: they are NaN.
      unsure: [batch, length, heads], rows that rounding may change at will, since a weight lies
        at the threshold, or all that is left of a row to be normalized is about 0.
      largest_score: magnitude of the largest score.
    """

    results: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    spreads: dict[str, np.ndarray]
    blind: np.ndarray
    unsure: np.ndarray
    largest_score: float


def document_starts(ids: np.ndarray) -> np.ndarray:
    """Returns where the document of each position starts, one position after the other."""
    starts = np.zeros(ids.shape, np.int64)
    for row in range(ids.shape[0]):
        for j in range(1, ids.shape[1]):
            starts[row, j] = starts[row, j - 1] if ids[row, j] == ids[row, j - 1] else j
    return starts


def places(args: dict[str, Any]) -> np.ndarray:
    """Returns the key that stands at each query's own position, [batch, length]."""
    batch, length = args["query"].shape[:2]
    if args.get("chunk_starts") is not None:
        starts = np.asarray(args["chunk_starts"])
        size = length // len(starts)
        one = np.concatenate([start + np.arange(size) for start in starts])
        return np.broadcast_to(one, (batch, length))
    start = args.get("query_start")
    start = np.zeros(batch, np.int64) if start is None else np.asarray(start)
    return start[:, None] + np.arange(length)


def truth(args: dict[str, Any], d_out: np.ndarray, unit: float) -> Truth:
    """Returns output and gradients of a call.

    Args:
      args: of `lazy_attention`.
      d_out: cotangent of the output; rows that are unsure are left out of the gradients.
      unit: relative error of the softmax weights that are computed.
    """
    arrays = {
        name: np.asarray(args[name], np.float64)
        for name in ("query", "key", "value", "distance_bias", "distance_slope", "offset")
        if args.get(name) is not None
    }
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    batch, length, heads, head_dim = query.shape
    key_length, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    key, value = np.repeat(key, group, axis=2), np.repeat(value, group, axis=2)
    scale = args.get("scale")
    scale = 1 / np.sqrt(head_dim) if scale is None else scale

    position = places(args)
    keys = np.arange(key_length)
    distance = position[:, :, None] - keys
    seen = distance >= 0
    if args.get("segment_ids") is not None:
        starts = document_starts(np.asarray(args["segment_ids"]))
        own = np.take_along_axis(starts, position, axis=1)
        seen &= keys >= own[:, :, None]
    if args.get("window") is not None:
        seen &= distance < args["window"]
    count = seen.sum(axis=-1)
    seen = np.broadcast_to(seen[:, None], (batch, heads, length, key_length))

    scores = scale * np.einsum("bqhd,bkhd->bhqk", query, key)
    table, slope = arrays.get("distance_bias"), arrays.get("distance_slope")
    if table is not None:
        width = table.shape[1]
        bias = table[:, np.clip(distance, 0, width - 1)]
        past = np.maximum(distance - (width - 1), 0)
        tail = 0.0 * past if slope is None else bias - slope[:, None, None, None] * past
        scores = scores + np.where(distance < width, bias, tail).swapaxes(0, 1)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    blind = ~np.isfinite(top[..., 0])
    exponentials = np.exp(scores - np.where(np.isfinite(top), top, 0))
    with np.errstate(invalid="ignore"):
        softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    softmax = np.where(blind[..., None], 0.0, softmax)

    tau, slack, live = arrays.get("offset"), np.zeros(()), seen
    per_row = np.zeros((batch, 1, length, 1))
    weights = softmax
    if tau is not None:
        divisor = args.get("offset_divisor", "visible")
        per_row = 1 / count[:, None, :, None] if divisor == "visible" else per_row + 1 / divisor
        threshold = tau[:, None, None] * per_row
        shifted = softmax + threshold
        live = seen & (shifted > 0)
        weights = np.where(live, shifted, 0.0)
        slack = np.where(live, np.abs(threshold), 0.0)
        near = np.abs(shifted) <= 8 * unit * (softmax + np.abs(threshold))
        # Weights too small for float32 are 0 there.
        near |= np.abs(shifted) < (1e-300 if unit < 1e-10 else 1e-30)
        unsure = (seen & near & (count[:, None, :, None] > 1)).any(axis=-1)
    else:
        unsure = np.zeros((batch, heads, length), bool)
    size = softmax + slack
    total = np.ones((batch, heads, length, 1))
    amplified = total
    if args.get("renormalize"):
        total = weights.sum(axis=-1, keepdims=True)
        unsure |= (total[..., 0] < 1e-3) & (total[..., 0] > 0)
        total = np.where(total > 0, total, 1.0)
        weights = weights / total
        amplified = 1 + size.sum(axis=-1, keepdims=True) / total
    size = size / total * amplified

    d_out = np.array(d_out, np.float64)
    d_out[(unsure | blind).swapaxes(1, 2)] = 0.0
    out = np.einsum("bhqk,bkhd->bqhd", weights, value)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, value)
    d_size = np.einsum("bqhd,bkhd->bhqk", np.abs(d_out), np.abs(value))
    if args.get("renormalize"):
        d_weights = (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / total
        d_size = (d_size + (weights * d_size).sum(axis=-1, keepdims=True)) / total * amplified
    d_live, d_size = np.where(live, d_weights, 0.0), np.where(live, d_size, 0.0)
    delta = (softmax * d_live).sum(axis=-1, keepdims=True)
    delta_size = ((softmax + 2 * slack) * d_size).sum(axis=-1, keepdims=True)
    d_scores = softmax * (d_live - delta)
    score_size = softmax * (d_size + delta_size)

    def by_key_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, key_length, kv_heads, group, -1).sum(axis=3)

    # What rounded weights leave of delta, the same error for all keys of a query.
    of_delta = np.sqrt(((weights * total * d_live) ** 2).sum(axis=-1, keepdims=True))
    roundings = d_scores**2 + (softmax * of_delta) ** 2
    found: dict[str, list[np.ndarray]] = {"out": [], "query": [], "key": [], "value": []}
    for w, ds, magnitude in (
        (weights, d_scores, lambda x: x),
        (size, score_size, np.abs),
        (weights**2, roundings, np.square),
    ):
        found["out"].append(np.einsum("bhqk,bkhd->bqhd", w, magnitude(value)))
        found["query"].append(abs(scale) * np.einsum("bhqk,bkhd->bqhd", ds, magnitude(key)))
        of_key = np.einsum("bhqk,bqhd->bkhd", ds, magnitude(query))
        found["key"].append(by_key_head(abs(scale) * of_key))
        found["value"].append(by_key_head(np.einsum("bhqk,bqhd->bkhd", w, magnitude(d_out))))
        if table is not None:
            d_table, d_slope = np.zeros(table.shape), np.zeros(heads)
            moments = np.zeros(heads)
            for row in range(batch):
                x = np.where(seen[row, 0], distance[row], -1).ravel()
                for head in range(heads):
                    flat = ds[row, head].ravel()
                    inside, beyond = (x >= 0) & (x < width), x >= width
                    d_table[head] += np.bincount(x[inside], flat[inside], minlength=width)
                    if slope is not None:
                        d_table[head, width - 1] += flat[beyond].sum()
                        far = magnitude(x[beyond] - float(width - 1))
                        moments[head] += (flat[beyond] * far).sum()
            d_slope = -moments if magnitude not in (np.abs, np.square) else moments
            found.setdefault("distance_bias", []).append(d_table)
            if slope is not None:
                found.setdefault("distance_slope", []).append(d_slope)
    if scale < 0:
        for name in ("query", "key"):
            found[name][0] = -found[name][0]
    if tau is not None:
        parts = (per_row * d_live, per_row * d_size, (per_row * d_live) ** 2)
        found["offset"] = [x.sum(axis=(0, 2, 3)) for x in parts]
    found["out"][0] = out
    spreads = {name: np.sqrt(x) for name, (_, _, x) in found.items()}
    # Of the squares: one factor of the scale is taken already.
    spreads["query"] *= np.sqrt(abs(scale))
    spreads["key"] *= np.sqrt(abs(scale))
    mean_key = np.einsum("bhqk,bkhd->bqhd", softmax, key)
    spreads["query"] += abs(scale) * of_delta[..., 0].swapaxes(1, 2)[..., None] * np.abs(mean_key)
    return Truth(
        {name: x for name, (x, _, _) in found.items()},
        {name: x for name, (_, x, _) in found.items()},
        spreads,
        blind.swapaxes(1, 2),
        unsure.swapaxes(1, 2),
        float(np.abs(scores[np.isfinite(scores)]).max(initial=0.0)),
    )
