"""The gradient of the queries.

With m the live entries, dP = dO V^T and delta_i = dO_i . (O_i - tau/n_i M_i):

    dS = P (m dP - delta)     dQ = scale dS K

A block takes piece after piece: 64 queries of one head a warpgroup, and goes over their key
tiles from the diagonal backwards: the live ones first, then the dead ones, where
dS = -P delta and neither values nor dP are needed. Tiles past the bias table also add to the
gradient of its tail.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import config, lanes, launch, memory, rings, row_facts, schedule
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS, TILE
from pallas_kernels.mosaic_gpu.plan import LOWEST, UNIT, Plan

# Weights of dead tiles are computed 2^10 times as large, for float16 has no small numbers.
_DEAD_SHIFT = 10


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
    count_inverse: Float[Array, "batch padded"],
    document: Int[Array, "batch padded"],
    first: Int[Array, "batch heads units"],
    live: Int[Array, "batch heads units"],
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
      offset_scale: as in the forward pass, like the next two.
      count_inverse: one over the number of keys each query sees.
      document: first key each query sees; not read unless `plan.packed`.
      first: first unit of keys that each unit of queries visits.
      live: first one of them that may be live.
      numbers: of the pieces, see `order` and `schedule.Order.numbers`.

    Returns:
      d_query; what `Rows` says of each query [batch, heads, units, kinds, 64]; with an offset
      what each query adds to the gradient of tau [batch, heads, units, 64]; and if the bias
      has a slope, for each query the sum of dS over tiles past the table, and of dS times the
      distance past its end [batch, heads, units, 2, 64].
    """
    kernel = _Kernel(plan, query, key, table.shape, first.shape[-1])
    out_type: list[Any] = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    out_type += row_facts.outputs(plan, first)
    if kernel.want_tail:
        out_type.append(jax.ShapeDtypeStruct((*first.shape, 2, UNIT), jnp.float32))
    results = kernel.launch(
        out_type, query, d_out, key, value, table, tail, residuals.log_total, offset, offset_scale,
        count_inverse, document, first, live, numbers, *residuals.tiles.values(),
    )  # fmt: skip
    d_query, rows = results.pop(0), results.pop(0)
    of_mean = results.pop(0) if plan.has_offset else None
    return d_query, rows, of_mean, results.pop(0) if kernel.want_tail else None


def order(plan: Plan, query: Array, key: Array) -> schedule.Order:
    """Returns the order of the kernel's pieces."""
    batch, length, heads, head_dim = query.shape
    rows = plan.blocks.backward_query.rows
    return schedule.Order.of_queries(batch, heads, heads // key.shape[2], length, rows, head_dim)


class _Kernel(launch.Kernel):
    """The kernel."""

    name = "lazy_backward_query"

    def __init__(self, plan: Plan, query, key, table_shape, units: int):
        block = plan.blocks.backward_query
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.group = self.heads // key.shape[2]
        self.dtype = query.dtype
        self.units = units
        self.table_shape = table_shape[1:]
        self.want_tail = plan.has_slope and self.length > plan.width
        self.order = order(plan, query, key)
        super().__init__(plan, block, self.order.pieces)
        tiles, self.fact_stages = config.query_tiles(self.block, self.head_dim, plan.has_offset)
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
        scratch |= row_facts.scratch(self.fact_stages, block.warpgroups, self.head_dim, self.dtype)
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

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "d_out", "key", "value", "table", "tail", "log_total", "offset",
            "offset_scale", "count_inverse", "document", "first", "live", "numbers",
            *row_facts.names(self.plan), "d_query", "rows",
        ]  # fmt: skip
        names += ["of_mean"] if self.plan.has_offset else []
        return names + (["far"] if self.want_tail else [])

    def slots(self) -> dict[str, int]:
        """Returns how many slots each ring has."""
        stages = self.block.stages
        slots = {"key": stages, "value": stages, "query": 1, "table": self.tables}
        return slots | {"fact": self.fact_stages}

    def tiles(self, pieces: Any, done: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each ring so many pieces took."""
        facts = pieces * len(row_facts.names(self.plan))
        return {
            "key": done[0],
            "value": done[1],
            "query": pieces,
            "table": pieces,
            "fact": facts,
        }

    def piece(self, *args: Any) -> "_Piece":
        """Returns a piece."""
        return _Piece(*args)


class _Piece:
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
        self.facts = blocks.rings["fact"].after(n * len(row_facts.names(self.plan)))

    def count_steps(self) -> None:
        """Reads how many key tiles the block visits, and how many of them may be live."""
        units = [
            lax.min(self.unit0 + n, jnp.int32(self.kernel.units - 1))
            for n in range(self.block.warpgroups)
        ]

        def steps(name: str) -> Int[Array, ""]:
            starts = [self.ref[name][self.batch, self.head, unit] for unit in units]
            return self.last - functools.reduce(lax.min, starts) + 1

        self.steps = steps("first")
        self.live_steps = steps("live") if self.plan.has_offset else self.steps

    def next_done(self) -> tuple[Any, Any]:
        """Returns `done` of the next piece."""
        return self.done[0] + self.steps, self.done[1] + self.live_steps

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
            row_facts.fetch(self)

        row_facts.prefetch(self)
        # What is read here takes time, so it comes after the first copies.
        self.count_steps()

        @rings.fetching(self.plan)
        def _():
            @pl.loop(0, self.live_steps)
            def _(n):
                copy(self.keys, "key", n)
                copy(self.values, "value", n)

            @pl.loop(0, self.steps - self.live_steps)
            def _(n):
                copy(self.keys, "key", self.live_steps + n)

        return self.next_done()

    def compute(self) -> tuple[Any, Any]:
        """Does all that is to be done for one warpgroup's queries; returns as `fetch` does."""
        ref, plan, kernel, b, h = self.ref, self.plan, self.kernel, self.batch, self.head
        self.count_steps()
        unit = self.unit0 + self.warpgroup
        exists = unit < kernel.units
        unit = lax.min(unit, jnp.int32(kernel.units - 1))
        self.query0 = unit * UNIT
        self.tail = (ref["tail"][h, 0], ref["tail"][h, 1])
        begin = self.last - unit
        end = lax.select(exists, self.last - ref["first"][b, h, unit] + 1, begin)
        live_end = lax.min(self.live_steps, end)

        self.queries.wait(self.n)
        self.row = row_facts.find(self, unit, exists)
        self.query, self.d_out = (
            rings.operand(ref[name], self.warpgroup, self.block.in_registers, self.interpret)
            for name in ("query_smem", "d_out_smem")
        )
        release_early = self.block.in_registers and not self.interpret
        if release_early:
            self.queries.release(self.n)
        self.table = ref["table_smem"].at[self.tables.wait(self.n)]
        both = ((self.keys, 0), (self.values, 0))
        rings.skip(0, begin, *both)

        def run(step, start, stop, numbered, acc):
            self.first_step = start
            zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            sums = (zero, zero) if kernel.want_tail else ()
            sums = rings.steps(
                start, stop, self.block.ahead, functools.partial(step, acc), sums, *numbered
            )
            total = acc[...]
            # The last products have been waited for only now.
            pl.when(stop > start)(lambda: self.keys.release(stop - 1))
            return total, sums

        shape = plgpu.ACC((ROWS, kernel.head_dim), jnp.float32)
        d_query, sums = pl.run_scoped(
            functools.partial(run, self.live_step, begin, live_end, both), shape
        )
        rings.skip(end, self.live_steps, *both)
        if plan.has_offset:
            # Where all is dead delta is a factor of the whole row.
            run_dead = functools.partial(run, self.dead_step, self.live_steps, end, both[:1])
            weighted, dead_sums = pl.run_scoped(run_dead, shape)
            factor = -(2.0**-_DEAD_SHIFT) * self.row.delta
            factors = lax.broadcast_in_dim(factor, weighted.shape, [0])
            d_query = d_query + factors * weighted
            sums = tuple(x + factor * y for x, y in zip(sums, dead_sums, strict=True))
        rings.skip(lax.max(end, self.live_steps), self.steps, (self.keys, 0))
        self.tables.release(self.n)

        @pl.when(exists)
        def _():
            # What the piece before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own = "d_query_smem" if self.block.in_registers else "query_smem"
            smem = ref[own].at[self.warpgroup]
            smem[...] = (d_query * plan.scale).astype(kernel.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, ref["d_query"].at[b, pl.ds(self.query0, ROWS), h])
            for n, x in enumerate(sums):
                ref["far"][b, h, unit, n] = lanes.finish_sums(x, interpret=self.interpret)

        if not release_early:
            if not self.block.in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.queries.release(self.n)
        return self.next_done()

    def bias(self, n: Any) -> tuple[Array, Any, Any]:
        """Returns a tile's bias, what is to be added to it, and the tile's first key.

        Loaded before the tile's products are issued: behind them in the queue to memory it
        would wait for the tensor cores.
        """
        key0 = (self.last - n) * UNIT
        start, rest = self.plan.bias_of_tile(self.query0 - key0, UNIT, self.tail, falling=True)
        return memory.gather(self.table, start, UNIT, interpret=self.interpret), rest, key0

    def softmax(self, x: Array, bias: tuple[Array, Any, Any], shift: int = 0) -> Array:
        """Returns softmax weights of a tile from its products, times 2^shift."""
        bias_tile, rest, key0 = bias
        x = x * self.plan.exponent_scale + bias_tile
        if self.plan.packed:
            x = lax.cond(
                key0 < self.row.document_last,
                lambda: jnp.where(self.in_document(key0), x, LOWEST),
                lambda: x,
            )
        return jnp.exp2(x - self.spread(self.row.log_total - (rest + shift)))

    def in_document(self, key0: Any) -> Array:
        """Returns which keys of a tile lie in the query's document or after its start."""
        columns = plgpu.broadcasted_iota(jnp.int32, (ROWS, UNIT), 1, layout=TILE)
        return columns + key0 >= self.spread(self.row.document)

    def spread(self, x: Any) -> Float[Array, "64 64"]:
        """Returns a row vector repeated along its rows."""
        return lax.broadcast_in_dim(x, (ROWS, UNIT), [0])

    def live_step(self, acc: Any, n: Any, slots: tuple, wait: Any, sums: tuple) -> tuple:
        """Adds a tile that may be live."""
        less = self.spread(-self.row.delta)
        bias = self.bias(n)
        key_slot, value_slot = slots

        def products(s_acc, d_acc):
            d_begun = rings.begin_with(d_acc, less, self.interpret)
            plgpu.wgmma(s_acc, self.query(), self.ref["key_smem"].at[key_slot].T)
            plgpu.wgmma(d_acc, self.d_out(), self.ref["value_smem"].at[value_slot].T)
            x = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            self.release_before(n, key_slot)
            wait()
            return self.softmax(x, bias), rings.finish(d_acc, d_begun)

        tile = plgpu.ACC((ROWS, UNIT), jnp.float32)
        p, d_weights = pl.run_scoped(products, tile, tile)
        self.values.release_slot(value_slot)
        if self.plan.has_offset:
            d_weights = jnp.where(p > self.spread(self.row.threshold), d_weights, less)
        return self.add(acc, key_slot, p * d_weights, bias[2], sums)

    def dead_step(self, acc: Any, n: Any, slots: tuple, wait: Any, sums: tuple) -> tuple:
        """Adds a tile with no live entry, as if all its dS / P were 2^_DEAD_SHIFT."""
        bias = self.bias(n)
        (slot,) = slots

        def product(s_acc):
            plgpu.wgmma(s_acc, self.query(), self.ref["key_smem"].at[slot].T)
            wait()
            return s_acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, UNIT), jnp.float32))
        self.release_before(n, slot)
        return self.add(acc, slot, self.softmax(x, bias, _DEAD_SHIFT), bias[2], sums)

    def release_before(self, n: Any, slot: Any) -> None:
        """Gives back the keys of the step before this one, unless this is the first.

        What reads them last is left in flight while the next step's products begin; those who
        have waited for these need not wait for it again.
        """
        before = self.keys.preceding(slot)
        pl.when(n > self.first_step)(lambda: self.keys.release_slot(before))

    def add(self, acc: Any, slot: Any, d_scores: Array, key0: Any, sums: tuple) -> tuple:
        """Issues dS K, and adds what dS means for the bias's tail."""
        spare = self.ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        x = lanes.pack(d_scores, self.kernel.dtype, relu=False, interpret=self.interpret)
        rings.multiply(acc, x, self.ref["key_smem"].at[slot], spare)
        if sums:
            apart = self.query0 - key0
            past = apart - (UNIT - 1) - self.plan.width

            def far():
                plain = lanes.lane_sums(d_scores, False, interpret=self.interpret)
                moment = lanes.lane_sums(d_scores, True, interpret=self.interpret)
                row = lanes.row_index(interpret=self.interpret)
                distance = row + (apart - (self.plan.width - 1)).astype(jnp.float32)
                return sums[0] + plain, sums[1] + plain * distance - moment

            sums = lax.cond(past >= 0, far, lambda: sums)
        return sums
