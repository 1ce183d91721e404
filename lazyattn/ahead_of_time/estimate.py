"""The same report by formula, for chips whose compiler needs the chip itself.

The state's memory is exact; activations are what JAX's own linearisation keeps, found by
tracing; products are counted; traffic follows the usual scheme of fully sharded training.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lazyattn import sharding
from lazyattn.ahead_of_time import compiler, memory
from lazyattn.ahead_of_time.chips import Chip
from lazyattn.ahead_of_time.collectives import Collective
from lazyattn.ahead_of_time.report import Report, Traffic
from lazyattn.ahead_of_time.roofline import roofline
from lazyattn.ahead_of_time.suggestions import suggest
from lazyattn.ahead_of_time.topology import Topology
from lazyattn.errors import require
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.model.config import ModelConfig
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import parameter_shapes


def estimate(experiment: ExperimentConfig, where: Topology) -> Report:
    """Returns the report of a step on GPUs.

    Args:
      experiment: the settings.
      where: how many GPUs.

    Raises:
      InputError: if the settings and the number of GPUs don't go together.
    """
    mesh = jax.sharding.AbstractMesh(
        tuple(_sizes(experiment, where.devices).values()), sharding.MESH_AXES
    )
    sizes = dict(mesh.shape)
    parts = experiment.training.microbatches
    sharding.check_batch(mesh, experiment.data.batch_size, parts, experiment.data.sequence_length)
    factory = compiler.state_factory(experiment, mesh)
    state = memory.state_bytes(factory.abstract)
    counts = parameter_counts(factory.abstract.params)
    model, length = experiment.model, experiment.data.sequence_length
    rows = experiment.data.batch_size // sharding.num_shards(mesh, "batch") // parts

    activations = kept_bytes(model, rows, length) / _split(sizes)
    one = dataclasses.replace(model, num_layers=1, remat="none")
    layer = kept_bytes(one, rows, length) / _split(sizes)
    blocks = counts["attention"] + counts["mlp"]
    shards = sizes["fsdp"] * sizes["tensor"]
    gradients = 4 * blocks / shards
    temporaries = (
        activations
        + 2 * layer  # a block's own, and their gradients
        + 4 * counts["total"] / shards * (1 if parts == 1 else 2)  # gradients, and their sum
        + 2 * 2 * blocks / model.num_layers / sizes["tensor"]  # two gathered blocks, bfloat16
        + _loss_bytes(model, rows, sizes["tensor"])
    )
    needed = state.parameters + state.optimizer + temporaries
    available = where.chip.usable_bytes
    return Report(
        topology=where,
        mesh=sizes,
        parameters=counts["total"],
        tokens=experiment.data.batch_size * length,
        microbatches=parts,
        remat=model.remat,
        implementation="of the GPU",
        state=state,
        activations=activations,
        gradients=gradients,
        temporaries=temporaries,
        needed=needed,
        available=available,
        seconds=None,
        traffic=_traffic(experiment, where, sizes, counts, layer),
        suggestions=suggest(
            experiment,
            sizes,
            state=state.parameters + state.optimizer,
            available=available,
            parameters=counts["total"],
        ),
    )


def _sizes(experiment: ExperimentConfig, devices: int) -> dict[str, int]:
    """Returns the mesh's sizes with the -1 filled in."""
    sizes = {axis: getattr(experiment.mesh, axis) for axis in sharding.MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    require(
        math.prod(sizes.values()) == devices,
        "mesh",
        sizes,
        f"sizes with a product of {devices}, the number of devices",
    )
    return sizes


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
    model = dataclasses.replace(model, attention=attention)
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


def _loss_bytes(model: ModelConfig, rows: int, tensor: int) -> float:
    """Returns the loss's logits of a chunk, twice, its table and the table's gradient."""
    positions = max(model.loss_chunk, rows)
    vocab = model.vocab_size / tensor
    return vocab * (3 * 4 * positions + (2 + 4 + 4) * model.width)


def _traffic(
    experiment: ExperimentConfig,
    where: Topology,
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    layer: float,
) -> Traffic:
    model, length = experiment.model, experiment.data.sequence_length
    per_token = flops_per_token(model, length)
    tokens = experiment.data.batch_size * length / where.devices
    again = 0 if model.remat == "none" else 1
    # Matrices again for "full"; attention, forward 4 products and backward 5 where
    # softmax would have 2, again unless nothing is.
    # Nobody needs a block's last product, SwiGLU's down, again.
    in_blocks = per_token.weights - 2.0 * model.vocab_size * model.width
    redone = in_blocks - 2.0 * model.num_layers * model.hidden_width * model.width
    weights = 3 * per_token.weights + (redone if model.remat == "full" else 0.0)
    attention = per_token.attention / 2 * (4 * (1 + again) + 5)
    parts = experiment.training.microbatches
    blocks = counts["attention"] + counts["mlp"]
    shards = sizes["fsdp"] * sizes["tensor"]
    passes = 3 + again
    hbm = (
        32 * counts["total"] / shards  # AdamW: seven arrays and the gradient, float32
        + passes * parts * 2 * blocks / sizes["tensor"]
        + parts * model.num_layers * layer * 2 * (1 + again)
    )
    found = _collectives(experiment, where.chip, sizes, blocks, passes, tokens)
    seconds: dict[str, float] = {}
    for each in found:
        seconds[each.axes] = seconds.get(each.axes, 0.0) + each.seconds
    roof = roofline(
        where.chip,
        flops=(weights + attention) * tokens,
        hbm_bytes=hbm,
        network=seconds,
        model_flops=per_token.training * tokens,
    )
    return Traffic(weights * tokens, attention * tokens, hbm, tuple(found), roof)


def _collectives(
    experiment: ExperimentConfig,
    chip: Chip,
    sizes: Mapping[str, int],
    blocks: int,
    passes: int,
    tokens: float,
) -> list[Collective]:
    """Returns what fully sharded and tensor-parallel training send."""
    model, parts = experiment.model, experiment.training.microbatches
    layers, data = model.num_layers, sizes["data"]
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    held = 2 * blocks / tensor  # bfloat16
    # (kind, axis, devices, devices between neighbours, times, bytes sent in all)
    found = []
    if fsdp > 1:
        share, gathers = (fsdp - 1) / fsdp, 2  # forward and backward
        found += [
            (
                "all-gather",
                "fsdp",
                fsdp,
                tensor,
                gathers * parts * 7 * layers,
                gathers * parts * held * share,
            ),
            ("reduce-scatter", "fsdp", fsdp, tensor, parts * 7 * layers, parts * held * share),
        ]
    if data > 1:
        sent = 2 * (data - 1) / data * 2 * held / fsdp * parts
        found.append(("all-reduce", "data", data, fsdp * tensor, parts * 7 * layers, sent))
    if tensor > 1:
        # After attention and SwiGLU, forward and again; before both, backward.
        times = 2 * (passes - 1) * layers
        once = 2 * (tensor - 1) / tensor * 2 * model.width * tokens * tensor
        found.append(("all-reduce", "tensor", tensor, 1, times * parts, times * once))
    return [
        Collective(kind, axis, size, times, sent, sent / _bandwidth(chip, size, step))
        for kind, axis, size, step, times, sent in found
    ]


def _bandwidth(chip: Chip, size: int, step: int) -> float:
    """Returns a GPU's rate in a ring of `size` GPUs, every `step`-th of them."""
    if size * step <= chip.host_chips:
        return chip.link_bandwidth
    # Between hosts, the GPUs of a host that take part share its network cards.
    assert chip.network_bandwidth is not None
    together = max(chip.host_chips // step, 1)
    return min(chip.link_bandwidth, together * chip.network_bandwidth)
