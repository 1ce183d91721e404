"""The MLIR of `layout.py` and `memory.py`: where numbers lie in a warpgroup's registers."""

from collections.abc import Sequence

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
SCALAR = plgpu.Layout.WG_SPLAT
ROWS = 64
LANES = 128


def i32() -> ir.Type:
    """Returns the type of 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> ir.Value:
    """Returns a 32-bit integer constant."""
    return mgpu.utils.c(value, i32())


def number(value: float) -> ir.Value:
    """Returns a float32 constant."""
    return mgpu.utils.c(value, ir.F32Type.get())


def pointer(ref: ir.Value, at: ir.Value | int, kind: ir.Type | None = None) -> ir.Value:
    """Returns where a number of a reference lies; `kind` is its type, else float32."""
    kind = ir.F32Type.get() if kind is None else kind
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], kind)


def thread() -> ir.Value:
    """Returns the index of this thread in its warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), constant(LANES))


def run(instruction: str, constraints: str, *operands: ir.Value) -> None:
    """Issues an instruction that returns nothing."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, instruction, constraints, has_side_effects=True)


def scalar(x) -> ir.Value:
    """Returns the value of what Pallas passes as a scalar."""
    return x.registers.item() if isinstance(x, mgpu.FragmentedArray) else x


def afresh(x: ir.Value) -> ir.Value:
    """Returns a 32-bit integer that the compiler takes for another one each time.

    What follows from it is then computed in a loop, rather than before it and kept in registers
    that the loop has not.
    """
    return llvm.inline_asm(i32(), [x], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)


def position(thread: ir.Value | None = None) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Returns this or another thread's warp in its warpgroup, its g and its t."""
    lane = arith.remui(mgpu.utils.thread_idx() if thread is None else thread, constant(LANES))
    warp = arith.divui(lane, constant(32))
    lane = arith.remui(lane, constant(32))
    return warp, arith.divui(lane, constant(4)), arith.remui(lane, constant(4))


def first_entry(thread: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
    """Returns row and column of this or another thread's first entry of a tile."""
    warp, g, t = position(thread)
    return arith.addi(arith.muli(warp, constant(16)), g), arith.muli(t, constant(2))


def element(x: ir.Value, index: int) -> ir.Value:
    """Returns one number of a register that holds several, or the only one."""
    if not isinstance(x.type, ir.VectorType):
        return x
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def vector_of(numbers: Sequence[ir.Value]) -> ir.Value:
    """Returns a few numbers as one vector, like a register that holds a pair."""
    x = llvm.mlir_undef(ir.VectorType.get((len(numbers),), numbers[0].type))
    for index, value in enumerate(numbers):
        x = vector.insert(
            value, x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index])
        )
    return x


def single(x: ir.Value) -> ir.Value:
    """Returns a number as a register of one."""
    return vector.broadcast(ir.VectorType.get((1,), x.type), x)


def add(x: ir.Value, y: ir.Value) -> ir.Value:
    """Returns x + y, which may be contracted with a product."""
    return arith.addf(x, y, fastmath=arith.FastMathFlags.contract)


def tree(combine, values: list[ir.Value]) -> ir.Value:
    """Combines values two by two."""
    while len(values) > 1:
        pairs = [combine(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]


def registers(x: mgpu.FragmentedArray) -> np.ndarray:
    """Returns a tile's registers as [row half, octet of columns], each a pair."""
    columns = x.shape[1]
    # Tiled as (64, 8), (16, 8), (8, 8), (2): octets of columns, then the halves of 16 rows.
    return x.registers.reshape(columns // 8, 2).T


def tile(build, columns: int) -> mgpu.FragmentedArray:
    """Returns the tile whose register (row half, octet of columns) `build` makes."""
    layout = TILE.to_mgpu()
    shape = layout.registers_shape((ROWS, columns))
    registers = np.empty((columns // 8, 2), object)
    for octet, half in np.ndindex(registers.shape):
        registers[octet, half] = build(half, octet)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(shape), _layout=layout, _is_signed=None
    )


def tile_of(entry, columns: int) -> mgpu.FragmentedArray:
    """Returns the tile of entries: entry(row half, octet of columns, 0 or 1)."""
    return tile(lambda *at: vector_of([entry(*at, i) for i in range(2)]), columns)


def row(values: list[ir.Value]) -> mgpu.FragmentedArray:
    """Returns the row vector of a lane's two rows."""
    layout = ROW.to_mgpu()
    shape = layout.registers_shape((ROWS,))
    kind = layout.registers_element_type(values[0].type)
    registers = np.empty(2, object)
    wide = isinstance(kind, ir.VectorType)
    for index, value in enumerate(values):
        registers[index] = vector.broadcast(kind, value) if wide else value
    return mgpu.FragmentedArray(
        _registers=registers.reshape(shape), _layout=layout, _is_signed=None
    )
