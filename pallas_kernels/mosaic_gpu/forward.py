"""The forward pass: its launch, and what is fetched for it; `forward_queries.py` computes.

A block stays, and takes work tile after work tile: 64 queries of one head a warpgroup. One more
warpgroup has one warp that fetches, tiles of keys and values and the next work tile's queries.
The first sweep goes from the diagonal backwards over the tiles that are not negligible, sums
the exponentials, and in training the keys with them, and notes the farthest tile that may be
live; the second goes the same way over the live ones. Without an offset one sweep does it.
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
    memory,
    pipeline,
    scheduler,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.config import ForwardBlock
from pallas_kernels.mosaic_gpu.forward_queries import Queries
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.pipeline import as_index
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan

# What the kernel may return.
RESULTS = ("out", "lse", "rounding", "live", *mean_k.NAMES, "past")


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
        self.query0 = tile * block.rows
        # Everything is counted in steps from the last key tile of the block backwards.
        self.last = lax.min(
            lax.div(self.query0 + block.rows - 1, jnp.int32(block.keys)),
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
        unit = lax.div(self.query0, jnp.int32(UNIT)) + warpgroup
        # Past the end of the sequence: as the unit before.
        unit = lax.min(unit, jnp.int32(self.ref["first"].shape[-1] - 1))
        return self.ref["first"][self.batch, self.head, unit]

    def steps(self) -> Int[Array, ""]:
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

    def compute(self) -> tuple[Any, Any]:
        """Does one warpgroup's part; returns `tiles_consumed` of the next work tile."""
        return Queries(self).compute()

    def fetch(self) -> tuple[Any, Any]:
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
                rows = pl.ds(self.query0 + ROWS * n, ROWS)
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
            memory.prefetch(ref[name].at[b], self.query0, block.rows, interpret=self.interpret)
        twice = self.sweeps_twice
        # One warp copies; but it can't load numbers, which is done here for it.
        steps = self.steps()
        diagonal = self.last - lax.div(self.query0, jnp.int32(block.keys)) + 1

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
