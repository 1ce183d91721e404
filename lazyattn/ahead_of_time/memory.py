"""What of a device's memory is parameters, optimiser, gradients, activations and the rest."""

import dataclasses
import math
from typing import Any

import jax

from lazyattn.ahead_of_time.hlo import Instruction, Module


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes a device of the training state.

    Attributes:
      parameters: float32 parameters.
      optimizer: the optimiser's state.
    """

    parameters: int
    optimizer: int


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Bytes a device of arrays with one part for each layer.

    Attributes:
      activations: kept by the forward pass for the backward pass.
      gradients: of the blocks' parameters.
    """

    activations: int
    gradients: int


def state_bytes(abstract: Any) -> StateBytes:
    """Returns the state's bytes a device.

    Args:
      abstract: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
    """
    return StateBytes(shard_bytes(abstract.params), shard_bytes(abstract.opt_state))


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of one device's share of arrays that carry their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


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
