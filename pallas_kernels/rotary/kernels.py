"""The two kernels: a program has some heads of some tokens, whole, in registers.

The two numbers of a pair stand half a head apart, so a head is read as two halves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block, power_of_two

# Heads of a program. 64 of size 64 are 32 numbers a thread in the backward pass.
_ROWS = 64
_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Static:
    """What a kernel is compiled for; it takes this as one constant.

    Attributes:
      heads: of a token.
      total: heads of all tokens of a row of the batch.
      half: half a head's size.
      half_padded: the power of two that holds it.
      rows: heads of a program.
      epsilon: of the norm.
    """

    heads: int
    total: int
    half: int
    half_padded: int
    rows: int
    epsilon: float

    @property
    def head_dim(self) -> int:
        """Returns a head's size."""
        return 2 * self.half


@triton.jit
def _load_halves(ptr, at, inside, static: tl.constexpr):
    """Loads both halves of heads, float32; 0 outside."""
    first = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(ptr + at + static.half, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _places(static: tl.constexpr):
    """Returns where a program's heads, and their tokens' angles, stand, and what exists."""
    rows = tl.program_id(0) * static.rows + tl.arange(0, static.rows)
    columns = tl.arange(0, static.half_padded)[None, :]
    inside = (rows < static.total)[:, None] & (columns < static.half)
    rows = tl.program_id(1).to(tl.int64) * static.total + rows
    at = rows[:, None] * static.head_dim + columns
    at_token = (rows // static.heads)[:, None] * static.half + columns
    return at, at_token, columns, inside


@triton.jit
def _inverse_rms(first, second, static: tl.constexpr):
    """Returns 1 / sqrt(mean square + epsilon) of each head."""
    mean_square = tl.sum(first * first + second * second, 1) / static.head_dim
    return tl.rsqrt(mean_square + static.epsilon)[:, None]


@triton.jit
def norm_rotate_forward(x_ptr, scale_ptr, cos_ptr, sin_ptr, out_ptr, static: tl.constexpr):
    """Writes the heads of x, normalized, scaled and turned."""
    at, at_token, columns, inside = _places(static)
    first, second = _load_halves(x_ptr, at, inside, static)
    factor = _inverse_rms(first, second, static)
    scale1, scale2 = _load_halves(scale_ptr, columns, columns < static.half, static)
    first *= factor * scale1
    second *= factor * scale2
    cos = tl.load(cos_ptr + at_token, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at_token, mask=inside, other=0.0)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(out_ptr + at + static.half, (second * cos + first * sin).to(kind), mask=inside)


@triton.jit
def norm_rotate_backward(
    x_ptr, scale_ptr, cos_ptr, sin_ptr, d_out_ptr, d_x_ptr, d_scale_ptr, static: tl.constexpr
):
    """Writes dx, and what this program's heads add to the scale's gradient."""
    at, at_token, columns, inside = _places(static)
    first, second = _load_halves(x_ptr, at, inside, static)
    factor = _inverse_rms(first, second, static)
    first *= factor
    second *= factor
    turned1, turned2 = _load_halves(d_out_ptr, at, inside, static)
    cos = tl.load(cos_ptr + at_token, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at_token, mask=inside, other=0.0)
    # The transpose of a turn is the turn back.
    d_first = turned1 * cos + turned2 * sin
    d_second = turned2 * cos - turned1 * sin
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    own = program.to(tl.int64) * static.head_dim + tl.arange(0, static.half_padded)
    exists = tl.arange(0, static.half_padded) < static.half
    tl.store(d_scale_ptr + own, tl.sum(d_first * first, 0), mask=exists)
    tl.store(d_scale_ptr + own + static.half, tl.sum(d_second * second, 0), mask=exists)
    scale1, scale2 = _load_halves(scale_ptr, columns, columns < static.half, static)
    d_first *= scale1
    d_second *= scale2
    mean = (tl.sum(d_first * first + d_second * second, 1) / static.head_dim)[:, None]
    kind = d_x_ptr.dtype.element_ty
    tl.store(d_x_ptr + at, (factor * (d_first - first * mean)).to(kind), mask=inside)
    tl.store(
        d_x_ptr + at + static.half, (factor * (d_second - second * mean)).to(kind), mask=inside
    )


def forward(
    epsilon: float,
    x: Float[Array, "batch length heads head_dim"],
    scale: Float[Array, " head_dim"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Returns the heads normalized, scaled and turned by angles of these cosines and sines."""
    (out,) = _launch(norm_rotate_forward, (x, scale, cos, sin), (x,), epsilon, scales=False)
    return out


def backward(
    epsilon: float,
    x: Float[Array, "batch length heads head_dim"],
    scale: Float[Array, " head_dim"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
    d_out: Float[Array, "batch length heads head_dim"],
) -> tuple[Float[Array, "batch length heads head_dim"], Float[Array, "batch head_dim"]]:
    """Returns the gradients of x, and of the scale by rows of the batch."""
    arrays = x, scale, cos, sin, d_out
    d_x, d_scale = _launch(norm_rotate_backward, arrays, (x,), epsilon, scales=True)
    return d_x, jnp.sum(d_scale, axis=1)


def _launch(
    kernel: Any, arrays: tuple[Array, ...], like: tuple[Array, ...], epsilon: float, *, scales: bool
) -> list[Array]:
    x = arrays[0]
    batch, length, heads, head_dim = x.shape
    total, half = length * heads, head_dim // 2
    programs = -(-total // _ROWS)
    outputs = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in like]
    if scales:
        outputs.append(jax.ShapeDtypeStruct((batch, programs, head_dim), jnp.float32))
    static = Static(heads, total, half, power_of_two(half), _ROWS, epsilon)
    return launch(
        kernel, arrays, outputs, (programs, batch), Block(_ROWS, _ROWS, _WARPS, 1), static
    )
