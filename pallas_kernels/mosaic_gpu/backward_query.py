"""The gradient of the queries.

With m the live entries, dP = dO V^T, and Y = P K from the forward pass:

    delta_i = sum_j P_ij m_ij dP_ij     dQ = scale ((P m dP) K - delta Y)

A block takes work tile after work tile: 64 queries of one head a warpgroup;
`backward_query_steps.py` is what is computed. Tiles past the bias table also add to the gradient
of its tail, to which what the forward pass has summed there adds the dead ones. Without an
offset delta is known before, dO . O, and dS = P (dP - delta).
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
    config,
    launch,
    mean_k,
    pipeline,
    row_stats,
    scheduler,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.backward_query_steps import Queries
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan


def backward_query(
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

    def fetch(self) -> tuple[Any, Any]:
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

    def compute(self) -> tuple[Any, Any]:
        """Does all that is to be done for one warpgroup's queries; returns as `fetch` does."""
        Queries(self).compute()
        return self.next_consumed()
