"""What all kernels share: how one is launched, and how its blocks go through work tiles."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import pipeline, scheduler
from pallas_kernels.mosaic_gpu.config import Block
from pallas_kernels.mosaic_gpu.plan import Plan


class Kernel:
    """A kernel's static facts, and its body.

    Those that inherit say what a work tile is.

    Args:
      plan: of the call.
      block: what it is made with.
      work_tiles: how many there are.
    """

    name: str

    def __init__(self, plan: Plan, block: Block, work_tiles: int):
        self.plan, self.block, self.work_tiles = plan, block, work_tiles
        self.interpret = plan.interpret is not None
        self.__name__ = self.name

    def refs(self) -> list[str]:
        """Returns the names of operands and results; `tile_order` is among them."""
        raise NotImplementedError

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and of the pipelines' barriers."""
        raise NotImplementedError

    def slots(self) -> dict[str, int]:
        """Returns how many slots each pipeline has."""
        raise NotImplementedError

    def tiles(self, work_tiles: Any, tiles_consumed: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each pipeline so many work tiles consumed.

        Args:
          work_tiles: how many.
          tiles_consumed: tiles of two pipelines.
        """
        raise NotImplementedError

    def work_tile(
        self, blocks: "Blocks", number: Any, n: Any, tiles_consumed: tuple[Any, Any]
    ) -> Any:
        """Returns what has `load_warp` and `compute_warpgroup`.

        Both return `tiles_consumed` of the next work tile.

        Args:
          blocks: what works on it.
          number: which work tile it is.
          n: how many work tiles came before it here.
          tiles_consumed: tiles that those took of two pipelines.
        """
        raise NotImplementedError

    def prepare(self, ref: dict[str, Any], fetches: bool) -> None:
        """Does what comes before a block's first work tile, in who fetches and in who computes."""

    def launch(self, out_type: list[Any], *arrays: Any) -> list[Any]:
        """Runs the kernel and returns its results."""
        results = plgpu.kernel(
            self,
            out_type=tuple(out_type),
            scratch_types=self.scratch() | scheduler.scratch(),
            grid=(scheduler.blocks(self.work_tiles, self.interpret),),
            grid_names=("block",),
            num_threads=self.block.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            kernel_name=self.name,
            interpret=self.plan.interpret,
        )(*arrays)
        return list(results)

    def __call__(self, *refs: Any, **scratch: Any) -> None:
        """The body: one block of the grid."""
        Blocks(self, dict(zip(self.refs(), refs, strict=True)) | scratch).run()


class Blocks:
    """What a block of the grid does, work tile after work tile, while the body is traced."""

    def __init__(self, kernel: Kernel, ref: dict[str, Any]):
        self.kernel, self.ref = kernel, ref
        self.warpgroup = lax.axis_index("warpgroup")
        self.scheduler = scheduler.PersistentTileScheduler(
            kernel.work_tiles, ref, lax.axis_index("block"), kernel.interpret
        )
        self.pipelines = pipeline.make(ref, kernel.slots(), kernel.block.warpgroups, kernel.plan)

    def run(self) -> None:
        """Divides the warpgroups."""
        pipeline.divide(self.warpgroup, self.kernel.block, self.fetch, self.compute)

    def each(self, fetches: bool) -> tuple[Any, Any]:
        """Goes through the work tiles; returns how many, and `tiles_consumed` after the last."""

        def step(number: Any, n: Any, tiles_consumed: tuple[Any, Any]) -> tuple[Any, Any]:
            work_tile = self.kernel.work_tile(self, number, n, tiles_consumed)
            return work_tile.load_warp() if fetches else work_tile.compute_warpgroup()

        zero = jnp.int32(0)
        return self.scheduler.each(fetches, step, (zero, zero))

    def fetch(self) -> None:
        """Fetches all that the work tiles read."""
        self.kernel.prepare(self.ref, True)
        for name, tiles in self.kernel.tiles(*self.each(True)).items():
            self.pipelines[name].close(tiles)

    def compute(self) -> None:
        """Does one warpgroup's part of the work tiles."""
        for pipe in self.pipelines.values():
            pipe.open()
        self.kernel.prepare(self.ref, False)
        self.each(False)
        # Results are written from SMEM, which must last as long.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
