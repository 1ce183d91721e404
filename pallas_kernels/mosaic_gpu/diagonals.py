"""The gradient of the bias table on the way: dS of a head, added up over each distance.

A tile of dS is [keys, queries], like all of dK's kernel; on its diagonal c - r lies the distance
from query to key, less that of the tile. A warp has 16 rows of it. It adds up what its
registers hold of each diagonal, 18 numbers a lane, and leaves them in SMEM, a row of them for
each g, one row shifted against the other so that diagonals become columns. One step later,
while products are under way, it adds up the columns. So a warp has sums of its own; at the end
those of all four are added, sixteen distances apart. Nothing depends on who comes first, so
every run gives the same bits.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from pallas_kernels import bias as bias_lib
from pallas_kernels.mosaic_gpu import mlir
from pallas_kernels.mosaic_gpu.config import SKEW_PITCH, SKEW_WORDS, near_words
from pallas_kernels.mosaic_gpu.kernel_types import Ref, Refs, Scalar, Scratch
from pallas_kernels.mosaic_gpu.mlir import LANES, SCALAR, TILE, Int32
from pallas_kernels.mosaic_gpu.plan import BLOCK

# Rows of a tile that a warp has.
_WARP_ROWS = 16


def scratch(warpgroups: int, distances: int) -> Scratch:
    """Returns the types of SMEM buffers, for so many distances of tiles inside the table."""
    return {
        "skew_smem": plgpu.SMEM((warpgroups, 4 * SKEW_WORDS), jnp.float32),
        "near_smem": plgpu.SMEM((warpgroups, 4 * near_words(distances)), jnp.float32),
    }


class Diagonals:
    """The sums of one warpgroup.

    Args:
      ref: of the kernel.
      warpgroup: index of this warpgroup.
      distances: as for `scratch`.
      interpret: for interpret mode, where one row of sums serves for all four warps.
    """

    def __init__(self, ref: Refs, warpgroup: Scalar, distances: int, interpret: bool):
        self.skew, self.near = ref["skew_smem"], ref["near_smem"]
        self.warpgroup = warpgroup
        self.distances, self.interpret = distances, interpret
        # Of a warp.
        self.entries = near_words(distances)

    def begin(self) -> None:
        """Prepares SMEM; once for all heads."""
        if self.interpret:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
        def clear(_, skew, warpgroup):
            zero = mlir.number(0.0)
            base, lane = _of_warp(skew, warpgroup, SKEW_WORDS)
            for at in range(0, SKEW_WORDS, 32):
                with mgpu.utils.when((lane + at).below(SKEW_WORDS)):
                    llvm.store(zero, _at(base, lane, at))

        clear(self.skew, self.warpgroup)

    def leave(self, x: Float[Array, "64 64"], distance: Scalar) -> None:
        """Leaves a tile's sums for `collect`."""
        if self.interpret:
            first = pl.ds(BLOCK * distance, 2 * BLOCK)
            # Diagonals are counted from the top right corner: here keys are the rows.
            sums = jnp.pad(bias_lib.sum_diagonals(x.T), (0, 1))
            near = self.near.at[self.warpgroup]
            near[first] = near[first] + sums
            return

        @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), SCALAR))
        def store(_, x, skew, warpgroup):
            registers = mlir.registers(x)
            octets = registers.shape[1]
            base, lane = _of_warp(skew, warpgroup, SKEW_WORDS)
            g, t = lane // 4, lane % 4
            # Diagonal e - g lies in column e - g + 16, where e is from -8 to 63.
            start = g * (SKEW_PITCH - 1) + t * 2
            _sync_warp()
            # Entries g, c and g + 8, c + 8 lie on one diagonal and belong to one lane.
            for octet in range(-1, octets):
                entries = [(half, octet + half) for half in range(2) if 0 <= octet + half < octets]
                for i in range(2):
                    total = mlir.tree(mlir.add, [mlir.element(registers[at], i) for at in entries])
                    llvm.store(total, _at(base, start, _WARP_ROWS + 8 * octet + i))

        store(x, self.skew, self.warpgroup)

    def collect(self, distance: Scalar) -> None:
        """Adds what `leave` left, of the tile at this distance from the diagonal.

        Called for distances 0, 1, ... in turn.
        """
        if self.interpret:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR))
        def add(_, skew, near, warpgroup, distance):
            four = ir.VectorType.get((4,), ir.F32Type.get())
            zero = mlir.number(0.0)
            base, lane = _of_warp(skew, warpgroup, SKEW_WORDS)
            sums, _ = _of_warp(near, warpgroup, self.entries)
            column, distance = lane * 4, mlir.integer(distance)
            first = distance * BLOCK + column
            _sync_warp()
            rows = [
                llvm.load(four, _at(base, column, row * SKEW_PITCH), alignment=16)
                for row in range(8)
            ]
            # The farthest 16 diagonals of the tile before are the nearest of this one.
            shared = arith.andi(column.below(_WARP_ROWS), distance > 0)
            before = llvm.load(four, _at(sums, first, 0), alignment=16)
            result = []
            for i in range(4):
                of_before = arith.select(shared, mlir.element(before, i), zero)
                total = mlir.tree(mlir.add, [mlir.element(row, i) for row in rows])
                result.append(mlir.add(total, of_before))
            # A warp has 80 diagonals. What the last lanes store is overwritten by the next
            # tile's, or never read.
            llvm.store(mlir.vector_of(result), _at(sums, first, 0), alignment=16)

        add(self.skew, self.near, self.warpgroup, jnp.asarray(distance, jnp.int32))

    def begin_head(self) -> None:
        """Prepares for another head."""
        if self.interpret:
            self.near[self.warpgroup] = jnp.zeros((4 * self.entries,), jnp.float32)

    def write(self, out: Ref, row: Scalar, tiles: Scalar) -> None:
        """Writes a head's sums into a row of `out`, float32 [rows, 64 distances].

        So many tiles were added, at most all distances; of those further away the sum is 0.
        """
        size = BLOCK * self.distances
        if self.interpret:
            out[row] = self.near[self.warpgroup, pl.ds(BLOCK - 1, size)]
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR, SCALAR))
        def add_warps(_, near, out, warpgroup, row, tiles):
            f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
            zero, thread = mlir.number(0.0), mlir.thread()
            sums = mlir.pointer(near, mlir.integer(warpgroup) * (4 * self.entries))
            row = arith.muli(
                arith.extsi(i64, mlir.scalar(row)),
                arith.constant(i64, ir.IntegerAttr.get(i64, size)),
            )
            target = mlir.pointer(out, Int32(row))
            end = mlir.integer(tiles) * BLOCK
            # All warps have added what they have.
            mgpu.utils.warpgroup_barrier()
            for chunk in range(0, size, LANES):
                x = thread + chunk
                parts = []
                for warp in range(4):
                    lead = _WARP_ROWS * warp
                    added = x + lead < end
                    place = x + (warp * self.entries + lead + _WARP_ROWS)
                    value = llvm.load(f32, _at(sums, place.where(added, 0), 0))
                    parts.append(arith.select(added, value, zero))
                with mgpu.utils.when(x < size):
                    llvm.store(mlir.tree(mlir.add, parts), _at(target, thread, chunk))
            # Nothing is added to the next head's before all is read.
            mgpu.utils.warpgroup_barrier()

        add_warps(
            self.near, out, self.warpgroup, jnp.asarray(row, jnp.int32),
            jnp.asarray(tiles, jnp.int32),
        )  # fmt: skip


def _of_warp(ref: ir.Value, warpgroup: ir.Value, words: int) -> tuple[ir.Value, Int32]:
    """Returns where a warp's words of SMEM [warpgroups, 4 words] begin, and this lane."""
    # The compiler can't see that it is the same at every step: what follows from it takes a few
    # instructions, but would take registers through the loop.
    thread = mlir.afresh(Int32(mgpu.utils.thread_idx())) % LANES
    warp = thread // 32
    first = (mlir.integer(warpgroup) * 4 + warp) * words
    return mlir.pointer(ref, first), thread % 32


def _at(base: ir.Value, index: Int32, more: int) -> ir.Value:
    """Returns a pointer to a number."""
    return mlir.after(mlir.after(base, index), more)


def _sync_warp() -> None:
    """Makes what lanes of a warp have stored known to the others."""
    mlir.run("bar.warp.sync 0xffffffff;", "~{memory}")
