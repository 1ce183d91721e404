"""Queries that are chunks of a sequence, in terms of queries that stand at all keys.

The fused kernels know square calls only: their queries are filled up to one a key. A query
that fills up sees its own key and no other, so it costs a part of one tile on the diagonal,
and its output is dropped.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.problem import Inputs

_OF_QUERIES = ("query", "segment_start", "offset_scale")


def split(inputs: Inputs, chunks: int) -> list[Inputs]:
    """Returns the inputs of each chunk of queries; the keys are those of all."""
    parts = [jnp.split(getattr(inputs, name), chunks, axis=1) for name in _OF_QUERIES]
    return [
        dataclasses.replace(inputs, **dict(zip(_OF_QUERIES, of_chunk, strict=True)))
        for of_chunk in zip(*parts, strict=True)
    ]


def fill(inputs: Inputs, starts: list[Any]) -> Inputs:
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
    out: Float[Array, "batch key_length heads value_dim"], length: int, starts: list[Any]
) -> Float[Array, "batch length heads value_dim"]:
    """Returns the outputs of the chunks, of `length` queries in all."""
    size = length // len(starts)
    parts = [jax.lax.dynamic_slice_in_dim(out, start, size, 1) for start in starts]
    return jnp.concatenate(parts, axis=1)


def _put(
    whole: Shaped[Array, "batch key_length *rest"],
    x: Shaped[Array, "batch length *rest"],
    starts: list[Any],
) -> Shaped[Array, "batch key_length *rest"]:
    """Returns `whole` with the chunks of `x` where they stand."""
    parts = jnp.split(x, len(starts), axis=1)
    for part, start in zip(parts, starts, strict=True):
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
    return whole
