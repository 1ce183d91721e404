"""What the kernels do to one tile: its bias, its mask, its products.

A tile is [keys, queries]. Its distance is the index of its query tile's first key tile
minus its own index: at least 1 where all keys come before all queries; 0, -1, ... on the
diagonal, where the first -distance * keys queries see nothing and are cut off.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tpu.buffers import HALF, half_of, unknown_zero
from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.kernel_types import Index, Ref, Refs, Scalar, Scratch
from pallas_kernels.tpu.plan import SUBLANES, Plan

# Steps of eight lanes in a vector.
TURNS = LANES // SUBLANES

# The arrays of a turned bias.
_TURNED = ("turned_0", "turned_1")

# A running maximum below any other, finite so that differences stay numbers. Masked scores
# are -inf themselves: a row that sees nothing else sums up to 0, and is no number then.
LOWEST = -1.0e30
MASKED = -math.inf
# A threshold that no weight passes.
UNREACHABLE = 1.0e30
# A tile must miss its threshold by this much, in units of log2, to be called dead: more
# than the rounding of its scores.
DEAD_SLACK = 1.0e-3

# Contracted axes of a product: of the left and of the right operand.
LAST_FIRST = (((1,), (0,)), ((), ()))
LAST_LAST = (((1,), (1,)), ((), ()))

# Every query of a tile.
EVERY = slice(0, None)


def dot(a: Array, b: Array, axes: Any) -> Float[Array, "m n"]:
    """Contracts with float32 accumulation and no loss on float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def at_tile(index: Index, size: int) -> pl.Slice:
    """Returns the positions of a tile."""
    return pl.ds(pl.multiple_of(cast(Scalar, index * size), size), size)


def views(refs: Refs, names: Sequence[str], at: pl.Slice) -> Refs:
    """Returns references of which some are those of one query tile, leading axes dropped."""
    seen = dict(vars(refs))
    for name in names:
        if name in seen:
            ref = seen[name]
            seen[name] = ref.at[(0,) * (len(ref.shape) - 2) + (slice(None), at)]
    return Refs(**seen)


def bias_start(plan: Plan, tile_distance: Index) -> Index:
    """Returns the first lane of `Plan.bias` that a tile at this distance reads."""
    start = (tile_distance + plan.ratio - 1) * plan.keys
    return pl.multiple_of(cast(Scalar, start), LANES)


class Bias:
    """The bias of one head as its tiles read it, and their gradient.

    Key k of a tile at distance n reads b(n keys + q - k). Row s of `Plan.bias` serves the
    keys s, 8 + s, ..., each eight lanes to the left of the one before. Turning vectors that
    far costs as much as a tile's other work, so where VMEM has room for it a head's bias is
    turned once: 128 rows, of which every tile is whole vectors. Two arrays hold them, and
    strips of keys go through each in order: see `buffers`.
    """

    def __init__(self, plan: Plan, refs: Refs, zero: Scalar | None = None):
        """`zero`: see `buffers.Buffers`."""
        self.plan, self.refs, self.zero = plan, refs, zero

    @staticmethod
    def scratch(plan: Plan, *, backward: bool) -> Scratch:
        """Returns the memory this needs."""
        if not (plan.has_bias and plan.turned):
            return {}
        # Below the bias lies its gradient, and below that what `fence` stores.
        below, lanes = (HALF, LANES) if backward else (0, 0)
        shape = (HALF + below + SUBLANES, plan.bias_length + lanes)
        return {name: pltpu.VMEM(shape, jnp.float32) for name in _TURNED}

    def _turned(self, half: int) -> Ref:
        return getattr(self.refs, _TURNED[half])

    def start(self) -> None:
        """At a head's first step."""
        plan, refs = self.plan, self.refs
        if not (plan.has_bias and plan.turned):
            return

        # The first vector is never read: see `bias_start`.
        width = plan.queries
        nothing = jnp.zeros((SUBLANES, LANES), jnp.float32)

        def turn(window: Float[Array, "8 lanes"], at: pl.Slice) -> None:
            for step in range(TURNS):
                half, row = divmod(SUBLANES * step, HALF)
                turned = pltpu.roll(window, SUBLANES * step, 1) if step else window
                self._turned(half)[row : row + SUBLANES, at] = turned[:, LANES:]

        turn(jnp.concatenate([nothing, refs.bias[0, :, :width]], axis=1), pl.ds(0, width))

        @pl.loop(1, plan.bias_length // width)
        def _(part):
            before = pl.multiple_of(part * width - LANES, LANES)
            turn(refs.bias[0, :, pl.ds(before, width + LANES)], at_tile(part, width))

    def tile(self, tile_distance: Index, keys: slice, skipped: int) -> Float[Array, "keys queries"]:
        """Returns the bias of some keys of a tile, `skipped` queries cut off."""
        plan, refs = self.plan, self.refs
        if not plan.turned:
            window = refs.bias[0, :, pl.ds(bias_start(plan, tile_distance), plan.bias_window)]
            return _turned_tile(plan, window, keys, skipped)
        row = keys.start % HALF
        rows = slice(row, row + keys.stop - keys.start)
        return self._turned(half_of(keys))[rows, self._lanes(tile_distance, keys, skipped)]

    def _lanes(self, tile_distance: Index, keys: slice, skipped: int) -> pl.Slice:
        plan = self.plan
        start = bias_start(plan, tile_distance) + plan.keys - keys.start // LANES * LANES + skipped
        return pl.ds(pl.multiple_of(start, LANES), plan.queries - skipped)

    def fence(self, keys: slice, x: Float[Array, "8 128"]) -> None:
        """Keeps the bias of the next strip after x, of the results of the strip `keys`."""
        if self.zero is not None and self.plan.has_bias and self.plan.turned:
            ref = self._turned(1 - half_of(keys))
            last = ref.shape[0] - SUBLANES
            ref[pl.ds(unknown_zero(self.zero) + last, SUBLANES), :LANES] = x

    def clear(self) -> None:
        """Clears the gradient at a head's first step."""
        if not self.plan.turned:
            self.refs.d_bias[...] = jnp.zeros_like(self.refs.d_bias)
            return
        for half in range(2):
            ref = self._turned(half)
            ref[HALF : 2 * HALF, :] = jnp.zeros_like(ref[HALF : 2 * HALF, :])

    def add(
        self,
        tile_distance: Index,
        keys: slice,
        d_scores: Float[Array, "keys queries"],
        skipped: int,
    ) -> None:
        """Adds some keys of a tile to the gradient: the adjoint of `tile`."""
        plan, refs = self.plan, self.refs
        if not plan.turned:
            at = pl.ds(bias_start(plan, tile_distance), plan.bias_window)
            refs.d_bias[0, 0, 0, :, at] += _sum_diagonals(plan, keys, d_scores, skipped)
            return
        rows = pl.ds(unknown_zero(self.zero) + HALF + keys.start % HALF, keys.stop - keys.start)
        self._turned(half_of(keys))[rows, self._lanes(tile_distance, keys, skipped)] += d_scores

    def finish(self) -> None:
        """Hands over the gradient at a head's last step."""
        plan, refs = self.plan, self.refs
        if not plan.turned:
            return

        width = plan.queries

        @pl.loop(0, plan.bias_length // width)
        def _(part):
            at = at_tile(part, width)
            total = self._turned(0)[HALF : HALF + SUBLANES, at]
            window = pl.ds(at.start, width + LANES)
            for step in range(1, TURNS):
                half, row = divmod(SUBLANES * step, HALF)
                rows = slice(HALF + row, HALF + row + SUBLANES)
                left = width + LANES - SUBLANES * step
                total += pltpu.roll(self._turned(half)[rows, window], left, 1)[:, :width]
            refs.d_bias[0, 0, 0, :, at] = total


def _turned_tile(
    plan: Plan, window: Float[Array, "8 window"], keys: slice, skipped: int
) -> Float[Array, "keys queries"]:
    """Returns the same, turned on the spot: keys a multiple of 128 apart share the turns."""
    strips = []
    for key in range(keys.start, keys.stop, SUBLANES):
        vectors, lanes = divmod(key, LANES)
        turned = pltpu.roll(window, lanes, 1) if lanes else window
        start = plan.keys - LANES * vectors
        strips.append(turned[:, start + skipped : start + plan.queries])
    return jnp.concatenate(strips, axis=0)


def _sum_diagonals(
    plan: Plan, keys: slice, d_scores: Float[Array, "keys queries"], skipped: int
) -> Float[Array, "8 window"]:
    """Returns the adjoint of `_turned_tile`."""
    zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
    result = jnp.zeros((SUBLANES, plan.bias_window), jnp.float32)
    for lanes in range(0, LANES, SUBLANES):
        blocks = [zero] * (plan.bias_window // LANES)
        for key in range(keys.start, keys.stop, SUBLANES):
            if key % LANES != lanes:
                continue
            place = (plan.keys + skipped) // LANES - key // LANES
            done = key - keys.start
            for query in range(0, plan.queries - skipped, LANES):
                at = place + query // LANES
                part = d_scores[done : done + SUBLANES, query : query + LANES]
                blocks[at] = part if blocks[at] is zero else blocks[at] + part
        row = jnp.concatenate(blocks, axis=1)
        result += pltpu.roll(row, plan.bias_window - lanes, 1) if lanes else row
    return result


def visible(
    segment_start: Int[Array, "1 queries"] | None,
    key: Index,
    shape: tuple[int, ...],
    on_diagonal: int | None,
) -> Bool[Array, "keys queries"] | None:
    """Returns which keys the queries of a tile see; None: all.

    Args:
      segment_start: first key that each query sees; None: the first.
      key: index of the first key.
      shape: of the tile, or of some keys of it.
      on_diagonal: index of the first key minus that of the first query; None: all keys
        come before all queries.
    """
    seen = None
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if on_diagonal is not None:
        seen = keys + on_diagonal <= jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if segment_start is not None:
        inside = keys >= segment_start - key
        seen = inside if seen is None else seen & inside
    return seen


def thresholds(
    plan: Plan, tau: Array, scale: Float[Array, "1 queries"], query_tile: Index
) -> Float[Array, "1 queries"]:
    """Returns what a softmax weight must exceed to be live, -tau/n.

    No weight exceeds 1, said outright: see the Triton kernels. Queries past the length
    have no live weight.
    """
    threshold = -tau * scale
    dead = threshold >= 1
    if plan.padded_length != plan.length:
        row = jax.lax.broadcasted_iota(jnp.int32, threshold.shape, 1)
        dead = dead | (row + query_tile * plan.queries >= plan.length)
    return jnp.where(dead, UNREACHABLE, threshold)
