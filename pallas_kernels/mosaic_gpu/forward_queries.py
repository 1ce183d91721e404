"""What one warpgroup of the forward pass does with its 64 queries.

The first sweep goes from the diagonal backwards over the tiles that are not negligible, sums
the exponentials and notes the farthest unit that may be live; the second goes the same way
over the live ones. Without an offset one sweep does it.

For the backward pass the first sweep also finds the mean of the keys, see `mean_k.py`.

Scores are small as a rule: their bound by Cauchy-Schwarz is far below what float32 can
take the exponential of. Then the sums need no running maximum and are never rescaled; a
flag of each head says so, and another loop serves where it does not hold.
"""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.mosaic_gpu import forward_scores, layout, mean_k, memory, pipeline
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.pipeline import as_index
from pallas_kernels.mosaic_gpu.plan import DEAD_SLACK, LOWEST, UNIT, threshold
from pallas_kernels.mosaic_gpu.tile_kind import TileKind


class Queries(forward_scores.Scores):
    """What one computing warpgroup does with its 64 queries."""

    def compute(self) -> tuple[Any, Any]:
        """Does all for the queries; returns `tiles_consumed` of the next work tile."""
        ref, plan, kernel = self.ref, self.plan, self.kernel
        block, b, h = self.all, self.all.batch, self.all.head
        self.exists = self.query0 < kernel.length
        self.no_overflow = ref["no_overflow"][b, h] != 0
        self.bias_tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        self.total_steps = block.steps()
        # Steps from the diagonal of the block to this warpgroup's, and to its last tile.
        diagonal = lax.div(self.query0 + ROWS - 1, jnp.int32(self.block.keys))
        self.begin = block.last - lax.min(diagonal, block.last)
        first = block.first_tile(block.first_of(self.warpgroup))
        self.end = lax.select(self.exists, block.last - first + 1, self.begin)
        if plan.has_offset:
            self.offset = ref["offset"][h]
            self.threshold = threshold(self.offset, self.load_rows("offset_scale"))
        if plan.packed:
            self.segment_start = self.load_rows("segment_start")
            # Documents and windows begin later and later: the last query's masks the most.
            last = lax.min(self.query0 + ROWS, jnp.int32(ref["segment_start"].shape[1])) - 1
            self.last_segment_start = ref["segment_start"][b, last]
        block.queries.consumer_wait(block.n)
        self.query = pipeline.operand(
            ref["query_smem"], self.warpgroup, self.block.in_registers, self.interpret
        )
        self.release_early = self.block.in_registers and not self.interpret
        if self.release_early:
            block.queries.consumer_release(block.n)
        self.table = ref["table_smem"].at[block.tables.consumer_wait(block.n)]

        if kernel.one_sweep:
            keys, values = lax.cond(self.no_overflow, self.softmax, self.two_sweeps)
        else:
            keys, values = self.two_sweeps()
        return block.used(keys, values)

    def two_sweeps(self) -> tuple[Any, Any]:
        """Log-sum-exp, then the output; returns how many tiles of keys and values that took."""
        ref, block = self.ref, self.all
        words = block.words
        keys_done = block.sum_sweeps * self.total_steps
        pipeline.skip(0, self.begin, (block.keys, 0))
        lse, farthest = lax.cond(self.no_overflow, self.sum_no_overflow, self.sum_any)
        pipeline.skip(self.end, self.total_steps, (block.keys, keys_done - self.total_steps))
        memory.store_minimum(farthest, words, self.warpgroup, interpret=self.interpret)
        plgpu.barrier_arrive(ref["bound_barrier"])
        plgpu.barrier_wait(ref["bound_barrier"])
        live_steps = block.live_steps()
        mine = functools.reduce(lax.min, [words[4 * self.warpgroup + n] for n in range(4)])
        end = lax.select(self.exists, block.last - block.first_tile(mine) + 1, self.begin)

        both = ((block.keys, keys_done), (block.values, 0))
        pipeline.skip(0, self.begin, *both)

        def sweep(no_overflow: bool) -> Array:
            add = functools.partial(self.add_values, lse, end, both, no_overflow)
            return pl.run_scoped(add, self.sums_type)

        if self.kernel.one_sweep:
            # Here only where scores are large.
            out = sweep(False)
        else:
            # The other way also serves where unseen entries must be told from seen ones.
            usual = (
                self.no_overflow & (self.offset <= 0) if self.plan.has_offset else self.no_overflow
            )
            out = lax.cond(usual, lambda: sweep(True), lambda: sweep(False))
        pipeline.skip(end, live_steps, *both)
        block.tables.consumer_release(block.n)
        self.store(out, lse)
        if self.kernel.want_keys:

            @pl.when(self.exists)
            def _():
                unit = lax.div(self.query0, jnp.int32(UNIT))
                ref["live"][block.batch, block.head, unit] = mine

        return keys_done + live_steps, live_steps

    @property
    def sums_type(self) -> Any:
        """Returns the type of sums of keys or values, one a query."""
        return plgpu.ACC((ROWS, self.kernel.head_dim), jnp.float32)

    def sum_no_overflow(self) -> tuple[Array, Array]:
        """First sweep without a maximum: log2 of the sums, first live unit per lane."""
        if self.kernel.keys_at_once:
            return pl.run_scoped(self.sum_exponentials, *mean_k.accumulators(self.kernel.head_dim))
        lse, farthest = self.sum_exponentials()
        if self.kernel.want_keys:
            mean_k.find(self, lse)
        return lse, farthest

    def sum_exponentials(self, *key_accs: Any) -> tuple[Array, Array]:
        """Does what `sum_no_overflow` does, and with accumulators stores the mean of the keys.

        What lanes must tell each other of a tile waits until the next tile's products are
        under way: in the queue to memory it would wait for other warps' products.
        """
        marks = self.plan.has_offset and self.plan.skip_dead
        bar = self.threshold * (1 - DEAD_SLACK) if marks else None
        units = self.block.keys // UNIT

        def note(n, lane_sums, others, bounds, total, farthest):
            """Adds what step n found, its units' bounds the last first."""
            total = total + layout.add_neighbours(lane_sums, others)
            if marks:
                # The sum only grows, so this never calls a live tile dead; and a NaN is not
                # below anything.
                limit = bar * total
                for last_first, bound in enumerate(bounds):
                    unit = (self.all.last - n + 1) * units - 1 - last_first
                    farthest = jnp.where(bound <= limit, farthest, unit)
            return total, farthest

        def step(kind, n, slots, wait, carry):
            total, farthest, lane_sums, bounds, past = carry
            (slot,) = slots
            others = layout.of_neighbours(lane_sums, interpret=self.interpret)

            def use(x, rest, key0, unit, carry):
                total, farthest, new_sums, new_bounds, past = carry
                if not new_bounds:
                    total, farthest = note(n - 1, lane_sums, others, bounds, total, farthest)
                e = jnp.exp2(self.hide_segments(x, key0, kind))
                if key_accs:
                    mean_k.add(self, key_accs, e, slot, unit)
                    past = mean_k.add_past(self, past, e, key0, kind)
                sums, bound = layout.sum_and_bound(e, interpret=self.interpret)
                if not key_accs:
                    factor = jnp.exp2(self.per_row(rest))
                    sums, bound = sums * factor, bound * factor
                new_sums = new_sums + sums if new_bounds else sums
                carry = (total, farthest, new_sums, (*new_bounds, bound), past)
                return carry, len(key_accs)

            start = (total, farthest, None, (), past)
            keep = bool(key_accs)
            carry = self.scores(n, slot, wait, use, start, keep=keep, whole=keep, kind=kind)
            if keep:
                plgpu.wgmma_wait(0)
                self.all.keys.consumer_release_slot(slot)
            return carry

        zero = self.per_row(0.0)
        start = (zero, self.no_unit(), zero, (zero,) * units, mean_k.no_past(self))
        carry = self.steps_by_distance(self.end, step, start, (self.all.keys, 0))
        total, farthest, lane_sums, bounds, past = carry
        others = layout.of_neighbours(lane_sums, interpret=self.interpret)
        last = lax.max(self.end, self.begin) - 1
        total, farthest = note(last, lane_sums, others, bounds, total, farthest)
        if key_accs:
            mean_k.store(self, key_accs, past)
        return jnp.log2(total), self.clip_units(farthest)

    def sum_any(self) -> tuple[Array, Array]:
        """First sweep with a running maximum: the same results."""

        def use(x, rest, key0, _, carry):
            maximum, total, farthest = carry
            x = self.hide_segments(x, key0)
            highest = x.max(axis=1) + rest
            new = jnp.maximum(maximum, highest)
            total = total * jnp.exp2(maximum - new)
            total = total + jnp.exp2(x - self.spread(new - rest)).sum(axis=1)
            if self.plan.has_offset and self.plan.skip_dead:
                limit = total * (self.threshold * (1 - DEAD_SLACK))
                dead = jnp.exp2(highest - new) <= limit
                farthest = jnp.where(dead, farthest, _unit(key0))
            return (new, total, farthest), 0

        def step(n, slots, wait, carry):
            return self.scores(n, *slots, wait, use, carry)

        start = (self.per_row(LOWEST), self.per_row(0.0), self.no_unit())
        maximum, total, farthest = self.steps(self.end, step, start, (self.all.keys, 0))
        lse = maximum + jnp.log2(total)
        if self.kernel.want_keys:
            mean_k.find(self, lse)
        return lse, self.clip_units(farthest)

    def no_unit(self) -> Array:
        """Returns where the search for the farthest live unit begins: the diagonal."""
        return self.per_row(lax.div(self.query0, jnp.int32(UNIT)), jnp.int32)

    def clip_units(self, farthest: Array) -> Array:
        """Returns the first live unit, within what is visited and exists."""
        first = self.all.first_of(self.warpgroup)
        if not (self.plan.has_offset and self.plan.skip_dead):
            farthest = self.per_row(first, jnp.int32)
        diagonal = lax.min(
            lax.div(self.query0, jnp.int32(UNIT)), jnp.int32((self.kernel.length - 1) // UNIT)
        )
        return jnp.minimum(jnp.maximum(farthest, first), diagonal)

    def add_values(self, lse, end, both, no_overflow, acc) -> Array:
        """Second sweep: the output.

        With `no_overflow` exponentials can't overflow, and tau is not above 0. Then they are taken
        before their sum is divided by: that and the threshold take one instruction.
        """
        block, plan = self.all, self.plan
        dtype = self.kernel.dtype
        spare = self.ref["spare_smem"].at[self.warpgroup] if self.interpret else None

        def use(kind, x, rest, key0, unit, slot):
            if no_overflow:
                p = jnp.exp2(x) * self.spread(jnp.exp2(rest - lse))
            else:
                p = jnp.exp2(x - self.spread(lse - rest))
            if plan.has_offset:
                p = p - self.spread(self.threshold)
            if kind is TileKind.MASKED:
                p = self.hide(p, key0, no_overflow)
            weights = layout.pack(p, dtype, relu=plan.has_offset, interpret=self.interpret)
            pipeline.multiply(acc, weights, self.values_of(slot, unit), spare)
            return slot, 1

        def step(kind, n, slots, wait, carry):
            key_slot, value_slot = slots
            self.scores(n, key_slot, wait, functools.partial(use, kind), value_slot, kind=kind)
            # Left in flight, they would make the compiler wait for each product there is.
            plgpu.wgmma_wait(0)
            block.values.consumer_release_slot(value_slot)
            return carry

        if no_overflow:
            self.steps_by_distance(end, step, (), both[0], both[1:])
        else:
            self.steps(end, functools.partial(step, TileKind.MASKED), (), both[0], both[1:])
        return acc[...]

    def values_of(self, slot: Any, unit: int) -> Any:
        """Returns the values of one unit of the tile in a slot."""
        return self.ref["value_smem"].at[slot, pl.ds(unit * UNIT, UNIT)]

    def softmax(self) -> tuple[Any, Any]:
        """The only sweep where there is no offset, and no exponential is too large.

        Returns what `two_sweeps` does.
        """
        block = self.all
        spare = self.ref["spare_smem"].at[self.warpgroup] if self.interpret else None

        def run(acc):
            def use(kind, x, rest, key0, unit, carry):
                slot, total = carry
                x = self.hide_segments(x, key0, kind)
                e = jnp.exp2(x)
                weights = layout.pack(e, self.kernel.dtype, relu=False, interpret=self.interpret)
                pipeline.multiply(acc, weights, self.values_of(slot, unit), spare)
                total = total + layout.lane_sums(e, False, interpret=self.interpret)
                return (slot, total), 1

            def step(kind, n, slots, wait, total):
                key_slot, value_slot = slots
                start = (value_slot, total)
                run = functools.partial(use, kind)
                _, total = self.scores(n, key_slot, wait, run, start, whole=True, kind=kind)
                plgpu.wgmma_wait(0)
                block.values.consumer_release_slot(value_slot)
                return total

            zero = self.per_row(0.0)
            total = self.steps_by_distance(self.end, step, zero, both[0], both[1:])
            return acc[...], total

        both = ((block.keys, 0), (block.values, 0))
        pipeline.skip(0, self.begin, *both)
        out, total = pl.run_scoped(run, self.sums_type)
        pipeline.skip(self.end, self.total_steps, *both)
        block.tables.consumer_release(block.n)
        total = layout.finish_sums(total, interpret=self.interpret)
        out = out * lax.broadcast_in_dim(1.0 / total, out.shape, [0])
        self.store(out, jnp.log2(total))
        return self.total_steps, self.total_steps

    def store(self, out: Array, lse: Array) -> None:
        """Writes the results of the queries that exist."""
        ref, block = self.ref, self.all
        b, h = block.batch, block.head

        @pl.when(self.exists)
        def _():
            results = {"out": out}
            if self.kernel.want_rounding:
                results["rounding"] = out - self.round(out).astype(jnp.float32)
            # What the work tile before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for name, x in results.items():
                self.staged(name)[...] = self.round(x)
            if self.kernel.training:
                ref["total_smem"][self.warpgroup] = lse
            plgpu.commit_smem()
            for name in results:
                plgpu.copy_smem_to_gmem(self.staged(name), ref[name].at[b, self.rows, h])
            if self.kernel.training:
                plgpu.copy_smem_to_gmem(
                    ref["total_smem"].at[self.warpgroup], ref["lse"].at[b, h, self.rows]
                )

        if not self.release_early:
            if not self.block.in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            block.queries.consumer_release(block.n)

    def staged(self, name: str) -> Any:
        """Returns where in SMEM an output waits to be written."""
        own = name == "out" and not self.block.in_registers
        return self.ref["query_smem" if own else f"{name}_smem"].at[self.warpgroup]

    def round(self, x: Array) -> Array:
        """Returns x in the dtype of the outputs."""
        return x.astype(self.kernel.dtype)


def _unit(key0: Any) -> Int[Array, ""]:
    return lax.div(as_index(key0), jnp.int32(UNIT))
