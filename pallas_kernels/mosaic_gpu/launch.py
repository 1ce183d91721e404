"""What all kernels share: how one is launched, and how a CTA goes through its work tiles."""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import (
    bias_table,
    compile_ahead,
    config,
    dump_names,
    equal_variables,
    layout,
    layouts_once,
    memory,
    pipeline,
    scheduler,
    weight_sums,
)
from pallas_kernels.mosaic_gpu.bias_table import TileKind
from pallas_kernels.mosaic_gpu.call import Call
from pallas_kernels.mosaic_gpu.config import Tuning
from pallas_kernels.mosaic_gpu.kernel_types import Index, Ref, Refs, Scalar, Scratch, TilesConsumed
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS, TILE
from pallas_kernels.mosaic_gpu.pipeline import Pipeline
from pallas_kernels.mosaic_gpu.plan import BLOCK
from pallas_kernels.mosaic_gpu.scheduler import TileOrder


class Kernel:
    """A kernel's static facts.

    Args:
      call: its sizes count.
      tuning: warpgroups and stages.
      order: of the work tiles.
      tile_bytes: of SMEM that the kernel's tiles take, see `config`.
    """

    name: str

    def __init__(self, call: Call, tuning: Tuning, order: TileOrder, tile_bytes: int):
        self.plan, self.tuning, self.order = call.plan, tuning, order
        self.interpret = call.plan.interpret is not None
        self.batch, self.length, self.heads = call.batch, call.length, call.heads
        self.head_dim, self.group, self.blocks = call.head_dim, call.group, call.blocks
        self.dtype = call.query.dtype
        self.table_shape = call.table.for_queries.shape[1:]
        self.table_slots = config.table_slots(tile_bytes, self.table_shape[0])
        # Sums of 64 rows by columns of the head size.
        self.sum_type = plgpu.ACC((ROWS, self.head_dim), jnp.float32)

    def scratch(self) -> Scratch:
        """Returns the types of SMEM buffers, but for those that all kernels have."""
        raise NotImplementedError

    def slots(self) -> dict[str, pipeline.Slots]:
        """Returns the slots of each pipeline, by name; `table`'s are among them."""
        raise NotImplementedError

    def tiled(self, count: int) -> pl.MemoryRef:
        """Returns the type of so many blocks of queries, keys or the like in SMEM."""
        return pipeline.tiled((count, BLOCK, self.head_dim), self.dtype)

    def consumed(self, work_tiles: Scalar, tiles_consumed: TilesConsumed) -> dict[str, Scalar]:
        """Returns how many tiles of each pipeline a CTA consumed.

        Args:
          work_tiles: how many it took.
          tiles_consumed: what `WorkTile.load_warp` of the last of them returned.
        """
        raise NotImplementedError

    def launch(
        self,
        work_tile: type["WorkTile"],
        operands: dict[str, Array],
        results: dict[str, jax.ShapeDtypeStruct],
    ) -> dict[str, Array]:
        """Runs the kernel; returns the results by name.

        Args:
          work_tile: what a CTA does at a time.
          operands: by the names of their references; `tile_order` is among them.
          results: types, by name.
        """
        names = [*operands, *results]

        def body(*refs: Ref, **scratch: Ref) -> None:
            Cta(self, work_tile, dict(zip(names, refs, strict=True)) | scratch).run()

        body.__name__ = self.name
        scratch = self.scratch() | scheduler.scratch()
        scratch["table_smem"] = plgpu.SMEM((self.table_slots, *self.table_shape), jnp.float32)
        for name, slots in self.slots().items():
            scratch |= pipeline.barriers(name, slots, self.tuning.warpgroups)
        if self.interpret:
            shape = (self.tuning.warpgroups, ROWS, BLOCK)
            scratch["spare_smem"] = pipeline.tiled(shape, self.dtype)
        dump_names.make_stable()
        compile_ahead.switch_on()
        equal_variables.keep_order()
        layouts_once.remember()
        found = plgpu.kernel(
            body,
            out_type=tuple(results.values()),
            scratch_types=scratch,
            grid=(scheduler.ctas(self.order.work_tiles, self.interpret),),
            grid_names=("cta",),
            num_threads=self.tuning.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            kernel_name=self.name,
            interpret=self.plan.interpret,
        )(*operands.values())
        return dict(zip(results, found, strict=True))


class Cta:
    """A CTA, which takes work tile after work tile, while its body is traced."""

    def __init__(self, kernel: Kernel, work_tile: type["WorkTile"], ref: Refs):
        self.kernel, self.work_tile, self.ref = kernel, work_tile, ref
        self.warpgroup = lax.axis_index("warpgroup")
        self.scheduler = scheduler.PersistentTileScheduler(
            kernel.order.work_tiles, ref, lax.axis_index("cta"), kernel.interpret
        )
        self.pipelines = pipeline.make(ref, kernel.slots(), kernel.tuning.warpgroups, kernel.plan)

    def run(self) -> None:
        """Divides the warpgroups: the last one loads, the others compute."""
        tuning = self.kernel.tuning
        loads = self.warpgroup == tuning.warpgroups

        @pl.when(loads)
        def _():
            plgpu.set_max_registers(tuning.fetch_registers, action="decrease")
            self.load()

        @pl.when(jnp.logical_not(loads))
        def _():
            plgpu.set_max_registers(tuning.registers, action="increase")
            self.compute()

    def each(self, loads: bool) -> tuple[Scalar, TilesConsumed]:
        """Goes through the work tiles; returns how many, and `tiles_consumed` after the last."""

        def step(number: Scalar, n: Scalar, tiles_consumed: TilesConsumed) -> TilesConsumed:
            work_tile = self.work_tile(self, number, n, tiles_consumed)
            return work_tile.load_warp() if loads else work_tile.compute_warpgroup()

        zero = jnp.int32(0)
        return self.scheduler.each(loads, step, (zero, zero))

    def load(self) -> None:
        """Fetches all that the work tiles read."""
        if "ones_smem" in self.ref:
            weight_sums.fetch(self.kernel.plan, self.ref)
        for name, tiles in self.kernel.consumed(*self.each(True)).items():
            self.pipelines[name].close(tiles)

    def compute(self) -> None:
        """Does one warpgroup's part of the work tiles."""
        for pipe in self.pipelines.values():
            pipe.open()
        if "ones_smem" in self.ref:
            weight_sums.wait(self.ref)
        self.each(False)
        # Results are written from SMEM, which must last as long.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class WorkTile:
    """What a CTA does at a time, as all its warpgroups see it.

    A kernel's own work tile says what the warp that loads does, and what each warpgroup that
    computes does for its 64 rows.

    Attributes:
      kernel: its static facts; `plan`, `tuning` and `interpret` are the kernel's.
      ref: operands, results and scratch by name.
      warpgroup: index of this warpgroup in the CTA.
      n: how many work tiles came before it here.
      tiles_consumed: tiles that those took of the kernel's two pipelines of tiles.
      batch, head, tile: which work tile it is, see `TileOrder.item`.
      pipelines: by name.
      query0: first query of this warpgroup, where rows are queries; like the rest set by
        `compute_warpgroup`.
      exists: whether this warpgroup has rows, rather than ones past the end.
      table: the head's bias table in SMEM.
      bias_tail: value and slope of what follows it, see `Plan.table`.
      segment_start: first key that each query sees, where some don't see their row's first.
    """

    kernel: Kernel
    query0: Scalar
    exists: Array
    table: Ref
    bias_tail: tuple[Scalar, Scalar]
    segment_start: Int[Array, "64"]

    def __init__(self, cta: Cta, number: Scalar, n: Scalar, tiles_consumed: TilesConsumed):
        kernel = self.kernel = cta.kernel
        self.plan, self.tuning, self.interpret = kernel.plan, kernel.tuning, kernel.interpret
        self.ref, self.warpgroup, self.pipelines = cta.ref, cta.warpgroup, cta.pipelines
        self.n, self.tiles_consumed = n, tiles_consumed
        self.batch, self.head, self.tile = kernel.order.item(number)
        # The CTA's own operands, or their copies in registers, are given back when read.
        self.release_early = self.tuning.in_registers and not self.interpret

    def load_warp(self) -> TilesConsumed:
        """Fetches all that the CTA reads; returns `tiles_consumed` of the next work tile."""
        raise NotImplementedError

    def compute_warpgroup(self) -> TilesConsumed:
        """Does all for one warpgroup's rows; returns what `load_warp` does."""
        raise NotImplementedError

    def own_rows(self, n: int) -> pl.Slice:
        """Returns the rows of warpgroup n."""
        raise NotImplementedError

    def load_own(self, pipe: Pipeline, names: tuple[str, ...], head: Scalar) -> None:
        """Fetches the CTA's own operands, which stay for a work tile: 64 rows a warpgroup."""
        slot = pipe.producer_acquire(self.n)
        for n in range(self.tuning.warpgroups):
            rows = self.own_rows(n)
            for name in names:
                source = self.ref[name].at[self.batch, rows, head]
                plgpu.copy_gmem_to_smem(source, self.ref[f"{name}_smem"].at[n], pipe.full.at[slot])

    def load_tile(
        self, pipe: Pipeline, slot: Scalar, names: tuple[str, ...], block: Scalar, head: Scalar
    ) -> None:
        """Fetches one block of operands into a slot that was acquired."""
        rows = pl.ds(block * BLOCK, BLOCK)
        for name in names:
            # What is known of each row lies block by block.
            at = (head, block) if name == "rows" else (rows, head)
            pipe.copy(slot, self.ref[name].at[self.batch, *at], self.ref[f"{name}_smem"])

    def load_table(self, pipe: Pipeline, number: Index, head: Scalar) -> None:
        """Fetches a head's bias table, into the slot of that number."""
        slot = pipe.producer_acquire(number)
        pipe.copy(slot, self.ref["table"].at[head], self.ref["table_smem"])

    def own(self, name: str) -> Callable[[], Ref | Array]:
        """Returns what gives one of the warpgroup's own operands, the first of a product.

        Called at each step; the tile is in registers, or, as always in interpret mode, in SMEM.
        """
        tiles = self.ref[f"{name}_smem"]
        if self.tuning.in_registers and not self.interpret:
            tile = plgpu.load(tiles.at[self.warpgroup], layout=TILE, optimized=False)
            return lambda: tile
        return lambda: tiles.at[memory.afresh(self.warpgroup, interpret=self.interpret)]

    def release_own(self, pipe: Pipeline) -> None:
        """Gives the own operands back where they were needed to the end."""
        if self.release_early:
            return
        if not self.tuning.in_registers:
            # Results lie in their place.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pipe.consumer_release(self.n)

    def spare(self) -> Ref | None:
        """Returns SMEM for operands that interpret mode can't take from registers."""
        return self.ref["spare_smem"].at[self.warpgroup] if self.interpret else None

    def load_row(self, x: Ref) -> Array:
        """Returns 64 numbers of memory as a row vector: one for each row of a tile."""
        return plgpu.load(x, layout=ROW, optimized=False)

    def tile_bias(
        self, kind: TileKind, key0: Scalar, *, whole: bool
    ) -> tuple[Array | float, Array | float]:
        """Returns the bias of a tile whose rows are queries, see `bias_table.tile_bias`.

        Reads `query0`, `table` and `bias_tail`.
        """
        return bias_table.tile_bias(
            self.plan, self.table, self.query0 - key0, self.bias_tail, kind,
            rows_are_keys=False, whole=whole, interpret=self.interpret,
        )  # fmt: skip

    def where_in_segment(self, x: Array, key0: Scalar, otherwise: float) -> Array:
        """Returns x for keys in the query's document or after its start, else another number.

        Of tiles whose rows are queries; reads `segment_start` of each.
        """
        return layout.where_from(x, self.segment_start - key0, otherwise, interpret=self.interpret)

    def first_masked(self, last: Scalar, last_segment_start: Scalar | None) -> Scalar | None:
        """Returns the first step with a key that some query doesn't see, but for causality.

        Args:
          last: block of keys of step 0, from which steps lead backwards.
          last_segment_start: first key that the last query sees, which sees the least; None: all
            see the first key of their row.
        """
        if last_segment_start is None:
            return None
        return last + 1 - lax.div(last_segment_start + (BLOCK - 1), jnp.int32(BLOCK))

    def spread(self, x: Float[Array, "64"], axis: int = 0) -> Float[Array, "64 64"]:
        """Returns a vector repeated along the rows of a tile, or with axis 1 along its columns."""
        return lax.broadcast_in_dim(x, (ROWS, BLOCK), [axis])

    def per_row(self, x: Index | float, dtype: DTypeLike = jnp.float32) -> Array:
        """Returns a row vector of one number."""
        return plgpu.layout_cast(jnp.full((ROWS,), x, dtype), ROW)
