"""How long a step takes at the rates that chips' makers state, and what that assumes."""

import dataclasses
from collections.abc import Iterable, Mapping

from lazyattn.compile.chips import Chip
from lazyattn.compile.collectives import Collective

ASSUMPTIONS = (
    "products of any shape at the chip's peak rate, memory and links at theirs, no latency",
    "attention kernels skip nothing: every visible tile counts, so skipping only makes it faster",
    "the attention kernels read each operand once; what is padded for layout is not counted",
    "collectives run as rings over the torus axes that their group spans, both ways",
    "between slices they are rings, too, at each chip's share of the data centre's network",
    "MFU counts what softmax attention needs, once, without recomputation",
    "from full overlap of computing, memory and network (the longest of them) to none (their sum)",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step.

    Attributes:
      compute: matrix products.
      memory: bytes to and from HBM.
      network: mesh axes -> collectives over them.
      model_seconds: what the model's own FLOPs would take at the peak rate.
    """

    compute: float
    memory: float
    network: Mapping[str, float]
    model_seconds: float

    @property
    def overlapped(self) -> float:
        """A step if computing, memory and network fully overlap."""
        return max(self.compute, self.memory, sum(self.network.values()))

    @property
    def serial(self) -> float:
        """A step if they don't overlap at all."""
        return self.compute + self.memory + sum(self.network.values())

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "network"."""
        parts = {
            "compute": self.compute,
            "memory": self.memory,
            "network": sum(self.network.values()),
        }
        return max(parts, key=lambda name: parts[name])

    def mfu(self, seconds: float) -> float:
        """Returns model FLOPs utilisation for a step of so many seconds."""
        return self.model_seconds / seconds if seconds > 0 else 0.0


def roofline(
    chip: Chip,
    *,
    flops: float,
    hbm_bytes: float,
    network: Iterable[Collective],
    model_flops: float,
) -> Roofline:
    """Returns a step's times on one device.

    Args:
      chip: which; a device of it is `1 / chip.devices` of one.
      flops: of products a device, recomputation included.
      hbm_bytes: to and from HBM a device.
      network: its collectives.
      model_flops: of the model a device, as MFU counts them.
    """
    peak = chip.flops / chip.devices
    seconds: dict[str, float] = {}
    for each in network:
        seconds[each.axes] = seconds.get(each.axes, 0.0) + each.seconds
    return Roofline(
        flops / peak,
        hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        seconds,
        model_flops / peak,
    )
