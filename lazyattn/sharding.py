"""The mesh and the one table that says which logical axis lies on which mesh axis.

Nothing else in the package names a mesh axis.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from lazyattn.errors import InputError, require

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis of an array -> mesh axes it is split over. Axes not named here, and
# None, are replicated.
RULES: tuple[tuple[str, tuple[str, ...] | str | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("distance", None),
    ("norm", None),
    ("layers", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, "the rest".

    `sequence` is kept for splitting the length, which nothing does yet: it must be 1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", size, "-1 or at least 1")
        require(
            list(sizes.values()).count(-1) <= 1,
            "mesh",
            sizes,
            "a mesh with at most one size of -1",
        )
        require(
            self.sequence == 1,
            "mesh.sequence",
            self.sequence,
            "1, since nothing is split along the length yet",
        )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns the named mesh over `devices` (default: all of them).

    Raises:
      InputError: if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    require(
        math.prod(sizes) == len(devices),
        "mesh",
        dataclasses.asdict(config),
        f"sizes with a product of {len(devices)}, the number of devices",
    )
    return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


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


def check_batch(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, batch_size: int, microbatches: int = 1
) -> None:
    """Checks that microbatches and the mesh divide the batch.

    Args:
      mesh: the mesh.
      batch_size: rows a step, over all devices and microbatches.
      microbatches: parts of a batch.

    Raises:
      InputError: if they don't, before anything is compiled.
    """
    shards = num_shards(mesh, "batch")
    require(
        batch_size % (microbatches * shards) == 0,
        "data.batch_size",
        batch_size,
        f"a multiple of {microbatches * shards}: training.microbatches = {microbatches}"
        f" times the mesh's {shards} parts of a batch",
    )


def shard_batch(
    batch: Mapping[str, Int[np.ndarray, "rows length"]], mesh: jax.sharding.Mesh
) -> dict[str, Int[Array, "batch length"]]:
    """Returns this process's rows of a batch as arrays over the whole mesh."""
    sharding = jax.sharding.NamedSharding(mesh, spec("batch", "length"))
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
        for name, array in batch.items()
    }
