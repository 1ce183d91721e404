"""The MLIR of `layout.py` and `memory.py`: where numbers lie in a warpgroup's registers."""

import dataclasses
from collections.abc import Callable, Sequence

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


def _operator(build: Callable) -> Callable:
    return lambda x, y: Int32(build(x.value, Int32.of(y)))


def _relation(name: str) -> Callable:
    return lambda x, y: arith.cmpi(getattr(arith.CmpIPredicate, name), x.value, Int32.of(y))


@dataclasses.dataclass(frozen=True, eq=False)
class Int32:
    """A 32-bit integer of a kernel, with Python's operators; those that divide know no sign.

    Relations give an MLIR boolean; `below` and `up_to` know no sign.
    """

    value: ir.Value

    @staticmethod
    def of(x: "Int32 | int") -> ir.Value:
        """Returns the MLIR value of a number that may be known."""
        return x.value if isinstance(x, Int32) else constant(x)

    __add__, __sub__, __mul__ = map(_operator, (arith.addi, arith.subi, arith.muli))
    __floordiv__, __mod__ = map(_operator, (arith.divui, arith.remui))
    __and__, __or__, __xor__ = map(_operator, (arith.andi, arith.ori, arith.xori))
    __lt__, __le__, __gt__, __ge__ = map(_relation, ("slt", "sle", "sgt", "sge"))
    equals, below, up_to = map(_relation, ("eq", "ult", "ule"))

    def __rsub__(self, other: int) -> "Int32":
        return Int32(constant(other)) - self

    def where(self, condition: ir.Value, otherwise: int) -> "Int32":
        """Returns this number where a boolean is true, else another."""
        return Int32(arith.select(condition, self.value, constant(otherwise)))

    def to_float(self) -> ir.Value:
        """Returns the number in float32."""
        return arith.sitofp(ir.F32Type.get(), self.value)


def number(value: float) -> ir.Value:
    """Returns a float32 constant."""
    return mgpu.utils.c(value, ir.F32Type.get())


def pointer(ref: ir.Value, at: Int32 | int, kind: ir.Type | None = None) -> ir.Value:
    """Returns where a number of a reference lies; `kind` is its type, else float32."""
    return after(mgpu.utils.memref_ptr(ref), at, kind)


def after(pointer: ir.Value, at: Int32 | int, kind: ir.Type | None = None) -> ir.Value:
    """Returns where the number lies that comes so many numbers after another."""
    kind = ir.F32Type.get() if kind is None else kind
    return mgpu.utils.getelementptr(pointer, [at.value if isinstance(at, Int32) else at], kind)


def thread() -> Int32:
    """Returns the index of this thread in its warpgroup."""
    return Int32(mgpu.utils.thread_idx()) % LANES


def run(instruction: str, constraints: str, *operands: ir.Value) -> None:
    """Issues an instruction that returns nothing."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, instruction, constraints, has_side_effects=True)


def scalar(x) -> ir.Value:
    """Returns the value of what Pallas passes as a scalar."""
    return x.registers.item() if isinstance(x, mgpu.FragmentedArray) else x


def integer(x) -> Int32:
    """Returns what Pallas passes as a scalar int32."""
    return Int32(scalar(x))


def afresh(x: Int32) -> Int32:
    """Returns a 32-bit integer that the compiler takes for another one each time.

    What follows from it is then computed in a loop, rather than before it and kept in registers
    that the loop has not.
    """
    instruction = "mov.b32 $0, $1;"
    return Int32(llvm.inline_asm(i32(), [x.value], instruction, "=r,r", has_side_effects=True))


def position(thread: Int32 | None = None) -> tuple[Int32, Int32, Int32]:
    """Returns this or another thread's warp in its warpgroup, its g and its t."""
    lane = (Int32(mgpu.utils.thread_idx()) if thread is None else thread) % LANES
    warp, lane = lane // 32, lane % 32
    return warp, lane // 4, lane % 4


def first_entry(thread: Int32 | None = None) -> tuple[Int32, Int32]:
    """Returns row and column of this or another thread's first entry of a tile."""
    warp, g, t = position(thread)
    return warp * 16 + g, t * 2


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
