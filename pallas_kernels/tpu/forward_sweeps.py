"""The sweeps of the forward pass over the tiles of one tile of queries.

The first sweep walks from the diagonal backwards over the tiles that are not negligible,
sums the exponentials and keeps each tile's largest scores; these and the final
log-sum-exp tell the farthest live tile. The second sweep goes over the live ones. Without
an offset one sweep does it all.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.tpu.buffers import ALONE, Sets, over_pairs
from pallas_kernels.tpu.forward_tile import QueryTile
from pallas_kernels.tpu.plan import SUBLANES, Plan
from pallas_kernels.tpu.tile import (
    DEAD_SLACK,
    EVERY,
    LOWEST,
    UNREACHABLE,
    at_tile,
    thresholds,
)

# Tiles that are told dead or live at a time.
_MARKS = 8


class Sweeps(QueryTile):
    """One tile of queries, and the sweeps over its keys."""

    def __init__(self, plan: Plan, training: bool, refs: Any, within: Any):
        super().__init__(plan, training, refs, within)
        self.chunk_tiles = plan.padded_length // plan.forward_chunks // plan.keys

    def chunk_range(self, chunk: Any, first: Any) -> tuple[Any, Any, Any]:
        """Returns a chunk's first tile, and its tiles from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        stop = jnp.minimum(self.diagonal, base + self.chunk_tiles)
        return base, jnp.minimum(jnp.maximum(first, base), stop), stop

    def if_visited(self, chunk: Any, first: Any, sweep: Any) -> None:
        """Runs `sweep(chunk, first)` if the chunk has tiles from `first` to the diagonal."""
        base = chunk * self.chunk_tiles
        visited = (base <= self.diagonal) & (base + self.chunk_tiles > first)
        pl.when(visited)(lambda: sweep(chunk, first))

    def on_own_chunk(self, base: Any, then: Any, otherwise: Any) -> None:
        """Does what is to be done at the diagonal if it lies in this chunk."""
        if self.plan.forward_chunks == 1:
            then()
        else:
            own = (self.diagonal >= base) & (self.diagonal < base + self.chunk_tiles)
            pl.when(own)(then)
            pl.when(jnp.logical_not(own))(otherwise)

    def one_by_one(self, chunk: Any, first: Any, body: Any) -> None:
        """Runs `body(tile, base, raw scores, sets, skipped)`, from the diagonal backwards.

        Leaves the diagonal's raw scores, unless keys are cut into chunks.
        """
        plan = self.plan
        base, start, stop = self.chunk_range(chunk, first)

        def prepare(tile: Any, into: int) -> None:
            after = self.diagonal if plan.forward_chunks == 1 else base
            self.prepare(jnp.where(tile < start, after, tile), base, into)

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                raw = self.raw_scores(tile, base, skipped)
                body(tile, base, raw.__getitem__, ALONE, skipped)

        self.on_own_chunk(base, on_diagonal, lambda: None)
        prepare(stop - 1, ALONE.ahead)

        def turn(n: Any, sets: Sets) -> None:
            tile = stop - 1 - n
            body(tile, base, self.prepared(sets.scores), sets, None)
            prepare(tile - 1, sets.ahead)

        over_pairs(stop - start, turn, alternate=False)

    def second_sweep(self, chunk: Any, first: Any) -> None:
        """Adds the values of a chunk's tiles, from the diagonal backwards."""
        plan = self.plan
        base, start, stop = self.chunk_range(chunk, first)
        last = self.diagonal + plan.ratio - 1

        def on_diagonal() -> None:
            for crossed in range(plan.ratio):
                tile, skipped = self.diagonal + crossed, crossed * plan.keys
                raw = self.prepared(ALONE.scores)
                if crossed or plan.forward_chunks > 1:
                    raw = self.raw_scores(tile, base, skipped).__getitem__
                if crossed:
                    self.multiply(tile - 1, base, ALONE.pending, skipped - plan.keys)
                self.weigh(tile, raw, ALONE, skipped)
            if plan.ratio > 1:
                clear(slice(0, (plan.ratio - 1) * plan.keys))

        def clear(cut: slice) -> None:
            nothing = jnp.zeros((plan.keys, plan.queries), self.buffers.dtype)
            for field in ("weights", "alive") if self.training else ("weights",):
                self.buffers.put(ALONE.results, field, nothing[:, cut], cut)

        self.on_own_chunk(base, on_diagonal, lambda: clear(EVERY))
        before = jnp.minimum(last, base + self.chunk_tiles - 1)
        self.prepare(jnp.maximum(stop - 1, base), base, ALONE.ahead)

        def turn(n: Any, sets: Sets) -> None:
            tile = stop - 1 - n
            self.multiply(jnp.where(n == 0, before, tile + 1), base, sets.pending)
            self.weigh(tile, self.prepared(sets.scores), sets)
            self.prepare(jnp.maximum(tile - 1, base), base, sets.ahead)

        over_pairs(stop - start, turn)
        self.multiply(jnp.where(start == stop, before, start), base, ALONE.pending)

    def start(self) -> None:
        """Before the first sweep."""
        refs, half = self.refs, (SUBLANES, self.plan.queries)
        if self.plan.has_offset:
            for ref in (refs.sums_0, refs.sums_1):
                ref[...] = jnp.concatenate([jnp.full(half, LOWEST), jnp.zeros(half)], axis=0)
        else:
            refs.total[...] = jnp.zeros_like(refs.total)
            refs.log_total[...] = jnp.full_like(refs.log_total, LOWEST)
            refs.sum[...] = jnp.zeros_like(refs.sum)

    def between(self) -> None:
        """After the first sweep: log-sum-exp, thresholds, and the first live tile."""
        plan, refs = self.plan, self.refs
        maxima = jnp.concatenate([ref[:SUBLANES, :] for ref in (refs.sums_0, refs.sums_1)], axis=0)
        totals = jnp.concatenate([ref[SUBLANES:, :] for ref in (refs.sums_0, refs.sums_1)], axis=0)
        maximum = jnp.max(maxima, axis=0, keepdims=True)
        total = jnp.sum(totals * jnp.exp2(maxima - maximum), axis=0, keepdims=True)
        log_total = maximum + jnp.log2(total)
        threshold = thresholds(plan, refs.tau[self.head], refs.scale[...], self.query_tile)
        refs.log_total[...] = log_total
        refs.threshold[...] = threshold
        refs.sum[...] = jnp.zeros_like(refs.sum)
        if self.training:
            refs.live_sum[...] = jnp.zeros_like(refs.live_sum)
        refs.live_tile[0] = self.first
        if plan.skip_dead:
            logarithm = jnp.log2(jnp.where(threshold > 0, threshold, 1))
            # At 0 or below every key may count.
            bar = jnp.where(threshold > 0, log_total + logarithm - DEAD_SLACK, -math.inf)

            def farthest(group: Any, found: Array) -> Array:
                for n in range(_MARKS):
                    tile = jnp.minimum(self.first + group * _MARKS + n, self.diagonal - 1)
                    # Not a number is not below anything.
                    dead = refs.highest[at_tile(tile, SUBLANES), :] <= bar
                    nearer = jnp.where(dead, UNREACHABLE, tile.astype(jnp.float32))
                    found = jnp.minimum(found, nearer)
                return found

            none = jnp.full((SUBLANES, plan.queries), self.diagonal, jnp.float32)
            groups = (self.diagonal - self.first + _MARKS - 1) // _MARKS
            found = jax.lax.fori_loop(0, groups, farthest, none)
            refs.live_tile[0] = jnp.min(found).astype(jnp.int32)

    def finish(self) -> None:
        """After the last sweep: outputs."""
        plan, refs = self.plan, self.refs
        dtype = refs.out.dtype
        if plan.has_offset:
            out = refs.sum[...]
        else:
            total = jnp.sum(refs.total[...], axis=0, keepdims=True)
            out = refs.sum[...] / total
        refs.out[...] = out.astype(dtype)
        if not self.training:
            return
        rounding = out - out.astype(dtype).astype(jnp.float32)
        if plan.has_offset:
            mean = refs.live_sum[...] * refs.scale[...]
            refs.mean[...] = mean.astype(dtype)
            left = mean - mean.astype(dtype).astype(jnp.float32)
            rounding = rounding - refs.tau[self.head] * left
            refs.log_sum[...] = refs.log_total[...]
            tile = jax.lax.broadcasted_iota(jnp.int32, refs.live.shape[2:], 1)
            before = jnp.where(self.query_tile == 0, 0, refs.live[0, 0])
            refs.live[0, 0] = jnp.where(tile == self.query_tile, refs.live_tile[0], before)
        else:
            refs.log_sum[...] = refs.log_total[...] + jnp.log2(total)
        if plan.half:
            refs.rounding[...] = rounding.astype(dtype)

    def run(self) -> None:
        """Does one query tile."""
        chunks, last = self.plan.forward_chunks, pl.num_programs(3) - 1

        def first_sweep(chunk: Any, first: Any) -> None:
            def body(tile: Any, base: Any, raw: Any, sets: Sets, skipped: int | None) -> None:
                self.add_exponentials(tile, raw, skipped)

            self.one_by_one(chunk, first, body)

        def only_sweep(chunk: Any, first: Any) -> None:
            self.one_by_one(chunk, first, self.add_softmax)

        if chunks == 1:
            self.start()
            if self.plan.has_offset:
                first_sweep(0, self.first)
                self.between()
                self.second_sweep(0, self.refs.live_tile[0])
            else:
                only_sweep(0, self.first)
            self.finish()
            return
        pl.when(self.step == 0)(self.start)
        chunk = chunks - 1 - self.step
        if self.plan.has_offset:

            @pl.when(self.step < chunks)
            def _():
                self.if_visited(chunk, self.first, first_sweep)

            pl.when(self.step == chunks)(self.between)

            @pl.when(self.step >= chunks)
            def _():
                live = self.refs.live_tile[0]
                self.if_visited(self.step - chunks, live, self.second_sweep)
        else:
            self.if_visited(chunk, self.first, only_sweep)
        pl.when(self.step == last)(self.finish)
