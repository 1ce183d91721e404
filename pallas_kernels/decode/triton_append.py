"""Writing new keys and values into caches, and keeping the pages' norms: in place, in one launch.

Position p goes to slot p mod slots. A page's norm is the largest of the keys that came to it;
where a row comes to a page for the first time, what was said of it before is forgotten.
A program does one row of one cache.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import types
from pallas_kernels.decode.append import Held
from pallas_kernels.decode.types import MAX_CACHES
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block, padded_head_dim, power_of_two
from pallas_kernels.triton.tile import constant

PAGE = tl.constexpr(types.PAGE)


@dataclasses.dataclass(frozen=True)
class Part:
    """What the kernel is compiled for of one cache.

    Attributes:
      number: of the cache; its programs are those from number * batch on.
      heads: key/value heads of the cache.
      slots: keys of a row.
      first_head: where its heads begin in the list of heads.
    """

    number: int
    heads: int
    slots: int
    first_head: int

    @property
    def padded_heads(self) -> int:
        """Returns the heads, rounded up to a power of two."""
        return power_of_two(self.heads)

    @property
    def pages(self) -> int:
        """Returns how many pages a row of the cache has."""
        return -(-self.slots // types.PAGE)


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel is compiled for; it takes this as one constant.

    Attributes:
      batch, new, kv_heads, head_dim: of the new keys.
      parts: of each cache.
    """

    batch: int
    new: int
    kv_heads: int
    head_dim: int
    parts: tuple[Part, ...]

    @property
    def number(self) -> int:
        """Returns how many caches there are."""
        return len(self.parts)

    @property
    def padded_dim(self) -> int:
        """Returns the head size of a tile."""
        return padded_head_dim(self.head_dim)

    @property
    def part0(self) -> Part:
        """Returns the sizes of the first cache."""
        return constant(self.parts[0])

    @property
    def part1(self) -> Part:
        """Returns those of the second."""
        return constant(self.parts[1])

    @property
    def part2(self) -> Part:
        """Returns those of the third."""
        return constant(self.parts[2])

    @property
    def part3(self) -> Part:
        """Returns those of the fourth."""
        return constant(self.parts[3])

    @property
    def part4(self) -> Part:
        """Returns those of the fifth."""
        return constant(self.parts[4])


@triton.jit
def _put(shared, key_out, value_out, norms_ptr, static: tl.constexpr, part: tl.constexpr):
    """Does a program of `decode_append`."""
    new: tl.constexpr = static.new
    key_ptr, value_ptr, start_ptr, count_ptr, heads_ptr = shared
    row = tl.program_id(0) % static.batch
    own = tl.arange(0, part.padded_heads)
    dim = tl.arange(0, static.padded_dim)
    inside = own < part.heads
    head = tl.load(heads_ptr + part.first_head + own, mask=inside, other=0)
    start = tl.load(start_ptr + row)
    count = tl.load(count_ptr + row)
    norm = tl.full((part.padded_heads,), 0, tl.float32)
    page_before = -1
    for i in tl.static_range(0, new):
        there = inside & (own * 0 + i < count)
        mask = there[:, None] & (dim < static.head_dim)[None, :]
        position = start + i
        slot = position % part.slots
        page = slot // PAGE
        at = ((row * static.new + i) * static.kv_heads + head) * static.head_dim
        key = tl.load(key_ptr + at[:, None] + dim[None, :], mask=mask, other=0.0)
        value = tl.load(value_ptr + at[:, None] + dim[None, :], mask=mask, other=0.0)
        to = (row.to(tl.int64) * part.slots + slot) * (part.heads * static.head_dim)
        within = (own * static.head_dim)[:, None] + dim[None, :]
        tl.store(key_out + to + within, key, mask=mask)
        tl.store(value_out + to + within, value, mask=mask)
        wide = key.to(tl.float32)
        new_norm = tl.sqrt(tl.sum(wide * wide, 1))
        at_page = (row * part.heads + own) * part.pages + page
        # What this program wrote for the page it is not sure to read.
        old_norm = tl.load(norms_ptr + at_page, mask=there, other=0.0)
        old_norm = tl.where(page == page_before, norm, old_norm)
        fresh = (slot % PAGE == 0) & (position < part.slots)
        old_norm = tl.where(fresh, 0.0, old_norm)
        # A NaN must come through.
        norm = tl.maximum(old_norm, new_norm, propagate_nan=tl.PropagateNan.ALL)
        tl.store(norms_ptr + at_page, norm, mask=there)
        page_before = page


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
    """New keys and values of all caches; grid (caches * batch,)."""
    shared = (key_ptr, value_ptr, start_ptr, count_ptr, heads_ptr)
    cache = tl.program_id(0) // static.batch
    if cache == 0:
        _put(shared, key0_ptr, value0_ptr, norms0_ptr, static, static.part0)
    if static.number > 1:  # noqa: SIM102
        if cache == 1:
            _put(shared, key1_ptr, value1_ptr, norms1_ptr, static, static.part1)
    if static.number > 2:  # noqa: SIM102
        if cache == 2:
            _put(shared, key2_ptr, value2_ptr, norms2_ptr, static, static.part2)
    if static.number > 3:  # noqa: SIM102
        if cache == 3:
            _put(shared, key3_ptr, value3_ptr, norms3_ptr, static, static.part3)
    if static.number > 4:  # noqa: SIM102
        if cache == 4:
            _put(shared, key4_ptr, value4_ptr, norms4_ptr, static, static.part4)


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
    parts: list[Part] = []
    for n, (cache, own) in enumerate(zip(held, heads, strict=True)):
        first = sum(part.heads for part in parts)
        parts.append(Part(n, len(own), cache[0].shape[1], first))
    static = Static(batch, new, kv_heads, head_dim, tuple(parts))
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
    grid = (batch * len(held),)
    found = launch(decode_append, arrays, (), grid, block, static, in_place=in_place)
    return [(found[3 * n], found[3 * n + 1], found[3 * n + 2]) for n in range(len(held))]
