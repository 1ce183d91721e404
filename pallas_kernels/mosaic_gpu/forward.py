"""The forward pass.

A CTA stays, and takes work tile after work tile: 64 queries of one head a warpgroup. One more
warpgroup has one warp that fetches, tiles of keys and values and the next work tile's queries.
The first sweep goes from the diagonal backwards over the tiles that are not negligible, sums
the exponentials, and in training the keys with them (see `mean_k.py`), and notes the farthest
block that may be live; the second goes the same way over the live ones. Without an offset one
sweep does it.

Scores are small as a rule: their bound by Cauchy-Schwarz is far below what float32 can take the
exponential of. Then the sums need no running maximum and are never rescaled; a flag of each head
says so (`no_overflow`), and another loop serves where it does not hold.
"""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.mosaic_gpu import (
    bias_table,
    config,
    launch,
    layout,
    mean_k,
    memory,
    pipeline,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.kernel_types import Carry, Index, Ref, Scalar, Scratch, TilesConsumed
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.pipeline import Slots
from pallas_kernels.mosaic_gpu.plan import BLOCK, DEAD_SLACK, LOWEST, MASKED, reachable, threshold
from pallas_kernels.mosaic_gpu.planning.types import Visits
from pallas_kernels.mosaic_gpu.scheduler import TileOrder

# Weights of `find_mean_k` are computed 2^10 times as large, for float16 has no small numbers.
_SHIFT = 10

# Of a warpgroup's queries with one block of keys.
_SCORES = plgpu.ACC((ROWS, BLOCK), jnp.float32)


def forward(
    call: Call, training: bool, visits: Visits, tile_order: Int[Array, " work_tiles+1"]
) -> dict[str, Array]:
    """Launches the forward pass; with `training` it also leaves residuals.

    Returns:
      By name: `out`; in training `lse`, log2-sum-exp2 of each row's scores less b(0)
      [batch, heads, padded], and without an offset `rounding`, what rounding took from out, of
      the same shape. In training with an offset `live`, the first live block of keys of each
      block of queries [batch, heads, blocks]; `mean_k.NAMES`, the mean of the keys weighted by the
      softmax, two times [batch, heads, blocks, head_dim / 16, 128, 4], see
      `memory.store_registers`; and if the bias has a tail `past`, the sums over tiles past its
      table of the softmax, and of the softmax times the distance past its end [batch, heads,
      blocks, 2, 64].
    """
    kernel = _Forward(call, training)
    first, table = visits.first, call.table
    # What is not read must only be there.
    segment_start = call.segment_start if call.plan.packed else first
    operands = dict(query=call.query, key=call.key, value=call.value)
    operands |= dict(table=table.for_queries, tail=table.tail, offset=call.offset)
    operands |= dict(offset_scale=call.offset_scale, segment_start=segment_start, first=first)
    operands |= dict(no_overflow=visits.no_overflow, tile_order=tile_order)
    operands["ones"] = weight_sums.ones(kernel.dtype)
    return kernel.launch(WorkTile, operands, kernel.results)


def order(call: Call, training: bool) -> TileOrder:
    """Returns the order of the kernel's work tiles."""
    rows = _tuning(call, training).rows
    return TileOrder.of_queries(
        call.batch, call.heads, call.group, call.length, rows, call.head_dim
    )


def _tuning(call: Call, training: bool) -> config.Tuning:
    tunings = call.plan.tunings
    return tunings.forward if training else tunings.inference


class _Forward(launch.Kernel):
    """The kernel's static facts.

    Attributes:
      want_keys: the mean of the keys is wanted.
      want_rounding, want_tail: `rounding`, and `past`, are wanted; see `forward`.
      keys_at_once: it can be summed with exponentials that are not divided yet, by the first
        sweep, where none overflows.
      one_sweep: the output can be summed so, and no second sweep is needed then.
      results: types of what the kernel returns, by name.
    """

    name = "lazy_forward"

    def __init__(self, call: Call, training: bool):
        plan, tuning = call.plan, _tuning(call, training)
        self.training = training
        self.want_keys = training and plan.has_offset
        self.want_rounding = training and not plan.has_offset
        used = config.forward_tiles(tuning, call.head_dim, 1 + self.want_rounding)
        super().__init__(call, tuning, order(call, training), used)
        self.want_tail = self.want_keys and plan.has_tail(self.length)
        # Exponentials that are not divided by their sum yet need the range of bfloat16.
        self.keys_at_once = self.want_keys and self.dtype == jnp.bfloat16
        # Softmax's own sum of exp2(s) v, not rescaled, needs the range of bfloat16.
        self.one_sweep = not plan.has_offset and self.dtype == jnp.bfloat16
        of_blocks = (self.batch, self.heads, self.blocks)
        same = jax.ShapeDtypeStruct(call.query.shape, self.dtype)
        self.results = {"out": same}
        if training:
            rows = (*of_blocks[:2], BLOCK * self.blocks)
            self.results["lse"] = jax.ShapeDtypeStruct(rows, jnp.float32)
        if self.want_rounding:
            self.results["rounding"] = same
        if self.want_keys:
            self.results["live"] = jax.ShapeDtypeStruct(of_blocks, jnp.int32)
            self.results |= mean_k.outputs(self.head_dim, of_blocks)
        if self.want_tail:
            self.results["past"] = jax.ShapeDtypeStruct((*of_blocks, 2, BLOCK), jnp.float32)

    def scratch(self) -> Scratch:
        """Returns the types of SMEM buffers."""
        tuning, rows = self.tuning, self.tiled(self.tuning.warpgroups)
        scratch: Scratch = {
            "query_smem": rows,
            "key_smem": self.tiled(tuning.stages),
            "value_smem": self.tiled(tuning.stages),
            # The first live block that each warp found; of two work tiles, since one warpgroup
            # may be at the next.
            "warps_live_smem": plgpu.SMEM((2, 4 * tuning.warpgroups), jnp.int32),
            "first_live_barrier": plgpu.Barrier(num_arrivals=tuning.warpgroups),
        }
        if tuning.in_registers:
            # Else the queries' own place, which they need to the end.
            scratch["out_smem"] = rows
        if self.want_keys:
            scratch |= weight_sums.scratch(self.dtype)
        if self.want_rounding:
            scratch["rounding_smem"] = rows
        if self.training:
            scratch["total_smem"] = plgpu.SMEM((tuning.warpgroups, ROWS), jnp.float32)
        return scratch

    def slots(self) -> dict[str, Slots]:
        """Returns the slots of each pipeline."""
        tiles, query = Slots(self.tuning.stages), Slots(1, copies=self.tuning.warpgroups)
        return {"key": tiles, "value": tiles, "query": query, "table": Slots(self.table_slots)}

    def consumed(self, work_tiles: Scalar, tiles_consumed: TilesConsumed) -> dict[str, Scalar]:
        """Returns how many tiles of each pipeline a CTA consumed."""
        keys, values = tiles_consumed
        return {"key": keys, "value": values, "query": work_tiles, "table": work_tiles}


class WorkTile(launch.WorkTile):
    """64 queries of one head a warpgroup; `tiles_consumed` are tiles of keys, and of values.

    Everything is counted in steps from the CTA's last tile of keys backwards.
    """

    kernel: _Forward

    def __init__(self, cta: launch.Cta, number: Scalar, n: Scalar, tiles_consumed: TilesConsumed):
        super().__init__(cta, number, n, tiles_consumed)
        kernel, tuning = self.kernel, self.tuning
        self.key_head = lax.div(self.head, jnp.int32(kernel.group))
        self.first_query = self.tile * tuning.rows
        self.last = lax.min(
            lax.div(self.first_query + tuning.rows - 1, jnp.int32(BLOCK)),
            jnp.int32((kernel.length - 1) // BLOCK),
        )
        self.keys = self.pipelines["key"].after(self.tiles_consumed[0])
        self.values = self.pipelines["value"].after(self.tiles_consumed[1])
        self.queries, self.tables = self.pipelines["query"], self.pipelines["table"]
        self.warps_live = self.ref["warps_live_smem"].at[lax.rem(self.n, jnp.int32(2))]
        self.no_overflow = self.ref["no_overflow"].at[self.batch, self.head]

    def load_warp(self) -> TilesConsumed:
        """Fetches all that the CTA reads; returns `tiles_consumed` of the next work tile."""
        ref = self.ref

        def load(pipe, name, number, step):
            slot = pipe.producer_acquire(number)
            self.load_tile(pipe, slot, (name,), self.last - step, self.key_head)

        load_key = functools.partial(load, self.keys, "key")
        load_value = functools.partial(load, self.values, "value")

        def load_both(before, start, stop):
            @pl.loop(start, stop)
            def _(n):
                load_key(before + n, n)
                load_value(n, n)

        @pipeline.fetching(self.plan)
        def _():
            self.load_own(self.queries, ("query",), self.head)
            self.load_table(self.tables, self.n, self.head)

        wanted = ["offset_scale"] if self.plan.has_offset else []
        wanted += ["segment_start"] if self.plan.packed else []
        for name in wanted:
            rows = ref[name].at[self.batch]
            memory.prefetch(rows, self.first_query, self.tuning.rows, interpret=self.interpret)
        twice = True if not self.kernel.one_sweep else self.no_overflow[...] == 0
        # One warp copies; but it can't load numbers, which is done here for it.
        steps = self.count_steps()
        diagonal = self.last - lax.div(self.first_query, jnp.int32(BLOCK)) + 1

        def one_sweep():
            pipeline.fetching(self.plan)(lambda: load_both(0, 0, steps))
            return self.next_consumed(steps, steps)

        def two_sweeps():
            before = self.sum_sweeps() * steps

            @pipeline.fetching(self.plan)
            def _():
                pl.loop(0, before)(lambda n: load_key(n, lax.rem(n, steps)))

                # Tiles on the diagonal are always live: no need to know how many more.
                load_both(before, 0, diagonal)

            plgpu.barrier_wait(ref["first_live_barrier"])
            live = self.live_steps()
            pipeline.fetching(self.plan)(lambda: load_both(before, diagonal, live))
            return self.next_consumed(before + live, live)

        return two_sweeps() if twice is True else lax.cond(twice, two_sweeps, one_sweep)

    def compute_warpgroup(self) -> TilesConsumed:
        """Does all for one warpgroup's queries; returns `tiles_consumed` of the next work tile."""
        ref, plan, kernel, b, h = self.ref, self.plan, self.kernel, self.batch, self.head
        self.query0 = self.first_query + ROWS * self.warpgroup
        self.exists = self.query0 < kernel.length
        no_overflow = self.no_overflow[...] != 0
        self.bias_tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        self.total_steps = self.count_steps()
        # Steps from the diagonal of the CTA to this warpgroup's, and to its last tile.
        diagonal = lax.div(self.query0 + ROWS - 1, jnp.int32(BLOCK))
        self.begin = self.last - lax.min(diagonal, self.last)
        first = self.first_of(self.warpgroup)
        self.end = lax.select(self.exists, self.last - first + 1, self.begin)
        if plan.has_offset:
            self.offset = ref["offset"][h]
            self.threshold = threshold(self.offset, self.load_rows("offset_scale"))
        self.last_segment_start = None
        if plan.packed:
            self.segment_start = self.load_rows("segment_start")
            # Documents and windows begin later and later: the last query's masks the most.
            last = lax.min(self.query0 + ROWS, jnp.int32(ref["segment_start"].shape[1])) - 1
            self.last_segment_start = ref["segment_start"][b, last]
        self.queries.consumer_wait(self.n)
        self.query = self.own("query")
        if self.release_early:
            self.queries.consumer_release(self.n, loading=True)
        self.table = ref["table_smem"].at[self.tables.consumer_wait(self.n)]

        two_sweeps = functools.partial(self.two_sweeps, no_overflow)
        if kernel.one_sweep:
            return self.next_consumed(*lax.cond(no_overflow, self.softmax, two_sweeps))
        return self.next_consumed(*two_sweeps())

    def two_sweeps(self, no_overflow: Array) -> tuple[Scalar, Scalar]:
        """Log-sum-exp, then the output; returns how many tiles of keys and values that took."""
        ref, words = self.ref, self.warps_live
        keys_consumed = self.sum_sweeps() * self.total_steps
        pipeline.skip(0, self.begin, (self.keys, 0))
        lse, farthest = lax.cond(no_overflow, self.sum_no_overflow, self.sum_any)
        pipeline.skip(self.end, self.total_steps, (self.keys, keys_consumed - self.total_steps))
        memory.store_minimum(farthest, words, self.warpgroup, interpret=self.interpret)
        plgpu.barrier_arrive(ref["first_live_barrier"])
        plgpu.barrier_wait(ref["first_live_barrier"])
        live_steps = self.live_steps()
        mine = functools.reduce(lax.min, [words[4 * self.warpgroup + n] for n in range(4)])
        end = lax.select(self.exists, self.last - mine + 1, self.begin)

        both = ((self.keys, keys_consumed), (self.values, 0))
        pipeline.skip(0, self.begin, *both)

        def sweep(no_overflow: bool) -> Array:
            add = functools.partial(self.add_values, lse, end, both, no_overflow)
            return pl.run_scoped(add, self.kernel.sum_type)

        if self.kernel.one_sweep:
            # Here only where scores are large.
            out = sweep(False)
        else:
            # The other way also serves where unseen entries must be told from seen ones.
            usual = no_overflow & (self.offset <= 0) if self.plan.has_offset else no_overflow
            out = lax.cond(usual, lambda: sweep(True), lambda: sweep(False))
        pipeline.skip(end, live_steps, *both)
        self.tables.consumer_release(self.n)
        self.store(out, lse)
        if self.kernel.want_keys:

            @pl.when(self.exists)
            def _():
                block = lax.div(self.query0, jnp.int32(BLOCK))
                ref["live"][self.batch, self.head, block] = mine

        return keys_consumed + live_steps, live_steps

    def sum_no_overflow(self) -> tuple[Array, Array]:
        """First sweep without a maximum: log2 of the sums, first live block per lane."""
        if self.kernel.keys_at_once:
            return pl.run_scoped(self.sum_exponentials, self.kernel.sum_type, weight_sums.ACC)
        lse, farthest = self.sum_exponentials()
        if self.kernel.want_keys:
            self.find_mean_k(lse)
        return lse, farthest

    def sum_exponentials(self, *key_accs: Ref) -> tuple[Array, Array]:
        """Does what `sum_no_overflow` does, and with accumulators stores the mean of the keys.

        What lanes must tell each other of a tile waits until the next tile's products are
        under way: in the queue to memory it would wait for other warps' products.
        """
        marks = self.plan.has_offset and self.plan.skip_dead
        with_keys = bool(key_accs)
        bar = self.threshold * (1 - DEAD_SLACK) if marks else None

        def note(n, lane_sums, others, bound, total, farthest):
            """Adds what step n found."""
            total = total + layout.add_neighbours(lane_sums, others)
            if bar is not None:
                # The sum only grows, so this never calls a live tile dead; and a NaN is not
                # below anything.
                farthest = jnp.where(bound <= bar * total, farthest, self.last - n)
            return total, farthest

        def step(kind, n, slots, wait, carry):
            total, farthest, lane_sums, bound, past = carry
            (slot,) = slots
            others = layout.of_neighbours(lane_sums, interpret=self.interpret)
            x, rest, key0 = self.scores(kind, n, slot, wait, keep=with_keys, whole=with_keys)
            total, farthest = note(n - 1, lane_sums, others, bound, total, farthest)
            e = jnp.exp2(self.hide_segments(x, key0, kind))
            if with_keys:
                mean_k.add(self, key_accs, e, slot)
                past = mean_k.add_past(self, past, e, key0, kind)
            lane_sums, bound = layout.sum_and_bound(e, interpret=self.interpret)
            if with_keys:
                plgpu.wgmma_wait(0)
                self.keys.consumer_release_slot(slot)
            else:
                factor = jnp.exp2(self.per_row(rest))
                lane_sums, bound = lane_sums * factor, bound * factor
            return total, farthest, lane_sums, bound, past

        zero = self.per_row(0.0)
        diagonal = self.per_row(lax.div(self.query0, jnp.int32(BLOCK)), jnp.int32)
        start = (zero, diagonal, zero, zero, self.no_past())
        carry = self.steps(self.end, step, start, (self.keys, 0))
        total, farthest, lane_sums, bound, past = carry
        others = layout.of_neighbours(lane_sums, interpret=self.interpret)
        last = lax.max(self.end, self.begin) - 1
        total, farthest = note(last, lane_sums, others, bound, total, farthest)
        if with_keys:
            mean_k.store(self, key_accs, past)
        return jnp.log2(total), self.clip_blocks(farthest)

    def sum_any(self) -> tuple[Array, Array]:
        """First sweep with a running maximum: the same results."""

        def step(kind, n, slots, wait, carry):
            maximum, total, farthest = carry
            x, rest, key0 = self.scores(kind, n, *slots, wait)
            x = self.hide_segments(x, key0, kind)
            highest = x.max(axis=1) + rest
            new = jnp.maximum(maximum, highest)
            total = total * jnp.exp2(maximum - new)
            total = total + jnp.exp2(x - self.spread(new - rest)).sum(axis=1)
            if self.plan.has_offset and self.plan.skip_dead:
                limit = total * (self.threshold * (1 - DEAD_SLACK))
                dead = jnp.exp2(highest - new) <= limit
                farthest = jnp.where(dead, farthest, lax.div(key0, jnp.int32(BLOCK)))
            return new, total, farthest

        diagonal = self.per_row(lax.div(self.query0, jnp.int32(BLOCK)), jnp.int32)
        start = (self.per_row(LOWEST), self.per_row(0.0), diagonal)
        carry = self.steps(self.end, step, start, (self.keys, 0), by_distance=False)
        maximum, total, farthest = carry
        lse = maximum + jnp.log2(total)
        if self.kernel.want_keys:
            self.find_mean_k(lse)
        return lse, self.clip_blocks(farthest)

    def find_mean_k(self, lse: Array) -> None:
        """Finds and stores the mean of the keys in a sweep of its own.

        For sums with a running maximum, and for float16, which takes no large exponentials.
        """
        lse = reachable(lse)
        again = (self.keys, self.total_steps)
        pipeline.skip(self.end, self.total_steps, (self.keys, 0))
        pipeline.skip(0, self.begin, again)

        def run(*accs):
            def step(kind, n, slots, wait, past):
                (slot,) = slots
                x, rest, key0 = self.scores(kind, n, slot, wait, keep=True)
                x = self.hide_segments(x, key0, kind)
                p = jnp.exp2(x - self.spread(lse - (rest + _SHIFT)))
                mean_k.add(self, accs, p, slot)
                past = mean_k.add_past(self, past, p, key0, kind)
                plgpu.wgmma_wait(0)
                self.keys.consumer_release_slot(slot)
                return past

            past = self.steps(self.end, step, self.no_past(), again, by_distance=False)
            mean_k.store(self, accs, past)

        pl.run_scoped(run, self.kernel.sum_type, weight_sums.ACC)

    def no_past(self) -> tuple[Array, ...]:
        """Returns sums over tiles past the table before the first, or () if none are wanted."""
        return (self.per_row(0.0),) * 2 if self.kernel.want_tail else ()

    def add_values(self, lse, end, both, no_overflow: bool, acc: Ref) -> Array:
        """Second sweep: the output.

        With `no_overflow` exponentials can't overflow, and tau is not above 0. Then they are taken
        before their sum is divided by: that and the threshold take one instruction.
        """
        has_offset = self.plan.has_offset

        def step(kind, n, slots, wait, carry):
            key_slot, value_slot = slots
            x, rest, key0 = self.scores(kind, n, key_slot, wait)
            if no_overflow:
                p = jnp.exp2(x) * self.spread(jnp.exp2(rest - lse))
            else:
                p = jnp.exp2(x - self.spread(lse - rest))
            if has_offset:
                p = p - self.spread(self.threshold)
            if kind is TileKind.MASKED:
                p = self.hide(p, key0, no_overflow)
            self.multiply_values(acc, p, value_slot, relu=has_offset)
            # Left in flight, they would make the compiler wait for each product there is.
            plgpu.wgmma_wait(0)
            self.values.consumer_release_slot(value_slot)
            return carry

        self.steps(end, step, (), *both, by_distance=no_overflow)
        return acc[...]

    def softmax(self) -> tuple[Scalar, Scalar]:
        """The only sweep where there is no offset, and no exponential is too large.

        Returns what `two_sweeps` does.
        """
        both = ((self.keys, 0), (self.values, 0))

        def run(acc):
            def step(kind, n, slots, wait, total):
                key_slot, value_slot = slots
                x, _, key0 = self.scores(kind, n, key_slot, wait, whole=True)
                e = jnp.exp2(self.hide_segments(x, key0, kind))
                self.multiply_values(acc, e, value_slot, relu=False)
                total = total + layout.lane_sums(e, False, interpret=self.interpret)
                plgpu.wgmma_wait(0)
                self.values.consumer_release_slot(value_slot)
                return total

            total = self.steps(self.end, step, self.per_row(0.0), *both)
            return acc[...], total

        pipeline.skip(0, self.begin, *both)
        out, total = pl.run_scoped(run, self.kernel.sum_type)
        pipeline.skip(self.end, self.total_steps, *both)
        self.tables.consumer_release(self.n)
        total = layout.finish_sums(total, interpret=self.interpret)
        out = out * lax.broadcast_in_dim(1.0 / total, out.shape, [0])
        self.store(out, jnp.log2(total))
        return self.total_steps, self.total_steps

    def store(self, out: Array, lse: Array) -> None:
        """Writes the results of the queries that exist, and gives the queries back."""
        ref, b, h, dtype = self.ref, self.batch, self.head, self.kernel.dtype
        rows = pl.ds(self.query0, ROWS)

        def staged(name):
            own = name == "out" and not self.tuning.in_registers
            return ref["query_smem" if own else f"{name}_smem"].at[self.warpgroup]

        @pl.when(self.exists)
        def _():
            results = {"out": out}
            if self.kernel.want_rounding:
                results["rounding"] = out - out.astype(dtype).astype(jnp.float32)
            # What the work tile before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for name, x in results.items():
                staged(name)[...] = x.astype(dtype)
            if self.kernel.training:
                ref["total_smem"][self.warpgroup] = reachable(lse)
            plgpu.commit_smem()
            for name in results:
                plgpu.copy_smem_to_gmem(staged(name), ref[name].at[b, rows, h])
            if self.kernel.training:
                plgpu.copy_smem_to_gmem(
                    ref["total_smem"].at[self.warpgroup], ref["lse"].at[b, h, rows]
                )

        self.release_own(self.queries)

    def scores(
        self,
        kind: TileKind,
        step: Scalar,
        slot: Scalar,
        wait: Callable[[], None],
        *,
        keep: bool = False,
        whole: bool = False,
    ) -> tuple[Array, Array | float, Scalar]:
        """Returns a tile's scores, what is still to be added to them, and its first key.

        Scores are masked where causality wants it: the table holds `MASKED` there. With `whole`
        nothing is left to be added. The keys in `slot` are given back unless told to `keep` them.
        """
        key0 = (self.last - step) * BLOCK
        # Behind the product in the queue to memory, loads would wait for the tensor cores.
        bias, rest = self.tile_bias(kind, key0, whole=whole)

        def product(acc):
            plgpu.wgmma(acc, self.query(), self.ref["key_smem"].at[slot].T)
            wait()
            return plgpu.wgmma_accumulator_load(acc)

        x = pl.run_scoped(product, _SCORES)
        if not keep:
            self.keys.consumer_release_slot(slot)
        return x * self.plan.exponent_scale + bias, rest, key0

    def multiply_values(self, acc: Ref, weights: Array, slot: Scalar, *, relu: bool) -> None:
        """Issues the product of a tile's weights, or with `relu` of those above 0, with values."""
        weights = layout.pack(weights, self.kernel.dtype, relu=relu, interpret=self.interpret)
        pipeline.multiply(acc, weights, self.ref["value_smem"].at[slot], self.spare())

    def hide_segments(self, x: Array, key0: Scalar, kind: TileKind) -> Array:
        """Returns scores with those of other documents masked, see `bias_table.loops`."""
        masked = self.plan.packed and kind is TileKind.MASKED
        return self.where_in_segment(x, key0, MASKED) if masked else x

    def hide(self, weights: Array, key0: Scalar, no_overflow: bool) -> Array:
        """Returns weights that are not above 0 where nothing is seen.

        Documents are not masked before. And tau / n would be a weight if it is above 0, which
        with `no_overflow` it is not.
        """
        unseen = -1.0 if self.plan.has_offset else 0.0

        def masked():
            return layout.where_seen(
                weights, self.query0 - key0, unseen, rows_are_keys=False, interpret=self.interpret
            )

        x = weights
        if self.plan.has_offset and not no_overflow:
            hidden = (self.offset > 0) & (key0 + BLOCK > self.query0)
            x = lax.cond(hidden, masked, lambda: weights)
        return self.where_in_segment(x, key0, unseen) if self.plan.packed else x

    def steps(self, end: Scalar, body, carry: Carry, keys, *values, by_distance=True) -> Carry:
        """Does what `pipeline.steps` does, for this warpgroup's tiles before `end`.

        `body` gets the tile's kind first. Values, if there are any, come late. `by_distance`: in
        loops that know what tiles they have, see `bias_table.loops`.
        """

        def loop(kind, start, stop, carry):
            step = functools.partial(body, kind)
            return pipeline.steps(start, stop, self.tuning.ahead, step, carry, keys, late=values)

        if not by_distance:
            return loop(TileKind.MASKED, self.begin, end, carry)
        masked = self.first_masked(self.last, self.last_segment_start)
        return bias_table.loops(
            self.plan, self.kernel.length, self.begin, self.begin, end, loop, carry, masked=masked
        )

    def clip_blocks(self, farthest: Array) -> Array:
        """Returns the first live block, within what is visited and exists."""
        first = self.first_of(self.warpgroup)
        if not (self.plan.has_offset and self.plan.skip_dead):
            farthest = self.per_row(first, jnp.int32)
        diagonal = lax.min(
            lax.div(self.query0, jnp.int32(BLOCK)), jnp.int32((self.kernel.length - 1) // BLOCK)
        )
        return jnp.minimum(jnp.maximum(farthest, first), diagonal)

    def load_rows(self, name: str) -> Array:
        """Returns this warpgroup's rows of an array [batch, padded]."""
        # Past the end of the sequence, anything that is there.
        start = lax.min(self.query0, jnp.int32(self.ref[name].shape[1] - ROWS))
        return self.load_row(self.ref[name].at[self.batch, pl.ds(start, ROWS)])

    def own_rows(self, n: int) -> pl.Slice:
        """Returns the queries of warpgroup n."""
        return pl.ds(self.first_query + ROWS * n, ROWS)

    def first_of(self, warpgroup: Index) -> Scalar:
        """Returns the first block of keys that a warpgroup visits."""
        block = lax.div(self.first_query, jnp.int32(BLOCK)) + warpgroup
        # Past the end of the sequence: as the block before.
        block = lax.min(block, jnp.int32(self.ref["first"].shape[-1] - 1))
        return self.ref["first"][self.batch, self.head, block]

    def count_steps(self) -> Scalar:
        """Returns how many key tiles the CTA visits."""
        first = functools.reduce(lax.min, [self.first_of(n) for n in range(self.tuning.warpgroups)])
        return self.last - first + 1

    def live_steps(self) -> Scalar:
        """Returns how many of them may be live, once `first_live_barrier` is complete."""
        words = [self.warps_live[n] for n in range(4 * self.tuning.warpgroups)]
        return self.last - functools.reduce(lax.min, words) + 1

    def sum_sweeps(self) -> Index:
        """Returns how often all tiles are visited before the live ones: see `find_mean_k`."""
        if not self.kernel.want_keys:
            return 1
        if not self.kernel.keys_at_once:
            return 2
        return lax.select(self.no_overflow[...] != 0, jnp.int32(1), jnp.int32(2))

    def next_consumed(self, keys: Scalar, values: Scalar) -> TilesConsumed:
        """Returns `tiles_consumed` of the next work tile, where this one took so many."""
        return self.tiles_consumed[0] + keys, self.tiles_consumed[1] + values
