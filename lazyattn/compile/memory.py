"""What of a compiled step's memory is gradients and activations."""

import dataclasses

from lazyattn.compile.hlo import Instruction, Module


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Bytes a device of arrays with one part for each layer.

    Attributes:
      activations: kept by the forward pass for the backward pass.
      gradients: of the blocks' parameters.
    """

    activations: int
    gradients: int


def stacked_bytes(module: Module, layers: int) -> Stacked:
    """Returns what the loops over layers write, a part each round.

    Args:
      module: a compiled train step with scanned layers.
      layers: rounds of those loops.
    """
    activations = gradients = 0
    for instruction, computation, _ in module.running():
        if instruction.opcode != "while":
            continue
        if module.trip_count(instruction, computation) != layers:
            continue
        written = sum(
            array.bytes
            for index, array in enumerate(instruction.arrays)
            if array.shape[:1] == (layers,) and _is_written(instruction, index, module)
        )
        if "transpose(" in instruction.op_name:
            gradients += written
        else:
            activations += written
    return Stacked(activations, gradients)


def _is_written(loop: Instruction, index: int, module: Module) -> bool:
    """Returns whether a loop's body hands on something else than it was given."""
    body = module.computations[loop.attribute("body") or ""]
    if body.root.opcode != "tuple" or len(body.root.operands) <= index:
        return False
    result = body.instructions[body.root.operands[index]]
    return not (result.opcode == "get-tuple-element" and f"index={index}," in result.rest + ",")
