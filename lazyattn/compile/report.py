"""What is known of a step ahead of time, and how it is told."""

import dataclasses
from collections.abc import Mapping

from lazyattn.compile.collectives import Collective
from lazyattn.compile.roofline import ASSUMPTIONS, Roofline
from lazyattn.compile.topology import Topology
from lazyattn.quantity import quantity
from lazyattn.training.step_memory import StateBytes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a step does on one device.

    Attributes:
      weight_flops, attention_flops: of products.
      hbm_bytes: to and from HBM.
      collectives: with the other devices.
      roofline: how long that takes.
      unread: collectives whose bytes could not be read and are in nothing of this.
      unread_loops: loops whose length depends on the data, of which one round counts.
    """

    weight_flops: float
    attention_flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    roofline: Roofline
    unread: tuple[str, ...] = ()
    unread_loops: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a step. Bytes are those of one device.

    Attributes:
      topology: which chips.
      mesh: mesh axis -> devices.
      parameters: of the model.
      tokens: a step, over all devices.
      microbatches: parts of a batch.
      remat: what the backward pass recomputes.
      implementation: of the attention.
      state: parameters and optimiser.
      activations: kept for the backward pass; None: not known.
      gradients: of the blocks; None: not known.
      temporaries: all but the state and the batch, at its peak.
      needed: in all.
      available: that a device has.
      seconds: to compile; None: nothing was compiled, all is estimated.
      traffic: None where the compiler gave up before there was anything to count.
      suggestions: what would make it fit, the most promising first.
    """

    topology: Topology
    mesh: Mapping[str, int]
    parameters: int
    tokens: int
    microbatches: int
    remat: str
    implementation: str
    state: StateBytes
    activations: float | None
    gradients: float | None
    temporaries: float
    needed: float
    available: float
    seconds: float | None
    traffic: Traffic | None
    suggestions: tuple[str, ...] = ()
    compiler_gave_up: bool = False

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return not self.compiler_gave_up and self.needed <= self.available


_LOWER_BOUND = (
    "             {} a lower bound, and so are both step times: not all of the step could be read"
)


def lines(report: Report) -> list[str]:
    """Returns the report for people."""
    chip = report.topology.chip
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    told = [
        f"topology     {report.topology}: {quantity(report.topology.chips, 'chip')},"
        f" {quantity(report.topology.devices, 'device')} as {mesh or 'one'}",
        f"step         {report.parameters:,} parameters, {report.tokens:,} tokens,"
        f" {quantity(report.microbatches, 'microbatch', 'microbatches')}, remat {report.remat},"
        f" attention {report.implementation}",
        f"compiled     in {report.seconds:.0f} s"
        if report.seconds is not None
        else "compiled     nothing: all below is estimated by formula",
        "",
        *_memory_lines(report),
    ]
    if report.traffic is not None:
        told += ["", *_work_lines(report, report.traffic), "", *_time_lines(report.traffic)]
    told += ["", f"chip         {chip.name}: {chip.sources}"]
    if report.traffic is not None:
        told += [f"assumed      {ASSUMPTIONS[0]};"]
        told += [f"             {text};" for text in ASSUMPTIONS[1:-1]]
        told += [f"             {ASSUMPTIONS[-1]}."]
    if not report.fits:
        told += ["", "It does not fit. " + ("Try" if report.suggestions else "No setting is left;")]
        told += [f"    {text}" for text in report.suggestions]
        if not report.suggestions:
            told += ["    take more chips, or chips with more memory."]
    return told


def _memory_lines(report: Report) -> list[str]:
    told = [
        f"memory       {report.needed / 1e9:.2f} of {report.available / 1e9:.2f} GB a device:"
        f" {'fits' if report.fits else 'DOES NOT FIT'}",
        f"  parameters   {report.state.parameters / 1e9:8.3f} GB",
        f"  optimiser    {report.state.optimizer / 1e9:8.3f} GB",
        f"  temporaries  {report.temporaries / 1e9:8.3f} GB"
        + (" (as far as the compiler got)" if report.compiler_gave_up else " at their peak"),
    ]
    if report.activations is not None:
        told += [f"    activations kept for the backward pass {report.activations / 1e9:.3f} GB"]
    if report.gradients is not None:
        told += [f"    gradients of the blocks {report.gradients / 1e9:.3f} GB"]
    return told


def _work_lines(report: Report, traffic: Traffic) -> list[str]:
    flops = traffic.weight_flops + traffic.attention_flops
    told = [
        f"work         {flops / 1e12:.2f} TFLOP a step and device"
        f" ({traffic.weight_flops / 1e12:.2f} with weights,"
        f" {traffic.attention_flops / 1e12:.2f} in attention)",
        f"hbm          {traffic.hbm_bytes / 1e9:.1f} GB read and written",
    ]
    if traffic.unread_loops:
        told.append(
            f"  NOT COUNTED: all but one round of each of"
            f" {quantity(traffic.unread_loops, 'loop')} whose length"
            " depends on the data"
        )
    for each in traffic.collectives:
        told.append(
            f"  {each.kind:18s} over {each.axes or 'one device':12s} {each.count:5d} times,"
            f" {each.wire_bytes / 1e9:9.3f} GB sent, {each.seconds * 1e3:8.2f} ms"
            + ("  (a gather, at twice its cost)" if each.gathers else "")
            + ("  (between slices)" if each.between else "")
        )
    told += [f"  NOT COUNTED, in a form that is not read: {what}" for what in traffic.unread]
    gathered = next((c for c in traffic.collectives if c.gathers), None)
    if gathered is not None and gathered.wire_bytes > 1e9:
        told.append(
            f"  A shard over {gathered.size} devices is smaller than a tile of memory, so that"
            " whole arrays are added up to be gathered: use fewer along fsdp and more along data"
            " or tensor."
        )
    return told


def _time_lines(traffic: Traffic) -> list[str]:
    roof = traffic.roofline
    network = ", ".join(f"{axis} {1e3 * s:.1f} ms" for axis, s in roof.network.items())
    return [
        f"roofline     compute {1e3 * roof.compute:.1f} ms, HBM {1e3 * roof.memory:.1f} ms,"
        f" network {network or 'none'}; {roof.bound} is the longest",
        *_lower_bounds(traffic),
        f"step time    {1e3 * roof.overlapped:.1f} to {1e3 * roof.serial:.1f} ms,"
        f" MFU {roof.mfu(roof.overlapped):.1%} to {roof.mfu(roof.serial):.1%}",
    ]


def _lower_bounds(traffic: Traffic) -> list[str]:
    told = []
    if traffic.unread_loops:
        told.append(_LOWER_BOUND.format("compute and HBM are"))
    if traffic.unread:
        told.append(_LOWER_BOUND.format("the network's part is"))
    return told
