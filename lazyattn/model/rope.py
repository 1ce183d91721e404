"""Rotary position embedding in the half-split layout."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn.attention import document_starts


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    base: float,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates each head of `x` by its position.

    Dimensions i and i + head_dim / 2 form a pair that turns by the angle
    position * base^(-2 i / head_dim). Angles and products are float32.

    Args:
      x: queries or keys, any float dtype; head_dim even.
      positions: int32, the place of each token in its document.
      base: the longest wavelength is about 2 pi base tokens.

    Returns:
      The rotated heads, in `x`'s dtype. Norms are unchanged.

    Source: Su et al., arXiv 2104.09864, eq. 15, with pairs taken half a head apart.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def document_positions(
    segment_ids: Int[Array, "batch length"],
) -> Int[Array, "batch length"]:
    """Returns each token's place in its document: 0, 1, ... from every change of id."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return index - document_starts(segment_ids)
