"""The forward pass: its launch, and what is fetched for it; `forward_queries.py` computes.

A block stays, and takes piece after piece: 64 queries of one head a warpgroup. One more
warpgroup has one warp that fetches, tiles of keys and values and the next piece's queries.
The first sweep goes from the diagonal backwards over the
tiles that are not negligible, sums the exponentials and notes the farthest tile that may be
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

from pallas_kernels.mosaic_gpu import config, launch, memory, rings, schedule
from pallas_kernels.mosaic_gpu.config import ForwardBlock
from pallas_kernels.mosaic_gpu.forward_queries import Queries
from pallas_kernels.mosaic_gpu.mlir import ROWS
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan
from pallas_kernels.mosaic_gpu.rings import as_index


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
    count_inverse: Float[Array, "batch padded"],
    document: Int[Array, "batch padded"],
    first: Int[Array, "batch heads units"],
    small: Int[Array, "batch heads"],
    numbers: Int[Array, " pieces+1"],
) -> tuple[Array | None, ...]:
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
      count_inverse: one over the number of keys each query sees.
      document: first key each query sees; not read unless `plan.packed`.
      first: first unit of keys that each unit of queries visits.
      small: whether no exponential of a score of this head can overflow.
      numbers: of the pieces, see `order` and `schedule.Order.numbers`.

    Returns:
      out; and in training with an offset the mean of the values of live entries over all
      visible ones, of the same shape; in training what rounding took from out - offset mean,
      of the same shape, and log2-sum-exp2 of each row's scores less b(0) [batch, heads,
      padded]; with an offset the first live unit of keys of each unit of queries [batch,
      heads, units].
    """
    block = plan.blocks.forward if training else plan.blocks.inference
    batch, _, heads, _ = query.shape
    units = first.shape[-1]
    want_mean = training and plan.has_offset
    same = jax.ShapeDtypeStruct(query.shape, query.dtype)
    out_type: list[Any] = [same]
    if want_mean:
        out_type += [same, jax.ShapeDtypeStruct((batch, heads, units), jnp.int32)]
    if training:
        out_type += [same, jax.ShapeDtypeStruct((batch, heads, UNIT * units), jnp.float32)]
    kernel = _Forward(plan, block, training, query, key, table.shape)
    results = kernel.launch(
        out_type, query, key, value, table, tail, offset, offset_scale, count_inverse, document,
        first, small, numbers,
    )  # fmt: skip
    out = results.pop(0)
    mean, live = (results.pop(0), results.pop(0)) if want_mean else (None, None)
    rounding, log_total = (results.pop(0), results.pop(0)) if training else (None, None)
    return out, mean, rounding, log_total, live


def order(plan: Plan, training: bool, query: Array, key: Array) -> schedule.Order:
    """Returns the order of the kernel's pieces."""
    batch, length, heads, head_dim = query.shape
    block = plan.blocks.forward if training else plan.blocks.inference
    group = heads // key.shape[2]
    return schedule.Order.of_queries(batch, heads, group, length, block.rows, head_dim)


class _Forward(launch.Kernel):
    """The kernel."""

    name = "lazy_forward"
    block: ForwardBlock

    def __init__(self, plan: Plan, block: ForwardBlock, training: bool, query, key, table_shape):
        self.training = training
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.group = self.heads // key.shape[2]
        self.dtype = query.dtype
        self.table_shape = table_shape[1:]
        self.want_mean = training and plan.has_offset
        self.order = order(plan, training, query, key)
        super().__init__(plan, block, self.order.pieces)
        # Softmax's own sum of exp2(s) v, not rescaled, needs the range of bfloat16.
        self.one_sweep = not plan.has_offset and self.dtype == jnp.bfloat16
        outputs = 1 + training + self.want_mean
        tiles = config.forward_tiles(block, self.head_dim, outputs)
        self.tables = config.tables(tiles, table_shape[1])

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and barriers."""
        block, d = self.block, self.head_dim
        tile = rings.tiled((block.stages, block.keys, d), self.dtype)
        rows = rings.tiled((block.warpgroups, ROWS, d), self.dtype)
        row = plgpu.SMEM((block.warpgroups, ROWS), jnp.float32)
        scratch = {
            "query_smem": rows,
            "key_smem": tile,
            "value_smem": tile,
            "table_smem": plgpu.SMEM((self.tables, *self.table_shape), jnp.float32),
            # Of two pieces, since one warpgroup may be at the next.
            "words_smem": plgpu.SMEM((2, 4 * block.warpgroups), jnp.int32),
            "bound_barrier": plgpu.Barrier(num_arrivals=block.warpgroups),
        }
        scratch |= rings.barriers("query", 1, block.warpgroups, copies=block.warpgroups)
        scratch |= rings.barriers("table", self.tables, block.warpgroups)
        for name in ("key", "value"):
            scratch |= rings.barriers(name, block.stages, block.warpgroups)
        if block.in_registers:
            # Else the queries' own place, which they need to the end.
            scratch["out_smem"] = rows
        if self.want_mean:
            scratch["mean_smem"] = rows
        if self.training:
            scratch["rounding_smem"] = rows
            scratch["total_smem"] = row
        if self.interpret:
            scratch["spare_smem"] = rings.tiled((block.warpgroups, ROWS, UNIT), self.dtype)
        return scratch

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "key", "value", "table", "tail", "offset", "offset_scale", "count_inverse",
            "document", "first", "small", "numbers", "out",
        ]  # fmt: skip
        names += ["mean", "live"] if self.want_mean else []
        return names + (["rounding", "log_total"] if self.training else [])

    def slots(self) -> dict[str, int]:
        """Returns how many slots each ring has."""
        stages = self.block.stages
        return {"key": stages, "value": stages, "query": 1, "table": self.tables}

    def tiles(self, pieces: Any, done: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each ring so many pieces took."""
        return {"key": done[0], "value": done[1], "query": pieces, "table": pieces}

    def piece(self, *args: Any) -> "Piece":
        """Returns a piece."""
        return Piece(*args)


class Piece:
    """A block of queries of one head, as all warpgroups see it.

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
        self.keys = blocks.rings["key"].after(done[0])
        self.values = blocks.rings["value"].after(done[1])
        self.queries, self.tables = blocks.rings["query"], blocks.rings["table"]
        self.words = self.ref["words_smem"].at[lax.rem(n, jnp.int32(2))]

    def used(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Returns `done` of the next piece, where this one took so many."""
        return self.done[0] + keys, self.done[1] + values

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
    def sweeps_twice(self) -> Any:
        """Whether there is a second sweep."""
        if not self.kernel.one_sweep:
            return True
        return self.ref["small"][self.batch, self.head] == 0

    def compute(self) -> tuple[Any, Any]:
        """Does one warpgroup's part; returns `done` of the next piece."""
        return Queries(self).compute()

    def fetch(self) -> tuple[Any, Any]:
        """Fetches all that the block reads; returns `done` of the next piece."""
        ref, block, kernel = self.ref, self.block, self.kernel
        b, h = self.batch, self.head

        def copy(ring, name, number, step):
            slot = ring.acquire(number)
            rows = pl.ds((self.last - step) * block.keys, block.keys)
            plgpu.copy_gmem_to_smem(
                ref[name].at[b, rows, self.key_head], ref[f"{name}_smem"].at[slot],
                ring.full.at[slot],
            )  # fmt: skip

        copy_key = functools.partial(copy, self.keys, "key")
        copy_value = functools.partial(copy, self.values, "value")

        @rings.fetching(self.plan)
        def _():
            slot = self.queries.acquire(self.n)
            for n in range(block.warpgroups):
                rows = pl.ds(self.query0 + ROWS * n, ROWS)
                plgpu.copy_gmem_to_smem(
                    ref["query"].at[b, rows, h], ref["query_smem"].at[n], self.queries.full.at[slot]
                )
            slot = self.tables.acquire(self.n)
            plgpu.copy_gmem_to_smem(
                ref["table"].at[h], ref["table_smem"].at[slot], self.tables.full.at[slot]
            )

        wanted = ["offset_scale"] if self.plan.has_offset else []
        wanted += ["count_inverse"] if kernel.want_mean else []
        wanted += ["document"] if self.plan.packed else []
        for name in wanted:
            memory.prefetch(ref[name].at[b], self.query0, block.rows, interpret=self.interpret)
        twice = self.sweeps_twice
        # One warp copies; but it can't load numbers, which is done here for it.
        steps = self.steps()
        diagonal = self.last - lax.div(self.query0, jnp.int32(block.keys)) + 1

        def one_sweep():
            @rings.fetching(self.plan)
            def _():
                @pl.loop(0, steps)
                def _(n):
                    copy_key(n, n)
                    copy_value(n, n)

            return self.used(steps, steps)

        def two_sweeps():
            @rings.fetching(self.plan)
            def _():
                pl.loop(0, steps)(lambda n: copy_key(n, n))

                # Tiles on the diagonal are always live: no need to know how many more.
                @pl.loop(0, diagonal)
                def _(n):
                    copy_key(steps + n, n)
                    copy_value(n, n)

            plgpu.barrier_wait(ref["bound_barrier"])
            live = self.live_steps()

            @rings.fetching(self.plan)
            def _():
                @pl.loop(diagonal, live)
                def _(n):
                    copy_key(steps + n, n)
                    copy_value(n, n)

            return self.used(steps + live, live)

        if twice is True:
            return two_sweeps()
        return lax.cond(twice, two_sweeps, one_sweep)
