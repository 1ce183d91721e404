"""Queries that are chunks of a sequence, in terms of simpler calls.

`xla_chunked` takes a chunk at a time: its keys are moved so that the queries stand at the last
ones. The fused kernels know square calls only: their queries are filled up to one a key. A query
that fills up sees its own key and no other, so it costs a part of one tile on the diagonal, and
its output is dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.problem import Inputs

_OF_QUERIES = ("query", "segment_start", "offset_scale")


def split(inputs: Inputs, chunks: int) -> list[Inputs]:
    """Returns the inputs of each chunk of queries; the keys are those of all."""
    parts = [jnp.split(getattr(inputs, name), chunks, axis=1) for name in _OF_QUERIES]
    return [
        dataclasses.replace(inputs, **dict(zip(_OF_QUERIES, of_chunk, strict=True)))
        for of_chunk in zip(*parts, strict=True)
    ]


def move(inputs: Inputs, start: Int[Array, ""], tile: int) -> Inputs:
    """Returns inputs whose queries stand at the last keys, for ones that stand at `start` and on.

    Keys after them fall off the end, and what comes in at the front is seen by nobody. Work
    grows with the keys before the last query, not with `key_length`.

    Args:
      inputs: `segment_start` is an index into `key` as it is given.
      start: at most key_length - length.
      tile: how many more keys there are than queries is a multiple of it.
    """
    length, key_length = inputs.query.shape[1], inputs.key.shape[1]
    ahead = -(-(key_length - length) // tile) * tile
    moved = ahead - start
    return dataclasses.replace(
        inputs,
        key=_move(inputs.key, moved, ahead + length),
        value=_move(inputs.value, moved, ahead + length),
        segment_start=inputs.segment_start + moved,
    )


def fill(inputs: Inputs, starts: list[Int[Array, ""]]) -> Inputs:
    """Returns queries for all keys; chunk c stands at key `starts[c]` and on."""
    batch, length = inputs.key.shape[:2]
    query, scale = inputs.query, inputs.offset_scale
    own = jnp.broadcast_to(jnp.arange(length, dtype=inputs.segment_start.dtype), (batch, length))
    return dataclasses.replace(
        inputs,
        query=_put(jnp.zeros((batch, length, *query.shape[2:]), query.dtype), query, starts),
        segment_start=_put(own, inputs.segment_start, starts),
        offset_scale=_put(jnp.ones((batch, length), scale.dtype), scale, starts),
    )


def take(
    out: Float[Array, "batch key_length heads value_dim"], length: int, starts: list[Int[Array, ""]]
) -> Float[Array, "batch length heads value_dim"]:
    """Returns the outputs of the chunks, of `length` queries in all."""
    size = length // len(starts)
    parts = [jax.lax.dynamic_slice_in_dim(out, start, size, 1) for start in starts]
    return jnp.concatenate(parts, axis=1)


def _put(
    whole: Shaped[Array, "batch key_length *rest"],
    x: Shaped[Array, "batch length *rest"],
    starts: list[Int[Array, ""]],
) -> Shaped[Array, "batch key_length *rest"]:
    """Returns `whole` with the chunks of `x` where they stand."""
    parts = jnp.split(x, len(starts), axis=1)
    for part, start in zip(parts, starts, strict=True):
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
    return whole


def _move(
    x: Shaped[Array, "batch key_length *rest"], by: Int[Array, ""], length: int
) -> Shaped[Array, "batch length *rest"]:
    """Returns x moved `by` places to the right, zeros before it, cut to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (length, max(0, length - x.shape[1]))
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, widths), length - by, length, axis=1)
