"""Operations on a tile in a warpgroup's registers that Pallas has no words for.

A 64 x N tile of float32 lies in a warpgroup as WGMMA leaves it: warp w holds rows 16w to
16w+15; lane 4g+t holds rows g and g+8 of them, and of each 8 columns those at 2t and 2t+1.
Here is what profits from knowing that. Each function has a plain twin for interpret mode,
which knows no lanes.

A row vector that is said to be *per lane* holds, in each of the four lanes of a row, what
that lane's own columns give. Only elementwise operations and `memory.store_minimum` make sense of
it. In interpret mode it is an ordinary row vector.
"""

from collections.abc import Iterable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import mlir
from pallas_kernels.mosaic_gpu.mlir import ROW, ROWS, SCALAR, TILE, Int32


def sum_and_bound(
    x: Float[Array, "64 64"], *, interpret: bool
) -> tuple[Float[Array, "64"], Float[Array, "64"]]:
    """Returns row sums and a bound on each row's largest entry, both per lane.

    x must not be negative. The bound is the largest sum of 8 entries of one lane: a maximum over
    single entries would cost an instruction each. `finish_sums` adds up the lanes' sums.
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
                _sum(registers[half, octet] for octet in range(4 * group, 4 * group + 4))
                for group in range(2)
            ]
            bounds.append(arith.maxnumf(*groups))
            sums.append(mlir.add(*groups))
        return mlir.row(sums), mlir.row(bounds)

    return reduce(x)


def _sum(pairs: Iterable[ir.Value]) -> ir.Value:
    return mlir.tree(mlir.add, [mlir.element(pair, i) for pair in pairs for i in range(2)])


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
        _, _, t = mlir.position()
        first = (t * 2).to_float()
        sums = []
        for half in range(2):
            plain = _sum(registers[half])
            if not weights:
                sums.append(plain)
                continue
            # The entry at 8 b + i of a lane stands in column 8 b + i + 2 t.
            moment = math.fma(plain, first, mlir.element(registers[half, 0], 1))
            for b in range(1, columns // 8):
                for i in range(2):
                    weight = mlir.number(float(8 * b + i))
                    moment = math.fma(mlir.element(registers[half, b], i), weight, moment)
            sums.append(moment)
        return mlir.row(sums)

    return reduce(x)


def of_neighbours(
    x: Float[Array, "64"], *, interpret: bool
) -> tuple[Float[Array, "64"], Float[Array, "64"], Float[Array, "64"]]:
    """Returns what the three other lanes of each row have, for `add_neighbours`.

    None of the exchanges waits for another, and what is done with them may come later.
    """
    if interpret:
        return (jnp.zeros_like(x),) * 3
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW)

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=(row, row, row))
    def exchange(_, x):
        values = [mlir.element(register, 0) for register in x.registers.flat]
        return tuple(
            mlir.row([mgpu.utils.shfl_bfly(value, distance) for value in values])
            for distance in (1, 2, 3)
        )

    return exchange(x)


def add_neighbours(x: Float[Array, "64"], others: tuple) -> Float[Array, "64"]:
    """Returns row sums, with equal bits in all lanes of a row."""
    one, two, three = others
    return (x + one) + (two + three)


def finish_sums(x: Float[Array, "64"], *, interpret: bool) -> Float[Array, "64"]:
    """Returns row sums from those per lane."""
    return add_neighbours(x, of_neighbours(x, interpret=interpret))


def slanted(
    base: Float[Array, ""], slope: Float[Array, ""], columns: int, *, interpret: bool
) -> Float[Array, "64 columns"]:
    """Returns the tile with tile[r, c] = base + slope (c - r): one instruction a diagonal."""
    if interpret:
        r = lax.broadcasted_iota(jnp.float32, (ROWS, columns), 0)
        c = lax.broadcasted_iota(jnp.float32, (ROWS, columns), 1)
        return base + slope * (c - r)

    @plgpu.inline_mgpu(
        arg_types=(SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, TILE),
    )
    def build_tile(_, base, slope):
        base, slope = mlir.scalar(base), mlir.scalar(slope)
        row, column = mlir.first_entry()
        base = math.fma(slope, (column - row).to_float(), base)
        entries: dict[int, ir.Value] = {}

        def entry(half, octet, i):
            distance = 8 * (octet - half) + i
            if distance not in entries:
                entries[distance] = math.fma(slope, mlir.number(float(distance)), base)
            return entries[distance]

        return mlir.tile_of(entry, columns)

    return build_tile(base, slope)


def where_seen(
    x: Float[Array, "64 columns"],
    tile_distance: Int[Array, ""],
    otherwise: float,
    *,
    rows_are_keys: bool,
    interpret: bool,
) -> Float[Array, "64 columns"]:
    """Returns x where the query is not before the key, else another number.

    `tile_distance` is the tile's first query less its first key.
    """
    if interpret:
        r = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        c = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(tile_distance + (c - r if rows_are_keys else r - c) >= 0, x, otherwise)

    @plgpu.inline_mgpu(
        arg_types=(TILE, SCALAR), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TILE)
    )
    def select(_, x, tile_distance):
        # Were its place known before the loop, a lane would keep it in registers for each entry.
        row, column = mlir.first_entry(mlir.afresh(Int32(mgpu.utils.thread_idx())))
        less, start = column - row, mlir.integer(tile_distance)
        start = start + less if rows_are_keys else start - less
        other = mlir.number(otherwise)
        registers = mlir.registers(x)
        seen: dict[int, ir.Value] = {}

        def chosen(half, octet, i):
            distance = 8 * (octet - half) + i
            if distance not in seen:
                seen[distance] = start >= (-distance if rows_are_keys else distance)
            return arith.select(seen[distance], mlir.element(registers[half, octet], i), other)

        return mlir.tile_of(chosen, x.shape[1])

    return select(x, jnp.asarray(tile_distance, jnp.int32))


def where_from(
    x: Float[Array, "64 columns"], first: Int[Array, "64"], otherwise: float, *, interpret: bool
) -> Float[Array, "64 columns"]:
    """Returns x from each row's first column on, and another number before."""
    if interpret:
        c = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(c >= first[:, None], x, otherwise)

    @plgpu.inline_mgpu(
        arg_types=(TILE, ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TILE)
    )
    def select(_, x, first):
        _, own = mlir.first_entry()
        starts = [Int32(mlir.element(row, 0)) - own for row in first.registers.flat]
        other = mlir.number(otherwise)
        registers = mlir.registers(x)

        def chosen(half, octet, i):
            seen = starts[half] <= 8 * octet + i
            return arith.select(seen, mlir.element(registers[half, octet], i), other)

        return mlir.tile_of(chosen, x.shape[1])

    return select(x, first)


def row_index(*, interpret: bool) -> Float[Array, "64"]:
    """Returns each row's index, float32."""
    if interpret:
        return jnp.arange(ROWS, dtype=jnp.float32)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW))
    def index(_):
        row, _ = mlir.first_entry()
        return mlir.row([(row + 8 * half).to_float() for half in range(2)])

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

        def build(half, octet):
            low, high = (mlir.element(registers[half, octet], i) for i in range(2))
            instruction = f"cvt.rn{'.relu' if relu else ''}.{kind}.f32 $0, $1, $2;"
            word = llvm.inline_asm(mlir.i32(), [high, low], instruction, "=r,f,f")
            return mgpu.utils.bitcast(word, two)

        return mlir.tile(build, x.shape[1])

    return convert(x)


def where_positive(
    weights: Float[Array, "64 columns"], x: Float[Array, "64 columns"], *, interpret: bool
) -> Float[Array, "64 columns"]:
    """Returns the float32 x where bfloat16 weights are above 0, else 0: one comparison for two."""
    if interpret:
        return jnp.where(weights > 0, x, 0.0)
    instructions = """{
        .reg .pred low, high;
        setp.gt.bf16x2 low|high, $2, $3;
        selp.f32 $0, $4, 0f00000000, low;
        selp.f32 $1, $5, 0f00000000, high;
    }"""

    @plgpu.inline_mgpu(
        arg_types=(TILE, TILE), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, TILE)
    )
    def select(_, weights, x):
        of_weights, of_x = mlir.registers(weights), mlir.registers(x)
        f32 = ir.F32Type.get()
        both = ir.Type.parse("!llvm.struct<(f32, f32)>")

        def build(half, octet):
            word = mgpu.utils.bitcast(of_weights[half, octet], mlir.i32())
            entries = [mlir.element(of_x[half, octet], i) for i in range(2)]
            chosen = llvm.inline_asm(
                both, [word, mlir.constant(0), *entries], instructions, "=f,=f,r,r,f,f"
            )
            return mlir.vector_of([llvm.extractvalue(f32, chosen, [i]) for i in range(2)])

        return mlir.tile(build, x.shape[1])

    return select(weights, x)
