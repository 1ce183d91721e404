"""The forward pass.

A block stays, and takes work tile after work tile: 64 queries of one head a warpgroup. One more
warpgroup has one warp that fetches, tiles of keys and values and the next work tile's queries.
The first sweep goes from the diagonal backwards over the tiles that are not negligible, sums
the exponentials, and in training the keys with them (see `mean_k.py`), and notes the farthest
unit that may be live; the second goes the same way over the live ones. Without an offset one
sweep does it.

Scores are small as a rule: their bound by Cauchy-Schwarz is far below what float32 can take the
exponential of. Then the sums need no running maximum and are never rescaled; a flag of each head
says so (`no_overflow`), and another loop serves where it does not hold.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import (
    bias_table,
    config,
    launch,
    layout,
    mean_k,
    memory,
    pipeline,
    scheduler,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.config import ForwardBlock
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS
from pallas_kernels.mosaic_gpu.pipeline import as_index
from pallas_kernels.mosaic_gpu.plan import DEAD_SLACK, LOWEST, MASKED, UNIT, Plan, threshold

# What the kernel may return.
RESULTS = ("out", "lse", "rounding", "live", *mean_k.NAMES, "past")
# Of a warpgroup's queries with one unit of keys.
_SHAPE = (ROWS, UNIT)


def forward(
    plan: Plan,
    training: bool,
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    table: Float[Array, "heads rows 128"],
    tail: Float[Array, "heads 2"],
    offset: Float[Array, " heads"],
    offset_scale: Float[Array, "batch padded"],
    segment_start: Int[Array, "batch padded"],
    first: Int[Array, "batch heads units"],
    no_overflow: Int[Array, "batch heads"],
    tile_order: Int[Array, " work_tiles+1"],
) -> dict[str, Array | None]:
    """Launches the forward pass.

    Args:
      plan: of the call.
      training: also return residuals.
      query: rotated queries; the length is a multiple of 8.
      key: rotated keys.
      value: values.
      table: from `plan.table`.
      tail: from `plan.table`.
      offset: tau; not read without an offset.
      offset_scale: factor of tau for each query; rows are padded to units of 64.
      segment_start: first key each query sees; not read unless `plan.packed`.
      first: first unit of keys that each unit of queries visits.
      no_overflow: whether no exponential of a score of this head can overflow.
      tile_order: of the work tiles, see `order` and `scheduler.TileOrder.tile_order`.

    Returns:
      By name: `out`; in training `lse`, log2-sum-exp2 of each row's scores less b(0)
      [batch, heads, padded], and without an offset `rounding`, what rounding took from out, of
      the same shape. In training with an offset `live`, the first live unit of keys of each
      unit of queries [batch, heads, units]; `mean_k.NAMES`, the mean of the keys weighted by the
      softmax, two times [batch, heads, units, head_dim / 16, 128, 4], see
      `memory.store_registers`; and if the bias has a tail `past`, the sums over tiles past its
      table of the softmax, and of the softmax times the distance past its end [batch, heads,
      units, 2, 64].
    """
    block = plan.blocks.forward if training else plan.blocks.inference
    kernel = _Forward(plan, block, training, query, key, table.shape, first.shape[-1])
    results = kernel.launch(
        list(kernel.results.values()), query, key, value, table, tail, offset, offset_scale,
        segment_start, first, no_overflow, tile_order, weight_sums.ones(query.dtype),
    )  # fmt: skip
    return dict.fromkeys(RESULTS) | dict(zip(kernel.results, results, strict=True))


def order(plan: Plan, training: bool, query: Array, key: Array) -> scheduler.TileOrder:
    """Returns the order of the kernel's work tiles."""
    batch, length, heads, head_dim = query.shape
    block = plan.blocks.forward if training else plan.blocks.inference
    group = heads // key.shape[2]
    return scheduler.TileOrder.of_queries(batch, heads, group, length, block.rows, head_dim)


class _Forward(launch.Kernel):
    """The kernel."""

    name = "lazy_forward"
    block: ForwardBlock

    def __init__(
        self,
        plan: Plan,
        block: ForwardBlock,
        training: bool,
        query: Array,
        key: Array,
        table_shape: tuple[int, ...],
        units: int,
    ):
        self.training = training
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.group = self.heads // key.shape[2]
        self.dtype = query.dtype
        self.table_shape = table_shape[1:]
        self.want_keys = training and plan.has_offset
        self.want_rounding = training and not plan.has_offset
        self.want_tail = self.want_keys and plan.has_tail(self.length)
        # Exponentials that are not divided by their sum yet need the range of bfloat16.
        self.keys_at_once = self.want_keys and self.dtype == jnp.bfloat16
        self.order = order(plan, training, query, key)
        super().__init__(plan, block, self.order.work_tiles)
        # Softmax's own sum of exp2(s) v, not rescaled, needs the range of bfloat16.
        self.one_sweep = not plan.has_offset and self.dtype == jnp.bfloat16
        used = config.forward_tiles(block, self.head_dim, 1 + self.want_rounding)
        self.tables = config.tables(used, table_shape[1])
        of_units = (self.batch, self.heads, units)
        same = jax.ShapeDtypeStruct(query.shape, query.dtype)
        self.results = {"out": same}
        if training:
            rows = (*of_units[:2], UNIT * units)
            self.results["lse"] = jax.ShapeDtypeStruct(rows, jnp.float32)
        if self.want_rounding:
            self.results["rounding"] = same
        if self.want_keys:
            self.results["live"] = jax.ShapeDtypeStruct(of_units, jnp.int32)
            self.results |= mean_k.outputs(self.head_dim, of_units)
        if self.want_tail:
            self.results["past"] = jax.ShapeDtypeStruct((*of_units, 2, UNIT), jnp.float32)

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and barriers."""
        block, d = self.block, self.head_dim
        tile = pipeline.tiled((block.stages, block.keys, d), self.dtype)
        rows = pipeline.tiled((block.warpgroups, ROWS, d), self.dtype)
        row = plgpu.SMEM((block.warpgroups, ROWS), jnp.float32)
        scratch = {
            "query_smem": rows,
            "key_smem": tile,
            "value_smem": tile,
            "table_smem": plgpu.SMEM((self.tables, *self.table_shape), jnp.float32),
            # Of two work tiles, since one warpgroup may be at the next.
            "words_smem": plgpu.SMEM((2, 4 * block.warpgroups), jnp.int32),
            "bound_barrier": plgpu.Barrier(num_arrivals=block.warpgroups),
        }
        scratch |= pipeline.barriers("query", 1, block.warpgroups, copies=block.warpgroups)
        scratch |= pipeline.barriers("table", self.tables, block.warpgroups)
        for name in ("key", "value"):
            scratch |= pipeline.barriers(name, block.stages, block.warpgroups)
        if block.in_registers:
            # Else the queries' own place, which they need to the end.
            scratch["out_smem"] = rows
        if self.want_keys:
            scratch |= weight_sums.scratch(self.dtype)
        if self.want_rounding:
            scratch["rounding_smem"] = rows
        if self.training:
            scratch["total_smem"] = row
        if self.interpret:
            scratch["spare_smem"] = pipeline.tiled((block.warpgroups, ROWS, UNIT), self.dtype)
        return scratch

    def prepare(self, ref: dict[str, Any], fetches: bool) -> None:
        """Fetches the ones, or waits for them."""
        if self.want_keys:
            weight_sums.prepare(self.plan, ref, fetches)

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "key", "value", "table", "tail", "offset", "offset_scale",
            "segment_start", "first", "no_overflow", "tile_order", "ones",
        ]  # fmt: skip
        return names + list(self.results)

    def slots(self) -> dict[str, int]:
        """Returns how many slots each pipeline has."""
        stages = self.block.stages
        return {"key": stages, "value": stages, "query": 1, "table": self.tables}

    def tiles(self, work_tiles: Any, tiles_consumed: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each pipeline so many work tiles took."""
        return {
            "key": tiles_consumed[0],
            "value": tiles_consumed[1],
            "query": work_tiles,
            "table": work_tiles,
        }

    def work_tile(self, *args: Any) -> "WorkTile":
        """Returns a work tile."""
        return WorkTile(*args)


class WorkTile:
    """A block of queries of one head, as all warpgroups see it.

    Args:
      blocks: what works on it.
      number: which work tile it is.
      n: how many work tiles came before it here.
      tiles_consumed: tiles of keys, and of values, that those took.
    """

    def __init__(self, blocks: launch.Blocks, number: Any, n: Any, tiles_consumed: tuple[Any, Any]):
        kernel: Any = blocks.kernel
        self.kernel, self.ref, self.n, self.tiles_consumed = kernel, blocks.ref, n, tiles_consumed
        self.plan, self.block, self.interpret = kernel.plan, kernel.block, kernel.interpret
        block = self.block
        self.warpgroup = blocks.warpgroup
        self.batch, self.head, tile = kernel.order.item(number)
        self.key_head = lax.div(self.head, jnp.int32(kernel.group))
        self.first_query = tile * block.rows
        # Everything is counted in steps from the last key tile of the block backwards.
        self.last = lax.min(
            lax.div(self.first_query + block.rows - 1, jnp.int32(block.keys)),
            jnp.int32((kernel.length - 1) // block.keys),
        )
        self.keys = blocks.pipelines["key"].after(tiles_consumed[0])
        self.values = blocks.pipelines["value"].after(tiles_consumed[1])
        self.queries, self.tables = blocks.pipelines["query"], blocks.pipelines["table"]
        self.words = self.ref["words_smem"].at[lax.rem(n, jnp.int32(2))]

    def used(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Returns `tiles_consumed` of the next work tile, where this one took so many."""
        return self.tiles_consumed[0] + keys, self.tiles_consumed[1] + values

    def first_tile(self, unit: Any) -> Int[Array, ""]:
        """Returns the key tile of a unit of keys."""
        return lax.div(as_index(unit), jnp.int32(self.block.keys // UNIT))

    def first_of(self, warpgroup: Any) -> Int[Array, ""]:
        """Returns the first unit of keys that a warpgroup visits."""
        unit = lax.div(self.first_query, jnp.int32(UNIT)) + warpgroup
        # Past the end of the sequence: as the unit before.
        unit = lax.min(unit, jnp.int32(self.ref["first"].shape[-1] - 1))
        return self.ref["first"][self.batch, self.head, unit]

    def count_steps(self) -> Int[Array, ""]:
        """Returns how many key tiles the block visits."""
        first = functools.reduce(lax.min, [self.first_of(n) for n in range(self.block.warpgroups)])
        return self.last - self.first_tile(first) + 1

    def live_steps(self) -> Int[Array, ""]:
        """Returns the same of the live ones, once `bound_barrier` is complete."""
        words = [self.words[n] for n in range(4 * self.block.warpgroups)]
        return self.last - self.first_tile(functools.reduce(lax.min, words)) + 1

    @property
    def sum_sweeps(self) -> Any:
        """How often all tiles are visited before the live ones: see `mean_k.find`."""
        if not self.kernel.want_keys:
            return 1
        if not self.kernel.keys_at_once:
            return 2
        no_overflow = self.ref["no_overflow"][self.batch, self.head] != 0
        return lax.select(no_overflow, jnp.int32(1), jnp.int32(2))

    @property
    def sweeps_twice(self) -> Any:
        """Whether there is a second sweep."""
        if not self.kernel.one_sweep:
            return True
        return self.ref["no_overflow"][self.batch, self.head] == 0

    def load_warp(self) -> tuple[Any, Any]:
        """Fetches all that the block reads; returns `tiles_consumed` of the next work tile."""
        ref, block, b, h = self.ref, self.block, self.batch, self.head

        def copy(pipe, name, number, step):
            slot = pipe.producer_acquire(number)
            rows = pl.ds((self.last - step) * block.keys, block.keys)
            plgpu.copy_gmem_to_smem(
                ref[name].at[b, rows, self.key_head], ref[f"{name}_smem"].at[slot],
                pipe.full.at[slot],
            )  # fmt: skip

        copy_key = functools.partial(copy, self.keys, "key")
        copy_value = functools.partial(copy, self.values, "value")

        @pipeline.fetching(self.plan)
        def _():
            slot = self.queries.producer_acquire(self.n)
            for n in range(block.warpgroups):
                rows = pl.ds(self.first_query + ROWS * n, ROWS)
                plgpu.copy_gmem_to_smem(
                    ref["query"].at[b, rows, h], ref["query_smem"].at[n], self.queries.full.at[slot]
                )
            slot = self.tables.producer_acquire(self.n)
            plgpu.copy_gmem_to_smem(
                ref["table"].at[h], ref["table_smem"].at[slot], self.tables.full.at[slot]
            )

        wanted = ["offset_scale"] if self.plan.has_offset else []
        wanted += ["segment_start"] if self.plan.packed else []
        for name in wanted:
            memory.prefetch(ref[name].at[b], self.first_query, block.rows, interpret=self.interpret)
        twice = self.sweeps_twice
        # One warp copies; but it can't load numbers, which is done here for it.
        steps = self.count_steps()
        diagonal = self.last - lax.div(self.first_query, jnp.int32(block.keys)) + 1

        def one_sweep():
            @pipeline.fetching(self.plan)
            def _():
                @pl.loop(0, steps)
                def _(n):
                    copy_key(n, n)
                    copy_value(n, n)

            return self.used(steps, steps)

        def two_sweeps():
            before = self.sum_sweeps * steps

            @pipeline.fetching(self.plan)
            def _():
                pl.loop(0, before)(lambda n: copy_key(n, lax.rem(n, steps)))

                # Tiles on the diagonal are always live: no need to know how many more.
                @pl.loop(0, diagonal)
                def _(n):
                    copy_key(before + n, n)
                    copy_value(n, n)

            plgpu.barrier_wait(ref["bound_barrier"])
            live = self.live_steps()

            @pipeline.fetching(self.plan)
            def _():
                @pl.loop(diagonal, live)
                def _(n):
                    copy_key(before + n, n)
                    copy_value(n, n)

            return self.used(before + live, live)

        if twice is True:
            return two_sweeps()
        return lax.cond(twice, two_sweeps, one_sweep)

    def compute_warpgroup(self) -> tuple[Any, Any]:
        """Does all for one warpgroup's queries; returns `tiles_consumed` of the next work tile."""
        ref, plan, kernel = self.ref, self.plan, self.kernel
        b, h = self.batch, self.head
        self.query0 = self.first_query + ROWS * self.warpgroup
        self.rows = pl.ds(self.query0, ROWS)
        self.exists = self.query0 < kernel.length
        self.no_overflow = ref["no_overflow"][b, h] != 0
        self.bias_tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        self.total_steps = self.count_steps()
        # Steps from the diagonal of the block to this warpgroup's, and to its last tile.
        diagonal = lax.div(self.query0 + ROWS - 1, jnp.int32(self.block.keys))
        self.begin = self.last - lax.min(diagonal, self.last)
        first = self.first_tile(self.first_of(self.warpgroup))
        self.end = lax.select(self.exists, self.last - first + 1, self.begin)
        if plan.has_offset:
            self.offset = ref["offset"][h]
            self.threshold = threshold(self.offset, self.load_rows("offset_scale"))
        if plan.packed:
            self.segment_start = self.load_rows("segment_start")
            # Documents and windows begin later and later: the last query's masks the most.
            last = lax.min(self.query0 + ROWS, jnp.int32(ref["segment_start"].shape[1])) - 1
            self.last_segment_start = ref["segment_start"][b, last]
        self.queries.consumer_wait(self.n)
        self.query = pipeline.operand(
            ref["query_smem"], self.warpgroup, self.block.in_registers, self.interpret
        )
        self.release_early = self.block.in_registers and not self.interpret
        if self.release_early:
            self.queries.consumer_release(self.n)
        self.table = ref["table_smem"].at[self.tables.consumer_wait(self.n)]

        if kernel.one_sweep:
            keys, values = lax.cond(self.no_overflow, self.softmax, self.two_sweeps)
        else:
            keys, values = self.two_sweeps()
        return self.used(keys, values)

    def two_sweeps(self) -> tuple[Any, Any]:
        """Log-sum-exp, then the output; returns how many tiles of keys and values that took."""
        ref, words = self.ref, self.words
        keys_done = self.sum_sweeps * self.total_steps
        pipeline.skip(0, self.begin, (self.keys, 0))
        lse, farthest = lax.cond(self.no_overflow, self.sum_no_overflow, self.sum_any)
        pipeline.skip(self.end, self.total_steps, (self.keys, keys_done - self.total_steps))
        memory.store_minimum(farthest, words, self.warpgroup, interpret=self.interpret)
        plgpu.barrier_arrive(ref["bound_barrier"])
        plgpu.barrier_wait(ref["bound_barrier"])
        live_steps = self.live_steps()
        mine = functools.reduce(lax.min, [words[4 * self.warpgroup + n] for n in range(4)])
        end = lax.select(self.exists, self.last - self.first_tile(mine) + 1, self.begin)

        both = ((self.keys, keys_done), (self.values, 0))
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
        self.tables.consumer_release(self.n)
        self.store(out, lse)
        if self.kernel.want_keys:

            @pl.when(self.exists)
            def _():
                unit = lax.div(self.query0, jnp.int32(UNIT))
                ref["live"][self.batch, self.head, unit] = mine

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
                    unit = (self.last - n + 1) * units - 1 - last_first
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
                self.keys.consumer_release_slot(slot)
            return carry

        zero = self.per_row(0.0)
        start = (zero, self.no_unit(), zero, (zero,) * units, mean_k.no_past(self))
        carry = self.steps_by_distance(self.end, step, start, (self.keys, 0))
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
                unit = lax.div(as_index(key0), jnp.int32(UNIT))
                farthest = jnp.where(dead, farthest, unit)
            return (new, total, farthest), 0

        def step(n, slots, wait, carry):
            return self.scores(n, *slots, wait, use, carry)

        start = (self.per_row(LOWEST), self.per_row(0.0), self.no_unit())
        maximum, total, farthest = self.steps(self.end, step, start, (self.keys, 0))
        lse = maximum + jnp.log2(total)
        if self.kernel.want_keys:
            mean_k.find(self, lse)
        return lse, self.clip_units(farthest)

    def no_unit(self) -> Array:
        """Returns where the search for the farthest live unit begins: the diagonal."""
        return self.per_row(lax.div(self.query0, jnp.int32(UNIT)), jnp.int32)

    def clip_units(self, farthest: Array) -> Array:
        """Returns the first live unit, within what is visited and exists."""
        first = self.first_of(self.warpgroup)
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
        plan = self.plan
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
            self.values.consumer_release_slot(value_slot)
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
                self.values.consumer_release_slot(value_slot)
                return total

            zero = self.per_row(0.0)
            total = self.steps_by_distance(self.end, step, zero, both[0], both[1:])
            return acc[...], total

        both = ((self.keys, 0), (self.values, 0))
        pipeline.skip(0, self.begin, *both)
        out, total = pl.run_scoped(run, self.sums_type)
        pipeline.skip(self.end, self.total_steps, *both)
        self.tables.consumer_release(self.n)
        total = layout.finish_sums(total, interpret=self.interpret)
        out = out * lax.broadcast_in_dim(1.0 / total, out.shape, [0])
        self.store(out, jnp.log2(total))
        return self.total_steps, self.total_steps

    def store(self, out: Array, lse: Array) -> None:
        """Writes the results of the queries that exist."""
        ref, b, h = self.ref, self.batch, self.head

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
            self.queries.consumer_release(self.n)

    def staged(self, name: str) -> Any:
        """Returns where in SMEM an output waits to be written."""
        own = name == "out" and not self.block.in_registers
        return self.ref["query_smem" if own else f"{name}_smem"].at[self.warpgroup]

    def round(self, x: Array) -> Array:
        """Returns x in the dtype of the outputs."""
        return x.astype(self.kernel.dtype)

    def spread(self, x: Float[Array, "64"]) -> Float[Array, "64 64"]:
        """Returns a row vector repeated along its rows."""
        return lax.broadcast_in_dim(x, _SHAPE, [0])

    def per_row(self, x: Any, dtype: Any = jnp.float32) -> Array:
        """Returns a row vector of one number."""
        return plgpu.layout_cast(jnp.full((ROWS,), x, dtype), ROW)

    def load_rows(self, name: str) -> Array:
        """Returns this warpgroup's rows of an array [batch, padded]."""
        # Past the end of the sequence, anything that is there.
        start = lax.min(self.query0, jnp.int32(self.ref[name].shape[1] - ROWS))
        return plgpu.load(
            self.ref[name].at[self.batch, pl.ds(start, ROWS)], layout=ROW, optimized=False
        )

    def steps(self, end: Any, body: Any, carry: Any, keys: Any, values: tuple = ()) -> Any:
        """Does what `pipeline.steps` does, for this warpgroup's tiles before `end`."""
        return pipeline.steps(self.begin, end, self.block.ahead, body, carry, keys, late=values)

    def steps_by_distance(
        self, end: Any, body: Any, carry: Any, keys: Any, values: tuple = ()
    ) -> Any:
        """Does what `steps` does, see `bias_table.loops`; body is called with `kind` first."""

        def loop(kind, start, stop, carry):
            step = functools.partial(body, kind)
            return pipeline.steps(start, stop, self.block.ahead, step, carry, keys, late=values)

        units, masked = self.block.keys // UNIT, None
        if self.plan.packed:
            unseen = self.last_segment_start + (self.block.keys - 1)
            masked = self.last + 1 - lax.div(unseen, jnp.int32(self.block.keys))
        return bias_table.loops(
            self.plan, self.kernel.length, self.begin, self.begin, end, loop, carry,
            masked=masked, units=units,
        )  # fmt: skip

    def scores(
        self,
        step: Any,
        slot: Any,
        wait: Any,
        use: Any,
        carry: Any,
        *,
        keep: bool = False,
        whole: bool = False,
        kind: TileKind = TileKind.MASKED,
    ) -> Any:
        """Goes over the units of a key tile, the last first, with their scores.

        The products of all units are issued at once, so that the tensor cores have work while
        one unit's scores are used. Releases the keys, unless told to keep them.

        Args:
          step: where the tile lies, see `WorkTile.last`.
          slot: of the tile.
          wait: called when all products are issued, see `pipeline.steps`.
          use: called as use(x, rest, key0, unit, carry) with scores, what is to be added to
            them, the first key and the index of the unit; returns the carry, and how many
            products it left in flight. Scores are masked where causality wants it: the table
            holds `MASKED` there.
          carry: for the first call.
          keep: the keys are needed once more.
          whole: nothing is left to be added.
          kind: see `bias_table.loops`.

        Returns:
          the last carry.
        """
        plan = self.plan
        units = list(reversed(range(self.block.keys // UNIT)))

        key0 = [(self.last - step) * self.block.keys + unit * UNIT for unit in units]
        # Behind products in the queue to memory, loads would wait for the tensor cores.
        biases, rests = zip(*(self.bias(x, whole, kind) for x in key0), strict=True)

        def run(*accs):
            result, in_flight = carry, 0
            for acc, unit in zip(accs, units, strict=True):
                keys = self.ref["key_smem"].at[slot, pl.ds(unit * UNIT, UNIT)]
                plgpu.wgmma(acc, self.query(), keys.T)
            wait()
            for n, unit in enumerate(units):
                left = len(units) - 1 - n
                x = plgpu.wgmma_accumulator_load(accs[n], wait_n=left + in_flight)
                if unit == 0 and not keep:
                    self.keys.consumer_release_slot(slot)
                x = x * plan.exponent_scale + biases[n]
                result, issued = use(x, rests[n], key0[n], unit, result)
                in_flight += issued
            return result

        return pl.run_scoped(run, *(plgpu.ACC(_SHAPE, jnp.float32) for _ in units))

    def bias(self, key0: Any, whole: bool, kind: TileKind) -> tuple[Any, Any]:
        """Returns a unit's bias, and what is still to be added to it: nothing with `whole`."""
        return bias_table.tile_bias(
            self.plan, self.table, self.query0 - key0, self.bias_tail, kind,
            falling=True, whole=whole, interpret=self.interpret,
        )  # fmt: skip

    def where_in_segment(self, x: Array, key0: Any, otherwise: float) -> Array:
        """Returns x for keys in the query's document or after its start, else another number."""
        return layout.where_from(x, self.segment_start - key0, otherwise, interpret=self.interpret)

    def hide_segments(self, x: Array, key0: Any, kind: TileKind = TileKind.MASKED) -> Array:
        """Returns scores with those of other documents masked, see `bias_table.loops`."""
        masked = self.plan.packed and kind is TileKind.MASKED
        return self.where_in_segment(x, key0, MASKED) if masked else x

    def hide(self, weights: Array, key0: Any, no_overflow: bool) -> Array:
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
            hidden = (self.offset > 0) & (key0 + UNIT > self.query0)
            x = lax.cond(hidden, masked, lambda: weights)
        return self.where_in_segment(x, key0, unseen) if self.plan.packed else x
