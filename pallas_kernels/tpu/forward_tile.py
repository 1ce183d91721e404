"""What the forward pass does to one tile: exponentials, weights, products.

`forward_sweeps` says in which order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.tpu.buffers import HALF, Buffers, Layout, Sets, strips, unknown_zero
from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.plan import SUBLANES, Plan
from pallas_kernels.tpu.tile import (
    EVERY,
    LAST_FIRST,
    LOWEST,
    MASKED,
    Bias,
    at_tile,
    dot,
    views,
    visible,
)

# References that hold the queries of a step.
_OF_QUERIES = ("query", "scale", "document", "out", "log_sum", "mean", "rounding")

Strips = Callable[[slice], Array]


def layout(plan: Plan, training: bool) -> Layout:
    """Returns the buffers of a turn."""
    results = ("weights", "alive") if training and plan.has_offset else ("weights",)
    return Layout(plan, ("scores",), results)


def tiles_a_step(plan: Plan) -> int:
    """Returns the tiles of queries of one step."""
    return plan.tiles_a_step if plan.forward_chunks == 1 else 1


def fold(x: Array, combine: Any) -> Array:
    """Combines keys that are a multiple of eight apart: [keys, queries] -> [8, queries]."""
    parts = [x[at : at + SUBLANES] for at in range(0, x.shape[0], SUBLANES)]
    while len(parts) > 1:
        pairs = list(zip(parts[::2], parts[1::2], strict=False))
        parts = [combine(a, b) for a, b in pairs] + parts[2 * len(pairs) :]
    return parts[0]


class QueryTile:
    """One tile of queries, and what is done to each of its tiles."""

    def __init__(self, plan: Plan, training: bool, refs: Any, within: Any):
        self.plan, self.training = plan, training
        self.head, self.step = pl.program_id(1), pl.program_id(3)
        self.query_tile = pl.program_id(2) * tiles_a_step(plan) + within
        row = pl.program_id(0) * plan.heads + self.head
        self.first = refs.first[row * plan.query_tiles + self.query_tile]
        self.diagonal = self.query_tile * plan.ratio
        self.refs = views(refs, _OF_QUERIES, at_tile(within, plan.queries))
        zero = jnp.minimum(self.first, 0)
        self.zero = zero
        self.buffers = Buffers(plan, refs, layout(plan, training))
        self.free = Bias(plan, refs), self.buffers
        self.in_order = Bias(plan, refs, zero), Buffers(plan, refs, layout(plan, training), zero)

    def raw_scores(self, tile: Any, base: Any, skipped: int = 0) -> Array:
        """Returns K Q of a tile; `base` is the first tile in VMEM."""
        refs = self.refs
        key = refs.key[0, 0, at_tile(tile - base, self.plan.keys), :]
        return dot(key, refs.query[:, skipped:], LAST_FIRST)

    def prepare(self, tile: Any, base: Any, into: int) -> None:
        """Stores the raw scores of the tile that the next turn works on."""
        self.buffers.put(into, "scores", self.raw_scores(tile, base), EVERY)

    def prepared(self, of: int) -> Strips:
        """Returns what `prepare` stored, by keys."""
        return lambda keys: self.buffers.load(of, "scores", keys, EVERY)

    def scores(self, tile: Any, raw: Array, keys: slice, skipped: int | None) -> Any:
        """Returns the scores of some keys of a tile, and what is seen of them.

        Args:
          tile: index of the tile.
          raw: `raw_scores` of these keys.
          keys: which ones.
          skipped: queries cut off; None: not on the diagonal.
        """
        plan, refs = self.plan, self.refs
        on_diagonal, skipped = None if skipped is None else keys.start, skipped or 0
        scores = raw * plan.score_scale
        if plan.has_bias:
            scores = scores + self.free[0].tile(self.diagonal - tile, keys, skipped)
        document = refs.document[:, skipped:] if plan.packed else None
        key = tile * plan.keys + keys.start
        return scores, visible(document, key, scores.shape, on_diagonal)

    def add_exponentials(self, tile: Any, raw: Strips, skipped: int | None = None) -> None:
        """First sweep: a maximum and a sum for each of sixteen classes of keys.

        Those of a strip that are equal modulo eight are of one class, of every other strip.
        Classes of one strip know nothing of those of the next one, so that both can be
        under way. Each half of them has its largest scores of the tile, too.
        """
        plan, refs = self.plan, self.refs
        cut, size = slice(skipped or 0, None), plan.strips.sums
        # In order: see `buffers`. On v6e the sums' order is enough, and more costs spills.
        row = unknown_zero(self.zero)
        row_of_largest = row if plan.query_first else 0
        for largest in (refs.largest_0, refs.largest_1):
            largest[:, cut] = jnp.full((SUBLANES, plan.queries), LOWEST)[:, cut]
        for n, at in enumerate(range(0, plan.keys, size)):
            keys, sums = slice(at, at + size), (refs.sums_0, refs.sums_1)[n % 2]
            largest = (refs.largest_0, refs.largest_1)[n % 2]
            scores, seen = self.scores(tile, raw(keys), keys, skipped)
            if seen is not None:
                scores = jnp.where(seen, scores, MASKED)
            vectors = [scores[at : at + SUBLANES] for at in range(0, size, SUBLANES)]
            highest = functools.reduce(jnp.maximum, vectors)
            largest[pl.ds(row_of_largest, SUBLANES), cut] = jnp.maximum(largest[:, cut], highest)
            before = sums[:SUBLANES, cut]
            maximum = jnp.maximum(before, highest)
            total = sums[SUBLANES:, cut] * jnp.exp2(before - maximum)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True):
                total = total + (jnp.exp2(a - maximum) + jnp.exp2(b - maximum))
            sums[:SUBLANES, cut] = maximum
            sums[pl.ds(row + SUBLANES, SUBLANES), cut] = total
        if skipped is None and plan.skip_dead:
            highest = jnp.maximum(refs.largest_0[...], refs.largest_1[...])
            refs.highest[at_tile(tile, SUBLANES), :] = highest

    def weigh(self, tile: Any, raw: Strips, sets: Sets, skipped: int | None = None) -> None:
        """Second sweep: stores a tile's weights."""
        refs, cut = self.refs, slice(skipped or 0, None)
        bias, buffers = self.in_order if sets.in_order else self.free
        sizes, dtype = self.plan.strips, buffers.dtype
        size = sizes.residuals if self.training else sizes.weights
        for keys in strips(self.plan, size if sets.in_order else HALF):
            scores, seen = self.scores(tile, raw(keys), keys, skipped)
            softmax = jnp.exp2(scores - refs.log_total[:, cut])
            weights = jnp.maximum(softmax - refs.threshold[:, cut], 0)
            if seen is not None:
                weights = jnp.where(seen, weights, 0)
            buffers.store(sets.results, "weights", keys, weights.astype(dtype), cut)
            if self.training:
                # Not a number must come through.
                alive = jnp.where(weights == 0, 0.0, 1.0)
                buffers.store(sets.results, "alive", keys, alive.astype(dtype), cut)
            bias.fence(keys, weights[:SUBLANES, :LANES])

    def multiply(self, tile: Any, base: Any, of: int, skipped: int = 0) -> None:
        """Second sweep: multiplies values by the weights that `weigh` stored."""
        refs, cut = self.refs, slice(skipped, None)
        value = refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]
        refs.sum[:, cut] += dot(value, self.buffers.whole(of, "weights", cut), LAST_FIRST)
        if self.training:
            alive = self.buffers.whole(of, "alive", cut)
            refs.live_sum[:, cut] += dot(value, alive, LAST_FIRST)

    def add_softmax(
        self, tile: Any, base: Any, raw: Strips, sets: Sets, skipped: int | None = None
    ) -> None:
        """The only sweep where there is no offset."""
        refs, cut = self.refs, slice(skipped or 0, None)
        bias, buffers = self.in_order if sets.in_order else self.free
        parts = strips(self.plan, self.plan.strips.weights if sets.in_order else HALF)

        highest = jnp.full((SUBLANES, self.plan.queries), LOWEST)[:, cut]
        for keys in parts:
            scores, seen = self.scores(tile, raw(keys), keys, skipped)
            if seen is not None:
                scores = jnp.where(seen, scores, MASKED)
            highest = jnp.maximum(highest, fold(scores, jnp.maximum))
            buffers.store(sets.scores, "scores", keys, scores, cut)
            bias.fence(keys, scores[:SUBLANES, :LANES])
        maximum = jnp.max(highest, axis=0, keepdims=True)
        maximum = jnp.maximum(refs.log_total[:, cut], maximum)
        shrink = jnp.exp2(refs.log_total[:, cut] - maximum)
        total = refs.total[:, cut] * shrink
        for keys in parts:
            weights = jnp.exp2(buffers.load(sets.scores, "scores", keys, cut) - maximum)
            total += fold(weights, jnp.add)
            buffers.store(sets.results, "weights", keys, weights.astype(buffers.dtype), cut)
        refs.log_total[:, cut], refs.total[:, cut] = maximum, total
        value = refs.value[0, 0, :, at_tile(tile - base, self.plan.keys)]
        added = dot(value, buffers.whole(sets.results, "weights", cut), LAST_FIRST)
        refs.sum[:, cut] = refs.sum[:, cut] * shrink + added
