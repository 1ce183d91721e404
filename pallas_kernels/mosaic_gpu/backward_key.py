"""The gradients of keys and values; `backward_key_steps.py` is what is computed.

With m the live entries, dP = dO V^T and delta_i = sum_j P_ij m_ij dP_ij:

    dS = P (m dP - delta)     dV = A^T dO     dK = scale dS^T Q

A block takes work tile after work tile: 64 keys of one key head a warpgroup. For each query head
of the group it goes over the query tiles from the diagonal on: those that may be live first,
then the dead ones, where dS = -P delta and dO is not needed. Tiles are [keys, queries] here. All
sums stay in registers until they are complete, so every run gives the same bits. Where registers
hold only one of the two sums, dK and dV have a kernel each.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import config, diagonals, launch, pipeline, scheduler
from pallas_kernels.mosaic_gpu.backward_key_steps import Keys
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan


def backward_key(
    plan: Plan,
    wanted: tuple[str, ...],
    query: Float[Array, "batch length heads head_dim"],
    d_out: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    table: Float[Array, "heads rows 128"],
    tail: Float[Array, "heads 2"],
    offset: Float[Array, " heads"],
    rows: Float[Array, "batch heads units kinds 64"],
    last: Int[Array, "batch heads units"],
    live: Int[Array, "batch heads units"],
    masked: Int[Array, "batch units"],
    tile_order: Int[Array, " work_tiles+1"],
) -> dict[str, Array]:
    """Launches the kernel.

    Args:
      plan: of the call.
      wanted: "key", "value" or both.
      query: as in the forward pass, like all that follow.
      d_out: gradient of the output.
      key: keys.
      value: values.
      table: from `plan.table`.
      tail: from `plan.table`.
      offset: tau; not read without an offset.
      rows: what `RowStat` says of each query.
      last: last unit of queries that visits each unit of keys.
      live: last one for which it may be live.
      masked: first one of which some query doesn't see all of the unit, for its document or
        window begins later; not read unless `plan.packed`.
      tile_order: of the work tiles, see `order` and `scheduler.TileOrder.tile_order`.

    Returns:
      `d_key` and `d_value`, of those that are wanted; and with both of them, where there is room
      for it and no other kernel for it, `sums` of dS over distances inside the bias table and as
      far as tiles go that have one, of each unit of keys [batch, units, heads, distances, 64].
    """
    kernel = _Kernel(plan, wanted, query, key, table.shape, rows.shape)
    results = kernel.launch(
        list(kernel.results.values()), query, d_out, key, value, table, tail, offset, rows, last,
        live, masked, tile_order,
    )  # fmt: skip
    found = dict(zip(kernel.results, results, strict=True))
    if kernel.want_bias:
        axes = (kernel.batch, kernel.units, kernel.heads, kernel.distances, UNIT)
        found["sums"] = found["sums"].reshape(axes)
    return found


def order(plan: Plan, query: Array, key: Array) -> scheduler.TileOrder:
    """Returns the order of the kernel's work tiles."""
    batch, length, kv_heads, head_dim = key.shape
    rows = plan.blocks.backward_key.rows
    group = query.shape[2] // kv_heads
    return scheduler.TileOrder.of_keys(batch, kv_heads, group, length, rows, head_dim)


class _Kernel(launch.Kernel):
    """The kernel."""

    name = "lazy_backward_key"

    def __init__(self, plan: Plan, wanted: tuple[str, ...], query, key, table_shape, rows_shape):
        self.wanted = wanted
        block = plan.blocks.backward_key
        if wanted == ("value",) and plan.blocks.backward_value is not None:
            block, self.name = plan.blocks.backward_value, "lazy_backward_value"
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.kv_heads = key.shape[2]
        self.group = self.heads // self.kv_heads
        self.dtype = query.dtype
        self.units, self.kinds = rows_shape[2:4]
        self.table_shape = table_shape[1:]
        self.order = order(plan, query, key)
        super().__init__(plan, block, self.order.work_tiles)
        # dV asks nothing of the values.
        self.operands = ("key", "value") if "key" in wanted else ("key",)
        self.want_bias = plan.width > 0 and plan.blocks.backward_bias is None and len(wanted) == 2
        self.distances = plan.distances(self.units)
        width = plan.width if self.want_bias else 0
        tiles = config.key_tiles(self.block, self.head_dim, width, len(self.operands))
        same = jax.ShapeDtypeStruct(key.shape, key.dtype)
        self.results = {f"d_{name}": same for name in wanted}
        if self.want_bias:
            shape = (self.batch * self.units * self.heads, UNIT * self.distances)
            self.results["sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        self.tables = config.tables(tiles, table_shape[1])

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and barriers."""
        block, d = self.block, self.head_dim
        tile = pipeline.tiled((block.stages, UNIT, d), self.dtype)
        keys = pipeline.tiled((block.warpgroups, ROWS, d), self.dtype)
        scratch = {
            "query_smem": tile,
            "d_out_smem": tile,
            "rows_smem": plgpu.SMEM((block.stages, self.kinds, UNIT), jnp.float32),
            "table_smem": plgpu.SMEM((self.tables, *self.table_shape), jnp.float32),
        }
        scratch |= {f"{name}_smem": keys for name in self.operands}
        copies = len(self.operands) * block.warpgroups
        scratch |= pipeline.barriers("key", 1, block.warpgroups, copies=copies)
        scratch |= pipeline.barriers("query", block.stages, block.warpgroups, copies=2)
        scratch |= pipeline.barriers("d_out", block.stages, block.warpgroups)
        scratch |= pipeline.barriers("table", self.tables, block.warpgroups)
        if block.in_registers:
            # Else the keys' and values' own places, which they need to the end.
            scratch |= {"d_key_smem": keys, "d_value_smem": keys}
        if self.want_bias:
            scratch |= diagonals.scratch(block.warpgroups, self.distances)
        if self.interpret:
            scratch["spare_smem"] = pipeline.tiled((block.warpgroups, ROWS, UNIT), self.dtype)
        return scratch

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "d_out", "key", "value", "table", "tail", "offset", "rows", "last", "live",
            "masked", "tile_order",
        ]  # fmt: skip
        return names + list(self.results)

    def slots(self) -> dict[str, int]:
        """Returns how many slots each pipeline has."""
        stages = self.block.stages
        return {"query": stages, "d_out": stages, "key": 1, "table": self.tables}

    def tiles(self, work_tiles: Any, tiles_consumed: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each pipeline so many work tiles took."""
        tables = work_tiles * self.group
        return {
            "query": tiles_consumed[0],
            "d_out": tiles_consumed[1],
            "key": work_tiles,
            "table": tables,
        }

    def work_tile(self, *args: Any) -> "WorkTile":
        """Returns a work tile."""
        return WorkTile(*args)


class WorkTile:
    """A block of keys of one key head.

    Args:
      blocks: what works on it.
      number: which work tile it is.
      n: how many work tiles came before it here.
      tiles_consumed: tiles of queries, and of d_out, that those took.
    """

    def __init__(self, blocks: launch.Blocks, number: Any, n: Any, tiles_consumed: tuple[Any, Any]):
        kernel: Any = blocks.kernel
        self.kernel, self.ref, self.n, self.tiles_consumed = kernel, blocks.ref, n, tiles_consumed
        self.plan, self.block, self.interpret = kernel.plan, kernel.block, kernel.interpret
        self.warpgroup = blocks.warpgroup
        self.batch, self.key_head, tile = kernel.order.item(number)
        # Query tiles are counted in steps from the first key tile of the block on.
        self.unit0 = tile * self.block.warpgroups
        self.queries, self.d_outs = blocks.pipelines["query"], blocks.pipelines["d_out"]
        self.keys = blocks.pipelines["key"]
        self.tables = blocks.pipelines["table"].after(n * kernel.group)

    def head(self, member: Any) -> Int[Array, ""]:
        """Returns a query head of the group."""
        return self.key_head * self.kernel.group + member

    def steps(self, name: str, head: Any) -> Int[Array, ""]:
        """Returns how many query tiles of a head the block visits, or may be live for it."""
        ref = self.ref[name]
        units = [
            lax.min(self.unit0 + n, jnp.int32(self.kernel.units - 1))
            for n in range(self.block.warpgroups)
        ]
        ends = [ref[self.batch, head, unit] for unit in units]
        return functools.reduce(lax.max, ends) - self.unit0 + 1

    def both_steps(self, head: Any) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Returns how many query tiles are visited, and how many of them may be live."""
        if not self.plan.has_offset:
            return (self.steps("last", head),) * 2
        live = self.steps("live", head)
        # dV asks nothing of the dead ones.
        return self.steps("last", head) if "key" in self.kernel.wanted else live, live

    def fetch(self) -> tuple[Any, Any]:
        """Fetches all that the block reads; returns `tiles_consumed` of the next work tile."""
        ref, b = self.ref, self.batch

        @pipeline.fetching(self.plan)
        def _():
            full = self.keys.full.at[self.keys.producer_acquire(self.n)]
            for n in range(self.block.warpgroups):
                rows = pl.ds((self.unit0 + n) * ROWS, ROWS)
                for name in self.kernel.operands:
                    plgpu.copy_gmem_to_smem(
                        ref[name].at[b, rows, self.key_head], ref[f"{name}_smem"].at[n], full
                    )

        def one_head(member, tiles_consumed):
            steps_done, live_done = tiles_consumed
            head = self.head(member)
            steps, live = self.both_steps(head)

            @pipeline.fetching(self.plan)
            def _():
                slot = self.tables.producer_acquire(member)
                plgpu.copy_gmem_to_smem(
                    ref["table"].at[head], ref["table_smem"].at[slot], self.tables.full.at[slot]
                )

                def copy_query(n):
                    slot = self.queries.producer_acquire(steps_done + n)
                    full = self.queries.full.at[slot]
                    unit = self.unit0 + n
                    rows = pl.ds(unit * UNIT, UNIT)
                    plgpu.copy_gmem_to_smem(
                        ref["rows"].at[b, head, unit], ref["rows_smem"].at[slot], full
                    )
                    plgpu.copy_gmem_to_smem(
                        ref["query"].at[b, rows, head], ref["query_smem"].at[slot], full
                    )

                @pl.loop(0, live)
                def _(n):
                    copy_query(n)
                    slot = self.d_outs.producer_acquire(live_done + n)
                    plgpu.copy_gmem_to_smem(
                        ref["d_out"].at[b, pl.ds((self.unit0 + n) * UNIT, UNIT), head],
                        ref["d_out_smem"].at[slot],
                        self.d_outs.full.at[slot],
                    )

                pl.loop(0, steps - live)(lambda n: copy_query(live + n))

            return steps_done + steps, live_done + live

        return lax.fori_loop(0, self.kernel.group, one_head, self.tiles_consumed)

    def compute(self) -> tuple[Any, Any]:
        """Does all that is to be done for one warpgroup's keys; returns as `fetch` does."""
        return Keys(self).compute()
