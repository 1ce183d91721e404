"""Which collectives a compiled program has."""

import dataclasses
import math
import re

KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute")

_LINE = re.compile(r" = (?P<shapes>.+?) (?P<kind>" + "|".join(KINDS) + r")(-start)?\((?P<rest>.*)")
_MESH = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{\{(?P<group>[\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(?P<size>\d+)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction between devices.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results on one device.
      dtypes: of its results.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program's text; loops count once.

    Those of a device with itself, over mesh axes of size 1, move nothing and are left out.
    """
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None or _group_size(match["rest"]) == 1:
            continue
        results = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match["shapes"])
        shapes = tuple(tuple(int(n) for n in sizes.split(",") if n) for _, sizes in results)
        found.append(Collective(match["kind"], shapes, tuple(dtype for dtype, _ in results)))
    return found


def _group_size(rest: str) -> int | None:
    if match := _MESH.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match["sizes"]))
        axes = re.findall(r"'(\w+)'", match["axes"])
        return math.prod(int(sizes[axis]) for axis in axes)
    if match := _IOTA.search(rest):
        return int(match["size"])
    if match := _LISTED.search(rest):
        return len(match["group"].split(","))
    return None
