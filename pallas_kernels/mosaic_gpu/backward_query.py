"""The gradient of the queries.

With m the live entries, dP = dO V^T, and Y = P K from the forward pass:

    delta_i = sum_j P_ij m_ij dP_ij     dQ = scale ((P m dP) K - delta Y)

A block takes piece after piece: 64 queries of one head a warpgroup; `backward_query_steps.py`
is what is computed. Tiles past the bias table also add to the gradient of its tail, to which
what the forward pass has summed there adds the dead ones. Without an offset delta is known
before, dO . O, and dS = P (dP - delta).
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
    mean_key,
    rings,
    row_facts,
    schedule,
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
    residuals: row_facts.Residuals,
    offset: Float[Array, " heads"],
    offset_scale: Float[Array, "batch padded"],
    document: Int[Array, "batch padded"],
    first: Int[Array, "batch heads units"],
    live: Int[Array, "batch heads units"],
    small: Int[Array, "batch heads"],
    numbers: Int[Array, " pieces+1"],
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
      document: first key each query sees; not read unless `plan.packed`.
      first: first unit of keys that each unit of queries visits.
      live: first one of them that may be live.
      small: as in the forward pass.
      numbers: of the pieces, see `order` and `schedule.Order.numbers`.

    Returns:
      d_query; what `Rows` says of each query [batch, heads, units, kinds, 64]; with an offset
      what each query adds to the gradient of tau [batch, heads, units, 64]; and if the bias
      has a slope, for each query the sum of dS over tiles past the table, and of dS times the
      distance past its end [batch, heads, units, 2, 64].
    """
    kernel = _Kernel(plan, query, key, table.shape, first.shape[-1], list(residuals.given))
    out_type: list[Any] = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    out_type += row_facts.outputs(plan, first)
    if kernel.want_tail:
        out_type.append(jax.ShapeDtypeStruct((*first.shape, 2, UNIT), jnp.float32))
    results = kernel.launch(
        out_type, query, d_out, key, value, table, tail, offset, offset_scale,
        document, first, live, small, numbers, weight_sums.ones(query.dtype),
        *residuals.given.values(),
    )  # fmt: skip
    d_query, rows = results.pop(0), results.pop(0)
    of_offset = results.pop(0) if plan.has_offset else None
    return d_query, rows, of_offset, results.pop(0) if kernel.want_tail else None


def order(plan: Plan, query: Array, key: Array) -> schedule.Order:
    """Returns the order of the kernel's pieces."""
    batch, length, heads, head_dim = query.shape
    rows = plan.blocks.backward_query.rows
    return schedule.Order.of_queries(batch, heads, heads // key.shape[2], length, rows, head_dim)


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
        super().__init__(plan, block, self.order.pieces)
        tiles, self.out_stages = config.query_tiles(self.block, self.head_dim, plan.has_offset)
        self.tables = config.tables(tiles, table_shape[1])

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and barriers."""
        block, d = self.block, self.head_dim
        tile = rings.tiled((block.stages, UNIT, d), self.dtype)
        rows = rings.tiled((block.warpgroups, ROWS, d), self.dtype)
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
            scratch |= row_facts.scratch(
                self.out_stages, block.warpgroups, self.head_dim, self.dtype
            )
        scratch |= rings.barriers("query", 1, block.warpgroups, copies=2 * block.warpgroups)
        scratch |= rings.barriers("table", self.tables, block.warpgroups)
        for name in ("key", "value"):
            scratch |= rings.barriers(name, block.stages, block.warpgroups)
        if block.in_registers:
            # Else the queries' own place, which they need to the end.
            scratch["d_query_smem"] = rows
        if self.interpret:
            scratch["spare_smem"] = rings.tiled((block.warpgroups, ROWS, UNIT), self.dtype)
        return scratch

    def prepare(self, ref: dict[str, Any], fetches: bool) -> None:
        """Fetches the ones, or waits for them."""
        if self.plan.has_offset:
            weight_sums.prepare(self.plan, ref, fetches)

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "d_out", "key", "value", "table", "tail", "offset", "offset_scale", "document",
            "first", "live", "small", "numbers", "ones", *self.residuals, "d_query", "rows",
        ]  # fmt: skip
        names += ["of_offset"] if self.plan.has_offset else []
        return names + (["far"] if self.want_tail else [])

    def slots(self) -> dict[str, int]:
        """Returns how many slots each ring has."""
        stages = self.block.stages
        slots = {"key": stages, "value": stages, "query": 1, "table": self.tables}
        return slots | ({"out": self.out_stages} if self.out_stages else {})

    def tiles(self, pieces: Any, done: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each ring so many pieces took."""
        tiles = {"key": done[0], "value": done[1], "query": pieces, "table": pieces}
        return tiles | ({"out": 2 * pieces} if self.out_stages else {})

    def piece(self, *args: Any) -> "Piece":
        """Returns a piece."""
        return Piece(*args)


class Piece:
    """A block of queries of one head.

    Args:
      blocks: what works on it.
      number: which piece it is.
      n: how many pieces came before it here.
      done: tiles of keys, and of values, that those took.
    """

    def __init__(self, blocks: launch.Blocks, number: Any, n: Any, done: tuple[Any, Any]):
        kernel: Any = blocks.kernel
        self.kernel, self.ref, self.n, self.done = kernel, blocks.ref, n, done
        self.plan, self.block, self.interpret = kernel.plan, kernel.block, kernel.interpret
        self.warpgroup = blocks.warpgroup
        self.batch, self.head, tile = kernel.order.item(number)
        self.unit0 = tile * self.block.warpgroups
        # Everything is counted in steps from the last key tile of the block backwards.
        self.last = lax.min(self.unit0 + self.block.warpgroups - 1, jnp.int32(kernel.units - 1))
        self.keys = blocks.rings["key"].after(done[0])
        self.values = blocks.rings["value"].after(done[1])
        self.queries, self.tables = blocks.rings["query"], blocks.rings["table"]
        if kernel.out_stages:
            self.outs = blocks.rings["out"].after(2 * n)

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

    def next_done(self) -> tuple[Any, Any]:
        """Returns `done` of the next piece."""
        return self.done[0] + self.steps, self.done[1] + self.steps

    def fetch(self) -> tuple[Any, Any]:
        """Fetches all that the block reads; returns `done` of the next piece."""
        ref, kernel, b, h = self.ref, self.kernel, self.batch, self.head
        key_head = lax.div(h, jnp.int32(kernel.group))

        def copy(ring, name, n):
            slot = ring.acquire(n)
            rows = pl.ds((self.last - n) * UNIT, UNIT)
            plgpu.copy_gmem_to_smem(
                ref[name].at[b, rows, key_head], ref[f"{name}_smem"].at[slot], ring.full.at[slot]
            )

        @rings.fetching(self.plan)
        def _():
            full = self.queries.full.at[self.queries.acquire(self.n)]
            for n in range(self.block.warpgroups):
                rows = pl.ds((self.unit0 + n) * ROWS, ROWS)
                for name in ("query", "d_out"):
                    plgpu.copy_gmem_to_smem(
                        ref[name].at[b, rows, h], ref[f"{name}_smem"].at[n], full
                    )
            slot = self.tables.acquire(self.n)
            plgpu.copy_gmem_to_smem(
                ref["table"].at[h], ref["table_smem"].at[slot], self.tables.full.at[slot]
            )
            if kernel.out_stages:
                row_facts.fetch(self)

        row_facts.prefetch(self)
        if self.plan.has_offset:
            mean_key.prefetch(self)
        # What is read here takes time, so it comes after the first copies.
        self.count_steps()

        @rings.fetching(self.plan)
        def _():
            @pl.loop(0, self.steps)
            def _(n):
                copy(self.keys, "key", n)
                copy(self.values, "value", n)

        return self.next_done()

    def compute(self) -> tuple[Any, Any]:
        """Does all that is to be done for one warpgroup's queries; returns as `fetch` does."""
        Queries(self).compute()
        return self.next_done()
