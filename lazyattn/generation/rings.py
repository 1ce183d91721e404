"""Reading and writing the slots of a cache: position p of a row lies in slot p mod slots.

A cache that is long enough holds position p in slot p; a shorter one is a ring.

int8 numbers have a scale for each head and page of slots. Tokens that come one by one need
larger scales from time to time, and a page is rounded again then. A scale grows by half at
least, so that all the roundings of a number together are at most `ROUNDINGS` times half its
last scale, however often that happens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lazyattn.decode_attention import PAGE
from lazyattn.generation.cache import GroupCache, pages

_GROWTH = 1.5
# 1 + 1/1.5 + 1/1.5^2 + ..., the last scale being up to 1.5 times as large as it must be.
ROUNDINGS = _GROWTH / (1 - 1 / _GROWTH)


def held_positions(lengths: Int[Array, " batch"], slots: int) -> Int[Array, "batch slots"]:
    """Returns the newest position below its row's length that each slot has; below 0: none."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    last = lengths[:, None] - 1
    return last - (last - slot) % slots


def place(
    keys: Float[Array, "batch length heads d"],
    values: Float[Array, "batch length heads d"],
    lengths: Int[Array, " batch"],
    slots: int,
    dtype: str,
) -> GroupCache:
    """Returns the cache of rows whose positions 0, 1 and on are given.

    Args:
      keys, values: what comes after a row's length doesn't count.
      lengths: positions of each row.
      slots: of the cache.
      dtype: of the cache.
    """
    positions = held_positions(lengths, slots)
    keys, values = (_taken(x, positions, positions >= 0) for x in (keys, values))
    return pack(keys, values, dtype)


def _taken(
    x: Float[Array, "batch length heads d"],
    index: Int[Array, "batch slots"],
    there: Bool[Array, "batch slots"],
) -> Float[Array, "batch slots heads d"]:
    """Returns x[b, index[b, s]], 0 where it isn't there."""
    index = jnp.clip(index, 0, x.shape[1] - 1)[..., None, None]
    return jnp.where(there[..., None, None], jnp.take_along_axis(x, index, axis=1), 0)


def extend(
    cache: GroupCache,
    keys: Float[Array, "batch length heads d"],
    values: Float[Array, "batch length heads d"],
    start: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> GroupCache:
    """Returns the cache with many new positions, of which the last ones are held.

    Args:
      cache: before.
      keys, values: of positions start[b], start[b] + 1 and on.
      start: positions each row has had.
      lengths: those it has with the new ones; what comes after them doesn't count.
    """
    positions = held_positions(lengths, cache.keys.shape[1])
    new = positions >= start[:, None]
    index = positions - start[:, None]
    survives = _by_page((positions >= 0) & ~new).any(axis=2)[:, None]

    def numbers(x: Array, added: Array) -> Array:
        return jnp.where(new[..., None, None], _taken(added, index, new).astype(x.dtype), x)

    if cache.key_scales is None:
        whole = numbers(cache.keys, keys)
        norms = _norms(jnp.where((positions >= 0)[..., None, None], whole, 0))
        return GroupCache(whole, numbers(cache.values, values), norms)
    assert cache.value_scales is not None

    def quantized(x: Array, scales: Array, added: Array) -> tuple[Array, Array]:
        added = _taken(added, index, new).astype(jnp.float32)
        old = jnp.where(survives, scales, 0)
        scale, ratio = _grown(old, _largest(added) / 127)
        kept = jnp.round(x.astype(jnp.float32) * _of_slots(ratio, x.shape[1]))
        x = jnp.where(new[..., None, None], _rounded(added, scale), kept.astype(jnp.int8))
        return x, scale

    whole, key_scales = quantized(cache.keys, cache.key_scales, keys)
    whole_values, value_scales = quantized(cache.values, cache.value_scales, values)
    norms = _norms(jnp.where((positions >= 0)[..., None, None], whole, 0)) * key_scales
    return GroupCache(whole, whole_values, norms, key_scales, value_scales)


def _grown(old: Array, needed: Array) -> tuple[Array, Array]:
    """Returns the scale of a page, and what its old numbers are to be multiplied by.

    Args:
      old: scale of what the page holds; 0: it holds nothing.
      needed: scale of what comes.
    """
    scale = jnp.where(needed > old, jnp.maximum(needed, _GROWTH * old), old)
    return scale, old / jnp.where(scale > 0, scale, 1)


def pack(
    keys: Float[Array, "batch slots heads d"],
    values: Float[Array, "batch slots heads d"],
    dtype: str,
) -> GroupCache:
    """Returns the cache that holds these keys and values; empty slots are 0."""
    if dtype != "int8":
        return GroupCache(keys.astype(dtype), values.astype(dtype), _norms(keys))
    key_scales, value_scales = (_largest(x) / 127 for x in (keys, values))
    keys, values = _rounded(keys, key_scales), _rounded(values, value_scales)
    return GroupCache(keys, values, _norms(keys) * key_scales, key_scales, value_scales)


def unpack(cache: GroupCache, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns keys and values of all slots."""
    if cache.key_scales is None:
        return cache.keys.astype(dtype), cache.values.astype(dtype)
    assert cache.value_scales is not None
    slots = cache.keys.shape[1]
    pairs = ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    keys, values = (x * _of_slots(scales, slots) for x, scales in pairs)
    return keys.astype(dtype), values.astype(dtype)


def append(
    cache: GroupCache,
    keys: Float[Array, "batch new heads d"],
    values: Float[Array, "batch new heads d"],
    start: Int[Array, " batch"],
    real: Bool[Array, "batch new"],
) -> GroupCache:
    """Returns the cache with a few new positions.

    Args:
      cache: before.
      keys, values: of positions start[b], start[b] + 1 and on.
      start: positions each row has had.
      real: which of them there are; nothing is written for the others.
    """
    for i in range(keys.shape[1]):
        position, there = start + i, real[:, i]
        cache = _append_one(cache, keys[:, i], values[:, i], position, there)
    return cache


def _append_one(
    cache: GroupCache,
    key: Float[Array, "batch heads d"],
    value: Float[Array, "batch heads d"],
    position: Int[Array, " batch"],
    real: Bool[Array, " batch"],
) -> GroupCache:
    batch, slots = cache.keys.shape[:2]
    rows = jnp.arange(batch)
    slot = position % slots
    page = slot // PAGE
    # A page that a row comes to for the first time holds nothing of its own yet.
    fresh = ((slot % PAGE == 0) & (position < slots))[:, None]
    # What is not written goes out of bounds.
    to_slot, to_page = jnp.where(real, slot, slots), jnp.where(real, page, pages(slots))

    def put(x: Array, new: Array) -> Array:
        return x.at[rows, to_slot].set(new.astype(x.dtype), mode="drop")

    def put_page(x: Array, new: Array) -> Array:
        return x.at[rows, :, to_page].set(new, mode="drop")

    if cache.key_scales is None:
        key = key.astype(cache.keys.dtype)
        new_norm = jnp.linalg.norm(key.astype(jnp.float32), axis=-1)
        old_norm = jnp.where(fresh, 0, cache.key_norms[rows, :, page])
        return GroupCache(
            put(cache.keys, key),
            put(cache.values, value),
            put_page(cache.key_norms, jnp.maximum(old_norm, new_norm)),
        )
    assert cache.value_scales is not None
    within = slot[:, None] // PAGE * PAGE + jnp.arange(PAGE)

    def quantized(x: Array, scales: Array, new: Array) -> tuple[Array, Array, Array]:
        new = new.astype(jnp.float32)
        old = jnp.where(fresh, 0, scales[rows, :, page])
        scale, ratio = _grown(old, jnp.abs(new).max(axis=-1) / 127)
        held = jnp.take_along_axis(
            x, jnp.clip(within, 0, slots - 1)[..., None, None], axis=1
        ).astype(jnp.float32)
        held = jnp.round(held * ratio[:, None, :, None])
        own = jnp.round(new / jnp.where(scale > 0, scale, 1)[..., None])
        held = jnp.where((within == slot[:, None])[..., None, None], own[:, None], held)
        to = jnp.where(real[:, None], within, slots)
        x = x.at[rows[:, None], to].set(held.astype(x.dtype), mode="drop")
        return x, put_page(scales, scale), held * scale[:, None, :, None]

    keys, key_scales, held = quantized(cache.keys, cache.key_scales, key)
    values, value_scales, _ = quantized(cache.values, cache.value_scales, value)
    norm = jnp.linalg.norm(held, axis=-1).max(axis=1)
    norms = put_page(cache.key_norms, norm)
    return GroupCache(keys, values, norms, key_scales, value_scales)


def in_order(
    cache: GroupCache, start: Int[Array, " batch"], dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Returns keys and values of positions start[b] - slots to start[b] - 1, in this order.

    Those of positions below 0 are anything.
    """
    slots = cache.keys.shape[1]
    index = (start[:, None] + jnp.arange(slots)) % slots
    keys, values = (
        jnp.take_along_axis(x, index[..., None, None], axis=1) for x in unpack(cache, dtype)
    )
    return keys, values


def put_rows(cache: GroupCache, rows: Int[Array, " n"], new: GroupCache) -> GroupCache:
    """Returns the cache with some rows replaced."""
    return jax.tree.map(lambda x, own: x.at[rows].set(own, mode="drop"), cache, new)


def _by_page(x: Array) -> Array:
    """[batch, slots, heads, ...] -> [batch, pages, PAGE, heads, ...], filled up with 0."""
    batch, slots = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -slots % PAGE)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(batch, -1, PAGE, *x.shape[2:])


def _norms(keys: Array) -> Float[Array, "batch heads pages"]:
    norms = jnp.linalg.norm(keys.astype(jnp.float32), axis=-1)
    return _by_page(norms).max(axis=2).swapaxes(1, 2)


def _largest(x: Array) -> Float[Array, "batch heads pages"]:
    largest = jnp.abs(x.astype(jnp.float32)).max(axis=-1)
    return _by_page(largest).max(axis=2).swapaxes(1, 2)


def _of_slots(scales: Float[Array, "batch heads pages"], slots: int) -> Array:
    """[batch, heads, pages] -> [batch, slots, heads, 1]."""
    return jnp.repeat(scales.swapaxes(1, 2), PAGE, axis=1)[:, :slots, :, None]


def _rounded(x: Array, scales: Float[Array, "batch heads pages"]) -> Array:
    scale = _of_slots(jnp.where(scales > 0, scales, 1), x.shape[1])
    return jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8)
