"""A compiled module's text as instructions, and how often each of them runs.

XLA's own cost analysis counts a loop's body once. Here a loop counts as often as its
condition says: those of a train step (layers, chunks, microbatches) run from zero to a
constant.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1,
    **dict.fromkeys(("s8", "u8", "f8e4m3fn", "f8e5m2", "s4", "u4"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
# The scope in which `lazyattn.model.fetch` chooses how far keys are fetched.
_FETCH = re.compile(r"\bfetch_\d+\b")
_NAME = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one device.

    Attributes:
      dtype: HLO's name of it.
      shape: dimensions.
      on_chip: whether it lies in vector memory rather than in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, without padding; 0 for tokens and the like."""
        return _BYTES.get(self.dtype, 0) * self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the percent sign.
      opcode: such as "fusion".
      arrays: its result, or the results' arrays one after the other.
      operands: names.
      rest: attributes as text.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the result that lie in HBM."""
        return sum(array.bytes for array in self.arrays if not array.on_chip)

    def attribute(self, name: str) -> str | None:
        """Returns the computation an attribute such as "body" names."""
        match = re.search(rf"\b{name}=%([\w.\-]+)", self.rest)
        return None if match is None else match[1]

    @property
    def op_name(self) -> str:
        """Where it came from in the program, or ""."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return "" if match is None else match[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the module; `instructions` by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who uses the result of each instruction."""
        found: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {
            int(instruction.operands[0]): instruction
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        }

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module.

    Attributes:
      computations: by name.
      entry: the name of the first one to run.
      partitions: devices that run it together; None: not stated.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Reads `compiled.as_text()`."""
        computations: dict[str, Computation] = {}
        entry, name = "", None
        instructions: dict[str, Instruction] = {}
        for line in text.splitlines():
            if name is None:
                if head := _HEAD.match(line):
                    name, instructions = head[2], {}
                    entry = name if head[1] else entry
            elif line.startswith("}"):
                computations[name] = Computation(name, instructions)
                name = None
            elif instruction := _instruction(line):
                instructions[instruction.name] = instruction
        partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
        return cls(computations, entry, int(partitions[1]) if partitions else None)

    def running(self, name: str | None = None) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yields what is scheduled: instruction, computation, times it runs.

        The inside of fusions is not scheduled by itself and not yielded; a loop or a
        call is yielded, and then what it runs.

        Args:
          name: the computation to begin with; by default the entry.
        """
        yield from self._running(name or self.entry, 1)

    def _running(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode == "while":
                body = instruction.attribute("body")
                if body is not None:
                    rounds = self.trip_count(instruction, computation)
                    yield from self._running(body, times * rounds)
            elif instruction.opcode in ("call", "call-start", "async-start"):
                # "call-start": what another core of the chip, such as a SparseCore, does.
                called = instruction.attribute("calls") or instruction.attribute("to_apply")
                if called is not None:
                    yield from self._running(called, times)
            elif instruction.opcode == "conditional":
                # Which one is taken is not known here. All count; where keys are fetched,
                # the last, which fetches all.
                branches = self.branches(instruction)
                for branch in branches[-1:] if _FETCH.search(instruction.op_name) else branches:
                    yield from self._running(branch, times)

    def branches(self, conditional: Instruction) -> list[str]:
        """Returns the computations that a conditional chooses from."""
        names = re.findall(r"%([\w.\-]+)", _branches(conditional.rest))
        return [name for name in names if name in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Yields what a fusion consists of, fusions inside it included."""
        called = instruction.attribute("calls")
        if instruction.opcode not in ("fusion", "fusion-start") or called is None:
            return
        computation = self.computations[called]
        for part in computation.instructions.values():
            yield part, computation
            yield from self.inside(part)

    def trip_count(self, loop: Instruction, owner: Computation) -> int:
        """Returns how often a loop's body runs; 1 where that can't be read."""
        rounds = self.rounds(loop, owner)
        return 1 if rounds is None else rounds

    def rounds(self, loop: Instruction, owner: Computation) -> int | None:
        """Returns how often a loop's body runs; None where that can't be read."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known is not None:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "")
        body = self.computations.get(loop.attribute("body") or "")
        if condition is None or body is None or body.root.opcode != "tuple":
            return None
        compared = self._unfused(condition.root)
        direction = re.search(r"direction=(\w+)", compared.rest)
        limits = [
            value
            for instruction in condition.instructions.values()
            if (value := _integer(instruction)) is not None
        ]
        counters = [
            int(index[1])
            for instruction in condition.instructions.values()
            if instruction.opcode == "get-tuple-element"
            and (index := re.search(r"index=(\d+)", instruction.rest))
        ]
        if direction is None or direction[1] not in ("LT", "NE"):
            return None
        if len(limits) != 1 or len(counters) != 1:
            return None
        start = self._start(loop, owner, counters[0])
        step = self._step(body, counters[0])
        return max(-(-(limits[0] - start) // step), 1)

    def _unfused(self, instruction: Instruction) -> Instruction:
        """Returns what a fusion computes last."""
        while instruction.opcode == "fusion":
            instruction = self.computations[instruction.attribute("calls") or ""].root
        return instruction

    def _start(self, loop: Instruction, owner: Computation, index: int) -> int:
        """Returns a loop's counter before the first round, 0 where that can't be read."""
        given = owner.instructions[loop.operands[0]]
        if given.opcode != "tuple":
            return 0
        value = _integer(_source(owner.instructions[given.operands[index]], owner))
        return 0 if value is None else value

    def _step(self, body: Computation, index: int) -> int:
        """Returns what a round adds to its counter, 1 where that can't be read."""
        owner = body
        added = _source(body.instructions[body.root.operands[index]], body)
        while added.opcode == "fusion":
            owner = self.computations[added.attribute("calls") or ""]
            added = owner.root
        if added.opcode != "add":
            return 1
        values = [_integer(owner.instructions[name]) for name in added.operands]
        return next((value for value in values if value is not None and value > 0), 1)


def _source(instruction: Instruction, owner: Computation) -> Instruction:
    """Returns what an instruction copies."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = owner.instructions[instruction.operands[0]]
    return instruction


def _integer(instruction: Instruction) -> int | None:
    """Returns a constant's value, None for anything but an integer."""
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.operands[0]):
        return None
    return int(instruction.operands[0])


def _branches(rest: str) -> str:
    match = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if match is not None:
        return match[1]
    return " ".join(re.findall(r"(?:true|false)_computation=%[\w.\-]+", rest))


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end + 1 :]
    start = rest.index("(")
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop]
    opcode = rest[:start]
    operands: tuple[str, ...]
    if opcode in ("parameter", "constant"):
        operands = (inner,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    arrays = tuple(
        Array(
            match[1],
            tuple(int(size) for size in match[2].split(",") if size),
            "S(1)" in (match[3] or ""),
        )
        for match in _ARRAY.finditer(re.sub(r"/\*.*?\*/", "", kind))
    )
    return Instruction(head[2], opcode, arrays, operands, rest[stop + 1 :], bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis opened at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text)
