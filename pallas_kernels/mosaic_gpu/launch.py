"""What all kernels share: how one is launched, and how its blocks go from piece to piece."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import queue, rings
from pallas_kernels.mosaic_gpu.config import Block
from pallas_kernels.mosaic_gpu.plan import Plan


class Kernel:
    """A kernel's static facts, and its body.

    Those that inherit say what a piece of work is.

    Args:
      plan: of the call.
      block: what it is made with.
      pieces: how many there are.
    """

    name: str

    def __init__(self, plan: Plan, block: Block, pieces: int):
        self.plan, self.block, self.pieces = plan, block, pieces
        self.interpret = plan.interpret is not None
        self.__name__ = self.name

    def refs(self) -> list[str]:
        """Returns the names of operands and results; `numbers`, of the pieces, among them."""
        raise NotImplementedError

    def scratch(self) -> dict[str, Any]:
        """Returns the types of SMEM buffers and of the rings' barriers."""
        raise NotImplementedError

    def slots(self) -> dict[str, int]:
        """Returns how many slots each ring has."""
        raise NotImplementedError

    def tiles(self, pieces: Any, done: tuple[Any, Any]) -> dict[str, Any]:
        """Returns how many tiles of each ring so many pieces took, `done` of them included."""
        raise NotImplementedError

    def piece(self, blocks: "Blocks", number: Any, n: Any, done: tuple[Any, Any]) -> Any:
        """Returns what has `fetch` and `compute`, each giving `done` of the next piece.

        Args:
          blocks: what works on it.
          number: which piece it is.
          n: how many pieces came before it here.
          done: tiles that those took of two rings.
        """
        raise NotImplementedError

    def prepare(self, ref: dict[str, Any], fetches: bool) -> None:
        """Does what comes before a block's first piece, in who fetches and in who computes."""

    def launch(self, out_type: list[Any], *arrays: Any) -> list[Any]:
        """Runs the kernel and returns its results."""
        results = plgpu.kernel(
            self,
            out_type=tuple(out_type),
            scratch_types=self.scratch() | queue.scratch(),
            grid=(queue.blocks(self.pieces, self.interpret),),
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
    """What a block of the grid does, piece after piece, while the body is traced."""

    def __init__(self, kernel: Kernel, ref: dict[str, Any]):
        self.kernel, self.ref = kernel, ref
        self.warpgroup = lax.axis_index("warpgroup")
        self.queue = queue.Queue(kernel.pieces, ref, lax.axis_index("block"), kernel.interpret)
        self.rings = rings.make(ref, kernel.slots(), kernel.block.warpgroups, kernel.plan)

    def run(self) -> None:
        """Divides the warpgroups."""
        rings.divide(self.warpgroup, self.kernel.block, self.fetch, self.compute)

    def each(self, fetches: bool) -> tuple[Any, Any]:
        """Goes through the pieces; returns how many there were, and `done` after the last."""

        def step(number: Any, n: Any, done: tuple[Any, Any]) -> tuple[Any, Any]:
            piece = self.kernel.piece(self, number, n, done)
            return piece.fetch() if fetches else piece.compute()

        zero = jnp.int32(0)
        return self.queue.each(fetches, step, (zero, zero))

    def fetch(self) -> None:
        """Fetches all that the pieces read."""
        self.kernel.prepare(self.ref, True)
        for name, tiles in self.kernel.tiles(*self.each(True)).items():
            self.rings[name].close(tiles)

    def compute(self) -> None:
        """Does one warpgroup's part of the pieces."""
        for ring in self.rings.values():
            ring.open()
        self.kernel.prepare(self.ref, False)
        self.each(False)
        # Results are written from SMEM, which must last as long.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
