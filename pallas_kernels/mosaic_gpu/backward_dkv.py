"""The gradients of keys and values.

With m the live entries, dP = dO V^T and delta_i = sum_j P_ij m_ij dP_ij:

    dS = P (m dP - delta)     dV = A^T dO     dK = scale dS^T Q

A CTA takes work tile after work tile: 64 keys of one key head a warpgroup. For each query head
of the group it goes over the query tiles from the diagonal on: those that may be live first,
then the dead ones, where dS = -P delta and dO is not needed. Tiles are [keys, queries] here. All
sums stay in registers until they are complete, so every run gives the same bits. Where registers
hold only one of the two sums, dK and dV have a kernel each.
"""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import (
    bias_table,
    config,
    diagonals,
    launch,
    layout,
    pipeline,
)
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.kernel_types import Index, Ref, Refs, Scalar, Scratch, TilesConsumed
from pallas_kernels.mosaic_gpu.mlir import COLUMN, ROWS, TILE
from pallas_kernels.mosaic_gpu.pipeline import Slots
from pallas_kernels.mosaic_gpu.plan import BLOCK, MASKED, RowStat
from pallas_kernels.mosaic_gpu.planning.types import KeyRanges
from pallas_kernels.mosaic_gpu.scheduler import TileOrder


def backward_dkv(
    call: Call,
    wanted: tuple[str, ...],
    rows: Float[Array, "batch heads blocks kinds 64"],
    ranges: KeyRanges,
    tile_order: Int[Array, " work_tiles+1"],
    d_out: Float[Array, "batch length heads head_dim"],
) -> dict[str, Array]:
    """Launches the kernel.

    Args:
      call: what it reads.
      wanted: "key", "value" or both.
      rows: what `RowStat` says of each query.
      ranges: which tiles it visits.
      tile_order: of the work tiles, see `order` and `scheduler.TileOrder.tile_order`.
      d_out: gradient of the output.

    Returns:
      `d_key` and `d_value`, of those that are wanted; and with both of them, where there is room
      for it and no other kernel for it, `sums` of dS over distances inside the bias table and as
      far as tiles go that have one, of each block of keys [batch, blocks, heads, distances, 64].
    """
    kernel = _Kernel(call, wanted, rows.shape[3])
    masked = ranges.last
    if call.plan.packed:
        # Documents and windows begin later and later: blocks are masked from some one on.
        starts = call.segment_start[:, None, BLOCK - 1 :: BLOCK]
        keys = BLOCK * jnp.arange(call.blocks)
        masked = jnp.sum(starts <= keys[:, None], axis=-1, dtype=jnp.int32)
    operands = dict(query=call.query, d_out=d_out, key=call.key, value=call.value)
    operands |= dict(table=call.table.for_keys, tail=call.table.tail, offset=call.offset)
    operands |= dict(rows=rows, last=ranges.last, last_live=ranges.last_live, masked=masked)
    found = kernel.launch(WorkTile, operands | {"tile_order": tile_order}, kernel.results)
    if kernel.want_bias:
        axes = (kernel.batch, kernel.blocks, kernel.heads, kernel.distances, BLOCK)
        found["sums"] = found["sums"].reshape(axes)
    return found


def order(call: Call) -> TileOrder:
    """Returns the order of the kernel's work tiles."""
    rows, kv_heads = call.plan.tunings.backward_dkv.rows, call.heads // call.group
    return TileOrder.of_keys(call.batch, kv_heads, call.group, call.length, rows, call.head_dim)


class _Kernel(launch.Kernel):
    """The kernel's static facts.

    Attributes:
      wanted: gradients that it finds.
      kinds: of `RowStat`, that there are.
      operands: of "key" and "value", those that it reads.
      want_bias: it also finds the gradient of the bias table.
      results: types of what the kernel returns, by name.
    """

    name = "lazy_backward_dkv"

    def __init__(self, call: Call, wanted: tuple[str, ...], kinds: int):
        plan, tunings = call.plan, call.plan.tunings
        tuning = tunings.backward_dkv
        if wanted == ("value",) and tunings.backward_dv is not None:
            tuning, self.name = tunings.backward_dv, "lazy_backward_dv"
        self.wanted, self.kinds = wanted, kinds
        # dV asks nothing of the values.
        self.operands = ("key", "value") if "key" in wanted else ("key",)
        self.want_bias = plan.width > 0 and tunings.backward_dbias is None and len(wanted) == 2
        width = plan.width if self.want_bias else 0
        used = config.key_tiles(tuning, call.head_dim, width, len(self.operands))
        super().__init__(call, tuning, order(call), used)
        self.distances = plan.distances(self.blocks)
        same = jax.ShapeDtypeStruct(call.key.shape, self.dtype)
        self.results = {f"d_{name}": same for name in wanted}
        if self.want_bias:
            shape = (self.batch * self.blocks * self.heads, BLOCK * self.distances)
            self.results["sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def scratch(self) -> Scratch:
        """Returns the types of SMEM buffers."""
        tuning, keys = self.tuning, self.tiled(self.tuning.warpgroups)
        scratch: Scratch = {
            "query_smem": self.tiled(tuning.stages),
            "d_out_smem": self.tiled(tuning.stages),
            "rows_smem": plgpu.SMEM((tuning.stages, self.kinds, BLOCK), jnp.float32),
        }
        scratch |= {f"{name}_smem": keys for name in self.operands}
        if tuning.in_registers:
            # Else the keys' and values' own places, which they need to the end.
            scratch |= {"d_key_smem": keys, "d_value_smem": keys}
        if self.want_bias:
            scratch |= diagonals.scratch(tuning.warpgroups, self.distances)
        return scratch

    def slots(self) -> dict[str, Slots]:
        """Returns the slots of each pipeline."""
        stages, own = self.tuning.stages, len(self.operands) * self.tuning.warpgroups
        tiles = {"query": Slots(stages, copies=2), "d_out": Slots(stages)}
        return tiles | {"key": Slots(1, copies=own), "table": Slots(self.table_slots)}

    def consumed(self, work_tiles: Scalar, tiles_consumed: TilesConsumed) -> dict[str, Scalar]:
        """Returns how many tiles of each pipeline a CTA consumed."""
        queries, d_outs = tiles_consumed
        tables = work_tiles * self.group
        return {"query": queries, "d_out": d_outs, "key": work_tiles, "table": tables}


class WorkTile(launch.WorkTile):
    """64 keys of one key head a warpgroup; `tiles_consumed` are tiles of queries, and of d_out.

    Query tiles are counted in steps from the CTA's first key tile on.
    """

    kernel: _Kernel

    def __init__(self, cta: launch.Cta, number: Scalar, n: Scalar, tiles_consumed: TilesConsumed):
        super().__init__(cta, number, n, tiles_consumed)
        # Its order counts key heads.
        self.key_head = self.head
        self.block0 = self.tile * self.tuning.warpgroups
        self.queries, self.d_outs = self.pipelines["query"], self.pipelines["d_out"]
        self.keys = self.pipelines["key"]
        self.tables = self.pipelines["table"].after(self.n * self.kernel.group)

    def load_warp(self) -> TilesConsumed:
        """Fetches all that the CTA reads; returns `tiles_consumed` of the next work tile."""

        @pipeline.fetching(self.plan)
        def _():
            self.load_own(self.keys, self.kernel.operands, self.key_head)

        def one_head(member, tiles_consumed):
            queries_consumed, d_outs_consumed = tiles_consumed
            head = self.query_head(member)
            steps, live = self.both_steps(head)

            @pipeline.fetching(self.plan)
            def _():
                self.load_table(self.tables, member, head)

                def load_query(n):
                    slot = self.queries.producer_acquire(queries_consumed + n)
                    self.load_tile(self.queries, slot, ("rows", "query"), self.block0 + n, head)

                @pl.loop(0, live)
                def _(n):
                    load_query(n)
                    slot = self.d_outs.producer_acquire(d_outs_consumed + n)
                    self.load_tile(self.d_outs, slot, ("d_out",), self.block0 + n, head)

                pl.loop(0, steps - live)(lambda n: load_query(live + n))

            return queries_consumed + steps, d_outs_consumed + live

        return lax.fori_loop(0, self.kernel.group, one_head, self.tiles_consumed)

    def compute_warpgroup(self) -> TilesConsumed:
        """Does all for one warpgroup's keys; returns `tiles_consumed` of the next work tile."""
        ref, kernel = self.ref, self.kernel
        block = self.block0 + self.warpgroup
        self.exists = block < kernel.blocks
        self.key_block = lax.min(block, jnp.int32(kernel.blocks - 1))
        self.key0 = self.key_block * BLOCK
        self.keys.consumer_wait(self.n)
        self.key = self.own("key")
        if "value" in kernel.operands:
            self.value = self.own("value")
        if self.release_early:
            self.keys.consumer_release(self.n, loading=True)
        # The step of this warpgroup's diagonal.
        self.begin = lax.select(self.exists, self.key_block - self.block0, jnp.int32(0))
        self.first_masked_step = None
        if self.plan.packed:
            # Documents and windows begin later and later.
            self.first_masked_step = ref["masked"][self.batch, self.key_block] - self.block0
        self.sums = None
        if kernel.want_bias:
            self.sums = diagonals.Diagonals(ref, self.warpgroup, kernel.distances, self.interpret)
            pl.when(self.n == 0)(self.sums.begin)

        def all_heads(*accs):
            step = functools.partial(self.add_head, dict(zip(kernel.wanted, accs, strict=True)))
            after = lax.fori_loop(0, kernel.group, step, self.tiles_consumed)
            return tuple(acc[...] for acc in accs), after

        gradients, after = pl.run_scoped(all_heads, *(kernel.sum_type for _ in kernel.wanted))
        self.store(gradients)
        return after

    def add_head(self, accs: Refs, member: Scalar, tiles_consumed: TilesConsumed) -> TilesConsumed:
        """Goes over the query tiles of one head of the group: live ones, then dead ones.

        Returns `tiles_consumed` after it; `accs` are the accumulators by their gradients' names.
        """
        ref, plan, begin = self.ref, self.plan, self.begin
        queries_consumed, d_outs_consumed = tiles_consumed
        head = self.query_head(member)
        steps, live = self.both_steps(head)
        last = ref["last"][self.batch, head, self.key_block]
        end = lax.select(self.exists, last - self.block0 + 1, begin)
        end = lax.min(end, steps)
        live_end = lax.min(live, end)
        self.tail = (ref["tail"][head, 0], ref["tail"][head, 1])
        if plan.has_offset:
            self.offset = ref["offset"][head]
        self.table = ref["table_smem"].at[self.tables.consumer_wait(member)]
        both = ((self.queries, queries_consumed), (self.d_outs, d_outs_consumed))
        if self.sums is not None:
            self.sums.begin_head()

        def loops(add, start, stop, late, masked):
            def loop(kind, start, stop, carry):
                step = functools.partial(add, kind, accs)
                ahead = self.tuning.ahead
                return pipeline.steps(start, stop, ahead, step, carry, both[0], late=late)

            length = self.kernel.length
            bias_table.loops(plan, length, begin, start, stop, loop, (), masked=masked)

        masked = live_masked = self.first_masked_step
        pipeline.skip(0, begin, *both)
        if plan.has_offset:
            # A weight of tau / n is no weight where nothing is seen.
            others = end if masked is None else masked
            live_masked = lax.select(self.offset > 0, begin, others)
        loops(self.live_step, begin, live_end, both[1:], live_masked)
        pipeline.skip(end, live, *both)
        if plan.has_offset and "key" in self.kernel.wanted:
            loops(self.dead_step, live, end, (), masked)
        pipeline.skip(lax.max(end, live), steps, both[0])
        self.tables.consumer_release(member)
        self.store_sums(head, end)
        return queries_consumed + steps, d_outs_consumed + live

    def store_sums(self, head: Scalar, end: Scalar) -> None:
        """Writes a head's sums of dS over distances, if they are wanted; `end` is its last step."""
        sums, kernel = self.sums, self.kernel
        if sums is None:
            return
        # The last tile inside the table.
        self.collect(lax.min(end, self.begin + kernel.distances))

        @pl.when(self.exists)
        def _():
            row = (self.batch * kernel.blocks + self.key_block) * kernel.heads + head
            tiles = lax.min(lax.max(end - self.begin, 0), jnp.int32(kernel.distances))
            sums.write(self.ref["sums"], row, tiles)

    def store(self, gradients: tuple[Array, ...]) -> None:
        """Writes the gradients of keys that exist, and gives the CTA's operands back."""
        ref, kernel = self.ref, self.kernel

        @pl.when(self.exists)
        def _():
            # What the work tile before has written is read by now.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rows = pl.ds(self.key0, ROWS)
            prefix = "d_" if self.tuning.in_registers else ""
            for name, x in zip(kernel.wanted, gradients, strict=True):
                place = name if name in kernel.operands else "key"
                smem = ref[f"{prefix}{place}_smem"].at[self.warpgroup]
                smem[...] = (x * self.plan.scale if name == "key" else x).astype(kernel.dtype)
                plgpu.commit_smem()
                target = ref[f"d_{name}"].at[self.batch, rows, self.key_head]
                plgpu.copy_smem_to_gmem(smem, target)

        self.release_own(self.keys)

    def own_rows(self, n: int) -> pl.Slice:
        """Returns the keys of warpgroup n."""
        return pl.ds((self.block0 + n) * ROWS, ROWS)

    def query_head(self, member: Index) -> Scalar:
        """Returns a query head of the group."""
        return self.key_head * self.kernel.group + member

    def steps(self, name: str, head: Scalar) -> Scalar:
        """Returns how many query tiles of a head the CTA visits, or may be live for it."""
        last = jnp.int32(self.kernel.blocks - 1)
        blocks = [lax.min(self.block0 + n, last) for n in range(self.tuning.warpgroups)]
        ends = [self.ref[name][self.batch, head, block] for block in blocks]
        return functools.reduce(lax.max, ends) - self.block0 + 1

    def both_steps(self, head: Scalar) -> tuple[Scalar, Scalar]:
        """Returns how many query tiles are visited, and how many of them may be live."""
        if not self.plan.has_offset:
            return (self.steps("last", head),) * 2
        live = self.steps("last_live", head)
        # dV asks nothing of the dead ones.
        return self.steps("last", head) if "key" in self.kernel.wanted else live, live

    def leave(self, n: Scalar, d_scores: Array, kind: TileKind) -> None:
        """Leaves a tile's dS for the gradient of the bias, if it is inside the table."""
        sums, distance = self.sums, n - self.begin
        if sums is None or kind is TileKind.TAIL:
            return
        # Near ones all are.
        inside = True if kind is TileKind.NEAR else distance < self.kernel.distances
        pl.when(inside)(lambda: sums.leave(d_scores, distance))

    def collect(self, n: Scalar, kind: TileKind = TileKind.NEAR) -> None:
        """Adds what the tile before tile n left, while products are under way.

        Not for the last one inside the table, unless asked for it from outside a loop.
        """
        sums, distance = self.sums, n - self.begin - 1
        if sums is None or kind is TileKind.TAIL:
            return
        wanted = distance >= 0
        if kind is TileKind.MASKED:
            wanted = wanted & (distance < self.kernel.distances - 1)
        pl.when(wanted)(lambda: sums.collect(distance))

    def row(self, slot: Scalar, kind: int) -> Float[Array, "64"]:
        """Returns one number a query."""
        return plgpu.load(self.ref["rows_smem"].at[slot, kind], layout=COLUMN, optimized=False)

    def loads(self, n: Scalar, slot: Scalar, kind: TileKind) -> tuple[Array | float | None, Array]:
        """Returns a tile's bias, and what is to be subtracted from each query's scores.

        Loaded before the tile's products are issued: behind them in the queue to memory it
        would wait for the tensor cores.
        """
        tile_distance = (self.block0 + n) * BLOCK - self.key0
        bias, rest = bias_table.tile_bias(
            self.plan, self.table, tile_distance, self.tail, kind,
            rows_are_keys=True, whole=kind is TileKind.TAIL, interpret=self.interpret,
        )  # fmt: skip
        lse = self.row(slot, RowStat.LSE)
        if kind is not TileKind.TAIL:
            return bias, lse - rest
        return (bias, lse) if self.plan.has_slope else (None, lse - bias)

    def softmax(
        self, kind: TileKind, x: Array, slot: Scalar, loaded: tuple[Array | float | None, Array]
    ) -> Array:
        """Returns softmax weights of a tile from its products."""
        bias, less = loaded
        x = x * self.plan.exponent_scale
        if bias is not None:
            x = x + bias
        if self.plan.packed and kind is TileKind.MASKED:
            x = jnp.where(self.in_segment(slot), x, MASKED)
        return jnp.exp2(x - self.spread(less, 1))

    def in_segment(self, slot: Scalar) -> Array:
        """Returns which keys of a tile lie in the query's document or after its start."""
        keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0, layout=TILE) + self.key0
        return keys >= self.spread(self.row(slot, RowStat.SEGMENT_START).astype(jnp.int32), 1)

    def hide(self, weights: Array, n: Scalar, slot: Scalar) -> Array:
        """Returns weights that are negative where nothing is seen.

        Without that, tau / n would be a weight there if it is above 0.
        """
        tile_distance = (self.block0 + n) * BLOCK - self.key0

        def masked():
            return layout.where_seen(
                weights, tile_distance, -1.0, rows_are_keys=True, interpret=self.interpret
            )

        weights = lax.cond(tile_distance == 0, masked, lambda: weights)
        return jnp.where(self.in_segment(slot), weights, -1.0) if self.plan.packed else weights

    def less(self, slot: Scalar) -> Array:
        """Returns -delta of each query, repeated along the keys."""
        return self.spread(-self.row(slot, RowStat.DELTA), 1)

    def live_step(
        self,
        kind: TileKind,
        accs: Refs,
        n: Scalar,
        slots: tuple[Scalar, ...],
        wait: Callable[[], None],
        carry: tuple[()],
    ) -> tuple[()]:
        """Adds a tile that may be live."""
        ref, plan, dtype = self.ref, self.plan, self.kernel.dtype
        spare = self.spare()
        slot, d_slot = slots
        loaded = self.loads(n, slot, kind)

        def weigh(acc):
            plgpu.wgmma(acc, self.key(), ref["query_smem"].at[slot].T)
            wait()
            self.collect(n, kind)
            p = weights = self.softmax(kind, acc[...], slot, loaded)
            if plan.has_offset:
                weights = p - self.spread(self.row(slot, RowStat.THRESHOLD), 1)
                if kind is TileKind.MASKED:
                    weights = self.hide(weights, n, slot)
            return p, layout.pack(weights, dtype, relu=plan.has_offset, interpret=self.interpret)

        def add(p, weights, acc):
            begun = None
            if not plan.has_offset:
                begun = pipeline.begin_with(acc, self.less(slot), self.interpret)
            plgpu.wgmma(acc, self.value(), ref["d_out_smem"].at[d_slot].T)
            if "value" in accs:
                pipeline.multiply(accs["value"], weights, ref["d_out_smem"].at[d_slot], spare)
            # Without waiting for the product that was issued last.
            d_weights = pipeline.finish(acc, begun, 1 if "value" in accs else 0)
            if plan.has_offset:
                # Where nothing is seen p is 0, and so is dS.
                if dtype == jnp.bfloat16:
                    # What the packed weights say costs no load.
                    alive = layout.where_positive(weights, d_weights, interpret=self.interpret)
                else:
                    # In float16 small ones are 0.
                    live = p > self.spread(self.row(slot, RowStat.THRESHOLD), 1)
                    alive = jnp.where(live, d_weights, 0.0)
                d_weights = alive + self.less(slot)
            return p * d_weights

        # One accumulator after the other, since there is no room in registers for both.
        tile = plgpu.ACC((ROWS, BLOCK), jnp.float32)
        p, weights = pl.run_scoped(weigh, tile)
        if "key" not in accs:
            pipeline.multiply(accs["value"], weights, ref["d_out_smem"].at[d_slot], spare)
            plgpu.wgmma_wait(0)
            self.d_outs.consumer_release_slot(d_slot)
            self.queries.consumer_release_slot(slot)
            return carry
        d_scores = pl.run_scoped(functools.partial(add, p, weights), tile)
        self.add_key(kind, accs["key"], n, slot, d_scores, d_slot)
        return carry

    def dead_step(
        self,
        kind: TileKind,
        accs: Refs,
        n: Scalar,
        slots: tuple[Scalar, ...],
        wait: Callable[[], None],
        carry: tuple[()],
    ) -> tuple[()]:
        """Adds a tile with no live entry."""
        (slot,) = slots
        loaded, less = self.loads(n, slot, kind), self.less(slot)

        def product(s_acc):
            plgpu.wgmma(s_acc, self.key(), self.ref["query_smem"].at[slot].T)
            wait()
            self.collect(n, kind)
            return s_acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        d_scores = self.softmax(kind, x, slot, loaded) * less
        self.add_key(kind, accs["key"], n, slot, d_scores)
        return carry

    def add_key(
        self,
        kind: TileKind,
        acc: Ref,
        n: Scalar,
        slot: Scalar,
        d_scores: Array,
        d_slot: Scalar | None = None,
    ) -> None:
        """Adds dS times the queries to dK, and gives the tile's slots back.

        Products issued before read its d_out in `d_slot`; None: it has none.
        """
        packed = layout.pack(d_scores, self.kernel.dtype, relu=False, interpret=self.interpret)
        pipeline.multiply(acc, packed, self.ref["query_smem"].at[slot], self.spare())
        self.leave(n, d_scores, kind)
        if d_slot is not None:
            plgpu.wgmma_wait(1)
            self.d_outs.consumer_release_slot(d_slot)
        # Left in flight, it made ptxas put dS where the values are, and lose them.
        plgpu.wgmma_wait(0)
        self.queries.consumer_release_slot(slot)
