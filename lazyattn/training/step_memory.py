"""What a step holds on a device, by formula: the state exactly, the rest about.

Activations are what JAX's own linearisation keeps, found by tracing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lazyattn import sharding
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.config import ModelConfig
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import parameter_shapes


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes a device of the training state.

    Attributes:
      parameters: float32 parameters.
      optimizer: the optimiser's state, and the average of the parameters.
    """

    parameters: int
    optimizer: int


@dataclasses.dataclass(frozen=True)
class Temporaries:
    """Bytes a device of all else, at its peak.

    Attributes:
      activations: kept by the forward pass for the backward pass.
      gradients: of the blocks' parameters.
      layer: what one block keeps of all its own.
      total: of everything.
    """

    activations: float
    gradients: float
    layer: float
    total: float


def state_bytes(abstract: Any) -> StateBytes:
    """Returns the state's bytes a device.

    Args:
      abstract: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
    """
    kept = abstract.opt_state, abstract.ema
    return StateBytes(shard_bytes(abstract.params), shard_bytes(kept))


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of one device's share of arrays that carry their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def temporaries(
    experiment: ExperimentConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    counts: Mapping[str, int],
) -> Temporaries:
    """Returns an estimate of what a step needs besides the state.

    Args:
      experiment: the settings.
      mesh: of the devices.
      counts: the model's parameters, as `parameter_counts` gives them.
    """
    model, length = experiment.model, experiment.data.sequence_length
    sizes, parts = dict(mesh.shape), experiment.training.microbatches
    rows = experiment.data.batch_size // sharding.num_shards(mesh, "batch") // parts
    activations = kept_bytes(model, rows, length) / _split(sizes)
    one = dataclasses.replace(model, num_layers=1, remat="none")
    layer = kept_bytes(one, rows, length) / _split(sizes)
    blocks = counts["attention"] + counts["mlp"]
    shards = sizes["fsdp"] * sizes["tensor"]
    trained = counts["total"]
    if experiment.teaching.frozen:
        trained = sum(counts.get(name, 0) for name in ("distance_bias", "offset", "lora"))
    total = (
        activations
        + 2 * layer  # a block's own, and their gradients
        + 4 * trained / shards * (1 if parts == 1 else 2)  # gradients, and their sum
        + 2 * 2 * blocks / model.num_layers / sizes["tensor"]  # two gathered blocks, bfloat16
        + _loss_bytes(model, rows, length, sizes["tensor"])
    )
    return Temporaries(activations, 4 * blocks / shards, layer, total)


def _split(sizes: Mapping[str, int]) -> float:
    """Returns over how many devices one row's activations lie.

    Of a block's, the residual stream is whole on each device along `tensor` and the
    others, heads and SwiGLU, are split: about a quarter and three quarters.
    """
    tensor = sizes["tensor"]
    return sizes.get("sequence", 1) / (0.25 + 0.75 / tensor)


def kept_bytes(model: ModelConfig, rows: int, length: int) -> float:
    """Returns what the forward pass keeps for the backward pass, besides parameters.

    Args:
      model: the model; its attention is taken to keep what the fused kernels keep.
      rows: of a microbatch on one device.
      length: tokens a row.
    """
    attention = dataclasses.replace(model.attention, implementation="xla_chunked")
    # One layer is traced; layers in a row keep as much.
    model = dataclasses.replace(model, attention=attention, scan_layers=True)
    loss_fn = make_loss_fn(model)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), tokens)
    params = parameter_shapes(model)

    def kept(params: Any, batch: Any) -> Any:
        _, backward = jax.vjp(lambda p: loss_fn(p, batch).objective, params)
        return jax.tree.leaves(backward)

    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    return float(
        sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.eval_shape(kept, params, batch)
            if leaf.shape not in shapes
        )
    )


def _loss_bytes(model: ModelConfig, rows: int, length: int, tensor: int) -> float:
    """Returns the loss's logits of a chunk, twice, its table and the table's gradient."""
    positions = min(max(model.loss_positions, rows), rows * length)
    vocab = model.vocab_size / tensor
    return vocab * (3 * 4 * positions + (2 + 4 + 4) * model.width)
