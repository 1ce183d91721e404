"""The key/value cache of incremental decoding, of static shape: what it holds of which head."""

import dataclasses
import itertools
import os
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.decode_attention import MAX_NEW, PAGE
from lazyattn.errors import InputError, require
from lazyattn.model.config import ModelConfig
from lazyattn.model.heads import head_windows
from lazyattn.quantity import quantity

# What keys and values are held in: the model's compute dtype, or bytes with a scale a page.
CacheDtype = Literal["compute", "int8"]


# Tokens that one step may add besides the first: the oldest of them still sees its span.
SPARE = MAX_NEW - 1


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """Which keys and values are held, and how.

    Attributes:
      kind: "spans" holds of each head the keys that it can need, "full" all.
      dtype: "compute" holds them in the model's compute dtype, "int8" as bytes with a scale
        for each head and 128 keys.
      buckets: of "spans", the lengths of rings besides the whole length, shortest first;
        None: those with which least is held.
    """

    kind: Literal["spans", "full"] = "spans"
    dtype: CacheDtype = "compute"
    buckets: tuple[int, ...] | None = None

    def __post_init__(self):
        require(self.kind in ("spans", "full"), "--cache", self.kind, "spans or full")
        allowed = ("compute", "int8")
        require(self.dtype in allowed, "--cache_dtype", self.dtype, "compute or int8")
        if self.buckets is not None:
            check_buckets(self.buckets)
            require(self.kind == "spans", "--cache", self.kind, "spans with --cache_buckets")


def check_buckets(buckets: tuple[int, ...]) -> None:
    """Checks lengths of rings.

    Raises:
      InputError: if one is too short for a step, or they are not in order.
    """
    ordered = all(a < b for a, b in itertools.pairwise(buckets))
    if not ordered or any(n <= SPARE for n in buckets):
        raise InputError(
            f"The bucket lengths (--cache_buckets) are {list(buckets)}, but they must be above"
            f" {SPARE} and rising."
        )


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Key/value heads of a layer of which equally many keys are held.

    Attributes:
      heads: which ones; where devices share the heads, the numbers within each share.
      slots: keys held of each: position p lies in slot p mod slots.
      window: keys a query sees at most; None: all.
    """

    heads: tuple[int, ...]
    slots: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Which keys a cache holds, known before anything is compiled.

    Attributes:
      length: positions a row may have.
      layers: the groups of each layer's heads.
      head_dim: numbers of a key, and of a value.
      dtype: of keys and values, a name such as "bfloat16", or "int8".
      shards: devices that share the heads, each with the same groups.
      skip_mass: softmax mass that decoding may leave out besides what is not held.
    """

    length: int
    layers: tuple[tuple[HeadGroup, ...], ...]
    head_dim: int
    dtype: str
    shards: int = 1
    skip_mass: float = 0.0

    @property
    def quantized(self) -> bool:
        """Whether keys and values are bytes with scales."""
        return self.dtype == "int8"

    @property
    def row_bytes(self) -> int:
        """Bytes that the keys and values of a row take, over all devices."""
        number = jnp.dtype(self.dtype).itemsize
        total = 0
        for layer in self.layers:
            for group in layer:
                scales = 3 if self.quantized else 1
                each = 2 * group.slots * self.head_dim * number + 4 * scales * pages(group.slots)
                total += each * len(group.heads) * self.shards
        return total


def pages(slots: int) -> int:
    """Returns how many pages so many slots are."""
    return -(-slots // PAGE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupCache:
    """Keys and values of a `HeadGroup`.

    Attributes:
      keys: rotated keys, the plan's dtype.
      values: values, the same.
      key_norms: float32; no key of the page is longer.
      key_scales, value_scales: float32, what int8 numbers of a page are multiplied by;
        None: they are no int8 numbers.
    """

    keys: Array
    values: Array
    key_norms: Float[Array, "batch heads pages"]
    key_scales: Float[Array, "batch heads pages"] | None = None
    value_scales: Float[Array, "batch heads pages"] | None = None


LayerCache = tuple[GroupCache, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, one document a row.

    Row b has had tokens 0 ... lengths[b] - 1. What else lies in its slots is never seen, and is
    overwritten in turn. A row of length 0 is free.

    Attributes:
      layers: what is held of each layer, a `GroupCache` for each group of the plan.
      lengths: int32, tokens each row has had.
      plan: which keys are held.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]
    plan: CachePlan = dataclasses.field(metadata={"static": True})


def full_plan(
    config: ModelConfig, cache_length: int, *, dtype: CacheDtype = "compute"
) -> CachePlan:
    """Returns the plan of a cache that holds every key.

    Args:
      config: the model.
      cache_length: tokens each row has room for.
      dtype: what keys and values are held in.

    Raises:
      InputError: for a length below 1, or heads that the mesh can't share out.
    """
    require(cache_length >= 1, "cache_length", cache_length, "at least 1")
    shards = head_shards(config)
    groups: dict[int | None, list[int]] = {}
    for head, window in enumerate(kv_windows(config, shards)):
        groups.setdefault(window, []).append(head)
    layer = tuple(HeadGroup(tuple(heads), cache_length, w) for w, heads in groups.items())
    return CachePlan(
        cache_length,
        (layer,) * config.num_layers,
        config.head_dim,
        dtype_name(config, dtype),
        shards,
        config.attention.skip_mass,
    )


def dtype_name(config: ModelConfig, dtype: CacheDtype) -> str:
    """Returns the name of what keys and values are held in."""
    require(dtype in ("compute", "int8"), "the cache's dtype", dtype, "compute or int8")
    return config.compute_dtype if dtype == "compute" else dtype


def head_shards(config: ModelConfig) -> int:
    """Returns how many devices of the active mesh share the heads.

    Raises:
      InputError: if the heads can't be shared out evenly.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return 1
    shards = sharding.num_shards(mesh, "kv_heads")
    require(
        config.attention.kv_heads % shards == 0,
        "model.attention.num_kv_heads",
        config.attention.kv_heads,
        f"a multiple of {shards}, the devices of the mesh that share the heads",
    )
    return shards


def kv_windows(config: ModelConfig, shards: int) -> tuple[int | None, ...]:
    """Returns the window of each key/value head of a device's share.

    Raises:
      InputError: if devices' shares differ.
    """
    attention = config.attention
    by_head = head_windows(attention)[:: attention.num_heads // attention.kv_heads]
    size = len(by_head) // shards
    shares = {by_head[i * size : (i + 1) * size] for i in range(shards)}
    require(
        len(shares) == 1,
        "model.attention.global_share",
        attention.global_share,
        f"a share that gives each of the {shards} devices that share the heads equally many"
        " global key/value heads, while model.attention.window is set",
    )
    return shares.pop()


def init_cache(plan: CachePlan, batch: int) -> KVCache:
    """Returns an empty cache.

    Args:
      plan: which keys it holds (`full_plan`, `spans.plan_cache`).
      batch: rows.

    Raises:
      InputError: for a batch below 1.
    """
    require(batch >= 1, "the cache's rows", batch, "at least 1")

    def group(of: HeadGroup) -> GroupCache:
        heads = len(of.heads) * plan.shards
        shape = (batch, of.slots, heads, plan.head_dim)

        def by_page() -> Array:
            empty = jnp.zeros((batch, heads, pages(of.slots)), jnp.float32)
            return sharding.constrain(empty, "batch", "kv_heads", None)

        def by_slot() -> Array:
            empty = jnp.zeros(shape, plan.dtype)
            return sharding.constrain(empty, "batch", None, "kv_heads", "head_dim")

        scales = (by_page(), by_page()) if plan.quantized else (None, None)
        return GroupCache(by_slot(), by_slot(), by_page(), *scales)

    layers = tuple(tuple(map(group, groups)) for groups in plan.layers)
    return KVCache(layers, jnp.zeros(batch, jnp.int32), plan)


def check_memory(plan: CachePlan, batch: int, available: int | None) -> None:
    """Checks that a cache fits.

    Args:
      plan: which keys it holds.
      batch: rows.
      available: bytes there are for it (`free_memory`); None: not known.

    Raises:
      InputError: if it takes more.
    """
    needed = plan.row_bytes * batch
    if available is not None and needed > available:
        raise InputError(
            f"The key/value cache of {quantity(batch, 'row')} of {quantity(plan.length, 'token')}"
            f" takes {in_bytes(needed)}, but it must be at most {in_bytes(available)}, the memory"
            " there is for it: take fewer rows, fewer tokens, shorter bucket lengths or int8."
        )


def free_memory() -> int | None:
    """Returns the bytes there are on all devices of the mesh together; None: not known.

    On GPUs and TPUs those that are free, on a CPU all of the machine's.
    """
    mesh = jax.sharding.get_mesh()
    devices = [jax.local_devices()[0]] if mesh.empty else list(mesh.devices.flat)
    stats = [device.memory_stats() for device in devices]
    if all(stats):
        return sum(x["bytes_limit"] - x["bytes_in_use"] for x in stats if x)
    if devices[0].platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def in_bytes(number: int) -> str:
    """Returns a number of bytes for people: "1.50 GB"."""
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{number} {units[0]}" if units[0] == "bytes" else f"{size:.3g} {units[0]}"


def trained_cache_length(config: ModelConfig, sequence_length: int) -> int | None:
    """Returns the only length of cache that decodes as the model was trained; None: any.

    `lazy_length_offset` divides its offset by the number of keys a row has room for.

    Args:
      config: the model.
      sequence_length: of the rows it was trained on.
    """
    return sequence_length if config.attention.variant == "lazy_length_offset" else None


def check_context(
    context: int,
    config: ModelConfig,
    sequence_length: int,
    *,
    name: str,
    beyond_table: bool = False,
) -> None:
    """Checks that a model knows what to do with a context of this length.

    A bias table without a tail says nothing of distances past its end. There the
    bias is 0, which a model trained on shorter rows never met. Nor will it where all
    heads have a window that ends before.

    Args:
      context: tokens a prediction may look at.
      config: the model.
      sequence_length: of the rows it was trained on.
      name: what asked for the context.
      beyond_table: allow it all the same.

    Raises:
      InputError: for a context below 1 or past the end of the table.
    """
    require(context >= 1, name, context, "at least 1")
    attention = config.attention
    if beyond_table or not attention.has_bias or attention.has_tail:
        return
    longest = max(attention.bias_width, sequence_length)
    farthest = max(window or context for window in head_windows(attention))
    if min(context, farthest) > longest:
        raise InputError(
            f"{name} is {context}, but the model's bias table has"
            f" {quantity(attention.bias_width, 'distance')} and no tail, and its rows had"
            f" {quantity(sequence_length, 'token')}; it must be at most {longest},"
            " or give --beyond_table to score farther keys with a bias of 0."
        )
