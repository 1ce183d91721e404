"""Where a mesh's devices stand, and at what rate they send to one another."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from lazyattn.compile import groups
from lazyattn.compile.chips import Chip


@dataclasses.dataclass(frozen=True)
class Network:
    """Where a mesh's devices stand.

    Attributes:
      axis_sizes: mesh axis -> devices, in the mesh's order.
      coordinates: [devices, torus axes + 1]: place in the torus and the slice (or the
        host), in the mesh's order.
      places: [devices]: a device's number in its slice, in the mesh's order.
      shape: chips along each axis of a slice.
      chip: what they are.
    """

    axis_sizes: Mapping[str, int]
    coordinates: np.ndarray
    places: np.ndarray
    shape: tuple[int, ...]
    chip: Chip

    @classmethod
    def of(cls, mesh: Mesh, shape: tuple[int, ...], chip: Chip) -> "Network":
        """Returns the network of a mesh of compile-only devices."""
        rows = [
            (*tuple(device.coords)[: len(shape)], getattr(device, "slice_index", None) or 0)
            for device in mesh.devices.flat
        ]
        ids = np.asarray([device.id for device in mesh.devices.flat])
        slices = np.asarray(rows)[:, -1]
        places = np.zeros_like(ids)
        for one in set(slices.tolist()):
            places[slices == one] = np.argsort(np.argsort(ids[slices == one]))
        return cls(dict(mesh.shape), np.asarray(rows), places, shape, chip)

    def program(self, partitions: int | None) -> list[int]:
        """Returns the devices of a program, by their place in the mesh.

        Each of several slices runs a program of its own, which counts its own devices.

        Args:
          partitions: devices of the program.
        """
        slices = self.coordinates[:, -1]
        first = np.flatnonzero(slices == slices[0]).tolist()
        return first if len(first) == partitions else list(range(len(slices)))

    def named(self, numbers: Sequence[int]) -> list[int]:
        """Returns devices by their place in the mesh.

        Args:
          numbers: as `groups.transfer` gives them.
        """
        own = ((self.coordinates[:, -1] + 1) * groups.SLICE + self.places).tolist()
        return [own.index(number) for number in numbers if number in own]

    def between(self, group: Sequence[int]) -> bool:
        """Returns whether a group spans slices."""
        return len(set(self.coordinates[np.asarray(group), -1].tolist())) > 1

    def axes(self, group: Sequence[int]) -> str:
        """Returns the mesh axes along which a group's devices differ, joined by "+"."""
        places = np.unravel_index(np.asarray(group), tuple(self.axis_sizes.values()))
        varied = [
            name
            for name, place in zip(self.axis_sizes, places, strict=True)
            if len(set(place.tolist())) > 1
        ]
        return "+".join(varied)

    def bandwidth(self, group: Sequence[int]) -> float:
        """Returns the rate at which each device of a group can send in a ring, bytes/s.

        Two links of every torus axis that the group spans, one where the axis is not a
        ring or the group is a part of it; the network's rate if it spans slices.
        """
        places = self.coordinates[np.asarray(group)]
        *spread, slices = (len(set(column.tolist())) for column in places.T)
        if slices > 1:
            assert self.chip.network_bandwidth is not None
            return self.chip.network_bandwidth / self.chip.devices
        links = sum(
            2 if self._is_ring(size) and chips == size else 1
            for size, chips in zip(self.shape, spread, strict=True)
            if chips > 1
        )
        if not links:  # the two halves of a chip
            return self.chip.hbm_bandwidth / self.chip.devices
        return links * self.chip.link_bandwidth / self.chip.devices

    def _is_ring(self, size: int) -> bool:
        whole = self.shape if self.chip.axes == 3 else (size,)
        return all(each % self.chip.wrap == 0 for each in whole)
