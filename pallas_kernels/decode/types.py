"""What a cache holds, and what a call of the op brings: the words all decode backends share.

A cache has `slots` places a row. Slot s holds the newest position p below the row's length
with p mod slots = s. So a cache that is long enough holds position s in slot s, and a shorter
one is a ring that holds the last `slots` positions. One formula serves both: the key in slot s
lies `back = (length - 1 - s) mod slots` positions before the newest one, and the slot is held
if `back < length`.

Slots come in pages of `PAGE`. Key norms and the scales of int8 numbers are one a page.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Slots of a page.
PAGE = 128

# Caches of one call, as many as the kernels have arguments for.
MAX_CACHES = 5

# Keys, values and key norms of a group of heads, as in `Inputs`, without layers.
Held = tuple[Array, Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a call whose heads hold equally many keys; see `lazyattn.decode_attention`.

    Attributes:
      query: [batch, new, heads, head_dim].
      key, value: [layers, batch, slots, kv_heads, head_dim], in the query's dtype or int8.
      lengths: int32 [batch], keys each row has had, the new ones included.
      distance_bias, distance_slope, offset: of each head, float32 or wider; None: none.
      key_norms: float32 [layers, batch, kv_heads, pages], no key of the page is longer;
        None: no page is skipped.
      key_scales, value_scales: float32, the same shape: what int8 numbers are multiplied by;
        None: they are no int8 numbers.
      layer: int32, which of the layers.
    """

    query: Float[Array, "batch new heads head_dim"]
    key: Array
    value: Array
    lengths: Int[Array, " batch"]
    distance_bias: Float[Array, "heads width"] | None
    distance_slope: Float[Array, " heads"] | None
    offset: Float[Array, " heads"] | None
    key_norms: Float[Array, "layers batch kv_heads pages"] | None
    key_scales: Float[Array, "layers batch kv_heads pages"] | None
    value_scales: Float[Array, "layers batch kv_heads pages"] | None
    layer: Int[Array, ""]

    @property
    def new(self) -> int:
        """Returns how many queries a row has."""
        return self.query.shape[1]

    @property
    def slots(self) -> int:
        """Returns how many keys a row has room for."""
        return self.key.shape[2]

    @property
    def kv_heads(self) -> int:
        """Returns how many heads the cache has."""
        return self.key.shape[3]

    @property
    def group(self) -> int:
        """Returns how many query heads read one head of the cache."""
        return self.query.shape[2] // self.kv_heads

    @property
    def pages(self) -> int:
        """Returns how many pages a row has, the last of them perhaps cut short."""
        return -(-self.slots // PAGE)

    def of_layer(self, x: Array) -> Array:
        """Returns the part of an array of all layers."""
        return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, self.layer, 0, False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is known when a call is traced.

    Attributes:
      scale: factor of the scores.
      skip_mass: softmax mass a row may lose to pages that are not read.
      window: keys each query sees at most; None: all.
      offset_scale: what tau is multiplied by; None: 1 / n.
      renormalize: divide each row of weights by its sum, where that isn't 0.
      ring: rows longer than the cache are meant; if not, their outputs are NaN.
    """

    scale: float
    skip_mass: float
    window: int | None
    offset_scale: float | None
    renormalize: bool
    ring: bool


@dataclasses.dataclass(frozen=True)
class Cache:
    """What is held of some key/value heads; the arrays are those of `Inputs`.

    Attributes:
      heads: which ones.
      window: keys that their queries see at most; None: all.
    """

    heads: tuple[int, ...]
    window: int | None
    key: Array
    value: Array
    key_norms: Array | None
    key_scales: Array | None
    value_scales: Array | None

    @property
    def slots(self) -> int:
        """Returns how many keys a row has room for."""
        return self.key.shape[2]


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked call: the arrays of all heads, and the cache of each group of them.

    Attributes:
      query, lengths, distance_bias, distance_slope, offset, layer: as in `Inputs`.
      caches: that together hold each key/value head once.
      settings: but for the window.
    """

    query: Float[Array, "batch new heads head_dim"]
    lengths: Int[Array, " batch"]
    distance_bias: Float[Array, "heads width"] | None
    distance_slope: Float[Array, " heads"] | None
    offset: Float[Array, " heads"] | None
    layer: Int[Array, ""]
    caches: tuple[Cache, ...]
    settings: Settings

    @property
    def kv_heads(self) -> int:
        """Returns how many heads the caches have together."""
        return sum(len(cache.heads) for cache in self.caches)

    @property
    def group(self) -> int:
        """Returns how many query heads read one of them."""
        return self.query.shape[2] // self.kv_heads

    def readers(self, cache: Cache) -> list[int]:
        """Returns the query heads that read a cache."""
        return [head * self.group + i for head in cache.heads for i in range(self.group)]

    def of(self, cache: Cache) -> tuple[Inputs, Settings]:
        """Returns the call of the heads of one cache."""
        readers = self.readers(cache)

        def own(x: Array | None, axis: int) -> Array | None:
            return x if x is None else taken(x, readers, axis)

        inputs = Inputs(
            taken(self.query, readers, 2),
            cache.key,
            cache.value,
            self.lengths,
            own(self.distance_bias, 0),
            own(self.distance_slope, 0),
            own(self.offset, 0),
            cache.key_norms,
            cache.key_scales,
            cache.value_scales,
            self.layer,
        )
        return inputs, dataclasses.replace(self.settings, window=cache.window)


def one_by_one(
    attention: Callable[[Inputs, Settings], Array], call: Call
) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output of a call, one cache after the other."""
    outs = [attention(*call.of(cache)) for cache in call.caches]
    if len(outs) == 1:
        return outs[0]
    order = [head for cache in call.caches for head in call.readers(cache)]
    return taken(jnp.concatenate(outs, axis=2), sorted(range(len(order)), key=order.__getitem__), 2)


def taken(x: Array, index: list[int], axis: int) -> Array:
    """Returns entries of an axis; neighbors as a slice, and all as they are."""
    first, size = index[0], len(index)
    if index != list(range(first, first + size)):
        return jnp.take(x, jnp.asarray(index), axis=axis)
    return x if size == x.shape[axis] else jax.lax.slice_in_dim(x, first, first + size, axis=axis)


def backs(inputs: Inputs) -> Int[Array, "batch slots"]:
    """Returns how far before its row's newest position the key of each slot lies."""
    slot = jnp.arange(inputs.slots, dtype=jnp.int32)
    return (inputs.lengths[:, None] - 1 - slot) % inputs.slots


def distances(inputs: Inputs) -> Int[Array, "batch new slots"]:
    """Returns the distance of each query from the key of each slot; below 0: it is later."""
    before_newest = inputs.new - 1 - jnp.arange(inputs.new, dtype=jnp.int32)
    return backs(inputs)[:, None] - before_newest[:, None]


def visible(inputs: Inputs, settings: Settings) -> Array:
    """Returns which slots each query sees, bool [batch, new, slots]."""
    distance = distances(inputs)
    seen = (distance >= 0) & (backs(inputs) < inputs.lengths[:, None])[:, None]
    return seen if settings.window is None else seen & (distance < settings.window)


def positions(inputs: Inputs) -> Int[Array, "batch new"]:
    """Returns the position of each query; below 0: there is no such query."""
    return inputs.lengths[:, None] - inputs.new + jnp.arange(inputs.new, dtype=jnp.int32)


def offset_scales(inputs: Inputs, settings: Settings) -> Float[Array, "batch new"]:
    """Returns what tau is multiplied by: 1 / n, or the constant."""
    position = positions(inputs)
    dtype = jnp.promote_types(inputs.query.dtype, jnp.float32)
    if settings.offset_scale is not None:
        return jnp.full(position.shape, settings.offset_scale, dtype)
    seen = jnp.maximum(position + 1, 1)
    if settings.window is not None:
        seen = jnp.minimum(seen, settings.window)
    return 1 / seen.astype(dtype)


def finished(
    out: Float[Array, "batch new heads head_dim"], inputs: Inputs, settings: Settings
) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output with 0 for queries that do not exist, and NaN for rows too long."""
    if not settings.ring:
        fits = (inputs.lengths <= inputs.slots)[:, None, None, None]
        out = jnp.where(fits, out, jnp.nan)
    return jnp.where((positions(inputs) >= 0)[:, :, None, None], out, 0)
