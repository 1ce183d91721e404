"""The one table that says which logical axis lies on which mesh axis."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from lazyattn.errors import InputError

# Logical axis of an array -> mesh axes it is split over. Axes not named here, and
# None, are replicated.
RULES: tuple[tuple[str, tuple[str, ...] | str | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("distance", None),
    ("norm", None),
    ("rank", None),
    ("layers", None),
)


def spec(*logical_axes: str | None) -> jax.sharding.PartitionSpec:
    """Returns the partition of an array whose axes have these logical names."""
    table = dict(RULES)
    return jax.sharding.PartitionSpec(*(table.get(axis) if axis else None for axis in logical_axes))


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the mesh of `jax.set_mesh`, or None if there is nothing to share out.

    None without a mesh, on a mesh of one device, and inside `jax.shard_map`, where
    arrays are one device's share already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """Returns the mesh axes a logical axis is split over, none if it is replicated."""
    axes = dict(RULES)[logical_axis]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def num_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, logical_axis: str) -> int:
    """Returns how many parts `mesh` splits a logical axis into."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical_axis))


def fitting_spec(
    mesh: jax.sharding.AbstractMesh, shape: Sequence[int], *logical_axes: str | None
) -> jax.sharding.PartitionSpec:
    """Returns `spec(*logical_axes)`, replicated where a size does not divide evenly.

    So a single prompt can be continued on a mesh that trained on large batches.
    """
    return spec(
        *(
            axis if axis and size % num_shards(mesh, axis) == 0 else None
            for size, axis in zip(shape, logical_axes, strict=True)
        )
    )


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Lays an activation out over the active mesh; without one, returns it as it is."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(mesh, x.shape, *logical_axes))


def check_divisible(shapes: Any, shardings: Any) -> None:
    """Checks that every array can be split as its sharding says.

    Args:
      shapes: a tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: the same tree with `NamedSharding`s.

    Raises:
      InputError: naming the first array that can't, its axis and the mesh's.
    """
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, array), sharding in zip(paths, jax.tree.leaves(shardings), strict=True):
        for axis, names in enumerate(sharding.spec):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(sharding.mesh.shape[name] for name in names)
            if array.shape[axis] % parts:
                parameter = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(
                    f"{parameter} of shape {array.shape} can't be split along axis {axis}:"
                    f" {array.shape[axis]} is not a multiple of mesh {' x '.join(names)} = {parts}."
                )
