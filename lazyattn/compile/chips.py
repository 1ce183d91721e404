"""The chips and what their makers say of them, in one table."""

import dataclasses
import math
import os

from lazyattn.errors import require

GIB = 2**30
CPU = "cpu"


def _host_memory() -> float:
    """Returns this machine's memory in bytes; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return math.inf


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      name: what `--topology` calls it.
      flops: peak FLOP/s of dense bfloat16 matrix products.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s to and from it.
      link_bandwidth: bytes/s of one link to a neighbour, one way. On a GPU: of all
        NVLinks together, one way.
      axes: dimensions of the torus; 0: every chip of a host reaches every other.
      wrap: an axis of a slice is a ring at multiples of this many chips; in three
        dimensions, if all three are.
      network_bandwidth: bytes/s a chip of the network between slices or hosts, one
        way; None: not stated.
      devices: JAX devices a chip, as this library compiles for it.
      largest: chips in the largest slice.
      host_chips: chips that share a host.
      sources: where the numbers are from.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    wrap: int
    network_bandwidth: float | None
    devices: int
    largest: int
    host_chips: int
    sources: str

    @property
    def usable_bytes(self) -> float:
        """Memory of a device that a program gets.

        libtpu 0.0.48 leaves 15.75 of 16 GiB on v5e and 31.24 of 32 GiB on v6e; the others
        are taken to lose as large a share. On a GPU the driver, NCCL and JAX's allocator
        are given a twelfth.
        """
        share = 0.976 if self.is_tpu else 11 / 12
        return share * self.hbm_bytes / self.devices

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.axes > 0

    @property
    def is_cpu(self) -> bool:
        """Whether XLA compiles for it on any machine."""
        return self.name == CPU


_SOURCES = {
    "v4": "cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433, table 4",
    "v5e": "cloud.google.com/tpu/docs/v5e: 400 GB/s ICI a chip, 6.4 Tb/s DCN a pod",
    "v5p": "cloud.google.com/tpu/docs/v5p: 1200 GB/s ICI and 50 Gb/s DCN a chip",
    "v6e": "cloud.google.com/tpu/docs/v6e: 800 GB/s ICI a chip, 25.6 Tb/s DCN a pod",
    "tpu7x": "docs.cloud.google.com/tpu/docs/tpu7x: 1200 GB/s ICI, 100 Gb/s DCN a chip",
    "h100": "NVIDIA H100 SXM data sheet; network: 400 Gb/s a GPU, as in a DGX H100",
    "h200": "NVIDIA H200 SXM data sheet; network: 400 Gb/s a GPU, as in a DGX H200",
    "b200": "NVIDIA DGX B200 data sheet, an eighth; network: 400 Gb/s a GPU, as there",
    "a100": "NVIDIA A100 SXM 80 GB data sheet; network: 200 Gb/s a GPU, as in a DGX A100",
    CPU: "this machine, whose memory all devices share",
}
_Rates = tuple[float, float, float, float]  # flops, hbm_bytes, hbm_bandwidth, link_bandwidth


def _tpu(
    name: str, rates: _Rates, axes: int, network: float | None, largest: int, devices: int = 1
) -> Chip:
    # A link is the stated bidirectional bandwidth over links and both ways: six links in a 3D
    # torus, four in a 2D one. A 3D slice is a torus if each axis is a multiple of 4 chips; an
    # axis of a 2D slice is a ring if it spans the pod's 16.
    wrap = {3: 4, 2: 16}[axes]
    return Chip(name, *rates, axes, wrap, network, devices, largest, 4, _SOURCES[name])


def _gpu(name: str, rates: _Rates, network: float) -> Chip:
    return Chip(name, *rates, 0, 0, network, 1, 2**20, 8, _SOURCES[name])


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", (275e12, 32 * GIB, 1200e9, 50e9), 3, None, 4096),
        _tpu("v5e", (197e12, 16 * GIB, 819e9, 50e9), 2, 6.4e12 / 8 / 256, 256),
        _tpu("v5p", (459e12, 95 * GIB, 2765e9, 100e9), 3, 50e9 / 8, 6144),
        _tpu("v6e", (918e12, 32 * GIB, 1638e9, 100e9), 2, 25.6e12 / 8 / 256, 256),
        _tpu("tpu7x", (2307e12, 192 * GIB, 7380e9, 100e9), 3, 100e9 / 8, 9216, devices=2),
        _gpu("h100", (989e12, 80e9, 3350e9, 450e9), 400e9 / 8),
        _gpu("h200", (989e12, 141e9, 4800e9, 450e9), 400e9 / 8),
        _gpu("b200", (2250e12, 180e9, 8000e9, 900e9), 400e9 / 8),
        _gpu("a100", (312e12, 80e9, 2039e9, 300e9), 200e9 / 8),
        # For a check of settings and mesh: its times are not told, so it has no rates.
        Chip(
            *(CPU, math.nan, _host_memory(), math.nan, math.nan),
            axes=0,
            wrap=0,
            network_bandwidth=None,
            devices=1,
            largest=1024,
            host_chips=1024,
            sources=_SOURCES[CPU],
        ),
    )
}


def chip(name: str) -> Chip:
    """Returns the chip of that name.

    Raises:
      InputError: if there is none.
    """
    require(name in CHIPS, "--topology", name, "of one of " + ", ".join(CHIPS) + ", as v5p:4x4x4")
    return CHIPS[name]
