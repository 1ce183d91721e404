"""How many keys a head can need: the span of each head, from the model's parameters alone.

Where queries and keys are RMS-normalized (`qk_norm`), no score is above U or below -U before
the bias, with U = scale |q| |k| <= sqrt(d) max|g_q| max|g_k|, g being the norms' scales. A query
sees itself, so lse >= -U + b(0), and all keys from distance S on together hold at most

    sum over x >= S of exp(2 U + b(x) - b(0))

of its softmax mass. The span is the least S for which that is at most `skip_mass`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lazyattn.errors import require
from lazyattn.generation import cache as cache_lib
from lazyattn.generation.cache import (
    SPARE,
    CacheDtype,
    CacheOptions,
    CachePlan,
    HeadGroup,
    check_buckets,
)
from lazyattn.generation.rings import ROUNDINGS
from lazyattn.model import query_key_norm
from lazyattn.model.config import ModelConfig
from lazyattn.model.distance_bias import bias_arguments
from lazyattn.model.heads import head_windows
from lazyattn.quantity import quantity
from pallas_kernels.decode.types import MAX_CACHES, PAGE


def everything_kept(params: Mapping[str, Any], config: ModelConfig) -> str | None:
    """Returns why no head can forget, as the end of "... since ..."; None: some may.

    Windows are not spoken of: they bound spans all the same.
    """
    attention = config.attention
    if not attention.qk_norm:
        return "the model has no qk_norm, so that its parameters bound no score"
    if not attention.has_bias:
        return "the model has no distance bias"
    if attention.has_offset:
        offsets = np.stack([np.asarray(x["offset"]) for x in _layers(params, config)])
        if (offsets > 0).all():
            return "all offsets are above 0, which gives every key a weight"
    return None


def head_spans(
    params: Mapping[str, Any],
    config: ModelConfig,
    length: int,
    *,
    skip_mass: float | None = None,
    quantized: bool = False,
) -> Int[np.ndarray, "layers heads"]:
    """Returns how many of its last keys each query head needs, itself included.

    Args:
      params: the model's parameters, unboxed.
      config: the model.
      length: keys a row has at most; also the span of a head that may need all.
      skip_mass: softmax mass that the others may hold; None: the model's own.
      quantized: keys are rounded to int8.
    """
    require(length >= 1, "length", length, "at least 1")
    skip_mass = config.attention.skip_mass if skip_mass is None else skip_mass
    layers = _layers(params, config)
    spans = [_layer_spans(layer, config, length, skip_mass, quantized) for layer in layers]
    windows = [length if window is None else window for window in head_windows(config.attention)]
    return np.minimum(np.stack(spans), windows)


def _layers(params: Mapping[str, Any], config: ModelConfig) -> list[Mapping[str, Any]]:
    """Returns the attention parameters that spans depend on, of each layer."""
    names = "distance_delta distance_log_slope distance_bias distance_slope offset"
    names += " query_norm key_norm"

    def some(attention: Mapping[str, Any]) -> dict[str, Any]:
        return jax.device_get({k: x for k, x in attention.items() if k in names.split()})

    if "blocks" in params:
        stacked = some(params["blocks"]["attention"])
        return [
            jax.tree.map(lambda x, i=i: x[i], stacked)  # type: ignore[misc]
            for i in range(config.num_layers)
        ]
    return [some(params[f"blocks_{i}"]["attention"]) for i in range(config.num_layers)]


def score_bound(layer: Mapping[str, Any], config: ModelConfig, *, quantized: bool = False) -> float:
    """Returns U, which no score of a layer exceeds before the bias, in nats; inf: not known.

    Args:
      layer: the attention layer's parameters.
      config: the model.
      quantized: keys are rounded to int8.
    """
    if not config.attention.qk_norm:
        return math.inf
    scales = (np.asarray(layer[name]["scale"], np.float64) for name in ("query_norm", "key_norm"))
    bound = float(query_key_norm.score_bound(config, *scales))
    if quantized:
        # |error| <= sqrt(d) times so many halves of max|k| / 127, and max|k| <= |k|'s bound.
        bound *= 1 + ROUNDINGS * math.sqrt(config.head_dim) / 254
    return bound


def _layer_spans(
    layer: Mapping[str, Any], config: ModelConfig, length: int, skip_mass: float, quantized: bool
) -> Int[np.ndarray, " heads"]:
    heads = config.attention.num_heads
    bound = score_bound(layer, config, quantized=quantized)
    if not config.attention.has_bias or not math.isfinite(bound) or skip_mass <= 0:
        return np.full(heads, length)
    bias = {
        name: np.asarray(x, np.float64)
        for name, x in bias_arguments(layer, config.attention).items()
    }
    spans = np.empty(heads, np.int64)
    for head in range(heads):
        slope = bias["distance_slope"][head] if "distance_slope" in bias else None
        table = bias["distance_bias"][head][:length]
        spans[head] = span(table, bound, skip_mass, slope=slope, length=length)
    if config.attention.has_offset:
        spans[np.asarray(layer["offset"]) > 0] = length
    return spans


def span(
    bias: Float[np.ndarray, " width"],
    bound: float,
    skip_mass: float,
    *,
    slope: float | None = None,
    length: int | None = None,
) -> int:
    """Returns the least S for which all keys from distance S on hold at most `skip_mass`.

    Args:
      bias: b(x) of the first distances, float64.
      bound: U, in nats.
      skip_mass: above 0.
      slope: how the bias goes on past them, as in `lazy_attention`; None: it is 0 there.
      length: how many distances there are; None: those of `bias`.
    """
    width = len(bias)
    length = width if length is None else length
    if not math.isfinite(bias[0]) or np.isnan(bias).any() or np.isnan(slope or 0.0):
        return length

    def tail(start: int) -> float:
        """Returns the mass from a distance past the table on, a geometric series."""
        number, rate = length - start, slope or 0.0
        if number <= 0:
            return 0.0
        near = 0.0 if slope is None else bias[-1] - rate * (start - (width - 1))
        largest = max(near, near - rate * (number - 1))
        decay = abs(rate)
        terms = number if decay == 0 else math.expm1(-decay * number) / math.expm1(-decay)
        with np.errstate(over="ignore"):
            return float(np.exp(2 * bound + largest - bias[0])) * terms

    allowed = skip_mass * (1 - 1e-9)
    if tail(width) > allowed:
        # The mass falls as the start grows: `low` is too near, `high` is far enough.
        low, high = width, length
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tail(middle) > allowed else (low, middle)
        return high
    with np.errstate(over="ignore"):
        mass = np.exp(2 * bound + (bias - bias[0]))
    # From the far end, where the smallest are: sums of float64 lose nothing that counts.
    beyond = tail(width) + np.cumsum(mass[::-1])[::-1]
    needed = np.flatnonzero(beyond > allowed)
    return max(1, int(needed[-1]) + 1) if needed.size else 1


def plan_cache(
    params: Mapping[str, Any],
    config: ModelConfig,
    cache_length: int,
    *,
    dtype: CacheDtype = "compute",
    buckets: tuple[int, ...] | None = None,
) -> CachePlan:
    """Returns the plan of a cache in which each head keeps the keys that it can need.

    Half of the model's `skip_mass` goes to keys that are no longer held, half to pages that
    decoding skips. Heads whose span no bucket has room for hold all of `cache_length`.

    Args:
      params: the model's parameters, unboxed; read here, so no tracers.
      config: the model.
      cache_length: tokens each row has room for.
      dtype: what keys and values are held in.
      buckets: lengths of rings, shortest first; None: those with which least is held.

    Raises:
      InputError: for a length below 1, heads that the mesh can't share out, or buckets that
        are too short, or not in order.
    """
    if buckets is not None:
        check_buckets(buckets)
    full = cache_lib.full_plan(config, cache_length, dtype=dtype)
    spans = head_spans(
        params,
        config,
        cache_length,
        skip_mass=config.attention.skip_mass / 2,
        quantized=full.quantized,
    )
    kv_heads = config.attention.kv_heads
    # Of the query heads of a key/value head, and of the devices' heads of one number.
    by_kv_head = spans.reshape(len(spans), full.shards, kv_heads // full.shards, -1).max(
        axis=(1, 3)
    )
    windows = cache_lib.kv_windows(config, full.shards)
    if buckets is None:
        buckets = best_lengths((by_kv_head + SPARE).ravel().tolist(), cache_length)

    def groups(layer: Int[np.ndarray, " kv_heads"]) -> tuple[HeadGroup, ...]:
        found: dict[tuple[int, int | None], list[int]] = {}
        for head, (needed, window) in enumerate(zip(layer.tolist(), windows, strict=True)):
            room = [n for n in buckets if needed + SPARE <= n < cache_length]
            found.setdefault((min(room, default=cache_length), window), []).append(head)
        return tuple(HeadGroup(tuple(heads), *key) for key, heads in found.items())

    return CachePlan(
        cache_length,
        tuple(map(groups, by_kv_head)),
        full.head_dim,
        full.dtype,
        full.shards,
        full.skip_mass / 2,
    )


def best_lengths(
    needed: Sequence[int], cache_length: int, number: int = MAX_CACHES
) -> tuple[int, ...]:
    """Returns at most `number` lengths of whole pages with which the fewest keys are held.

    One of them may be that of the cache, which is not returned.

    Args:
      needed: keys that each head must hold.
      cache_length: the longest length.
      number: of lengths; a step has one launch of its kernels for so many.
    """
    pages_needed = [min(-(-n // PAGE) * PAGE, cache_length) for n in needed]
    lengths = sorted(set(pages_needed))
    heads = [pages_needed.count(length) for length in lengths]
    # held[k][n]: the fewest keys of the heads of the n shortest lengths, in k lengths.
    before = [0.0] + [math.inf] * len(lengths)
    choices: list[list[int]] = []
    for _ in range(number):
        held, choice = [0.0], [0]
        for n in range(1, len(lengths) + 1):
            options = [before[m] + sum(heads[m:n]) * lengths[n - 1] for m in range(n)]
            choice.append(int(np.argmin(options)))
            held.append(options[choice[-1]])
        before = held
        choices.append(choice)
    found, n = [], len(lengths)
    for choice in reversed(choices):
        if n:
            found.append(lengths[n - 1])
            n = choice[n]
    return tuple(length for length in reversed(found) if length < cache_length)


def plan_by(
    params: Mapping[str, Any], config: ModelConfig, cache_length: int, options: CacheOptions
) -> CachePlan:
    """Returns the plan that the options ask for; arguments and errors as in `plan_cache`."""
    if options.kind == "full":
        return cache_lib.full_plan(config, cache_length, dtype=options.dtype)
    return plan_cache(params, config, cache_length, dtype=options.dtype, buckets=options.buckets)


def describe(plan: CachePlan, batch: int) -> str:
    """Returns what a cache holds, for people: bytes, their share of all, and the groups."""
    whole = sum(len(g.heads) for layer in plan.layers for g in layer) * plan.length
    held = sum(len(g.heads) * g.slots for layer in plan.layers for g in layer)
    sizes: dict[int, int] = {}
    for layer in plan.layers:
        for group in layer:
            sizes[group.slots] = sizes.get(group.slots, 0) + len(group.heads) * plan.shards
    kept = ", ".join(f"{slots:,} ({heads} heads)" for slots, heads in sorted(sizes.items()))
    total = cache_lib.in_bytes(plan.row_bytes * batch)
    return (
        f"{total} for {quantity(batch, 'row')} of {quantity(plan.length, 'token')}, {plan.dtype},"
        f" {held / whole:.1%} of all keys and values; keys held: {kept}"
    )
