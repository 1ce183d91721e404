"""What one computing warpgroup of dK's kernel does with its 64 keys.

It goes for each query head over the query tiles from the diagonal on, and keeps the sums dK and
dV in registers until they are complete.
"""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import diagonals, layout, memory, pipeline, tile_kind
from pallas_kernels.mosaic_gpu.mlir import COLUMN, ROWS, TILE
from pallas_kernels.mosaic_gpu.plan import MASKED, UNIT, RowStat
from pallas_kernels.mosaic_gpu.tile_kind import TileKind


class Keys:
    """What one computing warpgroup does with its 64 keys."""

    def __init__(self, work_tile: Any):
        # `backward_key.WorkTile`, which imports this.
        self.all, self.kernel = work_tile, work_tile.kernel
        self.ref, self.n = work_tile.ref, work_tile.n
        self.plan, self.block, self.interpret = work_tile.plan, work_tile.block, work_tile.interpret
        self.warpgroup, self.unit0 = work_tile.warpgroup, work_tile.unit0
        self.queries, self.d_outs = work_tile.queries, work_tile.d_outs
        self.keys, self.tables = work_tile.keys, work_tile.tables

    def compute(self) -> tuple[Any, Any]:
        """Does all for the keys; returns `tiles_consumed` of the next work tile."""
        ref, plan, kernel, b = self.ref, self.plan, self.kernel, self.all.batch
        unit = self.unit0 + self.warpgroup
        exists = unit < kernel.units
        unit = lax.min(unit, jnp.int32(kernel.units - 1))
        self.key0 = unit * UNIT
        self.keys.consumer_wait(self.n)
        own = {
            name: pipeline.operand(
                ref[f"{name}_smem"], self.warpgroup, self.block.in_registers, self.interpret
            )
            for name in kernel.operands
        }
        self.key, self.value = own["key"], own.get("value")
        release_early = self.block.in_registers and not self.interpret
        if release_early:
            self.keys.consumer_release(self.n)
        begin = self.begin = lax.select(exists, unit - self.unit0, jnp.int32(0))
        first_masked = None
        if plan.packed:
            # Documents and windows begin later and later.
            first_masked = ref["masked"][b, unit] - self.unit0
        self.sums = None
        if kernel.want_bias:
            self.sums = diagonals.Diagonals(ref, self.warpgroup, kernel.distances, self.interpret)
            pl.when(self.n == 0)(self.sums.begin)

        def one_head(accs, member, tiles_consumed):
            steps_done, live_done = tiles_consumed
            head = self.all.head(member)
            steps, live = self.all.both_steps(head)
            end = lax.select(exists, ref["last"][b, head, unit] - self.unit0 + 1, begin)
            end = lax.min(end, steps)
            live_end = lax.min(live, end)
            self.tail = (ref["tail"][head, 0], ref["tail"][head, 1])
            if plan.has_offset:
                self.offset = ref["offset"][head]
            self.table = ref["table_smem"].at[self.tables.consumer_wait(member)]
            both = ((self.queries, steps_done), (self.d_outs, live_done))
            if self.sums is not None:
                self.sums.begin_head()
            pipeline.skip(0, begin, *both)

            def loop(step, late, kind, start, stop, _):
                step = functools.partial(step, kind, accs)
                return pipeline.steps(start, stop, self.block.ahead, step, (), both[0], late=late)

            def loops(step, start, stop, late, masked):
                run = functools.partial(loop, step, late)
                tile_kind.loops(plan, kernel.length, begin, start, stop, run, (), masked=masked)

            masked = live_masked = first_masked
            if plan.has_offset:
                # A weight of tau / n is no weight where nothing is seen.
                others = end if masked is None else masked
                live_masked = lax.select(self.offset > 0, begin, others)
            loops(self.live_step, begin, live_end, both[1:], live_masked)
            pipeline.skip(end, live, *both)
            if plan.has_offset and "key" in kernel.wanted:
                loops(self.dead_step, live, end, (), masked)
            pipeline.skip(lax.max(end, live), steps, both[0])
            self.tables.consumer_release(member)
            if self.sums is not None:
                # The last tile inside the table.
                self.collect(lax.min(end, begin + kernel.distances))

                @pl.when(exists)
                def _():
                    row = (b * kernel.units + unit) * kernel.heads + head
                    tiles = lax.min(lax.max(end - begin, 0), jnp.int32(kernel.distances))
                    self.sums.write(ref["sums"], row, tiles)

            return steps_done + steps, live_done + live

        def run(*accs):
            step = functools.partial(one_head, dict(zip(kernel.wanted, accs, strict=True)))
            after = lax.fori_loop(0, kernel.group, step, self.all.tiles_consumed)
            return tuple(acc[...] for acc in accs), after

        acc = plgpu.ACC((ROWS, kernel.head_dim), jnp.float32)
        sums, after = pl.run_scoped(run, *(acc for _ in kernel.wanted))

        @pl.when(exists)
        def _():
            # What the work tile before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rows = pl.ds(self.key0, ROWS)
            prefix = "d_" if self.block.in_registers else ""
            for name, x in zip(kernel.wanted, sums, strict=True):
                place = name if name in kernel.operands else "key"
                smem = ref[f"{prefix}{place}_smem"].at[self.warpgroup]
                smem[...] = (x * plan.scale if name == "key" else x).astype(kernel.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, ref[f"d_{name}"].at[b, rows, self.all.key_head])

        if not release_early:
            if not self.block.in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.keys.consumer_release(self.n)
        return after

    def leave(self, n: Any, d_scores: Array, kind: TileKind) -> None:
        """Leaves a tile's dS for the gradient of the bias, if it is inside the table."""
        sums, distance = self.sums, n - self.begin
        if sums is None or kind is TileKind.TAIL:
            return
        # Near ones all are.
        inside = True if kind is TileKind.NEAR else distance < self.kernel.distances
        pl.when(inside)(lambda: sums.leave(d_scores, distance))

    def collect(self, n: Any, kind: TileKind = TileKind.NEAR) -> None:
        """Adds what the tile before tile n left, while products are under way.

        Not for the last one inside the table, unless asked for it from outside a loop.
        """
        sums, distance = self.sums, n - self.begin - 1
        if sums is None or kind is TileKind.TAIL:
            return
        wanted = distance >= 0
        if kind is TileKind.MASKED:
            wanted = wanted & (distance < self.kernel.distances - 1)
        pl.when(wanted)(lambda: sums.collect(distance))

    def spread(self, x: Float[Array, "64"]) -> Float[Array, "64 64"]:
        """Returns one number a query, repeated along the keys."""
        return lax.broadcast_in_dim(x, (ROWS, UNIT), [1])

    def row(self, slot: Any, kind: int) -> Float[Array, "64"]:
        """Returns one number a query."""
        return plgpu.load(self.ref["rows_smem"].at[slot, kind], layout=COLUMN, optimized=False)

    def loads(self, n: Any, slot: Any, kind: TileKind) -> tuple[Any, Array]:
        """Returns a tile's bias, and what is to be subtracted from each query's scores.

        Loaded before the tile's products are issued: behind them in the queue to memory it
        would wait for the tensor cores.
        """
        query0 = (self.unit0 + n) * UNIT
        if kind is TileKind.TAIL:
            bias, _ = tile_kind.bias(
                self.plan, query0 - self.key0, self.tail,
                falling=False, whole=True, interpret=self.interpret,
            )  # fmt: skip
            less = self.row(slot, RowStat.LSE)
            return (bias, less) if self.plan.has_slope else (None, less - bias)
        start, rest = self.plan.bias_of_tile(query0 - self.key0, UNIT, self.tail, falling=False)
        bias = memory.gather(self.table, start, UNIT, interpret=self.interpret)
        return bias, self.row(slot, RowStat.LSE) - rest

    def softmax(self, kind: TileKind, x: Array, slot: Any, loaded: tuple[Any, Array]) -> Array:
        """Returns softmax weights of a tile from its products."""
        bias, less = loaded
        x = x * self.plan.exponent_scale
        if bias is not None:
            x = x + bias
        if self.plan.packed and kind is TileKind.MASKED:
            x = jnp.where(self.in_segment(slot), x, MASKED)
        return jnp.exp2(x - self.spread(less))

    def in_segment(self, slot: Any) -> Array:
        """Returns which keys of a tile lie in the query's document or after its start."""
        keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, UNIT), 0, layout=TILE) + self.key0
        return keys >= self.spread(self.row(slot, RowStat.SEGMENT_START).astype(jnp.int32))

    def hide(self, weights: Array, n: Any, slot: Any) -> Array:
        """Returns weights that are negative where nothing is seen.

        Without that, tau / n would be a weight there if it is above 0.
        """
        apart = (self.unit0 + n) * UNIT - self.key0

        def masked():
            return layout.where_seen(
                weights, apart, -1.0, rows_are_keys=True, interpret=self.interpret
            )

        weights = lax.cond(apart == 0, masked, lambda: weights)
        return jnp.where(self.in_segment(slot), weights, -1.0) if self.plan.packed else weights

    def less(self, slot: Any) -> Array:
        """Returns -delta of each query, repeated along the keys."""
        return self.spread(-self.row(slot, RowStat.DELTA))

    def live_step(self, kind, accs, n, slots, wait, carry) -> tuple:
        """Adds a tile that may be live."""
        ref, plan, dtype = self.ref, self.plan, self.kernel.dtype
        spare = ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        slot, d_slot = slots
        loaded = self.loads(n, slot, kind)

        def weigh(acc):
            plgpu.wgmma(acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n, kind)
            p = weights = self.softmax(kind, acc[...], slot, loaded)
            if plan.has_offset:
                weights = p - self.spread(self.row(slot, RowStat.THRESHOLD))
                if kind is TileKind.MASKED:
                    weights = self.hide(weights, n, slot)
            return p, layout.pack(weights, dtype, relu=plan.has_offset, interpret=self.interpret)

        def add(p, weights, acc):
            begun = None
            if not plan.has_offset:
                begun = pipeline.begin_with(acc, self.less(slot), self.interpret)
            plgpu.wgmma(acc, self.value(), ref["d_out_smem"].at[d_slot].T)
            if "value" in accs:
                pipeline.multiply(accs["value"], weights, ref["d_out_smem"].at[d_slot], spare)
            # Without waiting for the product that was issued last.
            d_weights = pipeline.finish(acc, begun, 1 if "value" in accs else 0)
            if plan.has_offset:
                # Where nothing is seen p is 0, and so is dS.
                if dtype == jnp.bfloat16:
                    # What the packed weights say costs no load.
                    alive = layout.where_positive(weights, d_weights, interpret=self.interpret)
                else:
                    # In float16 small ones are 0.
                    live = p > self.spread(self.row(slot, RowStat.THRESHOLD))
                    alive = jnp.where(live, d_weights, 0.0)
                d_weights = alive + self.less(slot)
            return p * d_weights

        # One accumulator after the other, since there is no room in registers for both.
        tile = plgpu.ACC((ROWS, UNIT), jnp.float32)
        p, weights = pl.run_scoped(weigh, tile)
        if "key" not in accs:
            pipeline.multiply(accs["value"], weights, ref["d_out_smem"].at[d_slot], spare)
            plgpu.wgmma_wait(0)
            self.d_outs.consumer_release_slot(d_slot)
            self.queries.consumer_release_slot(slot)
            return carry
        d_scores = pl.run_scoped(functools.partial(add, p, weights), tile)
        packed = layout.pack(d_scores, dtype, relu=False, interpret=self.interpret)
        pipeline.multiply(accs["key"], packed, ref["query_smem"].at[slot], spare)
        self.leave(n, d_scores, kind)
        plgpu.wgmma_wait(1)
        self.d_outs.consumer_release_slot(d_slot)
        # Left in flight, it made ptxas put dS where the values are, and lose them.
        plgpu.wgmma_wait(0)
        self.queries.consumer_release_slot(slot)
        return carry

    def dead_step(self, kind, accs, n, slots, wait, carry) -> tuple:
        """Adds a tile with no live entry."""
        ref = self.ref
        spare = ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        (slot,) = slots
        loaded, less = self.loads(n, slot, kind), self.less(slot)

        def product(s_acc):
            plgpu.wgmma(s_acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n, kind)
            return s_acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, UNIT), jnp.float32))
        d_scores = self.softmax(kind, x, slot, loaded) * less
        packed = layout.pack(d_scores, self.kernel.dtype, relu=False, interpret=self.interpret)
        pipeline.multiply(accs["key"], packed, ref["query_smem"].at[slot], spare)
        self.leave(n, d_scores, kind)
        plgpu.wgmma_wait(0)
        self.queries.consumer_release_slot(slot)
        return carry
