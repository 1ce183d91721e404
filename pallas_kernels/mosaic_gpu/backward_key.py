"""The gradients of keys and values.

With m the live entries, dP = dO V^T and delta_i = dO_i . (O_i - tau/n_i M_i):

    dS = P (m dP - delta)     dV = A^T dO     dK = scale dS^T Q

A block takes piece after piece: 64 keys of one key head a warpgroup, and goes for each query
head of the group over the query tiles from the diagonal on: those that may be live first, then
the dead ones, where dS = -P delta and dO is not needed. Tiles are [keys, queries] here. All sums
stay in registers until they are complete, so every run gives the same bits.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import config, diagonals, lanes, launch, memory, rings, schedule
from pallas_kernels.mosaic_gpu.mlir import COLUMN, ROWS, TILE
from pallas_kernels.mosaic_gpu.plan import LOWEST, UNIT, Plan, Rows


def backward_key(
    plan: Plan,
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
    numbers: Int[Array, " pieces+1"],
) -> tuple[Float[Array, "..."], Float[Array, "..."], Array | None]:
    """Launches the kernel.

    Args:
      plan: of the call.
      query: as in the forward pass, like all that follow.
      d_out: gradient of the output.
      key: keys.
      value: values.
      table: from `plan.table`.
      tail: from `plan.table`.
      offset: tau; not read without an offset.
      rows: what `Rows` says of each query.
      last: last unit of queries that visits each unit of keys.
      live: last one for which it may be live.
      numbers: of the pieces, see `order` and `schedule.Order.numbers`.

    Returns:
      d_key and d_value; and where there is room for it and no other kernel for it, the sums of
      dS over distances inside the bias table and as far as tiles go that have one, of each
      unit of keys [batch, units, heads, distances, 64].
    """
    kernel = _Kernel(plan, query, key, table.shape, rows.shape)
    same = jax.ShapeDtypeStruct(key.shape, key.dtype)
    out_type = [same, same]
    if kernel.want_bias:
        rows_of_sums = kernel.batch * kernel.units * kernel.heads
        shape = (rows_of_sums, UNIT * kernel.distances)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    d_key, d_value, *sums = kernel.launch(
        out_type, query, d_out, key, value, table, tail, offset, rows, last, live, numbers
    )
    if not sums:
        return d_key, d_value, None
    axes = (kernel.batch, kernel.units, kernel.heads, kernel.distances, UNIT)
    return d_key, d_value, sums[0].reshape(axes)


def order(plan: Plan, query: Array, key: Array) -> schedule.Order:
    """Returns the order of the kernel's pieces."""
    batch, length, kv_heads, head_dim = key.shape
    rows = plan.blocks.backward_key.rows
    group = query.shape[2] // kv_heads
    return schedule.Order.of_keys(batch, kv_heads, group, length, rows, head_dim)


class _Kernel(launch.Kernel):
    """The kernel."""

    name = "lazy_backward_key"

    def __init__(self, plan: Plan, query, key, table_shape, rows_shape):
        block = plan.blocks.backward_key
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.kv_heads = key.shape[2]
        self.group = self.heads // self.kv_heads
        self.dtype = query.dtype
        self.units, self.kinds = rows_shape[2:4]
        self.table_shape = table_shape[1:]
        self.order = order(plan, query, key)
        super().__init__(plan, block, self.order.pieces)
        self.want_bias = plan.width > 0 and plan.blocks.backward_bias is None
        self.distances = min(config.distances(plan.width), self.units)
        width = plan.width if self.want_bias else 0
        tiles = config.key_tiles(self.block, self.head_dim, width)
        self.tables = config.tables(tiles, table_shape[1])

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and barriers."""
        block, d = self.block, self.head_dim
        tile = rings.tiled((block.stages, UNIT, d), self.dtype)
        keys = rings.tiled((block.warpgroups, ROWS, d), self.dtype)
        scratch = {
            "key_smem": keys,
            "value_smem": keys,
            "query_smem": tile,
            "d_out_smem": tile,
            "rows_smem": plgpu.SMEM((block.stages, self.kinds, UNIT), jnp.float32),
            "table_smem": plgpu.SMEM((self.tables, *self.table_shape), jnp.float32),
        }
        scratch |= rings.barriers("key", 1, block.warpgroups, copies=2 * block.warpgroups)
        scratch |= rings.barriers("query", block.stages, block.warpgroups, copies=2)
        scratch |= rings.barriers("d_out", block.stages, block.warpgroups)
        scratch |= rings.barriers("table", self.tables, block.warpgroups)
        if block.in_registers:
            # Else the keys' and values' own places, which they need to the end.
            scratch |= {"d_key_smem": keys, "d_value_smem": keys}
        if self.want_bias:
            scratch |= diagonals.scratch(block.warpgroups, self.distances)
        if self.interpret:
            scratch["spare_smem"] = rings.tiled((block.warpgroups, ROWS, UNIT), self.dtype)
        return scratch

    def refs(self) -> list[str]:
        """Returns the names of operands and results."""
        names = [
            "query", "d_out", "key", "value", "table", "tail", "offset", "rows", "last", "live",
            "numbers", "d_key", "d_value",
        ]  # fmt: skip
        return [*names, "sums"] if self.want_bias else names

    def slots(self) -> dict[str, int]:
        """Returns how many slots each ring has."""
        stages = self.block.stages
        return {"query": stages, "d_out": stages, "key": 1, "table": self.tables}

    def tiles(self, pieces: Any, done: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each ring so many pieces took."""
        tables = pieces * self.group
        return {"query": done[0], "d_out": done[1], "key": pieces, "table": tables}

    def piece(self, *args: Any) -> "_Piece":
        """Returns a piece."""
        return _Piece(*args)


class _Piece:
    """A block of keys of one key head.

    Args:
      blocks: what works on it.
      number: which piece it is.
      n: how many pieces came before it here.
      done: tiles of queries, and of d_out, that those took.
    """

    def __init__(self, blocks: launch.Blocks, number: Any, n: Any, done: tuple[Any, Any]):
        kernel: Any = blocks.kernel
        self.kernel, self.ref, self.n, self.done = kernel, blocks.ref, n, done
        self.plan, self.block, self.interpret = kernel.plan, kernel.block, kernel.interpret
        self.warpgroup = blocks.warpgroup
        self.batch, self.key_head, tile = kernel.order.item(number)
        # Query tiles are counted in steps from the first key tile of the block on.
        self.unit0 = tile * self.block.warpgroups
        self.queries, self.d_outs = blocks.rings["query"], blocks.rings["d_out"]
        self.keys = blocks.rings["key"]
        self.tables = blocks.rings["table"].after(n * kernel.group)

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
        steps = self.steps("last", head)
        return steps, self.steps("live", head) if self.plan.has_offset else steps

    def fetch(self) -> tuple[Any, Any]:
        """Fetches all that the block reads; returns `done` of the next piece."""
        ref, b = self.ref, self.batch

        @rings.fetching(self.plan)
        def _():
            full = self.keys.full.at[self.keys.acquire(self.n)]
            for n in range(self.block.warpgroups):
                rows = pl.ds((self.unit0 + n) * ROWS, ROWS)
                for name in ("key", "value"):
                    plgpu.copy_gmem_to_smem(
                        ref[name].at[b, rows, self.key_head], ref[f"{name}_smem"].at[n], full
                    )

        def one_head(member, done):
            steps_done, live_done = done
            head = self.head(member)
            steps, live = self.both_steps(head)

            @rings.fetching(self.plan)
            def _():
                slot = self.tables.acquire(member)
                plgpu.copy_gmem_to_smem(
                    ref["table"].at[head], ref["table_smem"].at[slot], self.tables.full.at[slot]
                )

                def copy_query(n):
                    slot = self.queries.acquire(steps_done + n)
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
                    slot = self.d_outs.acquire(live_done + n)
                    plgpu.copy_gmem_to_smem(
                        ref["d_out"].at[b, pl.ds((self.unit0 + n) * UNIT, UNIT), head],
                        ref["d_out_smem"].at[slot],
                        self.d_outs.full.at[slot],
                    )

                pl.loop(0, steps - live)(lambda n: copy_query(live + n))

            return steps_done + steps, live_done + live

        return lax.fori_loop(0, self.kernel.group, one_head, self.done)

    def compute(self) -> tuple[Any, Any]:
        """Does all that is to be done for one warpgroup's keys; returns as `fetch` does."""
        ref, plan, kernel, b = self.ref, self.plan, self.kernel, self.batch
        unit = self.unit0 + self.warpgroup
        exists = unit < kernel.units
        unit = lax.min(unit, jnp.int32(kernel.units - 1))
        self.key0 = unit * UNIT
        self.keys.wait(self.n)
        self.key, self.value = (
            rings.operand(ref[name], self.warpgroup, self.block.in_registers, self.interpret)
            for name in ("key_smem", "value_smem")
        )
        release_early = self.block.in_registers and not self.interpret
        if release_early:
            self.keys.release(self.n)
        begin = self.begin = lax.select(exists, unit - self.unit0, jnp.int32(0))
        self.sums = None
        if kernel.want_bias:
            self.sums = diagonals.Diagonals(ref, self.warpgroup, kernel.distances, self.interpret)
            pl.when(self.n == 0)(self.sums.begin)

        def one_head(d_key_acc, d_value_acc, member, done):
            steps_done, live_done = done
            head = self.head(member)
            steps, live = self.both_steps(head)
            end = lax.select(exists, ref["last"][b, head, unit] - self.unit0 + 1, begin)
            live_end = lax.min(live, end)
            self.tail = (ref["tail"][head, 0], ref["tail"][head, 1])
            if plan.has_offset:
                self.offset = ref["offset"][head]
            self.table = ref["table_smem"].at[self.tables.wait(member)]
            both = ((self.queries, steps_done), (self.d_outs, live_done))
            if self.sums is not None:
                self.sums.begin_head()
            rings.skip(0, begin, *both)

            def loop(step, start, stop, late):
                step = functools.partial(step, d_key_acc, d_value_acc)
                rings.steps(start, stop, self.block.ahead, step, (), both[0], late=late)

            loop(self.live_step, begin, live_end, both[1:])
            rings.skip(end, live, *both)
            if plan.has_offset:
                loop(self.dead_step, live, end, ())
            rings.skip(lax.max(end, live), steps, both[0])
            self.tables.release(member)
            if self.sums is not None:
                self.collect(end)

                @pl.when(exists)
                def _():
                    row = (b * kernel.units + unit) * kernel.heads + head
                    tiles = lax.min(lax.max(end - begin, 0), jnp.int32(kernel.distances))
                    self.sums.write(ref["sums"], row, tiles)

            return steps_done + steps, live_done + live

        def run(d_key_acc, d_value_acc):
            step = functools.partial(one_head, d_key_acc, d_value_acc)
            after = lax.fori_loop(0, kernel.group, step, self.done)
            return d_key_acc[...], d_value_acc[...], after

        acc = plgpu.ACC((ROWS, kernel.head_dim), jnp.float32)
        d_key, d_value, after = pl.run_scoped(run, acc, acc)

        @pl.when(exists)
        def _():
            # What the piece before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rows = pl.ds(self.key0, ROWS)
            prefix = "d_" if self.block.in_registers else ""
            for name, x in (("key", d_key * plan.scale), ("value", d_value)):
                smem = ref[f"{prefix}{name}_smem"].at[self.warpgroup]
                smem[...] = x.astype(kernel.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, ref[f"d_{name}"].at[b, rows, self.key_head])

        if not release_early:
            if not self.block.in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.keys.release(self.n)
        return after

    def leave(self, n: Any, d_scores: Array) -> None:
        """Leaves a tile's dS for the gradient of the bias, if it is inside the table."""
        if self.sums is not None:
            distance = n - self.begin

            @pl.when(distance < self.kernel.distances)
            def _():
                self.sums.leave(d_scores, distance)

    def collect(self, n: Any) -> None:
        """Adds what the tile before tile n left, while products are under way."""
        if self.sums is not None:
            distance = n - self.begin - 1

            @pl.when((distance >= 0) & (distance < self.kernel.distances))
            def _():
                self.sums.collect(distance)

    def spread(self, x: Float[Array, "64"]) -> Float[Array, "64 64"]:
        """Returns one number a query, repeated along the keys."""
        return lax.broadcast_in_dim(x, (ROWS, UNIT), [1])

    def row(self, slot: Any, kind: int) -> Float[Array, "64"]:
        """Returns one number a query."""
        return plgpu.load(self.ref["rows_smem"].at[slot, kind], layout=COLUMN, optimized=False)

    def loads(self, n: Any, slot: Any) -> tuple[Array, Array]:
        """Returns a tile's bias, and what is to be subtracted from each query's scores.

        Loaded before the tile's products are issued: behind them in the queue to memory it
        would wait for the tensor cores.
        """
        query0 = (self.unit0 + n) * UNIT
        start, rest = self.plan.bias_of_tile(query0 - self.key0, UNIT, self.tail, falling=False)
        bias = memory.gather(self.table, start, UNIT, interpret=self.interpret)
        return bias, self.row(slot, Rows.LOG_TOTAL) - rest

    def softmax(self, x: Array, n: Any, slot: Any, loaded: tuple[Array, Array]) -> Array:
        """Returns softmax weights of tile n from its products."""
        bias, less = loaded
        x = x * self.plan.exponent_scale + bias
        if self.plan.packed:
            query0 = (self.unit0 + n) * UNIT
            x = lax.cond(
                self.other_document(slot),
                lambda: jnp.where(self.visible(query0, slot), x, LOWEST),
                lambda: x,
            )
        return jnp.exp2(x - self.spread(less))

    def other_document(self, slot: Any) -> Any:
        """Returns whether some query of a tile does not see the first key."""
        # Documents begin later and later.
        last = self.ref["rows_smem"][slot, Rows.DOCUMENT, UNIT - 1]
        return self.key0.astype(jnp.float32) < last

    def visible(self, query0: Any, slot: Any) -> Array:
        """Returns which entries of a tile are seen."""
        keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, UNIT), 0, layout=TILE) + self.key0
        queries = plgpu.broadcasted_iota(jnp.int32, (ROWS, UNIT), 1, layout=TILE) + query0
        seen = queries >= keys
        if self.plan.packed:
            document = self.row(slot, Rows.DOCUMENT).astype(jnp.int32)
            seen = seen & (keys >= self.spread(document))
        return seen

    def less(self, slot: Any) -> Array:
        """Returns -delta of each query, repeated along the keys."""
        return self.spread(-self.row(slot, Rows.DELTA))

    def live_step(self, d_key_acc, d_value_acc, n, slots, wait, carry) -> tuple:
        """Adds a tile that may be live."""
        ref, plan, dtype = self.ref, self.plan, self.kernel.dtype
        spare = ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        slot, d_slot = slots
        loaded = self.loads(n, slot)

        def weigh(acc):
            plgpu.wgmma(acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n)
            p = weights = self.softmax(acc[...], n, slot, loaded)
            if plan.has_offset:
                weights = p - self.spread(self.row(slot, Rows.THRESHOLD))
                # A weight of tau / n is no weight where nothing is seen.
                query0 = (self.unit0 + n) * UNIT
                hidden = (self.offset > 0) & (query0 == self.key0)
                if plan.packed:
                    hidden = hidden | self.other_document(slot)
                weights = lax.cond(
                    hidden,
                    lambda: jnp.where(self.visible(query0, slot), weights, -1.0),
                    lambda: weights,
                )
            return p, lanes.pack(weights, dtype, relu=plan.has_offset, interpret=self.interpret)

        def add(p, weights, acc):
            begun = None
            if not plan.has_offset:
                begun = rings.begin_with(acc, self.less(slot), self.interpret)
            plgpu.wgmma(acc, self.value(), ref["d_out_smem"].at[d_slot].T)
            rings.multiply(d_value_acc, weights, ref["d_out_smem"].at[d_slot], spare)
            # Without waiting for the product that was issued last.
            d_weights = rings.finish(acc, begun, 1)
            if plan.has_offset:
                # Where nothing is seen p is 0, and so is dS.
                if dtype == jnp.bfloat16:
                    # What the packed weights say costs no load.
                    alive = lanes.where_positive(weights, d_weights, interpret=self.interpret)
                else:
                    # In float16 small ones are 0.
                    live = p > self.spread(self.row(slot, Rows.THRESHOLD))
                    alive = jnp.where(live, d_weights, 0.0)
                d_weights = alive + self.less(slot)
            return p * d_weights

        # One accumulator after the other, since there is no room in registers for both.
        tile = plgpu.ACC((ROWS, UNIT), jnp.float32)
        p, weights = pl.run_scoped(weigh, tile)
        d_scores = pl.run_scoped(functools.partial(add, p, weights), tile)
        packed = lanes.pack(d_scores, dtype, relu=False, interpret=self.interpret)
        rings.multiply(d_key_acc, packed, ref["query_smem"].at[slot], spare)
        self.leave(n, d_scores)
        plgpu.wgmma_wait(1)
        self.d_outs.release_slot(d_slot)
        # Left in flight, it made ptxas put dS where the values are, and lose them.
        plgpu.wgmma_wait(0)
        self.queries.release_slot(slot)
        return carry

    def dead_step(self, d_key_acc, d_value_acc, n, slots, wait, carry) -> tuple:
        """Adds a tile with no live entry."""
        del d_value_acc
        ref = self.ref
        spare = ref["spare_smem"].at[self.warpgroup] if self.interpret else None
        (slot,) = slots
        loaded, less = self.loads(n, slot), self.less(slot)

        def product(s_acc):
            plgpu.wgmma(s_acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n)
            return s_acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, UNIT), jnp.float32))
        d_scores = self.softmax(x, n, slot, loaded) * less
        packed = lanes.pack(d_scores, self.kernel.dtype, relu=False, interpret=self.interpret)
        rings.multiply(d_key_acc, packed, ref["query_smem"].at[slot], spare)
        self.leave(n, d_scores)
        plgpu.wgmma_wait(0)
        self.queries.release_slot(slot)
        return carry
