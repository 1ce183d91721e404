"""What devices say to each other in a step: kind, mesh axes, bytes, and at what rate."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lazyattn.ahead_of_time.chips import Chip
from lazyattn.ahead_of_time.hlo import Computation, Instruction, Module

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one step, as one device sees them.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or
        "collective-permute".
      axes: mesh axes it runs over, joined by "+".
      size: devices that take part.
      count: how often it runs.
      wire_bytes: what a device sends in all of them, by ring algorithms.
      seconds: what that takes at the links' rate.
      gathers: whether it is an all-gather that XLA wrote as an all-reduce, at twice
        the cost, since a shard is smaller than a tile of memory.
    """

    kind: str
    axes: str
    size: int
    count: int
    wire_bytes: float
    seconds: float
    gathers: bool = False


@dataclasses.dataclass(frozen=True)
class Network:
    """Where a mesh's devices stand.

    Attributes:
      axis_sizes: mesh axis -> devices, in the mesh's order.
      coordinates: [devices, torus axes + 1]: place in the torus and the slice (or the
        host), in the mesh's order.
      shape: chips along each axis of a slice.
      chip: what they are.
    """

    axis_sizes: Mapping[str, int]
    coordinates: np.ndarray
    shape: tuple[int, ...]
    chip: Chip

    @classmethod
    def of(cls, mesh: Mesh, shape: tuple[int, ...], chip: Chip) -> "Network":
        """Returns the network of a mesh of compile-only devices."""
        rows = [
            (*tuple(device.coords)[: len(shape)], getattr(device, "slice_index", None) or 0)
            for device in mesh.devices.flat
        ]
        return cls(dict(mesh.shape), np.asarray(rows), shape, chip)

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


def collect(module: Module, network: Network) -> list[Collective]:
    """Returns the collectives of a module, equal ones together, the slowest first."""
    found: dict[tuple[str, str, int, bool], list[float]] = collections.defaultdict(
        lambda: [0, 0.0, 0.0]
    )
    seen: set[tuple[str, ...]] = set()
    for instruction, computation, times in module.running():
        parts = [(instruction, computation), *module.inside(instruction)]
        for part, owner in parts:
            kind = kind_of(part)
            if kind is None:
                continue
            channel = re.search(r"channel_id=(\d+)", part.rest)
            # An asynchronous collective is written down in each fusion it overlaps with.
            mark = (
                (part.name.split(".clone")[0], owner.name)
                if channel is None
                else (channel[1], kind, str(part.arrays), part.op_name)
            )
            if mark in seen:
                continue
            seen.add(mark)
            if kind == "all-reduce" and owner.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            group = first_group(part.rest)
            if len(group) < 2:
                continue
            sent = wire_bytes(kind, part, owner, len(group))
            gathers = kind == "all-reduce" and _gathers(part, owner, module)
            entry = found[kind, network.axes(group), len(group), gathers]
            entry[0] += times
            entry[1] += times * sent
            entry[2] += times * sent / network.bandwidth(group)
    collectives = [
        Collective(kind, axes, size, int(count), sent, seconds, gathers)
        for (kind, axes, size, gathers), (count, sent, seconds) in found.items()
    ]
    return sorted(collectives, key=lambda c: -c.seconds)


def kind_of(instruction: Instruction) -> str | None:
    """Returns which collective an instruction is or starts, if any."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in _KINDS else None


def wire_bytes(kind: str, instruction: Instruction, computation: Computation, size: int) -> float:
    """Returns what a device sends in one collective of `size` devices, by a ring.

    Args:
      kind: as in `Collective`.
      instruction: the collective.
      computation: which it is in.
      size: devices that take part.
    """
    whole = sum(computation.instructions[name].bytes for name in instruction.operands)
    share = (size - 1) / size
    if kind == "all-gather":
        return whole * (size - 1)
    if kind == "all-reduce":
        return 2.0 * whole * share
    if kind == "collective-permute":
        return float(whole)
    return whole * share


def _gathers(instruction: Instruction, computation: Computation, module: Module) -> bool:
    """Returns whether an all-reduce adds up parts padded with zeros."""
    if len(instruction.operands) != 1:
        return False
    operand = computation.instructions[instruction.operands[0]]
    inside = [part for part, _ in module.inside(operand)]
    return operand.opcode == "dynamic-update-slice" or any(
        part.opcode == "dynamic-update-slice" and part.bytes == operand.bytes for part in inside
    )


def first_group(rest: str) -> list[int]:
    """Returns the devices of a collective's first group, by their place in the mesh.

    Reads the ways HLO writes groups: lists, an iota, axes of a mesh, and pairs of source
    and target.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(one) for one in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        sizes = [int(one) for one in iota[3].split(",")]
        order = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[4]:
            order = order.transpose([int(one) for one in iota[4].split(",")])
        return order.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index: list[Any] = [0] * len(axes)
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[2]):
            place = list(axes).index(name)
            if size:  # part of an axis: after `before` of it, `size` long
                step = axes[name] // (int(before) * int(size))
                index[place] = slice(0, step * int(size), step)
            else:
                index[place] = slice(None)
        return np.asarray(order[tuple(index)]).ravel().tolist()
    return []
