"""The mesh: devices along four named axes, laid out for the networks between them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from lazyattn.allowed import Allowed, check_settings
from lazyattn.errors import require

# From the axis that talks least to the ones that talk in every layer: the last ones lie
# on neighbouring devices.
MESH_AXES = ("data", "fsdp", "tensor", "sequence")

SIZE = Allowed(lambda size: size == -1 or size >= 1, "-1 or at least 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, over all slices; one of them may be -1, "the rest".

    Attributes:
      data: copies of everything, each with rows of its own.
      fsdp: rows of the batch, and parameters and optimiser state.
      tensor: heads, hidden units and vocabulary.
      sequence: the length of every row.
    """

    data: Annotated[int, SIZE] = -1
    fsdp: Annotated[int, SIZE] = 1
    tensor: Annotated[int, SIZE] = 1
    sequence: Annotated[int, SIZE] = 1

    def __post_init__(self):
        check_settings(self, "mesh.")
        sizes = dataclasses.asdict(self)
        require(
            list(sizes.values()).count(-1) <= 1,
            "mesh",
            sizes,
            "a mesh with at most one size of -1",
        )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the named mesh over `devices` (default: all of them).

    Devices of several slices, which only a slower network connects, are split among
    them by the first axes: by `data` as far as it goes, then `fsdp`, and so on.

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
    return jax.sharding.Mesh(_arrange(sizes, devices), MESH_AXES)


def across_slices(sizes: Sequence[int], slices: int) -> list[int]:
    """Returns into how many parts each axis is split among slices.

    Args:
      sizes: of the axes, with a product that is a multiple of `slices`.
      slices: how many there are, equally large.
    """
    parts = []
    for size in sizes:
        parts.append(math.gcd(size, slices))
        slices //= parts[-1]
    return parts


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in an array of these sizes, neighbours near one another."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    on_tpu = devices[0].platform == "tpu"
    if len(slices) > 1 and len(devices) % len(slices) == 0:
        parts = across_slices(sizes, len(slices))
        within = [size // part for size, part in zip(sizes, parts, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(
            within, parts, devices, allow_split_physical_axes=on_tpu
        )
    if on_tpu and len(devices) > 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(sizes)
