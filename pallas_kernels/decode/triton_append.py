"""Writing new keys and values into caches, and keeping the pages' norms: in place, in one launch.

Position p goes to slot p mod slots. A page's norm is the largest of the keys that came to it;
where a row comes to a page for the first time, what was said of it before is forgotten.
A program does one row of one key/value head. `enter` norms and turns what it writes, and the
queries beside it, so that a step needs no kernels for that.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import types
from pallas_kernels.decode.triton_plan import CachePart, Caches
from pallas_kernels.decode.types import MAX_CACHES, Held
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block, power_of_two

PAGE = tl.constexpr(types.PAGE)


@dataclasses.dataclass(frozen=True)
class Static(Caches):
    """What the kernel is compiled for.

    Attributes:
      batch, new, kv_heads: of the new keys.
      stride: heads of a token in the arrays that the new keys, values and queries come in.
      first_key, first_value: where keys and values begin among them.
      group: query heads a key head; 0: there are no queries, and keys come as they are held.
      normed: queries and keys are normed.
      epsilon: of the norm.
    """

    batch: int
    new: int
    kv_heads: int
    stride: int
    first_key: int = 0
    first_value: int = 0
    group: int = 0
    normed: bool = False
    epsilon: float = 0.0

    @property
    def half(self) -> int:
        """Returns half a head's size."""
        return -(-self.head_dim // 2)

    @property
    def half_padded(self) -> int:
        """Returns the power of two that holds it."""
        return power_of_two(self.half)

    @property
    def group_padded(self) -> int:
        """Returns the power of two that holds a group."""
        return power_of_two(max(1, self.group))


@triton.jit
def _load(ptr, at, there, static: tl.constexpr):
    """Returns both halves of heads [heads, half] that begin at `at`; 0 where they are not."""
    columns = tl.arange(0, static.half_padded)[None, :]
    first = there & (columns < static.half)
    second = there & (columns < static.head_dim - static.half)
    at = ptr + at + columns
    return tl.load(at, mask=first, other=0.0), tl.load(at + static.half, mask=second, other=0.0)


@triton.jit
def _store(ptr, at, heads, there, static: tl.constexpr):
    """Stores what `_load` loads."""
    columns = tl.arange(0, static.half_padded)[None, :]
    at = ptr + at + columns
    tl.store(at, heads[0], mask=there & (columns < static.half))
    second = there & (columns < static.head_dim - static.half)
    tl.store(at + static.half, heads[1], mask=second)


@triton.jit
def _turned(heads, scale_ptr, cos, sin, static: tl.constexpr):
    """Returns heads normed, scaled and turned, in their dtype."""
    kind = heads[0].dtype
    first, second = heads[0].to(tl.float32), heads[1].to(tl.float32)
    if static.normed:
        squares = tl.sum(first * first + second * second, 1) / static.head_dim
        factor = tl.rsqrt(squares + static.epsilon)[:, None]
        every = tl.arange(0, static.half_padded)[None, :] >= 0
        scale1, scale2 = _load(scale_ptr, 0, every, static)
        first *= factor * scale1
        second *= factor * scale2
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@triton.jit
def _put(shared, beside, key_out, value_out, norms_ptr, static: tl.constexpr, part: tl.constexpr):
    """Does a program of `decode_append`."""
    key_ptr, value_ptr, start_ptr, count_ptr, heads_ptr = shared
    query_scale_ptr, key_scale_ptr, cos_ptr, sin_ptr, query_out = beside
    row = tl.program_id(0) // static.kv_heads
    own = tl.program_id(0) % static.kv_heads - part.first_head
    head = tl.load(heads_ptr + part.first_head + own)
    start = tl.load(start_ptr + row)
    count = tl.load(count_ptr + row)
    columns = tl.arange(0, static.half_padded)[None, :]
    member = tl.arange(0, static.group_padded)[:, None]
    one = tl.arange(0, 1)
    norm = tl.full((1,), 0, tl.float32)
    page_before = -1
    new: tl.constexpr = static.new
    for i in tl.static_range(0, new):
        there = columns * 0 + i < count
        position = start + i
        slot = position % part.slots
        page = slot // PAGE
        token = row * static.new + i
        at = token * static.stride + head
        key = _load(key_ptr, (at + static.first_key) * static.head_dim, there, static)
        value = _load(value_ptr, (at + static.first_value) * static.head_dim, there, static)
        if static.group > 0:
            at_angle = token * static.half + columns
            cos = tl.load(cos_ptr + at_angle, mask=columns < static.half, other=0.0)
            sin = tl.load(sin_ptr + at_angle, mask=columns < static.half, other=0.0)
            key = _turned(key, key_scale_ptr, cos, sin, static)
            readers = head * static.group + member
            inside = member < static.group
            at_query = (token * static.stride + readers) * static.head_dim
            query = _load(key_ptr, at_query, inside, static)
            query = _turned(query, query_scale_ptr, cos, sin, static)
            at_query = (token * (static.kv_heads * static.group) + readers) * static.head_dim
            _store(query_out, at_query, query, inside, static)
        to = (row.to(tl.int64) * part.slots + slot) * (part.heads * static.head_dim)
        to += own * static.head_dim
        _store(key_out, to, key, there, static)
        _store(value_out, to, value, there, static)
        first, second = key[0].to(tl.float32), key[1].to(tl.float32)
        new_norm = tl.sqrt(tl.sum(first * first + second * second, 1))
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
    query_scale_ptr,
    key_scale_ptr,
    cos_ptr,
    sin_ptr,
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
    query_out,
    static: tl.constexpr,
):
    """New keys and values of all caches; grid (batch * kv_heads,)."""
    shared = (key_ptr, value_ptr, start_ptr, count_ptr, heads_ptr)
    beside = (query_scale_ptr, key_scale_ptr, cos_ptr, sin_ptr, query_out)
    keys = (key0_ptr, key1_ptr, key2_ptr, key3_ptr, key4_ptr)
    values = (value0_ptr, value1_ptr, value2_ptr, value3_ptr, value4_ptr)
    norms = (norms0_ptr, norms1_ptr, norms2_ptr, norms3_ptr, norms4_ptr)
    number: tl.constexpr = static.number
    place = tl.program_id(0) % static.kv_heads
    for n in tl.static_range(number):
        if _owns(place, static.each[n]):
            _put(shared, beside, keys[n], values[n], norms[n], static, static.each[n])


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
    kv_heads = keys.shape[2]
    dtype = held[0][0].dtype
    new = [x.astype(dtype) for x in (keys, values)]
    _, found = _launch(held, heads, new, start, count, (None,) * 4, None, stride=kv_heads)
    return found


@traced_by_own_settings(narrow=True)
def enter(
    held: Sequence[Held],
    heads: Sequence[Sequence[int]],
    projected: Float[Array, "batch new all_heads d"],
    scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None,
    angles: tuple[Float[Array, "batch new half"], Float[Array, "batch new half"]],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    epsilon: float,
) -> tuple[Float[Array, "batch new heads d"], list[Held]]:
    """Returns queries and the caches; see `append.enter`."""
    batch, new, every, head_dim = projected.shape
    kv_heads = sum(map(len, heads))
    number = every - 2 * kv_heads
    how: dict[str, Any] = {
        "stride": every,
        "first_key": number,
        "first_value": number + kv_heads,
        "group": number // kv_heads,
        "normed": scales is not None,
        "epsilon": epsilon,
    }
    beside = (*(scales or (None, None)), *angles)
    out = jax.ShapeDtypeStruct((batch, new, number, head_dim), projected.dtype)
    return _launch(held, heads, [projected] * 2, start, count, beside, out, **how)


def _launch(
    held: Sequence[Held],
    heads: Sequence[Sequence[int]],
    given: Sequence[Array],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    beside: Sequence[Array | None],
    out: jax.ShapeDtypeStruct | None,
    **how: Any,
) -> tuple[Any, list[Held]]:
    batch, new, _, head_dim = given[0].shape
    parts: list[CachePart] = []
    for cache, own in zip(held, heads, strict=True):
        first = sum(part.heads for part in parts)
        parts.append(CachePart(len(own), cache[0].shape[1], first))
    kv_heads = sum(map(len, heads))
    static = Static(head_dim, tuple(parts), batch, new, kv_heads, **how)
    listed = jnp.asarray([head for own in heads for head in own], jnp.int32)
    arrays: list[Array | None] = [*given, start.astype(jnp.int32), count.astype(jnp.int32), listed]
    arrays += [x if x is None else x.astype(jnp.float32) for x in beside]
    before = len(arrays)
    for n in range(MAX_CACHES):
        arrays += held[n] if n < len(held) else (None,) * 3
    # One warp, so that a page's norm is read by all before it is written.
    block = Block(16, 16, 1, 1)
    in_place = range(before, before + 3 * len(held))
    grid = (batch * kv_heads,)
    query, *found = launch(decode_append, arrays, (out,), grid, block, static, in_place=in_place)
    return query, [(found[3 * n], found[3 * n + 1], found[3 * n + 2]) for n in range(len(held))]
