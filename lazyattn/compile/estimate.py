"""The same report by formula, for chips whose compiler needs the chip itself.

The state's memory is exact; activations are what JAX's own linearisation keeps, found by
tracing; products are counted; traffic follows the usual scheme of fully sharded training.
"""

import math
from collections.abc import Mapping

import jax

from lazyattn import sharding
from lazyattn.compile import compiler
from lazyattn.compile.chips import Chip
from lazyattn.compile.collectives import Collective
from lazyattn.compile.report import Report, Traffic
from lazyattn.compile.roofline import roofline
from lazyattn.compile.suggestions import suggest
from lazyattn.compile.topology import Topology
from lazyattn.errors import require
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.training import step_memory


def estimate(experiment: ExperimentConfig, where: Topology) -> Report:
    """Returns the report of a step on GPUs.

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
    state = step_memory.state_bytes(factory.abstract)
    counts = parameter_counts(factory.abstract.params)
    model, length = experiment.model, experiment.data.sequence_length
    held = step_memory.temporaries(experiment, mesh, counts)
    needed = state.parameters + state.optimizer + held.total
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
        activations=held.activations,
        gradients=held.gradients,
        temporaries=held.total,
        needed=needed,
        available=available,
        seconds=None,
        traffic=_traffic(experiment, where, sizes, counts, held.layer),
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
    # Matrices again unless "dots" keeps them; attention, forward 4 products and backward 5
    # where softmax would have 2, again for "full".
    # Nobody needs a block's last product, SwiGLU's down, again.
    in_blocks = per_token.weights - 2.0 * model.vocab_size * model.width
    redone = in_blocks - 2.0 * model.num_layers * model.hidden_width * model.width
    weights = 3 * per_token.weights + (redone if model.remat in ("attention", "full") else 0.0)
    attention = per_token.attention / 2 * (4 * (1 + (model.remat == "full")) + 5)
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
    roof = roofline(
        where.chip,
        flops=(weights + attention) * tokens,
        hbm_bytes=hbm,
        network=found,
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
