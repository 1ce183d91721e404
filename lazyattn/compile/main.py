"""`--mode=compile`: what a step needs on a machine that is not here."""

import dataclasses

import jax

from lazyattn import sharding
from lazyattn.compile import collectives, compiler, estimate, memory, topology, work
from lazyattn.compile.hlo import Module
from lazyattn.compile.network import Network
from lazyattn.compile.report import Report, Traffic, lines
from lazyattn.compile.roofline import roofline
from lazyattn.compile.suggestions import suggest
from lazyattn.errors import require
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.model.config import AUTO, Remat
from lazyattn.training import remat, step_memory


def compile_report(experiment: ExperimentConfig, name: str) -> int:
    """Prints the report of an experiment's train step on a topology.

    Returns:
      0, or 1 if the step does not fit.

    Raises:
      InputError: for an unknown topology, settings that don't go together with it, or
        a missing compiler.
    """
    where = topology.parse(name)
    quantization = experiment.training.quantization
    require(
        quantization == "none",
        "training.quantization",
        quantization,
        "'none' with --mode=compile, which knows products in the compute dtype alone",
    )
    jax.config.update("jax_platforms", "cpu")  # chips that are here are left alone
    report = examine(experiment, where)
    print("\n".join(lines(report)))
    return 0 if report.fits else 1


def examine(experiment: ExperimentConfig, where: topology.Topology) -> Report:
    """Returns the report: compiled for TPUs and CPUs, estimated for GPUs.

    With `model.remat="auto"` it is that of the policy which training would choose.
    """
    if experiment.model.remat != AUTO:
        return _examine(experiment, where)
    by_formula = {name: 0.0 for name in remat.POLICIES}
    if where.chip.is_tpu or where.chip.is_cpu:
        mesh = sharding.make_mesh(experiment.mesh, topology.devices(where))
        factory = compiler.state_factory(experiment, mesh)
        by_formula = remat.estimates(experiment, mesh, factory.abstract)

    def needs(policy: Remat) -> remat.Need:
        report = _examine(remat.with_remat(experiment, policy), where)
        return remat.Need(report.needed if report.fits else float("inf"), report)

    available = where.chip.usable_bytes
    if where.chip.is_cpu:
        available = where.chip.hbm_bytes / where.devices
    choice = remat.choose(needs, available=available, estimates=by_formula)
    told = f"{choice.policy}, chosen by auto ({choice.why})"
    return dataclasses.replace(choice.result, remat=told)


def _examine(experiment: ExperimentConfig, where: topology.Topology) -> Report:
    if not where.chip.is_tpu and not where.chip.is_cpu:
        return estimate.estimate(experiment, where)
    mesh = sharding.make_mesh(experiment.mesh, topology.devices(where))
    sharding.check_batch(
        mesh,
        experiment.data.batch_size,
        experiment.training.microbatches,
        experiment.data.sequence_length,
    )
    factory = compiler.state_factory(experiment, mesh)
    state = step_memory.state_bytes(factory.abstract)
    parameters = parameter_counts(factory.abstract.params)["total"]
    result = compiler.compile_step(experiment, mesh, factory)
    tokens = experiment.data.batch_size * experiment.data.sequence_length

    activations = gradients = None
    traffic = None
    if isinstance(result, compiler.Compiled) and where.chip.is_cpu:
        temporaries, needed = result.temporaries, result.bytes
        available = where.chip.hbm_bytes / where.devices
    elif isinstance(result, compiler.Compiled):
        module = Module.parse(result.text)
        stacked = memory.stacked_bytes(module, experiment.model.num_layers)
        activations, gradients = stacked.activations, stacked.gradients
        temporaries, needed = result.temporaries, result.bytes
        # The compiler looks at temporaries alone, not at the state beside them.
        available = where.chip.usable_bytes
        traffic = _traffic(experiment, where, mesh, module, tokens)
    else:
        temporaries, available = result.bytes, result.available
        needed = result.bytes
        if result.what == "temporaries alone":
            needed += state.parameters + state.optimizer
        else:
            temporaries -= state.parameters + state.optimizer
    report = Report(
        topology=where,
        mesh=dict(mesh.shape),
        parameters=parameters,
        tokens=tokens,
        microbatches=experiment.training.microbatches,
        remat=experiment.model.remat,
        implementation=result.implementation,
        state=state,
        activations=activations,
        gradients=gradients,
        temporaries=temporaries,
        needed=needed,
        available=available,
        seconds=result.seconds,
        traffic=traffic,
        suggestions=suggest(
            experiment,
            mesh.shape,
            state=state.parameters + state.optimizer,
            available=available,
            parameters=parameters,
        ),
        compiler_gave_up=isinstance(result, compiler.TooLarge),
    )
    return report


def _traffic(
    experiment: ExperimentConfig,
    where: topology.Topology,
    mesh: jax.sharding.Mesh,
    module: Module,
    tokens: int,
) -> Traffic:
    """Returns the compiled module's work, collectives and times."""
    length = experiment.data.sequence_length
    done = work.count(module, length)
    found = collectives.collect(module, Network.of(mesh, where.shape, where.chip))
    model_flops = flops_per_token(experiment.model, length).training * tokens / where.devices
    roof = roofline(
        where.chip,
        flops=done.flops,
        hbm_bytes=done.hbm_bytes,
        network=found.collectives,
        model_flops=model_flops,
    )
    return Traffic(
        done.weight_flops,
        done.attention_flops,
        done.hbm_bytes,
        found.collectives,
        roof,
        found.unread,
        done.unread_loops,
    )
