"""Writing new keys and values into caches, and keeping the pages' norms: in place, in one launch.

Position p goes to slot p mod slots. A page's norm is the largest of the keys that came to it;
where a row comes to a page for the first time, what was said of it before is forgotten.
A program does one row of one key/value head.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import types
from pallas_kernels.decode.triton_plan import CachePart, Caches
from pallas_kernels.decode.types import MAX_CACHES, Held
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block

PAGE = tl.constexpr(types.PAGE)


@dataclasses.dataclass(frozen=True)
class Static(Caches):
    """What the kernel is compiled for.

    Attributes:
      new, kv_heads: of the new keys.
    """

    new: int
    kv_heads: int


@triton.jit
def _put(shared, key_out, value_out, norms_ptr, static: tl.constexpr, part: tl.constexpr):
    """Does a program of `decode_append`."""
    key_ptr, value_ptr, start_ptr, count_ptr, heads_ptr = shared
    row = tl.program_id(0) // static.kv_heads
    own = tl.program_id(0) % static.kv_heads - part.first_head
    head = tl.load(heads_ptr + part.first_head + own)
    start = tl.load(start_ptr + row)
    count = tl.load(count_ptr + row)
    dim = tl.arange(0, static.padded_dim)[None, :]
    one = tl.arange(0, 1)
    norm = tl.full((1,), 0, tl.float32)
    page_before = -1
    new: tl.constexpr = static.new
    for i in tl.static_range(0, new):
        there = (dim < static.head_dim) & (dim * 0 + i < count)
        position = start + i
        slot = position % part.slots
        page = slot // PAGE
        at = ((row * static.new + i) * static.kv_heads + head) * static.head_dim + dim
        key = tl.load(key_ptr + at, mask=there, other=0.0)
        value = tl.load(value_ptr + at, mask=there, other=0.0)
        to = (row.to(tl.int64) * part.slots + slot) * (part.heads * static.head_dim)
        to += own * static.head_dim + dim
        tl.store(key_out + to, key, mask=there)
        tl.store(value_out + to, value, mask=there)
        wide = key.to(tl.float32)
        new_norm = tl.sqrt(tl.sum(wide * wide, 1))
        at_page = norms_ptr + (row * part.heads + own) * part.pages + page + one
        # What this program wrote for the page it is not sure to read.
        old_norm = tl.load(at_page, mask=one + i < count, other=0.0)
        old_norm = tl.where(page == page_before, norm, old_norm)
        fresh = (slot % PAGE == 0) & (position < part.slots)
        old_norm = tl.where(fresh, 0.0, old_norm)
        # A NaN must come through.
        norm = tl.maximum(old_norm, new_norm, propagate_nan=tl.PropagateNan.ALL)
        tl.store(at_page, norm, mask=one + i < count)
        page_before = page


@triton.jit
def _owns(place, part: tl.constexpr):
    """Returns whether a place in the list of heads is one of the cache's."""
    return (place >= part.first_head) & (place < part.first_head + part.heads)


@triton.jit
def decode_append(
    key_ptr,
    value_ptr,
    start_ptr,
    count_ptr,
    heads_ptr,
    key0_ptr,
    value0_ptr,
    norms0_ptr,
    key1_ptr,
    value1_ptr,
    norms1_ptr,
    key2_ptr,
    value2_ptr,
    norms2_ptr,
    key3_ptr,
    value3_ptr,
    norms3_ptr,
    key4_ptr,
    value4_ptr,
    norms4_ptr,
    static: tl.constexpr,
):
    """New keys and values of all caches; grid (batch * kv_heads,)."""
    shared = (key_ptr, value_ptr, start_ptr, count_ptr, heads_ptr)
    keys = (key0_ptr, key1_ptr, key2_ptr, key3_ptr, key4_ptr)
    values = (value0_ptr, value1_ptr, value2_ptr, value3_ptr, value4_ptr)
    norms = (norms0_ptr, norms1_ptr, norms2_ptr, norms3_ptr, norms4_ptr)
    number: tl.constexpr = static.number
    place = tl.program_id(0) % static.kv_heads
    for n in tl.static_range(number):
        if _owns(place, static.each[n]):
            _put(shared, keys[n], values[n], norms[n], static, static.each[n])


@traced_by_own_settings(narrow=True)
def append(
    held: Sequence[Held],
    heads: Sequence[Sequence[int]],
    keys: Float[Array, "batch new kv_heads d"],
    values: Float[Array, "batch new kv_heads d"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> list[Held]:
    """Returns the caches with new positions; see `append.append`."""
    batch, new, kv_heads, head_dim = keys.shape
    parts: list[CachePart] = []
    for cache, own in zip(held, heads, strict=True):
        first = sum(part.heads for part in parts)
        parts.append(CachePart(len(own), cache[0].shape[1], first))
    static = Static(head_dim, tuple(parts), new, kv_heads)
    listed = jnp.asarray([head for own in heads for head in own], jnp.int32)
    dtype = held[0][0].dtype
    arrays: list[Array | None] = [x.astype(dtype) for x in (keys, values)]
    arrays += [start.astype(jnp.int32), count.astype(jnp.int32), listed]
    before = len(arrays)
    for n in range(MAX_CACHES):
        arrays += held[n] if n < len(held) else (None,) * 3
    # One warp, so that a page's norm is read by all before it is written.
    block = Block(16, 16, 1, 1)
    in_place = range(before, before + 3 * len(held))
    grid = (batch * kv_heads,)
    found = launch(decode_append, arrays, (), grid, block, static, in_place=in_place)
    return [(found[3 * n], found[3 * n + 1], found[3 * n + 2]) for n in range(len(held))]
