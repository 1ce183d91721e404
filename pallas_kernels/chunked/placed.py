"""Queries that are a stretch of the sequence, anywhere in it.

The keys are moved so that the queries stand at the last ones; keys after them fall off
the end, and what comes in at the front is seen by nobody.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.chunked.tiling import tile_size
from pallas_kernels.problem import Inputs


def place(inputs: Inputs, start: Int[Array, ""]) -> Inputs:
    """Returns the inputs of queries that stand at keys `start`, `start` + 1, ...

    Work grows with the keys before the last query, not with `key_length`.

    Args:
      inputs: `segment_start` is an index into `key` as it is given.
      start: at most key_length - length.
    """
    length, key_length = inputs.query.shape[1], inputs.key.shape[1]
    size = tile_size(length)
    ahead = -(-(key_length - length) // size) * size
    moved = ahead - start
    return dataclasses.replace(
        inputs,
        key=_move(inputs.key, moved, ahead + length),
        value=_move(inputs.value, moved, ahead + length),
        segment_start=inputs.segment_start + moved,
    )


def _move(
    x: Shaped[Array, "batch key_length *rest"], by: Int[Array, ""], length: int
) -> Shaped[Array, "batch length *rest"]:
    """Returns x moved `by` places to the right, zeros before it, cut to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (length, max(0, length - x.shape[1]))
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, widths), length - by, length, axis=1)
