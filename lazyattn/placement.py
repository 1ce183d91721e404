"""Calls whose queries are chunks of a sequence (`chunk_starts`), in terms of simpler ones.

`xla_chunked` takes a chunk at a time. The fused kernels know square calls only: their
queries are filled up to one a key. A query that fills up sees its own key and no other,
so it costs a part of one tile on the diagonal, and its output is dropped.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from lazyattn.call import Call
from pallas_kernels.types import Visibility


def chunks(
    call: Call,
) -> list[tuple[Float[Array, "batch chunk heads head_dim"], Visibility, Int[Array, ""] | None]]:
    """Returns queries, what they see and where they stand, one chunk at a time.

    A call that has no chunks is one, which stands at None.
    """
    if call.chunk_starts is None:
        return [(call.query, call.visibility(), None)]
    number = call.chunk_starts.shape[0]
    visibility = call.visibility()
    parts = [
        jnp.split(x, number, axis=1)
        for x in (call.query, visibility.first, visibility.offset_scale)
    ]
    return [
        (query, Visibility(first, scale), start)
        for query, first, scale, start in zip(*parts, call.places(), strict=True)
    ]


def fill(call: Call) -> tuple[Float[Array, "batch key_length heads head_dim"], Visibility]:
    """Returns queries for all keys, and what they see."""
    visibility = call.visibility()
    if call.chunk_starts is None:
        return call.query, visibility
    batch, length = call.key.shape[:2]
    heads, head_dim = call.query.shape[2:]
    own = jnp.broadcast_to(jnp.arange(length, dtype=visibility.first.dtype), (batch, length))
    scale = visibility.offset_scale
    query = jnp.zeros((batch, length, heads, head_dim), call.query.dtype)
    return _put(call, query, call.query), Visibility(
        first=_put(call, own, visibility.first),
        offset_scale=_put(call, jnp.ones((batch, length), scale.dtype), scale),
    )


def take(
    call: Call, out: Float[Array, "batch key_length heads value_dim"]
) -> Float[Array, "batch length heads value_dim"]:
    """Returns the outputs of the call's own queries."""
    if call.chunk_starts is None:
        return out
    size = call.query.shape[1] // call.chunk_starts.shape[0]
    parts = [jax.lax.dynamic_slice_in_dim(out, start, size, 1) for start in call.places()]
    return jnp.concatenate(parts, axis=1)


def _put(
    call: Call,
    whole: Shaped[Array, "batch key_length *rest"],
    x: Shaped[Array, "batch length *rest"],
) -> Shaped[Array, "batch key_length *rest"]:
    """Returns `whole` with the chunks of `x` where they stand."""
    assert call.chunk_starts is not None
    parts = jnp.split(x, call.chunk_starts.shape[0], axis=1)
    for part, start in zip(parts, call.places(), strict=True):
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
    return whole
