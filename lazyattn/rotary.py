"""RoPE, and RMS norm with RoPE, of queries and keys."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn.errors import require
from pallas_kernels.triton import support as triton_support

IMPLEMENTATIONS = ("triton", "xla")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Angles of a model that was stretched to longer rows.

    A pair that turns t times in `length` tokens keeps its angle if t is above `high`, has it
    divided by `factor` if t is below `low`, and in between the mean of both, weighted by where
    t is. Without `length` all angles are divided.

    Attributes:
      factor: positive.
      length: tokens a row before it was stretched; None: all pairs alike.
      low, high: turns, `low` below `high`.

    Source: without `length`, Chen et al., arXiv 2306.15595, eq. 4. With it, Llama 3.1's, which
    follows Peng et al., arXiv 2309.00071, section 3.2.
    """

    factor: float
    length: int | None = None
    low: float = 1.0
    high: float = 4.0


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    base: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates each head of `x` by its position.

    Dimensions i and i + head_dim / 2 form a pair that turns by the angle
    position * base^(-2 i / head_dim). Angles and products are float32.

    Args:
      x: queries or keys, any float dtype; head_dim even.
      positions: int32, the place of each token in its document.
      base: the longest wavelength is about 2 pi base tokens.
      scaling: of the angles; None: there is none.

    Returns:
      The rotated heads, in `x`'s dtype. Norms are unchanged.

    Source: Su et al., arXiv 2104.09864, eq. 15, with pairs taken half a head apart.
    """
    cos, sin = (part[:, :, None] for part in cos_and_sin(positions, x.shape[-1], base, scaling))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def norm_rotate(
    x: Float[Array, "batch length heads head_dim"],
    scale: Float[Array, " head_dim"],
    positions: Int[Array, "batch length"],
    base: float,
    epsilon: float,
    implementation: str | None = None,
    scaling: RopeScaling | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Returns the heads of x / sqrt(mean(x^2) + epsilon) * scale, rotated as by `rotate`.

    "triton" reads and writes each array once, forward and backward, which XLA's fusions don't
    (docs/log/2026-11-30-norm-and-rope.md). It has derivatives in reverse mode only.

    Args:
      x: queries or keys before the norm, float; head_dim even.
      scale: of the norm, float32.
      positions: int32, the place of each token in its document.
      base: of the rotation.
      epsilon: of the norm.
      implementation: "triton", "xla" or None: "triton" where it can be done.
      scaling: of the angles; None: there is none.

    Returns:
      The heads in `x`'s dtype; float32 inside.

    Raises:
      InputError: for an implementation that there is not, or that can't do it.

    Source: the norm is Zhang and Sennrich, arXiv 1910.07467, eq. 4, with epsilon, over each
    head (Dehghani et al., arXiv 2302.05442, section 3.1, but for its kind).
    """
    allowed = ", ".join(f'"{name}"' for name in IMPLEMENTATIONS) + " or None"
    known = implementation is None or implementation in IMPLEMENTATIONS
    require(known, "implementation", implementation, allowed)
    head_dim = x.shape[-1]
    reason = triton_support.refusal(head_dim, head_dim, x.dtype)
    if implementation == "triton":
        require(reason is None, "implementation", implementation, f'"xla" or None, since {reason}')
    if implementation == "xla" or reason is not None:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normal = x32 * jax.lax.rsqrt(mean_square + epsilon) * scale
        return rotate(normal.astype(x.dtype), positions, base, scaling)

    from pallas_kernels.rotary import op  # Triton takes a second to import.

    cos, sin = cos_and_sin(positions, head_dim, base, scaling)
    return op.norm_rotate(x, scale, cos, sin, epsilon)


def cos_and_sin(
    positions: Int[Array, "batch length"],
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Returns what `rotate` turns each token's pairs by, float32; arguments as there."""
    half = head_dim // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _scaled(frequencies: Float[Array, " half"], scaling: RopeScaling) -> Float[Array, " half"]:
    slow = frequencies / scaling.factor
    if scaling.length is None:
        return slow
    turns = frequencies * (scaling.length / (2 * math.pi))
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (1 - kept) * slow + kept * frequencies
