"""What a step does on one device: floating-point operations, and bytes to and from HBM."""

import dataclasses
import math

from lazyattn.compile.hlo import Array, Computation, Instruction, Module

# The TPU kernels' names begin like this, with their products in units of one (queries
# with keys) over all visible pairs, nothing skipped: forward 2 (scores, twice) + values
# + their sum over live entries; backward 5.
KERNELS = {"lazy_forward": 4, "lazy_backward": 5}

# Neither read nor write anything.
_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"),
        *("conditional", "after-all", "partition-id", "replica-id", "opt-barrier"),
        *("async-start", "async-update", "call-start", "call-update", "domain"),
    }
)


@dataclasses.dataclass(frozen=True)
class Work:
    """One step's work on one device.

    Attributes:
      weight_flops: of products outside the attention kernels.
      attention_flops: of the attention kernels, if they skip nothing.
      hbm_bytes: read and written by scheduled instructions.
      kernel_calls: how often each attention kernel runs.
      unread_loops: loops of unknown length, which count as one round.
    """

    weight_flops: float
    attention_flops: float
    hbm_bytes: float
    kernel_calls: dict[str, int]
    unread_loops: int = 0

    @property
    def flops(self) -> float:
        """All floating-point operations of products."""
        return self.weight_flops + self.attention_flops


def count(module: Module, length: int) -> Work:
    """Returns the work of a module.

    Args:
      module: a compiled train step.
      length: tokens a row, of which a token sees (length + 1) / 2 on average.
    """
    weights = attention = hbm = 0.0
    calls: dict[str, int] = {}
    unread = 0
    for instruction, computation, times in module.running():
        for part, owner in ((instruction, computation), *module.inside(instruction)):
            weights += times * product_flops(part, owner)
        kernel = kernel_of(instruction)
        if kernel is not None:
            calls[kernel] = calls.get(kernel, 0) + times
            pairs = _queries(instruction, computation).size * (length + 1) / 2
            attention += times * KERNELS[kernel] * 2.0 * pairs
        hbm += times * hbm_bytes(instruction, computation, module)
        if instruction.opcode == "while" and module.rounds(instruction, computation) is None:
            unread += 1
    return Work(weights, attention, hbm, calls, unread)


def kernel_of(instruction: Instruction) -> str | None:
    """Returns the name of the attention kernel that an instruction calls, if it does."""
    if instruction.opcode != "custom-call" or "tpu_custom_call" not in instruction.rest:
        return None
    return next((name for name in KERNELS if instruction.name.startswith(name)), None)


def _queries(call: Instruction, computation: Computation) -> Array:
    """Returns the queries of a kernel: the first operand with batch, heads, size and length.

    Results won't do: the backward pass's first ones have the shape of the keys, which
    may have fewer heads.
    """
    operands = (computation.instructions[name].arrays[0] for name in call.operands)
    return next(array for array in operands if len(array.shape) == 4)


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the floating-point operations of a matrix product, 0 for anything else.

    libtpu writes a product as a convolution. For [m, k] by [k, n] the three sizes give
    m k n = sqrt(mk kn mn), whatever the dimensions are called; a batch axis common to all
    three would count with its square root too much, and none of our products has one.
    """
    if instruction.opcode not in ("convolution", "dot"):
        return 0.0
    sizes = [
        math.prod(computation.instructions[name].arrays[0].shape)
        for name in instruction.operands[:2]
    ]
    return 2.0 * math.sqrt(sizes[0] * sizes[1] * instruction.arrays[0].size)


def hbm_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Returns what an instruction reads from and writes to HBM, in bytes.

    Results and operands once each, but for what lies in vector memory; of what is only
    sliced or updated in place, the slice.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0

    def operand(index: int) -> Instruction:
        return computation.instructions[instruction.operands[index]]

    if opcode in ("dynamic-slice", "slice", "gather"):
        return float(instruction.bytes + instruction.hbm_bytes)
    if opcode in ("slice-start", "dynamic-slice-start"):
        # (source, slice, context): the slice is read, and written.
        part = instruction.arrays[1]
        return float(part.bytes * (1 if part.on_chip else 2))
    if opcode == "dynamic-update-slice":
        return 2.0 * operand(1).hbm_bytes
    if opcode == "send":  # its result is its operand
        return float(operand(0).hbm_bytes)
    if opcode == "copy-start":
        # (destination, source, context): read one, write the other.
        return float(sum(a.bytes for a in instruction.arrays[:2] if not a.on_chip))
    if opcode in ("fusion", "fusion-start"):
        called = module.computations[instruction.attribute("calls") or ""]
        if opcode == "fusion-start":
            # (operands, results, context), on GPUs.
            root = called.root
            roots = (
                [root]
                if root.opcode != "tuple"
                else [called.instructions[name] for name in root.operands]
            )
            arrays = tuple(array for one in roots for array in one.arrays)
            instruction = dataclasses.replace(instruction, arrays=arrays)
        read = sum(
            min(_bytes_read(called, index, module), operand(index).hbm_bytes)
            for index in range(len(instruction.operands))
            if operand(index).hbm_bytes
        )
        return float(read + _bytes_written(called, instruction, module))
    read = sum(computation.instructions[name].hbm_bytes for name in instruction.operands)
    return float(read + instruction.hbm_bytes)


def _bytes_read(computation: Computation, index: int, module: Module) -> float:
    """Returns how much of a fusion's parameter is read."""
    return _read_of(computation, computation.parameters[index], module)


def _read_of(computation: Computation, value: Instruction, module: Module) -> float:
    total = 0.0
    for user in computation.users[value.name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _read_of(computation, user, module)
        elif user.opcode == "fusion":
            called = module.computations[user.attribute("calls") or ""]
            for index, name in enumerate(user.operands):
                if name == value.name:
                    total += _bytes_read(called, index, module)
        else:
            return float(value.bytes)
    return min(total, float(value.bytes))


def _bytes_written(called: Computation, fusion: Instruction, module: Module) -> float:
    """Returns how much of a fusion's results is written to HBM."""
    results = [called.root]
    if called.root.opcode == "tuple":
        results = [called.instructions[name] for name in called.root.operands]
    if len(results) != len(fusion.arrays):
        return float(fusion.hbm_bytes)
    return sum(
        0.0 if array.on_chip else _written(result, called, array, module)
        for result, array in zip(results, fusion.arrays, strict=True)
    )


def _written(result: Instruction, owner: Computation, array: Array, module: Module) -> float:
    while result.opcode == "bitcast":
        result = owner.instructions[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return float(owner.instructions[result.operands[1]].bytes)
    if result.opcode == "fusion" and len(result.arrays) == 1:
        inner = module.computations[result.attribute("calls") or ""]
        return _written(inner.root, inner, array, module)
    return float(array.bytes)
