"""What one warpgroup of dQ's kernel does with its 64 queries.

It goes over those of their key tiles that may be live, from the diagonal backwards; delta, and
what dtau takes, it sums up on the way. Where no exponential is too large, all of this is summed
with exponentials for P, and divided by their sum at the end.
"""

import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import (
    layout,
    mean_k,
    memory,
    pipeline,
    row_stats,
    tail_sums,
    tile_kind,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS
from pallas_kernels.mosaic_gpu.plan import MASKED, UNIT
from pallas_kernels.mosaic_gpu.tile_kind import TileKind


class _Sums(NamedTuple):
    """What is summed over the tiles of 64 queries, per lane.

    Attributes:
      delta: P m dP; None without an offset, like the next.
      alive: m dP.
      past: of dS, or without delta's part, over tiles past the table; () if not wanted.
    """

    delta: Any
    alive: Any
    past: tuple


class Queries:
    """What one computing warpgroup does with its 64 queries."""

    def __init__(self, work_tile: Any):
        # `backward_query.WorkTile`, which imports this.
        self.all, self.kernel = work_tile, work_tile.kernel
        self.ref, self.n = work_tile.ref, work_tile.n
        self.plan, self.block, self.interpret = work_tile.plan, work_tile.block, work_tile.interpret
        self.warpgroup = work_tile.warpgroup
        self.keys, self.values = work_tile.keys, work_tile.values
        self.queries, self.tables = work_tile.queries, work_tile.tables

    def compute(self) -> None:
        """Does all that is to be done for the queries."""
        ref, plan, kernel, b, h = self.ref, self.plan, self.kernel, self.all.batch, self.all.head
        self.all.count_steps()
        unit = self.all.unit0 + self.warpgroup
        exists = unit < kernel.units
        unit = lax.min(unit, jnp.int32(kernel.units - 1))
        self.query0 = unit * UNIT
        self.bias_tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        begin = self.all.last - unit
        first = ref["live" if plan.has_offset else "first"][b, h, unit]
        end = lax.select(exists, self.all.last - first + 1, begin)

        if plan.has_offset:
            self.offset = ref["offset"][h]
        self.queries.consumer_wait(self.n)
        self.row = row_stats.find(self.all, unit)
        self.query, self.d_out = (
            pipeline.operand(ref[name], self.warpgroup, self.block.in_registers, self.interpret)
            for name in ("query_smem", "d_out_smem")
        )
        release_early = self.block.in_registers and not self.interpret
        if release_early:
            self.queries.consumer_release(self.n)
        self.table = ref["table_smem"].at[self.tables.consumer_wait(self.n)]
        both = ((self.keys, 0), (self.values, 0))
        pipeline.skip(0, begin, *both)
        self.begin = begin

        def run(divided, *accs):
            zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            sums = _Sums(
                *((zero, zero) if plan.has_offset else (None, None)),
                (zero, zero) if kernel.want_tail else (),
            )

            def loop(kind, start, stop, sums):
                step = functools.partial(self.step, divided, kind, accs)
                return pipeline.steps(start, stop, self.block.ahead, step, sums, *both)

            if divided and kernel.dtype == jnp.bfloat16:
                # Rare, so one loop for all.
                sums = loop(TileKind.MASKED, begin, end, sums)
            else:
                masked = None
                if plan.packed:
                    masked = (
                        self.all.last
                        + 1
                        - lax.div(self.row.last_segment_start + (UNIT - 1), jnp.int32(UNIT))
                    )
                sums = tile_kind.loops(
                    plan, kernel.length, begin, begin, end, loop, sums, masked=masked
                )
            d_query = accs[0][...]
            if self.block.stages > 1:
                # The last products have been waited for only now.
                pl.when(end > begin)(lambda: self.keys.consumer_release(end - 1))
            delta, past = self.row.delta, [finish(x) for x in sums.past]
            if plan.has_offset:
                delta = finish(sums.delta)
                # The mean of the keys times what the tensor cores took for the weights' sum.
                of_mean = weight_sums.total(accs[1], interpret=self.interpret)
                y = mean_k.load(self.all, unit)
                d_query = d_query - lax.broadcast_in_dim(of_mean, y.shape, [0]) * y
            if not divided:
                factor = jnp.exp2(-self.row.lse)
                d_query = d_query * lax.broadcast_in_dim(factor, d_query.shape, [0])
                past = [x * factor for x in past]
                delta = delta * factor if plan.has_offset else delta
            if plan.has_offset:
                return d_query, delta, finish(sums.alive), past
            return d_query, delta, (), past

        finish = functools.partial(layout.finish_sums, interpret=self.interpret)
        accs = [plgpu.ACC((ROWS, kernel.head_dim), jnp.float32)]
        accs += [weight_sums.ACC] if plan.has_offset else []

        def all_tiles(divided: bool) -> Any:
            return pl.run_scoped(functools.partial(run, divided), *accs)

        if kernel.dtype == jnp.bfloat16:
            no_overflow = ref["no_overflow"][b, h] != 0
            if plan.has_offset:
                # The other way also serves where unseen entries must be told from seen ones.
                no_overflow = no_overflow & (self.offset <= 0)
            d_query, delta, alive, past = lax.cond(
                no_overflow, lambda: all_tiles(False), lambda: all_tiles(True)
            )
        else:
            d_query, delta, alive, past = all_tiles(True)
        pipeline.skip(end, self.all.steps, *both)
        self.tables.consumer_release(self.n)
        of_offset = None
        if plan.has_offset:
            of_offset = alive * self.row.offset_scale
            past = [
                x - delta * self.of_rows(ref["past"].at[b, h, unit, n]) for n, x in enumerate(past)
            ]

        @pl.when(exists)
        def _():
            # What the work tile before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own = "d_query_smem" if self.block.in_registers else "query_smem"
            smem = ref[own].at[self.warpgroup]
            smem[...] = (d_query * plan.scale).astype(kernel.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, ref["d_query"].at[b, pl.ds(self.query0, ROWS), h])
            for n, x in enumerate(past):
                ref["tail_sums"][b, h, unit, n] = x
            row_stats.write(self.all, self.row, unit, delta, of_offset)

        if not release_early:
            if not self.block.in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.queries.consumer_release(self.n)

    def bias(self, n: Any, kind: TileKind) -> tuple[Array, Any]:
        """Returns a tile's bias and the tile's first key.

        Loaded before the tile's products are issued: behind them in the queue to memory it
        would wait for the tensor cores.
        """
        key0 = (self.all.last - n) * UNIT
        apart = self.query0 - key0
        if kind is TileKind.TAIL:
            bias, _ = tile_kind.bias(
                self.plan, apart, self.bias_tail, falling=True, whole=True, interpret=self.interpret
            )
            return bias, key0
        start, rest = self.plan.bias_of_tile(apart, UNIT, self.bias_tail, falling=True)
        bias = memory.gather(self.table, start, UNIT, interpret=self.interpret, plus=rest)
        return bias, key0

    def softmax(self, kind: TileKind, x: Array, bias: Any, key0: Any, divided: bool) -> Array:
        """Returns softmax weights of a tile from its products, or only exponentials."""
        x = x * self.plan.exponent_scale + bias
        if self.plan.packed and kind is TileKind.MASKED:
            x = self.where_in_segment(x, key0, MASKED)
        return jnp.exp2(x - self.spread(self.row.lse) if divided else x)

    def lane_sums(self, x: Array) -> Array:
        """Returns the sum of each row, per lane."""
        return layout.lane_sums(x, False, interpret=self.interpret)

    def seen_sums(self, x: Array, key0: Any, kind: TileKind) -> Array:
        """Returns sums per lane over what the queries see, if tau is above 0; else over all."""
        if kind is TileKind.TAIL:
            return self.lane_sums(x)
        hidden = key0 == self.query0
        if self.plan.packed and kind is TileKind.MASKED:
            hidden = hidden | (key0 < self.row.last_segment_start)

        def masked():
            seen = layout.where_seen(
                x, self.query0 - key0, 0.0, rows_are_keys=False, interpret=self.interpret
            )
            if self.plan.packed and kind is TileKind.MASKED:
                seen = self.where_in_segment(seen, key0, 0.0)
            return seen

        return lax.cond(
            hidden & (self.offset > 0),
            lambda: self.lane_sums(masked()),
            lambda: self.lane_sums(x),
        )

    def where_in_segment(self, x: Array, key0: Any, otherwise: float) -> Array:
        """Returns x for keys in the query's document or after its start, else another number."""
        first = self.row.segment_start - key0
        return layout.where_from(x, first, otherwise, interpret=self.interpret)

    def spread(self, x: Any) -> Float[Array, "64 64"]:
        """Returns a row vector repeated along its rows."""
        return lax.broadcast_in_dim(x, (ROWS, UNIT), [0])

    def of_rows(self, x: Any) -> Float[Array, "64"]:
        """Returns a row vector from global memory."""
        return plgpu.load(x, layout=ROW, optimized=False)

    def step(
        self,
        divided: bool,
        kind: TileKind,
        accs: tuple,
        n: Any,
        slots: tuple,
        wait: Any,
        sums: "_Sums",
    ) -> "_Sums":
        """Adds a tile."""
        # Products that begin with a number known only now need no wait of their own.
        begin = 0.0 * self.row.lse if self.plan.has_offset else -self.row.delta
        less = self.spread(begin)
        bias, key0 = self.bias(n, kind)
        key_slot, value_slot = slots

        def products(s_acc, d_acc):
            d_begun = pipeline.begin_with(d_acc, less, self.interpret)
            plgpu.wgmma(s_acc, self.query(), self.ref["key_smem"].at[key_slot].T)
            plgpu.wgmma(d_acc, self.d_out(), self.ref["value_smem"].at[value_slot].T)
            x = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            self.release_before(n, key_slot)
            wait()
            return self.softmax(kind, x, bias, key0, divided), pipeline.finish(d_acc, d_begun)

        tile = plgpu.ACC((ROWS, UNIT), jnp.float32)
        p, d_weights = pl.run_scoped(products, tile, tile)
        self.values.consumer_release_slot(value_slot)
        if self.plan.has_offset:
            limit = self.row.threshold
            if not divided:
                limit = limit * jnp.exp2(self.row.lse)
            d_weights = jnp.where(p > self.spread(limit), d_weights, 0.0)
        weighted = p * d_weights
        spare = self.ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        x = layout.pack(weighted, self.kernel.dtype, relu=False, interpret=self.interpret)
        if self.plan.has_offset:
            weight_sums.add(accs[1], x, self.ref, spare)
        pipeline.multiply(accs[0], x, self.ref["key_smem"].at[key_slot], spare)
        if self.block.stages == 1:
            # Nothing can be fetched before.
            plgpu.wgmma_wait(0)
            self.keys.consumer_release_slot(key_slot)
        # Else while that is under way.
        delta, alive, past = sums
        if self.plan.has_offset:
            delta = delta + self.lane_sums(weighted)
            if divided:
                # A weight of tau / n is no weight where nothing is seen.
                alive = alive + self.seen_sums(d_weights, key0, kind)
            else:
                alive = alive + self.lane_sums(d_weights)
        if past:
            apart = self.query0 - key0
            past = tail_sums.add(self.plan, past, weighted, apart, kind, interpret=self.interpret)
        return _Sums(delta, alive, past)

    def release_before(self, n: Any, slot: Any) -> None:
        """Gives back the keys of the step before this one, unless this is the first.

        What reads them last is left in flight while the next step's products begin; those who
        have waited for these need not wait for it again.
        """
        if self.block.stages == 1:
            return
        before = self.keys.preceding(slot)
        pl.when(n > self.begin)(lambda: self.keys.consumer_release_slot(before))
