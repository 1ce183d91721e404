"""One call of the op on a mesh: each device's rows, heads and part of the length."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyattn import identity, sharding
from lazyattn.attention import lazy_attention
from lazyattn.errors import require
from lazyattn.model import fetch
from lazyattn.model.heads import HeadBlocks

# Logical axes of the op's arguments and results; "length" only where parts of rows
# were dealt out.
_AXES: dict[str, tuple[str | None, ...]] = {
    "query": ("batch", "length", "heads", "head_dim"),
    "key": ("batch", "length", "kv_heads", "head_dim"),
    "value": ("batch", "length", "kv_heads", "head_dim"),
    "segment_ids": ("batch", "length"),
    "query_start": ("batch",),
    "distance_bias": ("heads", "distance"),
    "distance_slope": ("heads",),
    "offset": ("heads",),
    "choices": (None,),
    "weights": ("batch", "heads", None, None),
}

# Moving and reshaping whole rows of keys and values: done again in the backward pass, so
# that between the passes a device holds its own part of them only.
_MOVES = frozenset(
    {
        "all_gather",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "pad",
        "ppermute",
        "pvary",
        "reshape",
        "rev",
        "select_n",
        "slice",
        "split",
        "squeeze",
        "transpose",
    }
)


def sharded_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch key_length kv_heads head_dim"],
    value: Float[Array, "batch key_length kv_heads value_dim"],
    arrays: dict[str, Array | None],
    *,
    sequence_shards: int,
    return_weights: bool,
    window: int | None = None,
    blocks: HeadBlocks | None = None,
    bound: fetch.Bound | None = None,
    **settings: Any,
) -> Any:
    """Calls `lazy_attention`, on each device's share where there are several.

    Rows and heads never meet in attention, so devices that differ in these don't talk to
    one another here. A batch that does not divide evenly is worked on by every device.
    Where the length is shared, a device takes its own queries and fetches the keys and
    values that they can see: those of a window, those that are near enough to matter, or
    all. The gradients of parameters that devices share are summed, those of keys and values
    too, each device keeping its part.

    Args:
      query, key, value: as in `lazy_attention`, over all devices.
      arrays: its other array arguments.
      sequence_shards: devices that share a row, in the order of
        `sharding.deal_sequence`; 1: none do.
      return_weights: as there; not with shared rows.
      window: as there, for local heads.
      blocks: where global heads lie, which have no window; None: there are none.
      bound: of the scores, where heads without a window may fetch less than all and
        `skip_mass` is above 0; None: they may not.
      **settings: its other arguments.

    Raises:
      InputError: if the mesh does not divide the heads, or not the global ones evenly while
        there is a window.
    """
    given = {"query": query, "key": key, "value": value}
    given |= {name: array for name, array in arrays.items() if array is not None}
    settings |= {"return_weights": return_weights}
    mesh = sharding.active_mesh()
    if window is None or blocks is None or not 0 < blocks.local < blocks.groups:
        blocks = None

    def own_blocks(shards: int) -> HeadBlocks | None:
        if blocks is None:
            return None
        require(
            blocks.number % shards == 0,
            "model.attention.global_share",
            (blocks.groups - blocks.local) / blocks.groups,
            f"a share that gives each of the {shards} devices that share the heads equally many"
            " global key/value heads, while model.attention.window is set",
        )
        return dataclasses.replace(blocks, number=blocks.number // shards)

    def on_device(blocks: HeadBlocks | None) -> Any:
        if blocks is None:
            return functools.partial(_call, settings | {"window": window})
        return functools.partial(_local_and_global, settings, window, blocks)

    if mesh is None:
        return on_device(own_blocks(1))(given)
    for axis, heads in (("heads", query.shape[2]), ("kv_heads", key.shape[2])):
        shards = sharding.num_shards(mesh, axis)
        require(
            heads % shards == 0,
            f"model.attention.num_{axis}",
            heads,
            f"a multiple of {shards}, the devices of the mesh that share the heads",
        )
    shared = sequence_shards > 1
    assert not (shared and return_weights)
    mine = own_blocks(sharding.num_shards(mesh, "heads"))
    if shared:
        groups, choices = _groups(given, settings, window, mine, bound, mesh, sequence_shards)
        if choices is not None:
            given["choices"] = choices
            settings["skip_mass"] /= 2
    call = on_device(mine)

    def place(name: str, shape: tuple[int, ...]) -> jax.sharding.PartitionSpec:
        axes = (axis if shared or axis != "length" else None for axis in _AXES[name])
        return sharding.fitting_spec(mesh, shape, *axes)

    specs = {name: place(name, array.shape) for name, array in given.items()}
    out_specs: Any = specs["query"]
    if return_weights:
        batch, length, heads = query.shape[:3]
        out_specs = out_specs, place("weights", (batch, heads, length, key.shape[1]))
    if shared:
        whole = functools.partial(_on_part_of_length, call, groups, sequence_shards)
        call = jax.checkpoint(whole, policy=_may_be_saved)
    return jax.shard_map(call, in_specs=(specs,), out_specs=out_specs)(given)


def _call(settings: dict[str, Any], given: dict[str, Array]) -> Any:
    rest: dict[str, Any] = {k: x for k, x in given.items() if k not in ("query", "key", "value")}
    return lazy_attention(given["query"], given["key"], given["value"], **rest, **settings)


def _local_and_global(
    settings: dict[str, Any], window: int | None, blocks: HeadBlocks, given: dict[str, Array]
) -> Any:
    """Calls the op for this device's local heads, with the window, and for its global ones."""

    def part(name: str, array: Array, begin: int, end: int) -> Array:
        axes = _AXES.get(name, ())
        axis = next((i for i, kind in enumerate(axes) if kind in ("heads", "kv_heads")), None)
        return array if axis is None else _take(array, axis, blocks, begin, end)

    def call(window: int | None, begin: int, end: int) -> Any:
        mine = {name: part(name, array, begin, end) for name, array in given.items()}
        return _call(settings | {"window": window}, mine)

    near = call(window, 0, blocks.local)
    far = call(None, blocks.local, blocks.groups)
    if not settings["return_weights"]:
        return _join(near, far, 2, blocks.number)
    return _join(near[0], far[0], 2, blocks.number), _join(near[1], far[1], 1, blocks.number)


def _take(array: Array, axis: int, blocks: HeadBlocks, begin: int, end: int) -> Array:
    """Returns the heads of groups `begin` to `end` of every block."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    by_group = array.reshape(*before, blocks.number, blocks.groups, -1, *after)
    return jax.lax.slice_in_dim(by_group, begin, end, axis=axis + 1).reshape(*before, -1, *after)


def _join(near: Array, far: Array, axis: int, blocks: int) -> Array:
    """Returns the heads of both in the order of the model."""
    before, after = near.shape[:axis], near.shape[axis + 1 :]
    both = [x.reshape(*before, blocks, -1, *after) for x in (near, far)]
    return jnp.concatenate(both, axis=axis + 1).reshape(*before, -1, *after)


def _groups(
    given: dict[str, Array],
    settings: dict[str, Any],
    window: int | None,
    blocks: HeadBlocks | None,
    bound: fetch.Bound | None,
    mesh: jax.sharding.AbstractMesh,
    sequence_shards: int,
) -> tuple[tuple[fetch.Group, ...], Array | None]:
    """Returns which of a device's heads fetch alike, and how far where they have a choice."""
    length, kv_heads = given["key"].shape[1:3]
    shards = sharding.num_shards(mesh, "kv_heads")
    if bound is None or window is not None:
        return fetch.by_window(kv_heads // shards, window, blocks, length), None
    slopes = bound.slopes.reshape(shards, kv_heads // shards, -1)
    groups = fetch.by_slope(slopes, length, sequence_shards)
    if all(len(group.reaches) == 1 for group in groups):
        return groups, None
    choices = fetch.choices(
        groups,
        bound,
        given["distance_bias"],
        given.get("distance_slope"),
        given.get("offset"),
        length=length,
        skip_mass=settings["skip_mass"] / 2,
        head_shards=shards,
    )
    return groups, choices


def _on_part_of_length(
    call: Any, groups: tuple[fetch.Group, ...], shards: int, given: dict[str, Array]
) -> Any:
    """Calls the op for this device's queries and the keys that they see, in whole rows."""
    given = dict(given)
    key, value, choices = given["key"], given["value"], given.pop("choices", None)
    both = jnp.concatenate([key, value], axis=-1)
    rows = fetch.fetch(both, groups, choices, shards)
    given |= {"key": rows[..., : key.shape[-1]], "value": rows[..., key.shape[-1] :]}
    if "segment_ids" in given:
        given["segment_ids"] = sharding.gather_sequence(given["segment_ids"])
    starts = sharding.chunk_starts(key.shape[1] * shards, shards)
    return call(given | {"chunk_starts": starts})


def _may_be_saved(primitive: Any, *_: Any, **parameters: Any) -> bool:
    if primitive.name == "custom_vjp_call":
        return not _sends(parameters.get("call_jaxpr"))
    return primitive.name not in _MOVES | identity.NAMES


def _sends(jaxpr: Any) -> bool:
    """Returns whether a traced function sends keys from device to device, as attention does not."""
    equations = getattr(getattr(jaxpr, "jaxpr", jaxpr), "eqns", ())
    return any(
        equation.primitive.name == "ppermute" or any(map(_sends, equation.params.values()))
        for equation in equations
    )
