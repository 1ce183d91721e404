"""The very train step, compiled for TPUs that are not here, or for this machine's CPU."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator

import jax

from lazyattn.checkpoint.state import StateFactory, make_state_factory
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig
from lazyattn.training.remat import abstract_batch, step_of
from lazyattn.training.teaching import make_run_optimizer
from pallas_kernels import target
from pallas_kernels.tpu import support

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)"
_TOO_MUCH = (
    re.compile(rf"temporaries \({_AMOUNT}B?\) exceeds available HBM \({_AMOUNT}B?\)"),
    re.compile(rf"Used {_AMOUNT}B? of {_AMOUNT}B? hbm"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made.

    Attributes:
      text: the optimised module.
      arguments: bytes a device of state and batch.
      temporaries: bytes a device of everything else, at its peak.
      code: bytes of the program.
      seconds: that tracing and compiling took.
      implementation: of the attention.
    """

    text: str
    arguments: int
    temporaries: int
    code: int
    seconds: float
    implementation: str

    @property
    def bytes(self) -> int:
        """Bytes a device."""
        return self.arguments + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """What the compiler said instead.

    Attributes:
      bytes: it would need on a device.
      available: bytes of a device.
      what: that `bytes` counts.
      seconds: until it gave up.
      implementation: of the attention.
    """

    bytes: int
    available: int
    what: str
    seconds: float
    implementation: str


def compile_step(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, factory: StateFactory
) -> Compiled | TooLarge:
    """Compiles the train step.

    Raises:
      InputError: if the settings and the mesh do not go together.
    """
    start = time.perf_counter()
    lowered, implementation = _lower(experiment, mesh, factory)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if refusal is None:
            raise
        need, available, what = refusal
        return TooLarge(need, available, what, time.perf_counter() - start, implementation)
    memory = compiled.memory_analysis()
    assert memory is not None
    return Compiled(
        compiled.as_text() or "",
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        time.perf_counter() - start,
        implementation,
    )


def read_refusal(message: str) -> tuple[int, int, str] | None:
    """Returns the bytes needed, those available and what was counted; None: another error."""
    for pattern, what in zip(_TOO_MUCH, ("temporaries alone", "in all"), strict=True):
        if match := pattern.search(message):
            need, available = (int(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
            return need, available, what
    return None


def _lower(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, factory: StateFactory
) -> tuple[jax.stages.Lowered, str]:
    """Traces the step with the attention that a TPU, or a CPU, would take."""
    asked = experiment.model.attention.implementation
    if mesh.devices.flat[0].platform == "cpu":
        name = asked or "xla_chunked"
        return _traced(_with_implementation(experiment, name), mesh, factory), name
    generation = support.generation_of(mesh.devices.flat[0].device_kind)
    assert generation is not None
    with _pretended(generation):
        if asked is not None:
            return _traced(experiment, mesh, factory), asked
        try:
            return _traced(_with_implementation(experiment, "tpu"), mesh, factory), "tpu"
        except InputError as error:
            if "can't do this call" not in str(error):
                raise
            # What the call would fall back to, there as here.
            chosen = _with_implementation(experiment, "xla_chunked")
            return _traced(chosen, mesh, factory), "xla_chunked"


@contextlib.contextmanager
def _pretended(generation: str) -> Iterator[None]:
    # Tracings made for this machine must not be taken for that one.
    jax.clear_caches()
    with target.compile_for(generation):
        yield
    jax.clear_caches()


def _with_implementation(experiment: ExperimentConfig, name: str) -> ExperimentConfig:
    attention = dataclasses.replace(experiment.model.attention, implementation=name)
    return dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, attention=attention)
    )


def _traced(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, factory: StateFactory
) -> jax.stages.Lowered:
    step = step_of(experiment, mesh, make_run_optimizer(experiment), factory.shardings)
    return step.lower(factory.abstract, abstract_batch(experiment, mesh))


def state_factory(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> StateFactory:
    """Returns the shapes and shardings of the experiment's state.

    Parameters are traced by running the model on one token, which needs no kernel.
    """
    chosen = _with_implementation(experiment, "xla_chunked")
    return make_state_factory(chosen, mesh, make_run_optimizer(experiment))  # type: ignore[arg-type]  # nothing is placed
