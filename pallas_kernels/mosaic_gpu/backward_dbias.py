"""The gradient of the bias table, without atomics.

All tiles of a head at one distance from the diagonal share one bias tile, so dS is summed
over these tiles elementwise first, in registers, and the diagonals of the sum are added up
at the end. A CTA takes work tile after work tile: a run of queries down which it walks. Each
of its warpgroups has a distance of its own, one block further from the diagonal than the one
before: the keys that one warpgroup has used are the next one's at the next step, so that each
step fetches only one tile of each operand.
"""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import config, launch, memory, pipeline
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.kernel_types import Scalar, Scratch, TilesConsumed
from pallas_kernels.mosaic_gpu.mlir import ROWS, TILE
from pallas_kernels.mosaic_gpu.pipeline import Slots
from pallas_kernels.mosaic_gpu.plan import BLOCK, MASKED, RowStat
from pallas_kernels.mosaic_gpu.planning.types import KeyRanges
from pallas_kernels.mosaic_gpu.scheduler import TileOrder

# Work tiles wanted, so that uneven ones share out well over the largest GPUs, and query blocks
# that a work tile should at least have.
_WORK_TILES = 2048
_BLOCKS_A_WORK_TILE = 16


def chunks(call: Call) -> int:
    """Returns into how many runs of queries a row is cut."""
    groups = -(-call.plan.distances(call.blocks) // _tuning(call).warpgroups)
    wanted = -(-_WORK_TILES // (call.batch * call.heads * groups))
    return max(1, min(wanted, call.blocks // _BLOCKS_A_WORK_TILE))


def backward_dbias(
    call: Call,
    rows: Float[Array, "batch heads blocks kinds 64"],
    ranges: KeyRanges,
    d_out: Float[Array, "batch length heads head_dim"],
) -> Float[Array, "batch chunks heads distances 128"]:
    """Launches the kernel.

    Args:
      call: what it reads.
      rows: what `RowStat` says of each query.
      ranges: has `distances`, as many as a multiple of the warpgroups.
      d_out: gradient of the output.

    Returns:
      for each distance the sums of dS over the diagonals of its tiles, the top right corner's
      first, and one 0.
    """
    assert ranges.distances is not None
    kernel = _Kernel(call, rows.shape[3], *ranges.distances.shape[2:4])
    operands = dict(query=call.query, d_out=d_out, key=call.key, value=call.value)
    operands |= dict(table=call.table.for_queries, rows=rows, ranges=ranges.distances)
    operands["tile_order"] = ranges.tile_order[2]
    return kernel.launch(_WorkTile, operands, kernel.results)["sums"]


def order(call: Call, chunks: int, distances: int) -> TileOrder:
    """Returns the order of the kernel's work tiles."""
    tiles = chunks * distances // _tuning(call).warpgroups
    return TileOrder.by_head(call.batch, call.heads, call.group, tiles)


def _tuning(call: Call) -> config.Tuning:
    tuning = call.plan.tunings.backward_dbias
    assert tuning is not None, "dK's kernel finds the gradient of the bias."
    return tuning


class _Kernel(launch.Kernel):
    """The kernel's static facts.

    Attributes:
      kinds: of `RowStat`, that there are.
      distances: of tiles, with those that only fill up the warpgroups.
      key_stages: slots for tiles of keys, and of values.
      results: types of what the kernel returns, by name.
    """

    name = "lazy_backward_dbias"

    def __init__(self, call: Call, kinds: int, chunks: int, distances: int):
        tuning = _tuning(call)
        used = config.bias_tiles(tuning, call.head_dim)
        super().__init__(call, tuning, order(call, chunks, distances), used)
        self.kinds, self.distances = kinds, distances
        # Warpgroups lag behind each other by one tile of keys.
        self.key_stages = tuning.stages + tuning.warpgroups - 1
        shape = (self.batch, chunks, self.heads, distances, 2 * BLOCK)
        self.results = {"sums": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def scratch(self) -> Scratch:
        """Returns the types of SMEM buffers."""
        tuning = self.tuning
        return {
            "query_smem": self.tiled(tuning.stages),
            "d_out_smem": self.tiled(tuning.stages),
            "key_smem": self.tiled(self.key_stages),
            "value_smem": self.tiled(self.key_stages),
            "rows_smem": plgpu.SMEM((tuning.stages, self.kinds, BLOCK), jnp.float32),
            "sums_smem": plgpu.SMEM((tuning.warpgroups, memory.DIAGONALS_WORDS), jnp.float32),
        }

    def slots(self) -> dict[str, Slots]:
        """Returns the slots of each pipeline: of queries and d_out, of keys and values."""
        query, key = Slots(self.tuning.stages, copies=3), Slots(self.key_stages, copies=2)
        return {"query": query, "key": key, "table": Slots(self.table_slots)}

    def consumed(self, work_tiles: Scalar, tiles_consumed: TilesConsumed) -> dict[str, Scalar]:
        """Returns how many tiles of each pipeline a CTA consumed."""
        return {"query": tiles_consumed[0], "key": tiles_consumed[1], "table": work_tiles}


class _WorkTile(launch.WorkTile):
    """A distance of one head a warpgroup, for one run of queries.

    `tiles_consumed` are tiles of queries, and of keys.
    """

    kernel: _Kernel

    def __init__(self, cta: launch.Cta, number: Scalar, n: Scalar, tiles_consumed: TilesConsumed):
        super().__init__(cta, number, n, tiles_consumed)
        kernel, tuning = self.kernel, self.tuning
        # All distances of a chunk side by side, so that they share its tiles in L2.
        self.chunk = lax.div(self.tile, jnp.int32(kernel.distances // tuning.warpgroups))
        group = self.tile - self.chunk * (kernel.distances // tuning.warpgroups)
        self.key_head = lax.div(self.head, jnp.int32(kernel.group))
        self.distance0 = group * tuning.warpgroups
        starts, _, stops = zip(
            *(self.range_of(self.distance0 + n) for n in range(tuning.warpgroups)), strict=True
        )
        # Steps are query blocks, all warpgroups' together.
        self.start = functools.reduce(lax.min, starts)
        self.stop = lax.max(functools.reduce(lax.max, stops), self.start)
        self.steps = self.stop - self.start
        behind = jnp.int32(tuning.warpgroups - 1)
        self.key_tiles = lax.select(self.steps > 0, self.steps + behind, jnp.int32(0))
        self.queries = self.pipelines["query"].after(self.tiles_consumed[0])
        self.keys = self.pipelines["key"].after(self.tiles_consumed[1])
        self.tables = self.pipelines["table"]

    def range_of(self, distance: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Returns the first visited, the first live and the last query block at a distance."""
        ref = self.ref["ranges"]
        start, live, stop = (ref[self.batch, self.head, self.chunk, distance, n] for n in range(3))
        return start, live, stop

    def next_consumed(self) -> TilesConsumed:
        """Returns `tiles_consumed` of the next work tile."""
        return self.tiles_consumed[0] + self.steps, self.tiles_consumed[1] + self.key_tiles

    def load_warp(self) -> TilesConsumed:
        """Fetches all that the CTA reads; returns `tiles_consumed` of the next work tile.

        Dead tiles need neither values nor d_out, but there are few of them near the diagonal.
        """
        behind = self.tuning.warpgroups - 1

        def load_keys(n):
            # Tile n is the nearest warpgroup's at step n - behind.
            block = lax.max(self.start + n - behind - self.distance0, jnp.int32(0))
            slot = self.keys.producer_acquire(n)
            self.load_tile(self.keys, slot, ("key", "value"), block, self.key_head)

        @pipeline.fetching(self.plan)
        def _():
            self.load_table(self.tables, self.n, self.head)

            @pl.when(self.steps > 0)
            def _():
                pl.loop(0, behind)(load_keys)

            @pl.loop(0, self.steps)
            def _(n):
                block, slot = self.start + n, self.queries.producer_acquire(n)
                self.load_tile(self.queries, slot, ("rows", "query", "d_out"), block, self.head)
                load_keys(n + behind)

        return self.next_consumed()

    def compute_warpgroup(self) -> TilesConsumed:
        """Sums dS at one warpgroup's distance; returns `tiles_consumed` of the next work tile."""
        ref, plan = self.ref, self.plan
        behind = self.tuning.warpgroups - 1
        distance = self.distance0 + self.warpgroup
        my_start, my_live, my_stop = self.range_of(distance)
        none = (jnp.float32(0.0), jnp.float32(0.0))
        start, _ = plan.bias_of_tile(distance * BLOCK, BLOCK, none, rows_are_keys=False)
        table = ref["table_smem"].at[self.tables.consumer_wait(self.n)]
        bias = memory.gather(table, start, BLOCK, interpret=self.interpret)
        self.tables.consumer_release(self.n, loading=True)
        zero = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), TILE)
        lag = behind - self.warpgroup
        both = ((self.queries, 0), (self.keys, lag))

        def steps(add, first, last, total):
            # Of query blocks, as the ranges are.
            first, last = (lax.clamp(self.start, x, self.stop) - self.start for x in (first, last))

            def step(n, slots, wait, total):
                slot, key_slot = slots
                total = total + add(bias, n, slot, key_slot, wait)
                self.queries.consumer_release_slot(slot)
                self.keys.consumer_release_slot(key_slot)
                return total

            last = lax.max(first, last)
            return pipeline.steps(first, last, self.tuning.ahead, step, total, *both), last

        # Tiles before this warpgroup's first, and after its last.
        pipeline.skip(0, lax.select(self.steps > 0, lag, jnp.int32(0)), (self.keys, 0))
        first = lax.clamp(jnp.int32(0), my_start - self.start, self.steps)
        pipeline.skip(0, first, *both)
        total, end = zero, first
        if plan.has_offset:
            total, end = steps(self.dead, my_start, lax.min(my_live, my_stop), total)
        total, end = steps(self.live, end + self.start, my_stop, total)
        pipeline.skip(end, self.steps, *both)
        pipeline.skip(self.steps + lag, self.key_tiles, (self.keys, 0))
        spare = ref["sums_smem"].at[self.warpgroup]
        ref["sums"][self.batch, self.chunk, self.head, distance] = lax.cond(
            my_start < my_stop,
            lambda: memory.sum_diagonals(total, spare, interpret=self.interpret),
            lambda: memory.no_diagonals(interpret=self.interpret),
        )
        return self.next_consumed()

    def row(self, slot: Scalar, kind: int) -> Float[Array, "64 64"]:
        """Returns one number a query, repeated along its row."""
        return self.spread(self.load_row(self.ref["rows_smem"].at[slot, kind]))

    def softmax(self, x: Array, bias: Array, n: Scalar, slot: Scalar, lse: Array) -> Array:
        """Returns softmax weights from the products of step n."""
        plan = self.plan
        x = x * plan.exponent_scale + bias
        if plan.packed:
            key0 = (self.start + n - self.distance0 - self.warpgroup) * BLOCK
            columns = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=TILE)
            first = self.row(slot, RowStat.SEGMENT_START).astype(jnp.int32)
            x = jnp.where(columns + key0 >= first, x, MASKED)
        return jnp.exp2(x - lse)

    def dead(
        self, bias: Array, n: Scalar, slot: Scalar, key_slot: Scalar, wait: Callable[[], None]
    ) -> Array:
        """Returns dS of a tile with no live entry."""
        # Loads that are issued after products wait for the tensor cores.
        less, lse = -self.row(slot, RowStat.DELTA), self.row(slot, RowStat.LSE)

        def product(acc):
            plgpu.wgmma(acc, self.ref["query_smem"].at[slot], self.ref["key_smem"].at[key_slot].T)
            wait()
            return acc[...]

        x = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        return self.softmax(x, bias, n, slot, lse) * less

    def live(
        self, bias: Array, n: Scalar, slot: Scalar, key_slot: Scalar, wait: Callable[[], None]
    ) -> Array:
        """Returns dS of a tile that may be live."""
        ref = self.ref
        less, lse = -self.row(slot, RowStat.DELTA), self.row(slot, RowStat.LSE)
        limit = self.row(slot, RowStat.THRESHOLD) if self.plan.has_offset else None

        def products(s_acc, d_acc):
            d_begun = pipeline.begin_with(d_acc, less, self.interpret)
            plgpu.wgmma(s_acc, ref["query_smem"].at[slot], ref["key_smem"].at[key_slot].T)
            plgpu.wgmma(d_acc, ref["d_out_smem"].at[slot], ref["value_smem"].at[key_slot].T)
            x = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            p = self.softmax(x, bias, n, slot, lse)
            # Late, since there may be but two slots.
            wait()
            return p, pipeline.finish(d_acc, d_begun)

        tile = plgpu.ACC((ROWS, BLOCK), jnp.float32)
        p, d_weights = pl.run_scoped(products, tile, tile)
        if limit is not None:
            d_weights = jnp.where(p > limit, d_weights, less)
        return p * d_weights
