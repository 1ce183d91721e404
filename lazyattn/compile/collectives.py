"""What devices say to each other in a step: kind, mesh axes, bytes, and at what rate."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator

from lazyattn.compile import groups
from lazyattn.compile.hlo import Computation, Instruction, Module
from lazyattn.compile.network import Network

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These and the like talk to other devices, too, though nothing here says how much.
_UNKNOWN = ("send", "ragged-all-to-all", "collective-broadcast")
_CALLS = re.compile(
    r"megascale|collective|permute|all_?-?(?:reduce|gather|to_?-?all)|reduce_?-?scatter", re.I
)
_OVERLAPPED = ("AsyncCollectiveStart", "AsyncCollectiveDone")


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
      between: whether it runs between slices, over the data centre's network.
    """

    kind: str
    axes: str
    size: int
    count: int
    wire_bytes: float
    seconds: float
    gathers: bool = False
    between: bool = False


@dataclasses.dataclass(frozen=True)
class Collected:
    """What was found in a module.

    Attributes:
      collectives: equal ones together, the slowest first.
      unread: what also talks to other devices, but in a form that isn't read, a line each.
    """

    collectives: tuple[Collective, ...]
    unread: tuple[str, ...]


def collect(module: Module, network: Network) -> Collected:
    """Returns the collectives of a module."""
    found: dict[tuple[str, str, int, bool, bool], list[float]] = collections.defaultdict(
        lambda: [0, 0.0, 0.0]
    )
    unread: dict[str, int] = collections.defaultdict(int)

    def add(part: Instruction, owner: Computation, times: int) -> None:
        kind, group = _who(part, module, network)
        if kind is None or not group:
            unread[f"{part.opcode} such as {part.name}"] += times
            return
        if kind == "all-reduce" and owner.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        if len(group) < 2:
            return
        sent = wire_bytes(kind, part, owner, len(group))
        gathers = kind == "all-reduce" and _gathers(part, owner, module)
        key = (kind, network.axes(group), len(group), gathers, network.between(group))
        entry = found[key]
        entry[0] += times
        entry[1] += times * sent
        entry[2] += times * sent / network.bandwidth(group)

    reached: set[tuple[str, str]] = set()
    started: set[tuple[str, ...]] = set()
    went_on: dict[tuple[str, ...], tuple[Instruction, Computation, int]] = {}
    for instruction, computation, times in module.running():
        if instruction.opcode == "while" and module.rounds(instruction, computation) is None:
            looped = sum(_talks(part) for part, _ in _under(instruction.attribute("body"), module))
            if looped:
                unread["rounds but the first of a loop of unknown length"] += looped
        if instruction.opcode == "conditional":  # also the branches that don't count
            for branch in module.branches(instruction):
                reached |= {(owner.name, part.name) for part, owner in _under(branch, module)}
        for part, owner in ((instruction, computation), *module.inside(instruction)):
            if not _talks(part):
                continue
            reached.add((owner.name, part.name))
            if "async_collective_fusion_config" not in part.rest:
                add(part, owner, times)
                continue
            # It is written down in each fusion that it overlaps with, and starts in one.
            shapes = str([array.shape for array in part.arrays])
            channel = re.search(r"channel_id=(\d+)", part.rest)
            mark = (computation.name, channel[1] if channel else "", part.opcode, shapes)
            if any(_target(other) == "AsyncCollectiveStart" for other in _all(owner)):
                started.add(mark)
                add(part, owner, times)
            else:
                went_on.setdefault(mark, (part, owner, times))
    for missed in went_on.keys() - started:
        add(*went_on[missed])
    for owner in module.computations.values():
        for part in _all(owner):
            if _talks(part) and (owner.name, part.name) not in reached:
                unread[f"{part.opcode} in a computation that nothing seems to call"] += 1
    collectives = [
        Collective(kind, axes, size, int(count), sent, seconds, gathers, between)
        for (kind, axes, size, gathers, between), (count, sent, seconds) in found.items()
    ]
    return Collected(
        tuple(sorted(collectives, key=lambda c: -c.seconds)),
        tuple(f"{times} times {what}" for what, times in unread.items()),
    )


def _all(computation: Computation) -> Iterable[Instruction]:
    return computation.instructions.values()


def _under(name: str | None, module: Module) -> Iterator[tuple[Instruction, Computation]]:
    """Yields what a computation runs, fusions' parts included; nothing without a name."""
    for instruction, computation, _ in module.running(name) if name is not None else ():
        yield instruction, computation
        yield from module.inside(instruction)


def _target(instruction: Instruction) -> str:
    """Returns what a custom call calls, "" for anything else."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return match[1] if match is not None and instruction.opcode == "custom-call" else ""


def _talks(instruction: Instruction) -> bool:
    """Returns whether an instruction sends anything to other devices.

    What is received was sent by another device, which runs the same program.
    """
    if kind_of(instruction) is not None:
        return True
    if instruction.opcode.removesuffix("-start") in _UNKNOWN:
        return True
    target = _target(instruction)
    if target in _OVERLAPPED:  # beside the collective itself
        return False
    return bool(_CALLS.search(target)) or (
        target == "tpu_custom_call" and '"has_communication":true' in instruction.rest
    )


def _who(part: Instruction, module: Module, network: Network) -> tuple[str | None, list[int]]:
    """Returns a collective's kind and its first group, by their place in the mesh."""
    devices = network.program(module.partitions)
    asked = groups.transfer(part.rest) if part.opcode == "send" else None
    if asked is not None:
        kind, numbers = asked
        group = network.named(numbers)
        return kind, group if len(group) == len(numbers) else []
    kind_read = kind_of(part)
    if part.opcode == "send" and "source_target_pairs" in part.rest:
        kind_read = "collective-permute"
    group = groups.first_group(part.rest, len(devices))
    return kind_read, [devices[one] for one in group if one < len(devices)]


def kind_of(instruction: Instruction) -> str | None:
    """Returns which collective an instruction is or starts, if any."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in _KINDS else None


def wire_bytes(kind: str, instruction: Instruction, computation: Computation, size: int) -> float:
    """Returns what a device sends in one collective of `size` devices, by a ring.

    Args:
      kind: as in `Collective`.
      instruction: the collective, or the `send` of one between slices.
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
