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

from pallas_kernels.mosaic_gpu import diagonals, far_tiles, lanes, memory, rings
from pallas_kernels.mosaic_gpu.mlir import COLUMN, ROWS, TILE
from pallas_kernels.mosaic_gpu.plan import MASKED, UNIT, Rows


class Keys:
    """What one computing warpgroup does with its 64 keys."""

    def __init__(self, piece: Any):
        # `backward_key.Piece`, which imports this.
        self.all, self.kernel, self.ref, self.n = piece, piece.kernel, piece.ref, piece.n
        self.plan, self.block, self.interpret = piece.plan, piece.block, piece.interpret
        self.warpgroup, self.unit0 = piece.warpgroup, piece.unit0
        self.queries, self.d_outs = piece.queries, piece.d_outs
        self.keys, self.tables = piece.keys, piece.tables

    def compute(self) -> tuple[Any, Any]:
        """Does all that is to be done for the keys; returns `done` of the next piece."""
        ref, plan, kernel, b = self.ref, self.plan, self.kernel, self.all.batch
        unit = self.unit0 + self.warpgroup
        exists = unit < kernel.units
        unit = lax.min(unit, jnp.int32(kernel.units - 1))
        self.key0 = unit * UNIT
        self.keys.wait(self.n)
        own = {
            name: rings.operand(
                ref[f"{name}_smem"], self.warpgroup, self.block.in_registers, self.interpret
            )
            for name in kernel.operands
        }
        self.key, self.value = own["key"], own.get("value")
        release_early = self.block.in_registers and not self.interpret
        if release_early:
            self.keys.release(self.n)
        begin = self.begin = lax.select(exists, unit - self.unit0, jnp.int32(0))
        first_masked = None
        if plan.packed:
            # Documents and windows begin later and later.
            first_masked = ref["masked"][b, unit] - self.unit0
        self.sums = None
        if kernel.want_bias:
            self.sums = diagonals.Diagonals(ref, self.warpgroup, kernel.distances, self.interpret)
            pl.when(self.n == 0)(self.sums.begin)

        def one_head(accs, member, done):
            steps_done, live_done = done
            head = self.all.head(member)
            steps, live = self.all.both_steps(head)
            end = lax.select(exists, ref["last"][b, head, unit] - self.unit0 + 1, begin)
            end = lax.min(end, steps)
            live_end = lax.min(live, end)
            self.tail = (ref["tail"][head, 0], ref["tail"][head, 1])
            if plan.has_offset:
                self.offset = ref["offset"][head]
            self.table = ref["table_smem"].at[self.tables.wait(member)]
            both = ((self.queries, steps_done), (self.d_outs, live_done))
            if self.sums is not None:
                self.sums.begin_head()
            rings.skip(0, begin, *both)

            def loop(step, late, far, start, stop, _):
                step = functools.partial(step, far, accs)
                return rings.steps(start, stop, self.block.ahead, step, (), both[0], late=late)

            def loops(step, start, stop, late, masked):
                run = functools.partial(loop, step, late)
                far_tiles.loops(plan, kernel.length, begin, start, stop, run, (), masked=masked)

            masked = live_masked = first_masked
            if plan.has_offset:
                # A weight of tau / n is no weight where nothing is seen.
                others = end if masked is None else masked
                live_masked = lax.select(self.offset > 0, begin, others)
            loops(self.live_step, begin, live_end, both[1:], live_masked)
            rings.skip(end, live, *both)
            if plan.has_offset and "key" in kernel.wanted:
                loops(self.dead_step, live, end, (), masked)
            rings.skip(lax.max(end, live), steps, both[0])
            self.tables.release(member)
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
            after = lax.fori_loop(0, kernel.group, step, self.all.done)
            return tuple(acc[...] for acc in accs), after

        acc = plgpu.ACC((ROWS, kernel.head_dim), jnp.float32)
        sums, after = pl.run_scoped(run, *(acc for _ in kernel.wanted))

        @pl.when(exists)
        def _():
            # What the piece before has written is read by now.
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
            self.keys.release(self.n)
        return after

    def leave(self, n: Any, d_scores: Array, far: bool | None) -> None:
        """Leaves a tile's dS for the gradient of the bias, if it is inside the table."""
        sums, distance = self.sums, n - self.begin
        if sums is None or far:
            return
        # Near ones all are.
        inside = True if far is False else distance < self.kernel.distances
        pl.when(inside)(lambda: sums.leave(d_scores, distance))

    def collect(self, n: Any, far: bool | None = False) -> None:
        """Adds what the tile before tile n left, while products are under way.

        Not for the last one inside the table, unless asked for it from outside a loop.
        """
        sums, distance = self.sums, n - self.begin - 1
        if sums is None or far:
            return
        wanted = distance >= 0
        if far is None:
            wanted = wanted & (distance < self.kernel.distances - 1)
        pl.when(wanted)(lambda: sums.collect(distance))

    def spread(self, x: Float[Array, "64"]) -> Float[Array, "64 64"]:
        """Returns one number a query, repeated along the keys."""
        return lax.broadcast_in_dim(x, (ROWS, UNIT), [1])

    def row(self, slot: Any, kind: int) -> Float[Array, "64"]:
        """Returns one number a query."""
        return plgpu.load(self.ref["rows_smem"].at[slot, kind], layout=COLUMN, optimized=False)

    def loads(self, n: Any, slot: Any, far: bool | None) -> tuple[Any, Array]:
        """Returns a tile's bias, and what is to be subtracted from each query's scores.

        Loaded before the tile's products are issued: behind them in the queue to memory it
        would wait for the tensor cores.
        """
        query0 = (self.unit0 + n) * UNIT
        if far:
            bias, _ = far_tiles.bias(
                self.plan, query0 - self.key0, self.tail,
                falling=False, whole=True, interpret=self.interpret,
            )  # fmt: skip
            less = self.row(slot, Rows.LOG_TOTAL)
            return (bias, less) if self.plan.has_slope else (None, less - bias)
        start, rest = self.plan.bias_of_tile(query0 - self.key0, UNIT, self.tail, falling=False)
        bias = memory.gather(self.table, start, UNIT, interpret=self.interpret)
        return bias, self.row(slot, Rows.LOG_TOTAL) - rest

    def softmax(self, far: bool | None, x: Array, slot: Any, loaded: tuple[Any, Array]) -> Array:
        """Returns softmax weights of a tile from its products."""
        bias, less = loaded
        x = x * self.plan.exponent_scale
        if bias is not None:
            x = x + bias
        if self.plan.packed and far is None:
            x = jnp.where(self.in_document(slot), x, MASKED)
        return jnp.exp2(x - self.spread(less))

    def in_document(self, slot: Any) -> Array:
        """Returns which keys of a tile lie in the query's document or after its start."""
        keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, UNIT), 0, layout=TILE) + self.key0
        return keys >= self.spread(self.row(slot, Rows.DOCUMENT).astype(jnp.int32))

    def hide(self, weights: Array, n: Any, slot: Any) -> Array:
        """Returns weights that are negative where nothing is seen.

        Without that, tau / n would be a weight there if it is above 0.
        """
        apart = (self.unit0 + n) * UNIT - self.key0

        def masked():
            return lanes.where_seen(
                weights, apart, -1.0, rows_are_keys=True, interpret=self.interpret
            )

        weights = lax.cond(apart == 0, masked, lambda: weights)
        return jnp.where(self.in_document(slot), weights, -1.0) if self.plan.packed else weights

    def less(self, slot: Any) -> Array:
        """Returns -delta of each query, repeated along the keys."""
        return self.spread(-self.row(slot, Rows.DELTA))

    def live_step(self, far, accs, n, slots, wait, carry) -> tuple:
        """Adds a tile that may be live."""
        ref, plan, dtype = self.ref, self.plan, self.kernel.dtype
        spare = ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        slot, d_slot = slots
        loaded = self.loads(n, slot, far)

        def weigh(acc):
            plgpu.wgmma(acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n, far)
            p = weights = self.softmax(far, acc[...], slot, loaded)
            if plan.has_offset:
                weights = p - self.spread(self.row(slot, Rows.THRESHOLD))
                if far is None:
                    weights = self.hide(weights, n, slot)
            return p, lanes.pack(weights, dtype, relu=plan.has_offset, interpret=self.interpret)

        def add(p, weights, acc):
            begun = None
            if not plan.has_offset:
                begun = rings.begin_with(acc, self.less(slot), self.interpret)
            plgpu.wgmma(acc, self.value(), ref["d_out_smem"].at[d_slot].T)
            if "value" in accs:
                rings.multiply(accs["value"], weights, ref["d_out_smem"].at[d_slot], spare)
            # Without waiting for the product that was issued last.
            d_weights = rings.finish(acc, begun, 1 if "value" in accs else 0)
            if plan.has_offset:
                # Where nothing is seen p is 0, and so is dS.
                if dtype == jnp.bfloat16:
                    # What the packed weights say costs no load.
                    alive = lanes.where_positive(weights, d_weights, interpret=self.interpret)
                else:
                    # In float16 small ones are 0.
                    live = p > self.spread(self.row(slot, Rows.THRESHOLD))
                    alive = jnp.where(live, d_weights, 0.0)
                d_weights = alive + self.less(slot)
            return p * d_weights

        # One accumulator after the other, since there is no room in registers for both.
        tile = plgpu.ACC((ROWS, UNIT), jnp.float32)
        p, weights = pl.run_scoped(weigh, tile)
        if "key" not in accs:
            rings.multiply(accs["value"], weights, ref["d_out_smem"].at[d_slot], spare)
            plgpu.wgmma_wait(0)
            self.d_outs.release_slot(d_slot)
            self.queries.release_slot(slot)
            return carry
        d_scores = pl.run_scoped(functools.partial(add, p, weights), tile)
        packed = lanes.pack(d_scores, dtype, relu=False, interpret=self.interpret)
        rings.multiply(accs["key"], packed, ref["query_smem"].at[slot], spare)
        self.leave(n, d_scores, far)
        plgpu.wgmma_wait(1)
        self.d_outs.release_slot(d_slot)
        # Left in flight, it made ptxas put dS where the values are, and lose them.
        plgpu.wgmma_wait(0)
        self.queries.release_slot(slot)
        return carry

    def dead_step(self, far, accs, n, slots, wait, carry) -> tuple:
        """Adds a tile with no live entry."""
        ref = self.ref
        spare = ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        (slot,) = slots
        loaded, less = self.loads(n, slot, far), self.less(slot)

        def product(s_acc):
            plgpu.wgmma(s_acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n, far)
            return s_acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, UNIT), jnp.float32))
        d_scores = self.softmax(far, x, slot, loaded) * less
        packed = lanes.pack(d_scores, self.kernel.dtype, relu=False, interpret=self.interpret)
        rings.multiply(accs["key"], packed, ref["query_smem"].at[slot], spare)
        self.leave(n, d_scores, far)
        plgpu.wgmma_wait(0)
        self.queries.release_slot(slot)
        return carry
