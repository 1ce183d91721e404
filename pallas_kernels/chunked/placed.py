"""A call whose queries are a stretch of the sequence, anywhere in it.

The keys are moved so that the queries stand at the last ones; keys after them fall off
the end, and what comes in at the front is seen by nobody.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import bias as bias_lib
from pallas_kernels.chunked.op import attention, tile_size
from pallas_kernels.types import AttentionSettings, Visibility


def placed_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    offset: Float[Array, " heads"] | None,
    visibility: Visibility,
    settings: AttentionSettings,
    *,
    start: Int[Array, ""] | None,
) -> Float[Array, "batch length heads value_dim"]:
    """Returns the output of queries that stand at keys `start`, `start` + 1, ...

    Work grows with the keys before the last query, not with `key_length`.

    Args:
      query, key, value, offset, visibility, settings: as in `attention`; `first` is an
        index into `key` as it is given.
      distance_bias, distance_slope: as in `bias.expand`; None: no bias.
      start: index of the first query's key, at most key_length - length; None: 0, with
        as many keys as queries.
    """
    length, key_length = query.shape[1], key.shape[1]
    if start is not None:
        size = tile_size(length)
        ahead = -(-(key_length - length) // size) * size
        moved = ahead - start
        key, value = (_move(x, moved, ahead + length) for x in (key, value))
        visibility = Visibility(visibility.first + moved, visibility.offset_scale)
    bias = None
    if distance_bias is not None:
        bias = bias_lib.expand(distance_bias, distance_slope, key.shape[1])
    return attention(query, key, value, bias, offset, visibility, settings)


def _move(
    x: Shaped[Array, "batch key_length *rest"], by: Int[Array, ""], length: int
) -> Shaped[Array, "batch length *rest"]:
    """Returns x moved `by` places to the right, zeros before it, cut to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (length, max(0, length - x.shape[1]))
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, widths), length - by, length, axis=1)
