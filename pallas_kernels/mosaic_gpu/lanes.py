"""Operations on a tile in a warpgroup's registers that Pallas has no words for.

A 64 x N tile of float32 lies in a warpgroup as WGMMA leaves it: warp w holds rows 16w to
16w+15; lane 4g+t holds rows g and g+8 of them, and of each 8 columns those at 2t and 2t+1.
Here is what profits from knowing that. Each function has a plain twin for interpret mode,
which knows no lanes.

A row vector that is said to be *per lane* holds, in each of the four lanes of a row, what
that lane's own columns give. Only elementwise operations and `store_minimum` make sense of
it. In interpret mode it is an ordinary row vector.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.mosaic_gpu import mlir
from pallas_kernels.mosaic_gpu.mlir import COLUMN, LANES, ROW, ROWS, SCALAR, TILE

# 2^f on [-1/2, 1/2], relative error 2.7e-6 at most (least squares at Chebyshev nodes on the
# relative error).
_EXP2 = (0.999999191, 0.693121968, 0.240249811, 0.0559170392, 0.00956051021)
_ROUND = 1.5 * 2.0**23
# Words from one row of a tile to the next, where rows lie in SMEM to be added up askew.
_PITCH = 65
DIAGONALS_WORDS = ROWS * _PITCH


def gather(
    table,
    start: Int[Array, ""],
    columns: int,
    *,
    transposed: bool,
    interpret: bool,
) -> Float[Array, "64 columns"]:
    """Returns the tile with tile[r, c] = table[start + r - c] (transposed: c - r).

    Two neighbours of a row come from one 8-byte load, which must be aligned; hence the two
    copies of the table. Entries g, c and g+8, c+8 are equal and belong to one lane, so
    columns/8 + 1 loads a lane make the tile.

    Args:
      table: SMEM [2 n, 128] float32: n rows of the table, then the table without its first
        entry. Entries from start - columns to start + 64 + columns are read.
      start: even.
      columns: N, a multiple of 8.
      transposed: rows are keys and columns queries.
      interpret: for interpret mode.
    """
    if interpret:
        flat = table[...].reshape(2, -1)[0]
        r = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 0)
        c = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 1)
        return flat[start + (c - r if transposed else r - c)]
    entries = table.shape[0] * table.shape[1] // 2

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, TILE),
    )
    def load(_, ref, start):
        f32 = ir.F32Type.get()
        warp, g, t = mlir.position()
        row = arith.addi(arith.muli(warp, mlir.constant(16)), g)
        pair = arith.muli(t, mlir.constant(2))
        # The pair of entries begins at the left column's entry, or at the right one's.
        if transposed:
            at = arith.subi(pair, row)
            odd = arith.andi(g, mlir.constant(1))
        else:
            at = arith.subi(arith.subi(row, pair), mlir.constant(1))
            odd = arith.xori(arith.andi(g, mlir.constant(1)), mlir.constant(1))
        at = arith.addi(at, arith.muli(odd, mlir.constant(entries - 1)))
        at = arith.addi(at, mlir.scalar(start))
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], f32)
        two = ir.VectorType.get((2,), f32)
        loaded: dict[int, ir.Value] = {}

        def entry(distance: int) -> ir.Value:
            if distance not in loaded:
                pointer = mgpu.utils.getelementptr(base, [distance], f32)
                x = llvm.load(two, pointer, alignment=8)
                if not transposed:
                    x = mlir.pair(mlir.element(x, 1), mlir.element(x, 0))
                loaded[distance] = x
            return loaded[distance]

        def build(half, block):
            return entry((8 * block - 8 * half) if transposed else (8 * half - 8 * block))

        return mlir.tile(build, columns)

    return load(table, start)


def exp2(
    x: Float[Array, "64 columns"], share: tuple[int, int], *, interpret: bool
) -> Float[Array, "64 columns"]:
    """Returns 2^x, for x <= 126, some of it by a polynomial.

    The special function unit does 16 of them a clock on an SM, a quarter of what the
    tensor cores leave time for at head size 64; the multipliers have time to spare.

    Args:
      x: exponents; below -126 the result may be 0 or 2^-126.
      share: (n, of): in n of every `of` blocks of 8 columns a polynomial is used. Its
        relative error is below 3e-6, with mean near 0.
      interpret: for interpret mode.
    """
    n, of = share
    columns = x.shape[1]
    chosen = [(block * n) % of < n for block in range(columns // 8)]
    if interpret:
        block = lax.broadcasted_iota(jnp.int32, x.shape, 1) // 8
        return jnp.where(block * n % of < n, _polynomial_exp2(x), jnp.exp2(x))
    if n == 0:
        return jnp.exp2(x)

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, TILE)
    )
    def both(_, x):
        registers = mlir.registers(x)

        def build(half, block):
            f = _polynomial_register if chosen[block] else _special_register
            return mlir.pair(*(f(mlir.element(registers[half, block], i)) for i in range(2)))

        return mlir.tile(build, columns)

    return both(x)


def _polynomial_exp2(x: Array) -> Array:
    x = jnp.maximum(x, -126.0)
    whole = jnp.round(x)
    f = x - whole
    p = jnp.full_like(f, _EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        p = coefficient + f * p
    return p * jnp.exp2(whole)


def _special_register(x: ir.Value) -> ir.Value:
    return llvm.inline_asm(ir.F32Type.get(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _polynomial_register(x: ir.Value) -> ir.Value:
    f32, i32 = ir.F32Type.get(), mlir.i32()

    def constant(value: float) -> ir.Value:
        return arith.constant(f32, ir.FloatAttr.get(f32, value))  # type: ignore[call-arg,arg-type]

    # maxnum: a NaN would become 2^-126. The other columns of its row show it.
    x = arith.maxnumf(x, constant(-126.0))
    # Adding 1.5 2^23 leaves x rounded to an integer in the lowest bits.
    rounded = arith.addf(x, constant(_ROUND))
    f = arith.subf(x, arith.subf(rounded, constant(_ROUND)))
    p = constant(_EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        p = math.fma(p, f, constant(coefficient))
    exponent = arith.shli(arith.bitcast(i32, rounded), mlir.constant(23))
    return arith.bitcast(f32, arith.addi(arith.bitcast(i32, p), exponent))


def sum_and_bound(
    x: Float[Array, "64 64"], *, interpret: bool
) -> tuple[Float[Array, "64"], Float[Array, "64"]]:
    """Returns row sums and a bound on each row's largest entry, both per lane.

    The bound is the largest sum of 8 entries of one lane: a maximum over single entries would
    cost an instruction each. `finish_sums` adds up the lanes' sums.

    Args:
      x: not negative.
      interpret: for interpret mode.
    """
    if interpret:
        return x.sum(axis=1), x.max(axis=1)
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(row, row))
    def reduce(_, x):
        registers = mlir.registers(x)
        sums, bounds = [], []
        for half in range(2):
            groups = [
                mlir.tree(
                    mlir.add,
                    [
                        mlir.element(registers[half, block], i)
                        for block in range(4 * group, 4 * group + 4)
                        for i in range(2)
                    ],
                )
                for group in range(2)
            ]
            bounds.append(arith.maxnumf(*groups))
            sums.append(mlir.add(*groups))
        return mlir.row(sums), mlir.row(bounds)

    return reduce(x)


def lane_sums(
    x: Float[Array, "64 columns"], weights: bool, *, interpret: bool
) -> Float[Array, "64"]:
    """Returns the sum of each row, per lane; with `weights`, of each entry times its column.

    `finish_sums` adds up the lanes.
    """
    columns = x.shape[1]
    if interpret:
        column = jnp.arange(columns, dtype=jnp.float32)
        return (x * column if weights else x).sum(axis=1)

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW)
    )
    def reduce(_, x):
        registers = mlir.registers(x)
        f32 = ir.F32Type.get()
        _, _, t = mlir.position()
        first = arith.sitofp(f32, arith.muli(t, mlir.constant(2)))
        sums = []
        for half in range(2):
            plain = mlir.tree(
                mlir.add,
                [
                    mlir.element(registers[half, b], i)
                    for b in range(columns // 8)
                    for i in range(2)
                ],
            )
            if not weights:
                sums.append(plain)
                continue
            # The entry at 8 b + i of a lane stands in column 8 b + i + 2 t.
            moment = math.fma(plain, first, mlir.element(registers[half, 0], 1))
            for b in range(1, columns // 8):
                for i in range(2):
                    weight = arith.constant(f32, ir.FloatAttr.get(f32, float(8 * b + i)))
                    moment = math.fma(mlir.element(registers[half, b], i), weight, moment)
            sums.append(moment)
        return mlir.row(sums)

    return reduce(x)


def finish_sums(x: Float[Array, "64"], *, interpret: bool) -> Float[Array, "64"]:
    """Returns row sums from those per lane."""
    if interpret:
        return x

    @plgpu.inline_mgpu(
        arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW)
    )
    def reduce(_, x):
        sums = []
        for register in x.registers.flat:
            total = mlir.element(register, 0)
            for distance in (1, 2):
                total = mlir.add(total, mgpu.utils.shfl_bfly(total, distance))
            sums.append(total)
        return mlir.row(sums)

    return reduce(x)


def sum_diagonals(x: Float[Array, "64 64"], spare, *, interpret: bool) -> Float[Array, "128"]:
    """Returns the sums over the diagonals of x, the top right corner's first, and one 0.

    Args:
      x: a tile.
      spare: SMEM of this warpgroup's own, [DIAGONALS_WORDS] float32.
      interpret: for interpret mode.
    """
    if interpret:
        return jnp.pad(bias_lib.sum_diagonals(x), (0, 1))
    layout = plgpu.Layout.WG_STRIDED((LANES,), 1)

    @plgpu.inline_mgpu(
        arg_types=(TILE, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout),
    )
    def add_up(_, x, spare):
        f32 = ir.F32Type.get()
        base = mgpu.utils.memref_ptr(spare)
        warp, g, t = mlir.position()

        def pointer(at):
            return mgpu.utils.getelementptr(base, [at], f32)

        # All have read what was there before.
        mgpu.utils.warpgroup_barrier()
        registers = mlir.registers(x)
        row = arith.addi(arith.muli(warp, mlir.constant(16)), g)
        pair = arith.muli(t, mlir.constant(2))
        first = arith.addi(arith.muli(row, mlir.constant(_PITCH)), pair)
        for half in range(2):
            for block in range(ROWS // 8):
                for i in range(2):
                    at = arith.addi(first, mlir.constant(8 * half * _PITCH + 8 * block + i))
                    llvm.store(mlir.element(registers[half, block], i), pointer(at))
        mgpu.utils.warpgroup_barrier()
        # Thread n adds up the diagonal on which row - column is n - 63.
        thread = arith.remui(mgpu.utils.thread_idx(), mlir.constant(LANES))
        distance = arith.subi(thread, mlir.constant(ROWS - 1))
        sums = []
        for r in range(ROWS):
            column = arith.subi(mlir.constant(r), distance)
            inside = arith.cmpi(arith.CmpIPredicate.ult, column, mlir.constant(ROWS))
            column = arith.select(inside, column, mlir.constant(0))
            at = arith.addi(column, mlir.constant(r * _PITCH))
            value = llvm.load(f32, pointer(at))
            zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
            sums.append(arith.select(inside, value, zero))
        total = mlir.tree(mlir.add, sums)
        return mgpu.FragmentedArray(
            _registers=np.array([mlir.single(total)], dtype=object),
            _layout=layout.to_mgpu(),
            _is_signed=None,
        )

    return add_up(x, spare)


def row_index(*, interpret: bool) -> Float[Array, "64"]:
    """Returns each row's index, float32."""
    if interpret:
        return jnp.arange(ROWS, dtype=jnp.float32)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW))
    def index(_):
        warp, g, _ = mlir.position()
        row = arith.addi(arith.muli(warp, mlir.constant(16)), g)
        return mlir.row(
            [
                arith.sitofp(ir.F32Type.get(), arith.addi(row, mlir.constant(8 * half)))
                for half in range(2)
            ]
        )

    return index()


def pack(
    x: Float[Array, "64 columns"], dtype: jnp.dtype, *, relu: bool, interpret: bool
) -> Float[Array, "64 columns"]:
    """Returns x, or max(x, 0), in 16 bits: one instruction for two entries."""
    if interpret:
        return (jnp.maximum(x, 0) if relu else x).astype(dtype)
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, TILE))
    def convert(_, x):
        registers = mlir.registers(x)
        two = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))

        def build(half, block):
            low, high = (mlir.element(registers[half, block], i) for i in range(2))
            instruction = f"cvt.rn{'.relu' if relu else ''}.{kind}.f32 $0, $1, $2;"
            word = llvm.inline_asm(mlir.i32(), [high, low], instruction, "=r,f,f")
            return mgpu.utils.bitcast(word, two)

        return mlir.tile(build, x.shape[1])

    return convert(x)


def is_positive(x: Float[Array, "64 columns"], *, interpret: bool) -> Float[Array, "64 columns"]:
    """Returns 1 where the bfloat16 x is above 0, else 0, in x's dtype."""
    if interpret:
        return jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TILE)
    )
    def compare(_, x):
        registers = mlir.registers(x)
        two = registers[0, 0].type

        def build(half, block):
            word = mgpu.utils.bitcast(registers[half, block], mlir.i32())
            word = llvm.inline_asm(
                mlir.i32(), [word, mlir.constant(0)], "set.gt.bf16x2.bf16x2 $0, $1, $2;", "=r,r,r"
            )
            return mgpu.utils.bitcast(word, two)

        return mlir.tile(build, x.shape[1])

    return compare(x)


def store_minimum(
    x: Int[Array, "64"], words, warpgroup: Int[Array, ""], *, interpret: bool
) -> None:
    """Stores the least of a warpgroup's per-lane x into its four words of SMEM.

    Args:
      x: int32, per lane.
      words: SMEM int32, four a warpgroup, whose minimum is the result.
      warpgroup: index of this warpgroup.
      interpret: for interpret mode.
    """
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
        at = arith.addi(arith.muli(mlir.scalar(warpgroup), mlir.constant(4)), warp)
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(words), [at], i32)
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.ori(g, t), mlir.constant(0))
        with mgpu.utils.when(first):
            llvm.store(least, pointer)

    store(x, words, warpgroup)


def take_number(counter, words, slot: Int[Array, ""]) -> None:
    """Takes the next number from a counter in global memory into a word of SMEM.

    One thread of the warpgroup's second warp does it; the others don't wait.

    Args:
      counter: a semaphore, 0 before the first call.
      words: SMEM int32.
      slot: which of them.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def take(_, counter, words, slot):
        i32 = mlir.i32()
        warp, g, t = mlir.position()
        lane = arith.ori(g, t)
        chosen = arith.cmpi(
            arith.CmpIPredicate.eq,
            arith.ori(lane, arith.xori(warp, mlir.constant(1))),
            mlir.constant(0),
        )
        source = mgpu.utils.memref_ptr(counter)
        target = mgpu.utils.memref_ptr(words)
        target = mgpu.utils.getelementptr(target, [mlir.scalar(slot)], i32)
        with mgpu.utils.when(chosen):
            number = llvm.inline_asm(
                i32,
                [source],
                "atom.add.relaxed.gpu.u32 $0, [$1], 1;",
                "=r,l",
                has_side_effects=True,
            )
            llvm.store(number, target)

    take(counter, words, jnp.asarray(slot, jnp.int32))


def named_barrier(operation: str, number, threads: int) -> None:
    """Arrives at ("arrive"), or waits at ("sync"), a hardware barrier of the block."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,))
    def bar_op(_, number):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [mlir.scalar(number)],
            f"bar.{operation} $0, {threads};",
            "r",
            has_side_effects=True,
        )

    bar_op(jnp.asarray(number, jnp.int32))


__all__ = [
    "COLUMN",
    "DIAGONALS_WORDS",
    "LANES",
    "ROW",
    "ROWS",
    "SCALAR",
    "TILE",
    "exp2",
    "finish_sums",
    "gather",
    "is_positive",
    "lane_sums",
    "named_barrier",
    "pack",
    "row_index",
    "store_minimum",
    "sum_and_bound",
    "sum_diagonals",
    "take_number",
]
