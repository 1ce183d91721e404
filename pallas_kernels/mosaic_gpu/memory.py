"""Operations between a warpgroup's registers and memory that Pallas has no words for.

Where numbers lie in registers: see `layout.py`. Each function has a plain twin for interpret
mode, where it means anything there.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.mosaic_gpu import mlir
from pallas_kernels.mosaic_gpu.config import DIAGONALS_PITCH, DIAGONALS_ROWS
from pallas_kernels.mosaic_gpu.kernel_types import Index, Ref, Scalar
from pallas_kernels.mosaic_gpu.mlir import LANES, ROW, ROWS, SCALAR, TILE, Int32

# Of the SMEM where rows of a tile lie to be added up askew.
DIAGONALS_WORDS = DIAGONALS_ROWS * DIAGONALS_PITCH


def gather(
    table: Ref,
    start: Scalar,
    columns: int,
    *,
    interpret: bool,
    plus: Float[Array, ""] | float = 0.0,
) -> Float[Array, "64 columns"]:
    """Returns the tile with tile[r, c] = table[start + c - r] + plus.

    Two neighbours of a row come from one 8-byte load, which must be aligned; hence the two
    copies of the table. Entries g, c and g+8, c+8 are equal and belong to one lane, so
    columns/8 + 1 loads a lane make the tile.

    Args:
      table: SMEM [2 n, 128] float32: n rows of the table, then the table without its first
        entry. Entries from start - 64 to start + columns are read.
      start: even.
      columns: a multiple of 8.
      interpret: for interpret mode.
      plus: the float 0.0 costs nothing.
    """
    if interpret:
        flat = table[...].reshape(2, -1)[0]
        r = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 0)
        c = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 1)
        return flat[start + c - r] + plus
    entries = table.shape[0] * table.shape[1] // 2

    more = [] if isinstance(plus, float) and plus == 0.0 else [plus]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, *([SCALAR] * len(more))),
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, TILE),
    )
    def load(_, ref, start, *more):
        row, column = mlir.first_entry()
        # An entry at an odd place begins an aligned pair in the second copy.
        at = column - row + (row & 1) * (entries - 1) + mlir.integer(start)
        base = mlir.pointer(ref, at)
        two = ir.VectorType.get((2,), ir.F32Type.get())
        loaded: dict[int, ir.Value] = {}

        def build(half, octet):
            distance = 8 * octet - 8 * half
            if distance not in loaded:
                loaded[distance] = llvm.load(two, mlir.after(base, distance), alignment=8)
                for x in more:
                    both = vector.broadcast(two, mlir.scalar(x))
                    loaded[distance] = arith.addf(loaded[distance], both)
            return loaded[distance]

        return mlir.tile(build, columns)

    return load(table, start, *more)


def registers_shape(columns: int) -> tuple[int, int, int]:
    """Returns the shape of what `store_registers` stores."""
    return columns // 8, LANES, 4


def store_registers(x: Float[Array, "64 columns"], targets: list[Ref], *, interpret: bool) -> None:
    """Stores a tile in the order in which a warpgroup's registers hold it, for `load_registers`.

    A lane writes 16 bytes at a time, of 8 columns, and a warp 512 that follow each other: no
    other order is as fast, and none needs shared memory.

    Each of the targets takes as many columns, see `registers_shape`. In interpret mode the
    order is another.
    """
    columns = x.shape[1] // len(targets)
    if interpret:
        for n, target in enumerate(targets):
            target[...] = x[:, n * columns : (n + 1) * columns].reshape(target.shape)
        return

    @plgpu.inline_mgpu(arg_types=(TILE, *[plgpu.RefType()] * len(targets)))
    def store(_, x, *targets):
        registers = mlir.registers(x)
        pointers = [y for target in targets for y in _of_lane(target, columns // 8)]
        for octet, pointer in enumerate(pointers):
            halves = [registers[half, octet] for half in range(2)]
            numbers = [mlir.element(y, i) for y in halves for i in range(2)]
            llvm.store(mlir.vector_of(numbers), pointer, alignment=16)

    store(x, *targets)


def load_registers(sources: list[Ref], *, interpret: bool) -> Float[Array, "64 columns"]:
    """Returns the tile that `store_registers` stored."""
    each = 8 * sources[0].shape[0]
    columns = each * len(sources)
    if interpret:
        return jnp.concatenate([x[...].reshape(ROWS, each) for x in sources], axis=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(sources),
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, TILE),
    )
    def load(_, *sources):
        four = ir.VectorType.get((4,), ir.F32Type.get())
        pointers = [x for source in sources for x in _of_lane(source, each // 8)]
        loaded = [llvm.load(four, x, alignment=16) for x in pointers]

        def build(half, octet):
            numbers = [mlir.element(loaded[octet], 2 * half + i) for i in range(2)]
            return mlir.vector_of(numbers)

        return mlir.tile(build, columns)

    return load(*sources)


def _of_lane(ref: ir.Value, octets: int) -> list[ir.Value]:
    """Returns where this lane's four numbers of each octet of columns lie."""
    base = mlir.pointer(ref, mlir.thread() * 4)
    return [mlir.after(base, 4 * LANES * n) for n in range(octets)]


def sum_diagonals(x: Float[Array, "64 64"], spare: Ref, *, interpret: bool) -> Float[Array, "128"]:
    """Returns the sums over the diagonals of x, the top right corner's first, and one 0.

    `spare` is SMEM of this warpgroup's own, [DIAGONALS_WORDS] float32.
    """
    if interpret:
        return jnp.pad(bias_lib.sum_diagonals(x), (0, 1))
    layout = plgpu.Layout.WG_STRIDED((LANES,), 1)

    @plgpu.inline_mgpu(
        arg_types=(TILE, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout),
    )
    def add_up(_, x, spare):
        base = mgpu.utils.memref_ptr(spare)
        warp, g, t = mlir.position()
        registers = mlir.registers(x)
        # One half of two warps' rows at a time: thread n adds up the diagonal on which
        # row - column is n - 63.
        first = (warp % 2 * 8 + g) * DIAGONALS_PITCH + t * 2
        thread, zero = mlir.thread(), mlir.number(0.0)
        sums = []
        for half, pair in np.ndindex(2, 2):
            # All have read what was there before.
            mgpu.utils.warpgroup_barrier()
            with mgpu.utils.when((warp // 2).equals(pair)):
                for octet in range(ROWS // 8):
                    for i in range(2):
                        at, x = first + (8 * octet + i), mlir.element(registers[half, octet], i)
                        llvm.store(x, mlir.after(base, at))
            mgpu.utils.warpgroup_barrier()
            for n in range(DIAGONALS_ROWS):
                row = (2 * pair + n // 8) * 16 + n % 8 + 8 * half
                column = row + ROWS - 1 - thread
                inside = column.below(ROWS)
                at = mlir.after(base, column.where(inside, 0) + n * DIAGONALS_PITCH)
                sums.append(arith.select(inside, llvm.load(ir.F32Type.get(), at), zero))
        total = mlir.tree(mlir.add, sums)
        return mgpu.FragmentedArray(
            _registers=np.array([mlir.single(total)], dtype=object),
            _layout=layout.to_mgpu(),
            _is_signed=None,
        )

    return add_up(x, spare)


def no_diagonals(*, interpret: bool) -> Float[Array, "128"]:
    """Returns what `sum_diagonals` would of a tile of zeros."""
    zero = jnp.zeros((LANES,), jnp.float32)
    return zero if interpret else plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED((LANES,), 1))


def store_minimum(x: Int[Array, "64"], words: Ref, warpgroup: Scalar, *, interpret: bool) -> None:
    """Stores the least of a warpgroup's per-lane x: the minimum of its four words of SMEM."""
    if interpret:
        words[pl.ds(4 * warpgroup, 4)] = jnp.full((4,), x.min())
        return

    @plgpu.inline_mgpu(arg_types=(ROW, plgpu.RefType(), SCALAR))
    def store(_, x, words, warpgroup):
        i32 = mlir.i32()
        low, high = (mlir.element(register, 0) for register in x.registers.flat)
        least = llvm.inline_asm(
            i32,
            [arith.minsi(low, high)],
            "redux.sync.min.s32 $0, $1, 0xffffffff;",
            "=r,r",
            has_side_effects=True,
        )
        warp, g, t = mlir.position()
        pointer = mlir.pointer(words, mlir.integer(warpgroup) * 4 + warp, i32)
        with mgpu.utils.when((g | t).equals(0)):
            llvm.store(least, pointer)

    store(x, words, warpgroup)


def prefetch(x: Ref, start: Scalar, size: int, *, interpret: bool) -> None:
    """Brings `size` 4-byte numbers of x into the first cache, a line a thread; past its end none.

    x is in global memory, of one axis.
    """
    if interpret:
        return
    length = x.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def fetch(_, x, start):
        thread = mlir.thread()
        at = mlir.integer(start) + thread * 32
        wanted = arith.andi(thread < -(-size // 32), at < length)
        pointer = mlir.pointer(x, at)
        with mgpu.utils.when(wanted):
            mlir.run("prefetch.global.L1 [$0];", "l", pointer)

    fetch(x, start)


def prefetch_tile(x: Ref, words: int, *, interpret: bool) -> None:
    """Brings so many words of global memory from the start of x on into L2, a line a thread."""
    if interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def fetch(_, x):
        base = mlir.pointer(x, mlir.thread() * 32)
        for at in range(0, words, 32 * LANES):
            mlir.run("prefetch.global.L2 [$0];", "l", mlir.after(base, at))

    fetch(x)


def take_number(numbers: Ref, words: Ref, slot: Scalar, takers: int) -> None:
    """Takes the next of some numbers into a word of SMEM; after the last one, how many they are.

    One thread of the warpgroup's second warp does it; the others don't wait.

    Args:
      numbers: int32 in global memory, each less than their count; and after them a counter of
        those taken. It is 0 before the first call and again after the last.
      words: SMEM int32.
      slot: which of them.
      takers: how many CTAs take numbers, each until it is told how many they are.
    """
    count = numbers.shape[0] - 1

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def take(_, numbers, words, slot):
        i32 = mlir.i32()
        warp, g, t = mlir.position()
        chosen = (g | t | warp ^ 1).equals(0)
        source = mgpu.utils.memref_ptr(numbers)
        counter = mlir.after(source, count, i32)
        target = mlir.pointer(words, mlir.integer(slot), i32)
        with mgpu.utils.when(chosen):
            take_one = "atom.add.relaxed.gpu.u32 $0, [$1], 1;"
            turn = Int32(llvm.inline_asm(i32, [counter], take_one, "=r,l", has_side_effects=True))
            place = Int32(arith.minui(turn.value, mlir.constant(count - 1)))
            place, left = mlir.after(source, place, i32), turn.up_to(count - 1)
            number = Int32(llvm.load(i32, place)).where(left, count)
            llvm.store(number.value, target)
            # Every CTA is told once that nothing is left; the last one puts the counter back.
            with mgpu.utils.when(turn.equals(count + takers - 1)):
                llvm.store(mlir.constant(0), counter)

    take(numbers, words, jnp.asarray(slot, jnp.int32))


def finish_loads() -> None:
    """Orders a thread's loads from SMEM before copies into it that wait for the thread.

    Copies go another way to SMEM than loads, and may overtake those issued before.
    """

    @plgpu.inline_mgpu()
    def fence(_):
        mlir.run("fence.proxy.async.shared::cta;", "")

    fence()


def named_barrier(operation: str, number: Index, threads: int) -> None:
    """Arrives at ("arrive"), or waits at ("sync"), a hardware barrier of the CTA."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,))
    def bar_op(_, number):
        mlir.run(f"bar.{operation} $0, {threads};", "r", mlir.scalar(number))

    bar_op(jnp.asarray(number, jnp.int32))


def afresh(index: Scalar, *, interpret: bool) -> Scalar:
    """Returns an index that the compiler takes for another one each time, see `mlir.afresh`.

    An operand in SMEM has a descriptor of 64 bits for each 16 columns.
    """
    if interpret:
        return index

    @plgpu.inline_mgpu(
        arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR)
    )
    def move(_, index):
        moved = mlir.afresh(mlir.integer(index))
        return mgpu.FragmentedArray.splat(moved.value, (), is_signed=True)

    return move(jnp.asarray(index, jnp.int32))
