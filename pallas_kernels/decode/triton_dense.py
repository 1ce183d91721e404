"""Products of a few tokens with weights, in one launch with what comes before and after.

A step reads each weight once for a handful of tokens, so memory is what it waits for, and every
kernel besides costs more than its work. One launch does: the RMS norm of the tokens; their product
with one to three matrices side by side; silu(gate) * up; and the sum with the residual stream.
A program has some columns of one matrix.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block, power_of_two
from pallas_kernels.triton.tile import PRECISION, constant

# Tokens of a step at most; of more, weights are no longer all that counts.
MAX_TOKENS = 64
MAX_MATRICES = 3
WARPS = 4
# Bytes of a row of a program's tile of tokens.
TILE_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Where a matrix stands among those of a launch.

    Attributes:
      columns: of it that a launch goes over; of one with gates half of them.
      first: columns before them, of those to its left.
    """

    columns: int
    first: int


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel is compiled for; it takes this as one constant.

    Attributes:
      tokens, inner: of the product.
      matrices: side by side.
      tile_tokens, tile_columns, tile_inner: of a program.
      gated: the matrix has gates, then as many other columns.
      normed, epsilon: the tokens are normed.
      residual: something is added.
    """

    tokens: int
    inner: int
    matrices: tuple[Matrix, ...]
    tile_tokens: int
    tile_columns: int
    tile_inner: int
    gated: bool
    normed: bool
    epsilon: float
    residual: bool

    @property
    def number(self) -> int:
        """Returns how many matrices there are."""
        return len(self.matrices)

    @property
    def each(self) -> tuple[Matrix, ...]:
        """Returns them in the form in which a kernel can pass them on."""
        return tuple(constant(matrix) for matrix in self.matrices)

    @property
    def columns(self) -> int:
        """Returns the columns of the result."""
        return sum(matrix.columns for matrix in self.matrices)


@triton.jit
def _multiply(pointers, weight_ptr, static: tl.constexpr, matrix: tl.constexpr):
    """Does a program's columns of a matrix."""
    x_ptr, scale_ptr, residual_ptr, out_ptr = pointers
    token = tl.arange(0, static.tile_tokens)
    there = (token < static.tokens)[:, None]
    place = tl.program_id(0) * static.tile_columns + tl.arange(0, static.tile_columns)
    column = place - matrix.first
    stride: tl.constexpr = matrix.columns * 2 if static.gated else matrix.columns
    shape: tl.constexpr = (static.tile_tokens, static.tile_columns)
    found = tl.full(shape, 0, tl.float32)
    other = found
    # Added up at the end: sums over a row are what warps wait for each other at.
    squares = tl.full((static.tile_tokens, static.tile_inner), 0, tl.float32)
    for start in tl.range(0, static.inner, static.tile_inner):
        k = start + tl.arange(0, static.tile_inner)
        inside = k < static.inner
        at = token[:, None] * static.inner + k[None, :]
        x = tl.load(x_ptr + at, mask=there & inside[None, :], other=0.0)
        at = weight_ptr + k[:, None] * stride + column[None, :]
        weight = tl.load(at, mask=inside[:, None], other=0.0)
        if static.normed:
            wide = x.to(tl.float32)
            squares += wide * wide
            scale = tl.load(scale_ptr + k, mask=inside, other=0.0)
            x = (wide * scale[None, :]).to(x.dtype)
        found = tl.dot(x, weight, found, input_precision=PRECISION)
        if static.gated:
            weight = tl.load(at + matrix.columns, mask=inside[:, None], other=0.0)
            other = tl.dot(x, weight, other, input_precision=PRECISION)
    if static.normed:
        mean = tl.sum(squares, 1) / static.inner
        factor = tl.rsqrt(mean + static.epsilon)[:, None]
        found *= factor
        other *= factor
    if static.gated:
        found = found / (1.0 + tl.exp(-found)) * other
    kind = out_ptr.dtype.element_ty
    at = token[:, None] * static.columns + place[None, :]
    if static.residual:
        # The update is a number of the stream's dtype before it is added.
        found = found.to(kind).to(tl.float32)
        found += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, found.to(kind), mask=there)


@triton.jit
def _owns(place, matrix: tl.constexpr):
    """Returns whether a column of the result is one of the matrix's."""
    return (place >= matrix.first) & (place < matrix.first + matrix.columns)


@triton.jit
def decode_dense(
    x_ptr,
    scale_ptr,
    residual_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    out_ptr,
    static: tl.constexpr,
):
    """Columns of all matrices; grid (columns / tile_columns,)."""
    pointers = (x_ptr, scale_ptr, residual_ptr, out_ptr)
    weights = (weight0_ptr, weight1_ptr, weight2_ptr)
    number: tl.constexpr = static.number
    place = tl.program_id(0) * static.tile_columns
    for n in tl.static_range(number):
        if _owns(place, static.each[n]):
            _multiply(pointers, weights[n], static, static.each[n])


def unsupported(tokens: int, columns: Sequence[int]) -> str | None:
    """Returns why a product can't be done, as the end of "... since ..."; None: it can."""
    if tokens > MAX_TOKENS:
        return f"there are {tokens} tokens, above {MAX_TOKENS}"
    if any(n % 32 for n in columns):
        return f"{list(columns)} columns are no multiples of 32"
    return None


@traced_by_own_settings(narrow=True)
def dense(
    x: Float[Array, "tokens inner"],
    *weights: Float[Array, "inner _"],
    norm: Float[Array, " inner"] | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
    residual: Float[Array, "tokens columns"] | None = None,
) -> Float[Array, "tokens columns"]:
    """Returns the product of tokens with matrices side by side.

    Args:
      x: the tokens, of any float dtype but float64.
      *weights: one to three matrices in x's dtype.
      norm: scale of the RMS norm of x, float32; None: there is none.
      epsilon: of the norm.
      gated: the only matrix has gates, then as many other columns: silu(gate) * other.
      residual: is added, x's dtype.
    """
    tokens, inner = x.shape
    sizes = [weight.shape[1] // (2 if gated else 1) for weight in weights]
    matrices = tuple(Matrix(n, sum(sizes[:i])) for i, n in enumerate(sizes))
    # Narrow tiles where there would be few programs, and more of them in flight.
    narrow = sum(sizes) < 32 * 64
    tile_columns, stages = (16, 6) if narrow else (32, 4)
    tile_tokens = max(16, power_of_two(tokens))
    tile_inner = TILE_BYTES // x.dtype.itemsize // (2 if tile_tokens > 32 else 1)
    static = Static(
        tokens=tokens,
        inner=inner,
        matrices=matrices,
        tile_tokens=tile_tokens,
        tile_columns=tile_columns,
        tile_inner=tile_inner,
        gated=gated,
        normed=norm is not None,
        epsilon=epsilon,
        residual=residual is not None,
    )
    every = [*weights, *(None,) * (MAX_MATRICES - len(weights))]
    (out,) = launch(
        decode_dense,
        (x, norm if norm is None else norm.astype(jnp.float32), residual, *every),
        (jax.ShapeDtypeStruct((tokens, static.columns), x.dtype),),
        (static.columns // tile_columns,),
        Block(tile_tokens, tile_columns, WARPS, stages),
        static,
    )
    return out
