"""`model.remat="auto"`: the fastest policy whose step fits, as the compiler counts its memory.

What recomputes less is faster. A formula says where to begin, so that no step is compiled that is
far too large; what the compiler says of the step decides.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lazyattn import sharding
from lazyattn.checkpoint.state import TrainState
from lazyattn.distributed import tell_all
from lazyattn.experiment import ExperimentConfig
from lazyattn.model.accounting import parameter_counts
from lazyattn.model.config import AUTO, Remat
from lazyattn.model.objective import Batch, make_loss_fn
from lazyattn.training import step_memory
from lazyattn.training.optimizer import make_schedule
from lazyattn.training.step import TrainStep, make_train_step

# From the fastest to the smallest.
POLICIES: tuple[Remat, ...] = ("none", "dots", "attention", "full")
# Of a device's memory, what a step may take: validation, samples and fragments want some, too.
MARGIN = 0.92
# Of what the formula counts, the least that compilers were seen to need: XLA computes again what
# is cheap, and more so where layers are not scanned (docs/log/2026-11-30-remat-auto.md).
_LEAST_SCANNED, _LEAST_UNROLLED = 0.7, 0.4
# XLA recomputes by itself near the device's limit, and doesn't know what an attention costs.
# Far from it there is no need to look.
_NEAR = 0.6
_CLONE = re.compile(r"^\s*(?:ROOT )?%?\S*\.remat\S* = .*\bcustom-call\(", re.MULTILINE)
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|exceeds available|out of memory", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Need:
    """What the compiler says of a step.

    Attributes:
      bytes: on a device; infinite where it gave up.
      result: what was compiled.
      text: gives the program, which is long.
    """

    bytes: float
    result: Any
    text: Callable[[], str] = str


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
      policy: one of `POLICIES`.
      why: for people.
      result: what was compiled; None: nothing was.
    """

    policy: Remat
    why: str
    result: Any = None


def choose(
    needs: Callable[[Remat], Need],
    *,
    available: float | None,
    estimates: Mapping[Remat, float],
    agree: Callable[[str, bool], bool] = lambda policy, fits: fits,
) -> Choice:
    """Returns the fastest policy that fits; the smallest if none does.

    Args:
      needs: compiles the step with a policy.
      available: bytes of a device; None: not known, and nothing is compiled.
      estimates: bytes that each policy's step needs at least; what is more than fits is not
        compiled.
      agree: whether it fits on all processes, from the policy and whether it fits here.
    """
    if available is None:
        return Choice("none", "these devices do not say how much memory they have")
    limit = MARGIN * available
    first = next(
        (i for i, name in enumerate(POLICIES) if estimates[name] <= limit),
        len(POLICIES) - 1,
    )
    told = [f"{name} would need at least {_gib(estimates[name])}" for name in POLICIES[:first]]
    for policy in POLICIES[first:]:
        need = needs(policy)
        clones = _NEAR * available < need.bytes <= limit and bool(_CLONE.search(need.text()))
        fits = agree(policy, need.bytes <= limit and not clones)
        if fits or policy == POLICIES[-1]:
            break
        told.append(
            f"{policy} needs {_gib(need.bytes)}" + (" with kernels run twice" if clones else "")
        )
    why = f"its step needs {_gib(need.bytes)} of {_gib(available)} a device"
    if not fits:
        why += ", more than the margin leaves"
    return Choice(policy, "; ".join([why, *told]), need.result)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size < float("inf") else "more than there is"


def with_remat(experiment: ExperimentConfig, policy: Remat) -> ExperimentConfig:
    """Returns the experiment with another policy."""
    return dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, remat=policy)
    )


def estimates(
    experiment: ExperimentConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    abstract: TrainState,
) -> dict[Remat, float]:
    """Returns about how many bytes a device each policy's step needs at least."""
    state = step_memory.state_bytes(abstract)
    counts = parameter_counts(abstract.params)
    share = _LEAST_SCANNED if experiment.model.scan_layers else _LEAST_UNROLLED

    def needed(policy: Remat) -> float:
        held = step_memory.temporaries(with_remat(experiment, policy), mesh, counts)
        return state.parameters + state.optimizer + share * held.total

    return {policy: needed(policy) for policy in POLICIES}


def available_bytes(mesh: jax.sharding.Mesh) -> float | None:
    """Returns the memory of the smallest device, over all processes; None: not known."""
    here = [
        (device.memory_stats() or {}).get("bytes_limit")
        for device in mesh.devices.flat
        if device.process_index == jax.process_index()
    ]
    least = min((size for size in here if size), default=0) if all(here) else 0
    told = [int(size) for size in tell_all("remat/memory", str(least))]
    return float(min(told)) if min(told) > 0 else None


def step_of(
    experiment: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainStep:
    """Returns the step of an experiment whose `model.remat` is a policy."""
    training, teaching = experiment.training, experiment.teaching
    return make_train_step(
        make_loss_fn(
            experiment.model,
            training.z_loss,
            distill=teaching.distill,
            frozen=teaching.frozen,
            quantization=training.quantization,
        ),
        optimizer,
        make_schedule(experiment.optimizer, training.steps),
        mesh=mesh,
        shardings=shardings,
        microbatches=training.microbatches,
        ema_decay=experiment.optimizer.ema_decay,
    )


def make_step(
    experiment: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    abstract: TrainState,
) -> tuple[TrainStep, list[str]]:
    """Returns the trainer's step, and lines on how its remat was chosen.

    With `model.remat="auto"` it is compiled already, unless the devices do not say what memory
    they have. All processes choose the same.
    """

    def step_with(policy: Remat) -> TrainStep:
        return step_of(with_remat(experiment, policy), mesh, optimizer, shardings)

    if experiment.model.remat != AUTO:
        return step_with(experiment.model.remat), []
    available = available_bytes(mesh)
    batch = abstract_batch(experiment, mesh)
    choice = choose(
        lambda policy: _need(step_with(policy), abstract, batch),
        available=available,
        estimates={} if available is None else estimates(experiment, mesh, abstract),
        agree=lambda policy, fits: all(tell_all(f"remat/{policy}", "fits" if fits else "")),
    )
    step = choice.result or step_with(choice.policy)
    return step, [f"remat    {choice.policy}, chosen by auto: {choice.why}"]


def _need(step: TrainStep, state: TrainState, batch: Batch) -> Need:
    """Compiles a step for its memory."""
    lowered = step.lower(state, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not _TOO_LARGE.search(str(error)):
            raise
        return Need(float("inf"), step)
    memory = compiled.memory_analysis()
    made = TrainStep(compiled, step.mesh)
    return Need(compiled_bytes(memory), made, lambda: compiled.as_text() or "")


def compiled_bytes(memory: Any) -> int:
    """Returns the bytes a device of a compiled program, by its `memory_analysis`."""
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def abstract_batch(experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> Batch:
    """Returns a batch as `jax.ShapeDtypeStruct`s laid out over the mesh."""
    rows: jax.Array = jax.ShapeDtypeStruct(  # type: ignore[assignment]
        (experiment.data.batch_size, experiment.data.sequence_length),
        jnp.int32,
        sharding=jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length")),
    )
    return dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), rows)
