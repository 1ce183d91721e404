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

from pallas_kernels.mosaic_gpu import config, lanes, queue, rings, schedule
from pallas_kernels.mosaic_gpu.lanes import ROW, ROWS, TILE
from pallas_kernels.mosaic_gpu.plan import LOG2_E, LOWEST, UNIT, Plan, Rows


def backward_query(
    plan: Plan,
    query: Float[Array, "batch length heads head_dim"],
    d_out: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    table: Float[Array, "heads rows 128"],
    tail: Float[Array, "heads 2"],
    rows: Float[Array, "batch heads units kinds 64"],
    first: Int[Array, "batch heads units"],
    live: Int[Array, "batch heads units"],
) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "..."] | None]:
    """Launches the kernel.

    Args:
      plan: of the call.
      query: as in the forward pass, like all that follow.
      d_out: gradient of the output.
      key: keys.
      value: values.
      table: from `plan.table`.
      tail: from `plan.table`.
      rows: what `Rows` says of each query.
      first: first unit of keys that each unit of queries visits.
      live: first one of them that may be live.

    Returns:
      d_query; and if the bias has a slope, for each query the sum of dS over tiles past the
      table, and of dS times the distance past its end [batch, heads, units, 2, 64].
    """
    kernel = _Kernel(plan, query, key, table.shape, rows.shape)
    out_type: list[Any] = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    if kernel.want_tail:
        out_type.append(jax.ShapeDtypeStruct((*first.shape, 2, UNIT), jnp.float32))
    results = plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types=kernel.scratch(),
        grid=(queue.blocks(kernel.order.pieces, kernel.interpret),),
        grid_names=("block",),
        num_threads=kernel.block.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="lazy_backward_query",
        interpret=plan.interpret,
    )(query, d_out, key, value, table, tail, rows, first, live)
    return results[0], (results[1] if kernel.want_tail else None)


class _Kernel:
    """The kernel's static facts, and its body."""

    __name__ = "lazy_backward_query"

    def __init__(self, plan: Plan, query, key, table_shape, rows_shape):
        self.plan, self.block = plan, plan.blocks.backward_query
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.group = self.heads // key.shape[2]
        self.dtype = query.dtype
        self.units = rows_shape[2]
        self.table_shape = table_shape[1:]
        self.interpret = plan.interpret is not None
        self.want_tail = plan.has_slope and self.length > plan.width
        self.order = schedule.Order.of_queries(
            self.batch, self.heads, self.length, self.block.rows, self.head_dim, self.group
        )
        tiles = config.query_tiles(self.block, self.head_dim)
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
        scratch |= queue.scratch()
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

    def __call__(self, *refs, **scratch) -> None:
        """The body."""
        names = ["query", "d_out", "key", "value", "table", "tail", "rows", "first", "live"]
        names += ["d_query", "far"] if self.want_tail else ["d_query"]
        _Blocks(self, dict(zip(names, refs, strict=True)) | scratch).run()


class _Blocks:
    """What a block of the grid does, piece after piece, while the body is traced."""

    def __init__(self, kernel: _Kernel, ref: dict[str, Any]):
        self.kernel, self.ref, self.block = kernel, ref, kernel.block
        self.warpgroup = lax.axis_index("warpgroup")
        self.queue = queue.Queue(
            kernel.order.pieces, ref, lax.axis_index("block"), kernel.interpret
        )
        stages = self.block.stages
        sizes = {"key": stages, "value": stages, "query": 1, "table": kernel.tables}
        self.rings = rings.make(ref, sizes, self.block.warpgroups, kernel.plan)

    def run(self) -> None:
        """Divides the warpgroups."""
        rings.divide(self.warpgroup, self.block, self.fetch, self.compute)

    def fetch(self) -> None:
        """Fetches all that the pieces read."""

        def piece(number, n, done):
            return _Piece(self, number, n, done).fetch()

        zero = jnp.int32(0)
        pieces, (keys, values) = self.queue.each(True, piece, (zero, zero))
        for name, tiles in (("key", keys), ("value", values), ("query", pieces), ("table", pieces)):
            self.rings[name].close(tiles)

    def compute(self) -> None:
        """Does what is to be done for one warpgroup's queries in each piece."""
        for ring in self.rings.values():
            ring.open()

        def piece(number, n, done):
            return _Piece(self, number, n, done).compute()

        zero = jnp.int32(0)
        self.queue.each(False, piece, (zero, zero))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _Piece:
    """A block of queries of one head.

    Args:
      blocks: what works on it.
      number: which piece it is.
      n: how many pieces came before it here.
      done: tiles of keys, and of values, that those took.
    """

    def __init__(self, blocks: _Blocks, number: Any, n: Any, done: tuple[Any, Any]):
        self.kernel, self.ref, self.n, self.done = blocks.kernel, blocks.ref, n, done
        kernel = self.kernel
        self.plan, self.block, self.interpret = kernel.plan, kernel.block, kernel.interpret
        self.warpgroup = blocks.warpgroup
        self.batch, self.head, tile = kernel.order.item(number)
        self.unit0 = tile * self.block.warpgroups
        # Everything is counted in steps from the last key tile of the block backwards.
        self.last = lax.min(self.unit0 + self.block.warpgroups - 1, jnp.int32(kernel.units - 1))
        self.keys = blocks.rings["key"].after(done[0])
        self.values = blocks.rings["value"].after(done[1])
        self.queries, self.tables = blocks.rings["query"], blocks.rings["table"]

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

        def row(kind: int) -> Array:
            return plgpu.load(ref["rows"].at[b, h, unit, kind], layout=ROW, optimized=False)

        self.log_total, self.delta = row(Rows.LOG_TOTAL), row(Rows.DELTA)
        if plan.has_offset:
            self.threshold = row(Rows.THRESHOLD)
        if plan.packed:
            self.document = row(Rows.DOCUMENT).astype(jnp.int32)
            # Documents begin later and later: the last query's masks the most.
            last = ref["rows"][b, h, unit, Rows.DOCUMENT, UNIT - 1]
            self.document_last = last.astype(jnp.int32)
        self.queries.wait(self.n)
        self.query, self.d_out = (
            rings.operand(ref[name].at[self.warpgroup], self.block.in_registers, self.interpret)
            for name in ("query_smem", "d_out_smem")
        )
        release_early = self.block.in_registers and not self.interpret
        if release_early:
            self.queries.release(self.n)
        self.table = ref["table_smem"].at[self.tables.wait(self.n)]
        both = ((self.keys, 0), (self.values, 0))
        rings.skip(0, begin, *both)

        def run(acc):
            zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            sums = (zero, zero) if kernel.want_tail else ()

            def loop(step, start, stop, sums):
                return lax.fori_loop(
                    0,
                    lax.max(stop - start, jnp.int32(0)),
                    lambda n, sums: step(acc, start + n, sums),
                    sums,
                )

            sums = loop(self.live_step, begin, live_end, sums)
            rings.skip(end, self.live_steps, *both)
            if plan.has_offset:
                sums = loop(self.dead_step, self.live_steps, end, sums)
            return acc[...], sums

        d_query, sums = pl.run_scoped(run, plgpu.ACC((ROWS, kernel.head_dim), jnp.float32))
        rings.skip(lax.max(end, self.live_steps), self.steps, (self.keys, 0))
        # The table was read by ordinary loads.
        plgpu.commit_smem()
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

    def softmax(self, x: Array, n: Any) -> tuple[Array, Any]:
        """Returns softmax weights of tile n from its products, and its first key."""
        key0 = (self.last - n) * UNIT
        start, rest = self.plan.bias_of_tile(self.query0 - key0, UNIT, self.tail)
        bias = lanes.gather(self.table, start, UNIT, transposed=False, interpret=self.interpret)
        x = x * (self.plan.scale * LOG2_E) + bias
        if self.plan.packed:
            x = lax.cond(
                key0 < self.document_last,
                lambda: jnp.where(self.in_document(key0), x, LOWEST),
                lambda: x,
            )
        return jnp.exp2(x - self.spread(self.log_total - rest)), key0

    def in_document(self, key0: Any) -> Array:
        """Returns which keys of a tile lie in the query's document or after its start."""
        columns = plgpu.broadcasted_iota(jnp.int32, (ROWS, UNIT), 1, layout=TILE)
        return columns + key0 >= self.spread(self.document)

    def spread(self, x: Float[Array, "64"]) -> Float[Array, "64 64"]:
        """Returns a row vector repeated along its rows."""
        return lax.broadcast_in_dim(x, (ROWS, UNIT), [0])

    def live_step(self, acc: Any, n: Any, sums: tuple) -> tuple:
        """Adds a tile that may be live."""
        key_slot, value_slot = self.keys.wait(n), self.values.wait(n)

        def products(s_acc, d_acc):
            plgpu.wgmma(s_acc, self.query, self.ref["key_smem"].at[key_slot].T)
            plgpu.wgmma(d_acc, self.d_out, self.ref["value_smem"].at[value_slot].T)
            p, key0 = self.softmax(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), n)
            return p, key0, d_acc[...]

        tile = plgpu.ACC((ROWS, UNIT), jnp.float32)
        p, key0, d_weights = pl.run_scoped(products, tile, tile)
        self.values.release(n)
        if self.plan.has_offset:
            d_weights = jnp.where(p > self.spread(self.threshold), d_weights, 0.0)
        return self.add(acc, n, p * (d_weights - self.spread(self.delta)), key0, sums)

    def dead_step(self, acc: Any, n: Any, sums: tuple) -> tuple:
        """Adds a tile with no live entry."""
        slot = self.keys.wait(n)

        def product(s_acc):
            plgpu.wgmma(s_acc, self.query, self.ref["key_smem"].at[slot].T)
            return s_acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, UNIT), jnp.float32))
        p, key0 = self.softmax(x, n)
        return self.add(acc, n, p * self.spread(-self.delta), key0, sums)

    def add(self, acc: Any, n: Any, d_scores: Array, key0: Any, sums: tuple) -> tuple:
        """Adds dS K, and what dS means for the bias's tail; releases the keys."""
        spare = self.ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        slot = self.keys.slot(n)
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
        plgpu.wgmma_wait(0)
        self.keys.release(n)
        return sums
