"""One layer's attention of new tokens to a cache, which they are added to.

Three cases, of which what is compiled has one:

- START: rows begin here. It is ordinary causal attention within the tokens; then each group of
  heads keeps the last ones.
- EXTEND: any number of tokens after those of the cache. A group's keys are brought into the
  order of their positions, the new ones last, so that queries stand at the same place in
  each row: an ordinary call again, with a row's missing keys as another document.
- STEP: up to eight tokens a row, written into the cache first: `decode_attention`.
"""

import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.attention import lazy_attention
from lazyattn.decode_attention import decode_attention
from lazyattn.generation import rings
from lazyattn.generation.cache import CachePlan, GroupCache, HeadGroup, LayerCache, pages
from lazyattn.model.attention_layer import variant_arguments
from lazyattn.model.config import AttentionConfig
from pallas_kernels.decode import append as decode_append

# Arrays with an axis of query heads, and which axis it is.
_BY_HEAD = {"query": 2, "distance_bias": 0, "distance_slope": 0, "offset": 0}


class Step(enum.Enum):
    """What is known of new tokens when a pass is compiled."""

    START = "rows begin with them"
    EXTEND = "any number after those of the cache"
    STEP = "a few after those of the cache"


def cached_attention(
    query: Float[Array, "batch length heads d"],
    key: Float[Array, "batch length kv_heads d"],
    value: Float[Array, "batch length kv_heads d"],
    own: dict[str, Array],
    cache: LayerCache,
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    *,
    config: AttentionConfig,
    plan: CachePlan,
    groups: tuple[HeadGroup, ...],
    step: Step,
) -> tuple[Float[Array, "batch length heads d"], LayerCache]:
    """Returns the attention's output and the cache with the new keys and values.

    Args:
      query, key, value: of the new tokens, rotated; those after `count` don't count.
      own: the layer's learned arguments of the op.
      cache: what the layer held before; () where rows begin.
      start: positions each row has had.
      count: new tokens of each row.
      config: the layer.
      plan: which keys are held, `groups` in this layer.
      step: which case it is.
    """
    work = Work(config, plan, groups, step)
    given = {"query": query, "key": key, "value": value, "start": start, "count": count} | own
    mesh = sharding.active_mesh()
    if mesh is None:
        return work(given, cache)
    axes: dict[str, tuple[str | None, ...]] = {
        "query": ("batch", None, "heads", None),
        "key": ("batch", None, "kv_heads", None),
        "value": ("batch", None, "kv_heads", None),
        "start": ("batch",),
        "count": ("batch",),
        "distance_bias": ("heads", None),
        "distance_slope": ("heads",),
        "offset": ("heads",),
    }
    specs = {k: sharding.fitting_spec(mesh, x.shape, *axes[k]) for k, x in given.items()}
    batch = query.shape[0]

    def place(group: HeadGroup) -> GroupCache:
        heads = len(group.heads) * plan.shards
        slots = (batch, group.slots, heads, plan.head_dim)
        by_slot = sharding.fitting_spec(mesh, slots, "batch", None, "kv_heads", None)
        number = (batch, heads, pages(group.slots))
        by_page = sharding.fitting_spec(mesh, number, "batch", "kv_heads", None)
        scales = (by_page, by_page) if plan.quantized else (None, None)
        return GroupCache(by_slot, by_slot, by_page, *scales)  # type: ignore[arg-type]

    held = tuple(map(place, groups))
    return jax.shard_map(
        work,
        in_specs=(specs, held if cache else ()),
        out_specs=(specs["query"], held),
        # Kernels don't say over which devices their results differ.
        check_vma=False,
    )(given, cache)


class Work:
    """The work of one device: its rows and heads."""

    def __init__(
        self,
        config: AttentionConfig,
        plan: CachePlan,
        groups: tuple[HeadGroup, ...],
        step: Step,
    ):
        self.config, self.plan, self.groups, self.step = config, plan, groups, step
        self.variant = variant_arguments(config, plan.length)
        self.how = {
            Step.START: self._start,
            Step.EXTEND: self._extend,
            Step.STEP: self._step,
        }[step]

    def __call__(
        self, given: dict[str, Array], cache: LayerCache
    ) -> tuple[Float[Array, "batch length heads d"], LayerCache]:
        """Returns what `cached_attention` does on one device."""
        return self.how(given, cache)

    def _start(self, given: dict[str, Array], cache: LayerCache) -> tuple[Array, LayerCache]:
        # Heads that see equally far are one call, whatever their groups hold.
        windows: dict[int | None, list[int]] = {}
        for group in self.groups:
            windows.setdefault(group.window, []).extend(group.heads)
        outs = [
            self._attend(_heads(given, heads), window=window) for window, heads in windows.items()
        ]
        held = []
        for group in self.groups:
            mine = _heads(given, group.heads)
            held.append(
                rings.place(
                    mine["key"], mine["value"], given["count"], group.slots, self.plan.dtype
                )
            )
        return _joined(outs, list(windows.values())), tuple(held)

    def _extend(self, given: dict[str, Array], cache: LayerCache) -> tuple[Array, LayerCache]:
        start, length = given["start"], given["query"].shape[1]
        outs, held = [], []
        for group, of in zip(self.groups, cache, strict=True):
            mine = _heads(given, group.heads)
            new = mine["key"], mine["value"]
            old = rings.in_order(of, start, mine["query"].dtype)
            mine["key"], mine["value"] = (
                jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)
            )
            # Keys of positions that never were are a document of their own.
            position = start[:, None] - group.slots + jnp.arange(group.slots + length)
            how: dict[str, Any] = {}
            if self.variant["offset_divisor"] == "visible":
                seen = position[:, group.slots :] + 1
                how["offset_divisor"] = (
                    seen if group.window is None else (jnp.minimum(seen, group.window))
                )
            out = self._attend(
                mine,
                window=group.window,
                segment_ids=(position >= 0).astype(jnp.int32),
                chunk_starts=np.asarray([group.slots]),
                **how,
            )
            outs.append(out)
            held.append(rings.extend(of, *new, start, start + given["count"]))
        return _joined(outs, [group.heads for group in self.groups]), tuple(held)

    def _attend(self, mine: dict[str, Array], **how: Any) -> Array:
        learned: dict[str, Any] = {k: mine[k] for k in _BY_HEAD if k in mine and k != "query"}
        return lazy_attention(
            mine["query"],
            mine["key"],
            mine["value"],
            skip_mass=self.config.skip_mass,
            **learned,
            **(self.variant | how),
        )

    def _step(self, given: dict[str, Array], cache: LayerCache) -> tuple[Array, LayerCache]:
        start, count = given["start"], given["count"]
        length = given["query"].shape[1]
        # A row without new tokens has nothing to read either.
        lengths = jnp.where(count > 0, start + length, 0)
        held = self._appended(given, cache)
        learned = {k: given[k] for k in _BY_HEAD if k in given and k != "query"}
        return self.attention(given["query"], held, lengths, learned), tuple(held)

    def attention(
        self,
        query: Float[Array, "batch new heads d"],
        held: Sequence[GroupCache],
        lengths: Int[Array, " batch"],
        learned: dict[str, Array],
    ) -> Float[Array, "batch new heads d"]:
        """Returns the attention of a step's queries to caches that have the new keys."""
        cached: dict[str, Any] = {
            "key_cache": [of.keys for of in held],
            "value_cache": [of.values for of in held],
            "key_norms": [of.key_norms for of in held],
        }
        if self.plan.quantized:
            cached["key_scales"] = [of.key_scales for of in held]
            cached["value_scales"] = [of.value_scales for of in held]
        how: dict[str, Any] = learned | self.variant
        return decode_attention(
            query,
            lengths=lengths,
            head_groups=[group.heads for group in self.groups],
            window=[group.window for group in self.groups],
            ring=any(group.slots < self.plan.length for group in self.groups),
            skip_mass=self.plan.skip_mass,
            **cached,
            **how,
        )

    def _appended(self, given: dict[str, Array], cache: LayerCache) -> list[GroupCache]:
        """Returns the cache with the new keys and values of a step."""
        start, count = given["start"], given["count"]
        new = given["key"].shape[1]
        if not self.plan.quantized:
            found = decode_append.append(
                [(of.keys, of.values, of.key_norms) for of in cache],
                [group.heads for group in self.groups],
                given["key"],
                given["value"],
                start,
                count,
            )
            if found is not None:
                return [GroupCache(*of) for of in found]
        real = jnp.arange(new) < count[:, None]
        held = []
        for group, of in zip(self.groups, cache, strict=True):
            key, value = (_taken(given[x], list(group.heads), 2) for x in ("key", "value"))
            held.append(rings.append(of, key, value, start, real))
        return held


def _heads(given: dict[str, Array], heads: Sequence[int]) -> dict[str, Array]:
    """Returns the arrays with some key/value heads, and the query heads that read them."""
    kv_heads = given["key"].shape[2]
    group = given["query"].shape[2] // kv_heads
    if list(heads) == list(range(kv_heads)):
        return dict(given)
    readers = [head * group + i for head in heads for i in range(group)]
    found = dict(given)
    for name, axis in _BY_HEAD.items():
        if name in given:
            found[name] = _taken(given[name], readers, axis)
    for name in ("key", "value"):
        found[name] = _taken(given[name], list(heads), 2)
    return found


def _joined(outs: list[Array], heads: list[Any]) -> Array:
    """Returns the outputs of all heads in their order.

    Args:
      outs: of the query heads that read some key/value heads.
      heads: which ones, for each of `outs`.
    """
    if len(outs) == 1 and list(heads[0]) == sorted(heads[0]):
        return outs[0]
    group = outs[0].shape[2] // len(heads[0])
    order = [head for part in heads for head in part]
    back = sorted(range(len(order)), key=order.__getitem__)
    readers = [place * group + i for place in back for i in range(group)]
    return _taken(jnp.concatenate(outs, axis=2), readers, 2)


def _taken(x: Array, index: list[int], axis: int) -> Array:
    """Returns entries of an axis; neighbors as a slice."""
    first, size = index[0], len(index)
    if index == list(range(first, first + size)):
        return jax.lax.slice_in_dim(x, first, first + size, axis=axis)
    return jnp.take(x, jnp.asarray(index), axis=axis)
