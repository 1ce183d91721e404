"""The definition, a block of queries after the other: for long calls that no kernel does."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn import reference

# Queries that `in_blocks` takes at a time.
BLOCK = 256


def in_blocks(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    *parameters: Any,
    position: Int[Array, "batch length"],
    segment_start: Int[Array, "batch length"],
    offset_scale: Float[Array, "batch length"],
    **settings: Any,
) -> Float[Array, "batch length heads value_dim"]:
    """Returns the output of `reference.lazy_attention`, some queries after the others.

    The backward pass computes the weights again, so memory is linear in length.

    Args:
      query, key, value, position, segment_start, offset_scale: as there.
      *parameters: distance_bias, distance_slope and offset.
      **settings: the others, as there.
    """
    length = query.shape[1]

    def cut(x: Array) -> Array:
        rest = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, -length % BLOCK), *rest), mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)

    # Gradients of keys and values are summed over blocks in the scores' dtype.
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (key, value)]

    @jax.checkpoint
    def one(block: Any) -> Array:
        query, position, segment_start, offset_scale = block
        narrow = [x.astype(key.dtype) for x in wide]
        out, _ = reference.lazy_attention(
            *(query, *narrow, *parameters, position, segment_start),
            offset_scale=offset_scale,
            **settings,
        )
        return out

    rows = (query, position, segment_start, offset_scale)
    out = jnp.moveaxis(jax.lax.map(one, tuple(map(cut, rows))), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]
