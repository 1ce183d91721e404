"""Which chips, how many and in what shape: the --topology flag."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from lazyattn.compile import libtpu
from lazyattn.compile.chips import CHIPS, Chip, chip
from lazyattn.errors import bad_value
from lazyattn.quantity import quantity

_FORM = re.compile(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of equal chips.

    Attributes:
      chip: of which kind.
      shape: chips along each axis of a slice; of GPUs, how many.
      slices: how many slices, joined by the data centre's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """All chips."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """All JAX devices."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
    """Returns the topology that `--topology` names.

    Args:
      text: "v5p:8x8x8", "2*v5e:16x16" for two slices, "h100:64".

    Raises:
      InputError: if it is not of that form, or no such slice exists.
    """
    match = _FORM.fullmatch(text.lower())
    if match is None:
        raise bad_value(
            "--topology",
            text,
            f"a chip ({', '.join(CHIPS)}) and a shape, as v5p:8x8x8, v5e:16x16, 2*v6e:16x16,"
            " h100:64 or cpu:8",
        )
    kind = chip(match[2])
    shape = tuple(int(size) for size in match[3].split("x"))
    found = Topology(kind, shape, int(match[1] or 1))
    allowed = {0: f"a number of devices, as {kind.name}:64", 2: "two sizes, as v5e:4x4"}.get(
        kind.axes, "three sizes, as v5p:4x4x4"
    )
    if len(shape) != max(kind.axes, 1) or min(*shape, found.slices) < 1:
        raise bad_value("--topology", text, allowed)
    if found.chips // found.slices > kind.largest:
        raise bad_value(
            "--topology",
            text,
            f"a slice of at most {quantity(kind.largest, 'chip')};"
            f" join several, as 2*{kind.name}:...",
        )
    if found.slices > 1 and kind.network_bandwidth is None:
        raise bad_value("--topology", text, f"one slice, since {kind.name}'s network is unknown")
    return found


def devices(topology: Topology) -> Sequence[Any]:
    """Returns the compile-only devices of a TPU topology, or as many of this machine's CPU.

    Raises:
      InputError: if libtpu is not there, or knows no such slice; if JAX has counted the
        CPU's devices already, and there are fewer.
    """
    if topology.chip.is_cpu:
        with contextlib.suppress(RuntimeError):  # JAX is at work already
            jax.config.update("jax_num_cpu_devices", topology.devices)
        found = jax.devices("cpu")
        if len(found) < topology.devices:
            raise bad_value("--topology", str(topology), f"cpu:{len(found)} in this process")
        return found[: topology.devices]
    libtpu.prepare()
    from jax.experimental import topologies

    kind, shape = topology.chip, "x".join(map(str, topology.shape))
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if kind.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the machine
    if max(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind.name}:{shape}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(":", 1)[-1].strip().splitlines()[0]
        raise bad_value("--topology", str(topology), f"a slice libtpu knows ({reason})") from None
    return description.devices
