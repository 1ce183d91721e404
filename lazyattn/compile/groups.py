"""Which devices a collective runs over, in all the ways HLO says it."""

import math
import re
from typing import Any

import numpy as np

# What a program of one slice asks of MegaScale, the runtime between slices.
_TRANSFERS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# A device there is its slice, counted from one, times this, and its place in the slice.
SLICE = 100_000


def first_group(rest: str, devices: int) -> list[int]:
    """Returns the devices of a collective's first group, as its program numbers them.

    Reads the ways HLO writes groups: lists, an iota, axes of a mesh, and pairs of source
    and target, of which the first that differ are taken. [] where none of these is found.

    Args:
      rest: the collective's attributes.
      devices: of the program, which no list at all means.
    """
    if pairs := re.search(r"source_target_pairs=\"?(\{\{[\d,{}]+\}\})", rest):
        ends = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return list(next((pair for pair in ends if pair[0] != pair[1]), ends[0][:1]))
    if "replica_groups={}" in rest:
        return list(range(devices))
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


def transfer(rest: str) -> tuple[str, list[int]] | None:
    """Returns what a `send` to MegaScale asks for, None where that can't be read.

    Returns:
      The kind of collective and the devices of its first group, each as `SLICE` times
      its slice, from one, and its place in the slice.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    target = re.search(r'_xla_megascale_target="?(\{[\d,:x>{}\-]+\})', rest)
    if kind is None or target is None or kind[1] not in _TRANSFERS:
        return None
    # Slices "x" places in them, for the same places of all those slices together.
    if product := re.fullmatch(r"\{([\d,:]+)\}x\{(\d+)[\d,:]*\}", target[1]):
        return _TRANSFERS[kind[1]], [
            number * SLICE + int(product[2]) for number in _numbers(product[1])
        ]
    # Or groups of devices; or sources and targets.
    if listed := re.match(r"\{\{(\d+(?:(?:,|->)\d+)*)\}", target[1]):
        return _TRANSFERS[kind[1]], [int(one) for one in re.split(",|->", listed[1])]
    return None


def _numbers(text: str) -> list[int]:
    """Returns the numbers of a list such as "1,2" or "1:4", the last one included."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        found += range(int(first), int(last or first) + 1)
    return found
