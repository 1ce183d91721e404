"""The definition once more, row by row in numpy: what the oracle itself is held to."""

from typing import Any

import numpy as np


def naive_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    distance_bias: np.ndarray | None = None,
    distance_slope: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
    offset_divisor: Any = "visible",
    renormalize: bool = False,
    window: int | None = None,
    scale: float | None = None,
    skip_mass: float = 0.0,
    sink: np.ndarray | None = None,
    soft_cap: float | None = None,
    prefix: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns out and weights in float64."""
    del skip_mass
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    bias = None
    if distance_bias is not None:
        bias = np.array(
            [
                [naive_bias(distance_bias[h], distance_slope, h, x) for x in range(length)]
                for h in range(heads)
            ]
        )
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros((batch, length, heads, value.shape[-1]))
    weights = np.zeros((batch, heads, length, length))
    for b in range(batch):
        start = 0
        for i in range(length):
            if segment_ids is not None and i > 0 and segment_ids[b, i] != segment_ids[b, i - 1]:
                start = i
            first = start
            while window is not None and i - first >= window:
                first += 1
            seen = list(range(first, i + 1))
            for j in range(i + 1, length):
                if segment_ids is not None and segment_ids[b, j] != segment_ids[b, i]:
                    break
                if prefix is not None and prefix[b, j]:
                    seen.append(j)
            for h in range(heads):
                scores = scale * key[b, seen, h // group] @ query[b, i, h]
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                if bias is not None:
                    scores = scores + bias[h, np.abs(i - np.array(seen))]
                p = np.exp(scores - max(scores))
                p /= p.sum() + (0 if sink is None else np.exp(np.float64(sink[h]) - max(scores)))
                if offset is not None:
                    divisor = len(p) if offset_divisor == "visible" else offset_divisor
                    p = np.maximum(0, p + np.float64(offset[h]) / divisor)
                    if renormalize and p.sum() > 0:
                        p /= p.sum()
                weights[b, h, i, seen] = p
                out[b, i, h] = p @ value[b, seen, h // group]
    return out, weights


def naive_bias(table: np.ndarray, slopes: np.ndarray | None, head: int, x: int) -> float:
    """Returns b_h(x)."""
    if x < len(table):
        return float(table[x])
    if slopes is None:
        return 0.0
    return float(table[-1]) - float(slopes[head]) * (x - (len(table) - 1))
