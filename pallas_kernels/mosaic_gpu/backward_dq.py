"""The gradient of the queries.

With m the live entries, dP = dO V^T, and Y = P K from the forward pass:

    delta_i = sum_j P_ij m_ij dP_ij     dQ = scale ((P m dP) K - delta Y)

A block takes work tile after work tile: 64 queries of one head a warpgroup. It goes over those
of their key tiles that may be live, from the diagonal backwards, and sums up delta, and what
dtau takes, on the way. Where no exponential is too large, all of this is summed with
exponentials for P, and divided by their sum at the end.

Tiles past the bias table also add to the gradient of its tail, to which what the forward pass
has summed there adds the dead ones. Without an offset delta is known before, dO . O, and
dS = P (dP - delta).
"""

import functools
from typing import Any, NamedTuple

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
    pipeline,
    row_stats,
    scheduler,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS
from pallas_kernels.mosaic_gpu.plan import MASKED, UNIT, Plan


def backward_dq(
    plan: Plan,
    query: Float[Array, "batch length heads head_dim"],
    d_out: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    table: Float[Array, "heads rows 128"],
    tail: Float[Array, "heads 2"],
    residuals: row_stats.Residuals,
    offset: Float[Array, " heads"],
    offset_scale: Float[Array, "batch padded"],
    segment_start: Int[Array, "batch padded"],
    first: Int[Array, "batch heads units"],
    live: Int[Array, "batch heads units"],
    no_overflow: Int[Array, "batch heads"],
    tile_order: Int[Array, " work_tiles+1"],
) -> tuple[Array, Array, Array | None, Array | None]:
    """Launches the kernel.

    Args:
      plan: of the call.
      query: as in the forward pass, like all that follow.
      d_out: gradient of the output.
      key: keys.
      value: values.
      table: from `plan.table`.
      tail: from `plan.table`.
      residuals: of the forward pass.
      offset: tau; not read without an offset.
      offset_scale: as in the forward pass, like the next.
      segment_start: first key each query sees; not read unless `plan.packed`.
      first: first unit of keys that each unit of queries visits.
      live: first one of them that may be live.
      no_overflow: as in the forward pass.
      tile_order: of the work tiles, see `order` and `scheduler.TileOrder.tile_order`.

    Returns:
      d_query; what `RowStat` says of each query [batch, heads, units, kinds, 64]; with an offset
      what each query adds to the gradient of tau [batch, heads, units, 64]; and if the bias
      has a slope, for each query the sum of dS over tiles past the table, and of dS times the
      distance past its end [batch, heads, units, 2, 64].
    """
    kernel = _Kernel(plan, query, key, table.shape, first.shape[-1], list(residuals.given))
    out_type: list[Any] = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    out_type += row_stats.outputs(plan, first)
    if kernel.want_tail:
        out_type.append(jax.ShapeDtypeStruct((*first.shape, 2, UNIT), jnp.float32))
    results = kernel.launch(
        out_type, query, d_out, key, value, table, tail, offset, offset_scale,
        segment_start, first, live, no_overflow, tile_order, weight_sums.ones(query.dtype),
        *residuals.given.values(),
    )  # fmt: skip
    d_query, rows = results.pop(0), results.pop(0)
    of_offset = results.pop(0) if plan.has_offset else None
    return d_query, rows, of_offset, results.pop(0) if kernel.want_tail else None


def order(plan: Plan, query: Array, key: Array) -> scheduler.TileOrder:
    """Returns the order of the kernel's work tiles."""
    batch, length, heads, head_dim = query.shape
    rows = plan.blocks.backward_query.rows
    return scheduler.TileOrder.of_queries(
        batch, heads, heads // key.shape[2], length, rows, head_dim
    )


class _Kernel(launch.Kernel):
    """The kernel."""

    name = "lazy_backward_query"

    def __init__(
        self,
        plan: Plan,
        query: Array,
        key: Array,
        table_shape: tuple[int, ...],
        units: int,
        residuals: list[str],
    ):
        block = plan.blocks.backward_query
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.group = self.heads // key.shape[2]
        self.dtype = query.dtype
        self.units = units
        self.table_shape = table_shape[1:]
        self.want_tail = plan.has_tail(self.length)
        self.residuals = residuals
        self.order = order(plan, query, key)
        super().__init__(plan, block, self.order.work_tiles)
        tiles, self.out_stages = config.query_tiles(self.block, self.head_dim, plan.has_offset)
        self.tables = config.tables(tiles, table_shape[1])

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and barriers."""
        block, d = self.block, self.head_dim
        tile = pipeline.tiled((block.stages, UNIT, d), self.dtype)
        rows = pipeline.tiled((block.warpgroups, ROWS, d), self.dtype)
        scratch = {
            "query_smem": rows,
            "d_out_smem": rows,
            "key_smem": tile,
            "value_smem": tile,
            "table_smem": plgpu.SMEM((self.tables, *self.table_shape), jnp.float32),
        }
        if self.plan.has_offset:
            scratch |= weight_sums.scratch(self.dtype)
        if self.out_stages:
            scratch |= row_stats.scratch(
                self.out_stages, block.warpgroups, self.head_dim, self.dtype
            )
        scratch |= pipeline.barriers("query", 1, block.warpgroups, copies=2 * block.warpgroups)
        scratch |= pipeline.barriers("table", self.tables, block.warpgroups)
        for name in ("key", "value"):
            scratch |= pipeline.barriers(name, block.stages, block.warpgroups)
        if block.in_registers:
            # Else the queries' own place, which they need to the end.
            scratch["d_query_smem"] = rows
        if self.interpret:
            scratch["spare_smem"] = pipeline.tiled((block.warpgroups, ROWS, UNIT), self.dtype)
        return scratch

    def prepare(self, ref: dict[str, Any], fetches: bool) -> None:
        """Fetches the ones, or waits for them."""
        if self.plan.has_offset:
            weight_sums.prepare(self.plan, ref, fetches)

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "d_out", "key", "value", "table", "tail", "offset", "offset_scale",
            "segment_start", "first", "live", "no_overflow", "tile_order", "ones",
            *self.residuals, "d_query", "rows",
        ]  # fmt: skip
        names += ["of_offset"] if self.plan.has_offset else []
        return names + (["tail_sums"] if self.want_tail else [])

    def slots(self) -> dict[str, int]:
        """Returns how many slots each pipeline has."""
        stages = self.block.stages
        slots = {"key": stages, "value": stages, "query": 1, "table": self.tables}
        return slots | ({"out": self.out_stages} if self.out_stages else {})

    def tiles(self, work_tiles: Any, tiles_consumed: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each pipeline so many work tiles took."""
        tiles = {
            "key": tiles_consumed[0],
            "value": tiles_consumed[1],
            "query": work_tiles,
            "table": work_tiles,
        }
        return tiles | ({"out": 2 * work_tiles} if self.out_stages else {})

    def work_tile(self, *args: Any) -> "WorkTile":
        """Returns a work tile."""
        return WorkTile(*args)


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


class WorkTile:
    """A block of queries of one head.

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
        self.warpgroup = blocks.warpgroup
        self.batch, self.head, tile = kernel.order.item(number)
        self.unit0 = tile * self.block.warpgroups
        # Everything is counted in steps from the last key tile of the block backwards.
        self.last = lax.min(self.unit0 + self.block.warpgroups - 1, jnp.int32(kernel.units - 1))
        self.keys = blocks.pipelines["key"].after(tiles_consumed[0])
        self.values = blocks.pipelines["value"].after(tiles_consumed[1])
        self.queries, self.tables = blocks.pipelines["query"], blocks.pipelines["table"]
        if kernel.out_stages:
            self.outs = blocks.pipelines["out"].after(2 * n)

    def count_steps(self) -> None:
        """Reads how many key tiles the block visits."""
        units = [
            lax.min(self.unit0 + n, jnp.int32(self.kernel.units - 1))
            for n in range(self.block.warpgroups)
        ]

        def steps(name: str) -> Int[Array, ""]:
            starts = [self.ref[name][self.batch, self.head, unit] for unit in units]
            return self.last - functools.reduce(lax.min, starts) + 1

        self.steps = steps("live" if self.plan.has_offset else "first")

    def next_consumed(self) -> tuple[Any, Any]:
        """Returns `tiles_consumed` of the next work tile."""
        return self.tiles_consumed[0] + self.steps, self.tiles_consumed[1] + self.steps

    def load_warp(self) -> tuple[Any, Any]:
        """Fetches all that the block reads; returns `tiles_consumed` of the next work tile."""
        ref, kernel, b, h = self.ref, self.kernel, self.batch, self.head
        key_head = lax.div(h, jnp.int32(kernel.group))

        def copy(pipe, name, n):
            slot = pipe.producer_acquire(n)
            rows = pl.ds((self.last - n) * UNIT, UNIT)
            plgpu.copy_gmem_to_smem(
                ref[name].at[b, rows, key_head], ref[f"{name}_smem"].at[slot], pipe.full.at[slot]
            )

        @pipeline.fetching(self.plan)
        def _():
            full = self.queries.full.at[self.queries.producer_acquire(self.n)]
            for n in range(self.block.warpgroups):
                rows = pl.ds((self.unit0 + n) * ROWS, ROWS)
                for name in ("query", "d_out"):
                    plgpu.copy_gmem_to_smem(
                        ref[name].at[b, rows, h], ref[f"{name}_smem"].at[n], full
                    )
            slot = self.tables.producer_acquire(self.n)
            plgpu.copy_gmem_to_smem(
                ref["table"].at[h], ref["table_smem"].at[slot], self.tables.full.at[slot]
            )
            if kernel.out_stages:
                row_stats.fetch(self)

        row_stats.prefetch(self)
        if self.plan.has_offset:
            mean_k.prefetch(self)
        # What is read here takes time, so it comes after the first copies.
        self.count_steps()

        @pipeline.fetching(self.plan)
        def _():
            @pl.loop(0, self.steps)
            def _(n):
                copy(self.keys, "key", n)
                copy(self.values, "value", n)

        return self.next_consumed()

    def compute_warpgroup(self) -> tuple[Any, Any]:
        """Does all for one warpgroup's queries; returns as `load_warp` does."""
        ref, plan, kernel, b, h = self.ref, self.plan, self.kernel, self.batch, self.head
        self.count_steps()
        unit = self.unit0 + self.warpgroup
        exists = unit < kernel.units
        unit = lax.min(unit, jnp.int32(kernel.units - 1))
        self.query0 = unit * UNIT
        self.bias_tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        begin = self.last - unit
        first = ref["live" if plan.has_offset else "first"][b, h, unit]
        end = lax.select(exists, self.last - first + 1, begin)

        if plan.has_offset:
            self.offset = ref["offset"][h]
        self.queries.consumer_wait(self.n)
        self.row = row_stats.find(self, unit)
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
                        self.last
                        + 1
                        - lax.div(self.row.last_segment_start + (UNIT - 1), jnp.int32(UNIT))
                    )
                sums = bias_table.loops(
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
                y = mean_k.load(self, unit)
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
        pipeline.skip(end, self.steps, *both)
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
            row_stats.write(self, self.row, unit, delta, of_offset)

        if not release_early:
            if not self.block.in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.queries.consumer_release(self.n)
        return self.next_consumed()

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
        key0 = (self.last - n) * UNIT
        bias, _ = bias_table.tile_bias(
            self.plan, self.table, self.query0 - key0, self.bias_tail, kind,
            falling=True, whole=True, interpret=self.interpret,
        )  # fmt: skip
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
            past = bias_table.add_tail_sums(
                self.plan, past, weighted, apart, kind, interpret=self.interpret
            )
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
