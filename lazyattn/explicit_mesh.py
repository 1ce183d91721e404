"""Calls whose arrays lie on a mesh with Explicit axes, as `jax.make_mesh` makes them.

There every operation must say how its result is sharded. Rows and heads never meet in
attention, so each device works on its own ones, in a `shard_map`. What is sharded otherwise,
the length or a head's numbers, is gathered first.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from lazyattn.call import Call

# Which axes of the arrays of a call are rows and heads.
_ROWS = {"query": 0, "key": 0, "value": 0, "segment_ids": 0, "query_start": 0, "divisor": 0}
_ROWS |= {"prefix": 0, "key_lengths": 0}
_HEADS = {"query": 2, "distance_bias": 0, "distance_slope": 0, "offset": 0, "sink": 0}
_KV_HEADS = {"key": 2, "value": 2}
_ARRAYS = (*_ROWS, *(name for name in _HEADS if name not in _ROWS), "chunk_starts")


def on_own_share(run: Callable[[Call], Any], call: Call) -> Any:
    """Returns run(call), with each device's own rows and heads where a mesh says so.

    Args:
      run: of a part of the rows, and of the heads, of a call.
      call: the whole call.
    """
    arrays: dict[str, Any] = {name: getattr(call, name) for name in _ARRAYS}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    mesh = _mesh(arrays)
    if mesh is None:
        return run(call)
    nothing: dict[str, Any] = dict.fromkeys(arrays)
    static = dataclasses.replace(call, **nothing)
    return _run(run, arrays, _Static(mesh, static))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known of a call when it is traced: its mesh, and a `Call` without arrays."""

    mesh: Any
    call: Call


# Compiled, so that arrays that lie elsewhere may join those on the mesh.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(run: Callable[[Call], Any], arrays: dict[str, Array], static: _Static) -> Any:
    mesh = static.mesh
    rows = _axes(arrays, _ROWS)
    heads = _axes(arrays, _HEADS) or _axes(arrays, _KV_HEADS)
    heads = tuple(axis for axis in heads if axis not in rows)
    shards = math.prod(mesh.shape[axis] for axis in heads)
    kv_heads = arrays["key"].shape[2]
    # Devices that share a key head take it out of all of them.
    together = shards // kv_heads if shards % kv_heads == 0 and shards > kv_heads else 1
    if arrays["query"].shape[2] % shards or kv_heads * together % shards:
        # Heads can't be shared out: every device has all of them.
        heads, together = (), 1
    if arrays["query"].shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()

    def spec(name: str) -> PartitionSpec:
        entries: list[Any] = [None] * arrays[name].ndim
        split_keys = _KV_HEADS if together == 1 else {}
        for axes, places in ((rows, _ROWS), (heads, _HEADS | split_keys)):
            if name in places and axes:
                entries[places[name]] = axes
        return PartitionSpec(*entries)

    def share(arrays: dict[str, Any]) -> Any:
        if together > 1:
            own = jax.lax.axis_index(heads) // together
            arrays = arrays | {
                name: jax.lax.dynamic_slice_in_dim(arrays[name], own, 1, axis=2)
                for name in _KV_HEADS
            }
        return run(dataclasses.replace(static.call, **arrays))

    specs = {name: spec(name) for name in arrays}
    placed = {
        name: jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, specs[name]))
        for name, x in arrays.items()
    }
    out_specs: Any = specs["query"]
    if static.call.return_weights:
        out_specs = out_specs, PartitionSpec(rows or None, heads or None)
    return jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=out_specs,
        axis_names=set(_explicit(mesh)),
    )(placed)


def _mesh(arrays: dict[str, Any]) -> Any:
    """Returns the mesh whose Explicit axes an array is sharded over; None: there is none."""
    for x in arrays.values():
        sharding = getattr(jax.typeof(x), "sharding", None)
        if sharding is None:
            continue
        explicit = _explicit(sharding.mesh)
        if any(axis in explicit for entry in sharding.spec for axis in _names(entry)):
            return sharding.mesh
    return None


def _explicit(mesh: Any) -> tuple[str, ...]:
    named = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in named if kind == AxisType.Explicit)


def _axes(arrays: dict[str, Array], places: dict[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes of the first array that is sharded over rows, or over heads."""
    for name, place in places.items():
        if name in arrays:
            found = _names(jax.typeof(arrays[name]).sharding.spec[place])
            if found:
                return found
    return ()


def _names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a `PartitionSpec` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
