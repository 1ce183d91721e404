"""Decoding on NVIDIA GPUs: two sweeps over the cache where weights may be 0, one where not.

The pages of a row are dealt out to `splits` programs in turn, so that a page that matters has
neighbours in other programs, and a batch of one fills the chip. All query heads of a group, and
all new queries, share what is loaded.

With Elastic-Softmax, `decode_scores` reads the keys of the pages that are not negligible, keeps
the scores, and notes each page's highest; `decode_values` then knows the log-sum-exp and reads
the values of pages with a weight above 0. Softmax has no zeros: `decode_softmax` reads keys and
values at once. `decode_combine` adds up what the splits found.

A call has one launch of each kernel, whatever the number of caches: programs of one cache follow
those of the other, each compiled for its own sizes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decode import types
from pallas_kernels.decode.triton_kernels import (
    decode_combine,
    decode_scores,
    decode_softmax,
    decode_values,
)
from pallas_kernels.decode.triton_plan import make_static
from pallas_kernels.decode.types import MAX_CACHES, Call, Inputs, Settings
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block

WARPS = 4
STAGES = 3


@traced_by_own_settings(narrow=True)
def attention(call: Call) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output of a call of at most `MAX_CACHES` caches; of more, one by one."""
    if len(call.caches) > MAX_CACHES:
        return types.one_by_one(_of_one, call)
    # Those with the most pages first: what is left for the end is short.
    caches = sorted(call.caches, key=lambda cache: -cache.slots)
    return _attention(dataclasses.replace(call, caches=tuple(caches)))


def _of_one(inputs: Inputs, settings: Settings) -> Array:
    cache = types.Cache(
        tuple(range(inputs.kv_heads)),
        settings.window,
        inputs.key,
        inputs.value,
        inputs.key_norms,
        inputs.key_scales,
        inputs.value_scales,
    )
    names = ("query", "lengths", "distance_bias", "distance_slope", "offset", "layer")
    shared = {name: getattr(inputs, name) for name in names}
    return _attention(Call(**shared, caches=(cache,), settings=settings))


def _attention(call: Call) -> Float[Array, "batch new heads head_dim"]:
    static = make_static(call)
    nothing = jnp.zeros(1, jnp.float32)

    def number(x: Array | None) -> Array:
        return nothing if x is None else x.astype(jnp.float32)

    query, lengths, layer = call.query, call.lengths, call.layer.reshape(1)
    table, slope = number(call.distance_bias), number(call.distance_slope)
    offset = number(call.offset)
    heads = [head for cache in call.caches for head in cache.heads]
    sizes = {
        head: (part.splits, part.slots)
        for cache, part in zip(call.caches, static.parts, strict=True)
        for head in cache.heads
    }
    listed = jnp.asarray(heads, jnp.int32)
    head_sizes = jnp.asarray([sizes[head] for head in range(call.kv_heads)], jnp.int32)

    def cached(*names: str) -> list[Array]:
        arrays: list[Array] = []
        for n in range(MAX_CACHES):
            for name in names:
                # What there is no cache for is not read.
                x = getattr(call.caches[n], name) if n < len(call.caches) else None
                arrays.append(x if name in ("key", "value") and x is not None else number(x))
        return arrays

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    pairs = static.batch * static.kv_heads
    found = floats(pairs, static.splits, static.rows)
    parts = floats(pairs, static.splits, static.rows, static.head_dim)
    grid = (static.parts[-1].stop,)
    block = Block(static.tile_rows, static.keys, WARPS, STAGES)
    if static.has_offset:
        last = static.parts[-1]
        own = static.batch * last.heads * static.rows
        scores, highest, maximum, total = launch(
            decode_scores,
            (
                *(query, lengths, layer, table, slope, offset, listed),
                *cached("key", "key_norms", "key_scales"),
            ),
            (
                floats(last.first_score + own * last.padded_slots),
                floats(last.first_page + own * last.splits * last.turns),
                found,
                found,
            ),
            grid,
            block,
            static,
        )
        part, weight = launch(
            decode_values,
            (
                *(query, lengths, layer, offset, listed),
                *cached("value", "value_scales"),
                *(scores, highest, maximum, total),
            ),
            (parts, found),
            grid,
            dataclasses.replace(block, stages=1),
            static,
        )
    else:
        names = ("key", "value", "key_norms", "key_scales", "value_scales")
        part, maximum, total = launch(
            decode_softmax,
            (query, lengths, layer, table, slope, listed, *cached(*names)),
            (parts, found, found),
            grid,
            block,
            static,
        )
        weight = nothing
    (out,) = launch(
        decode_combine,
        (lengths, head_sizes, part, maximum, total, weight),
        (jax.ShapeDtypeStruct(query.shape, query.dtype),),
        (pairs * static.rows,),
        dataclasses.replace(block, stages=1),
        static,
    )
    return out
