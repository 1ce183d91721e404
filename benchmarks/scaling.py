"""The train step on one device and on all, split along one mesh axis after the other.

    python -m benchmarks.scaling --config=configs/fineweb_edu.py:lazy_340m_10b
    python -m benchmarks.scaling --config=configs/fineweb_edu.py:lazy_1300m_100b \\
        --lengths=16384 --meshes=fsdp,fsdp+tensor:2 --attentions=lazy

The step is that of `benchmarks.train_step`: freshly initialized parameters, random tokens, a
document a row, the same batch every time. For each length and attention it is timed on one device,
then on all devices of each mesh:

- weak: as many rows for each device as one device has. All devices of `tensor` and `sequence`
  work on all of these rows, each on its heads or its part of the length.
- strong: the rows of one device, shared by all.

Efficiency is tokens a second over those of as many single devices. A trace of some steps says how
long a GPU was in collectives, waiting for the others included, and which share of this was hidden
behind other kernels. cuDNN's attention can't be called on parts of rows, so it has no `sequence`.

All programs of a length are compiled side by side, which takes most of the time. Each line is
written as soon as it is there. NVLink multicast is off unless NCCL_NVLS_ENABLE says otherwise.

One process has all GPUs; or a process has one, as in a cluster, each with its own
CUDA_VISIBLE_DEVICES, `--coordinator`, `--process_count` and `--process_id`.
"""

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import provenance, step_profile, train_step
from lazyattn import distributed, paths, sharding
from lazyattn.errors import InputError, require
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.model.accounting import parameter_counts
from lazyattn.training import remat

SCALINGS = ("weak", "strong")
_COLLECTIVE = re.compile(
    r"nccl|all_?reduce|all_?gather|reduce_?scatter|collective|memcpyp2p", re.IGNORECASE
)
_PART = re.compile(r"([a-z]+)(?::([0-9]+))?")


@dataclasses.dataclass
class Case:
    """What is timed.

    Attributes:
      attention: a key of `train_step.KINDS`.
      experiment: the settings, with the rows of all devices.
      mesh: where.
      split: what the mesh was called; None: one device.
      scaling: of `SCALINGS`; None: one device.
    """

    attention: str
    experiment: ExperimentConfig
    mesh: jax.sharding.Mesh
    split: str | None = None
    scaling: str | None = None


def mesh_config(text: str) -> sharding.MeshConfig:
    """Returns a mesh from axes with pluses between them, such as "fsdp+tensor:2".

    Raises:
      InputError: for anything else.
    """
    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    for part in text.split("+"):
        found = _PART.fullmatch(part)
        require(
            found is not None and found[1] in sizes,
            "--meshes",
            text,
            f"of {', '.join(sharding.MESH_AXES)} with pluses between them, each but one with its"
            " size, as in fsdp+tensor:2",
        )
        assert found is not None
        sizes[found[1]] = int(found[2]) if found[2] else -1
    return sharding.MeshConfig(**sizes)


def cases(experiment: ExperimentConfig, length: int, options: flags.FlagValues) -> Iterator[Case]:
    """Yields what is timed at a length, each attention's single device first."""
    rows = options.tokens // length
    require(rows >= 1, "--tokens", options.tokens, f"at least {length}, a row of --lengths")
    one = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])

    def sized(rows: int) -> ExperimentConfig:
        return train_step.with_batch(experiment, rows, length, 1)

    for attention in options.attentions:
        yield Case(attention, sized(rows), one)
        for scaling in options.scaling:
            for split in options.meshes:
                mesh = sharding.make_mesh(mesh_config(split))
                if attention == "cudnn" and mesh.shape["sequence"] > 1:
                    continue
                times = mesh.size if scaling == "weak" else 1
                yield Case(attention, sized(rows * times), mesh, split, scaling)


def measure(case: Case, step: Any, state: Any, options: flags.FlagValues) -> dict[str, Any]:
    """Times a compiled step and traces it; the state is consumed.

    Returns:
      ms (the median round), least, greatest, tokens_per_second, mfu, gib (of a device, by the
      compiler's count), loss, collectives_ms and hidden; the last two None without a trace.
    """
    experiment = case.experiment
    batch = train_step.random_batch(experiment, case.mesh, np.random.default_rng(0))
    metrics: Any = None

    def steps(count: int) -> float:
        nonlocal state, metrics
        for _ in range(count):
            state, metrics = step(state, batch)
        return float(metrics["loss"])  # on the host: all steps are done

    steps(2)
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        loss = steps(options.steps)
        times.append(1e3 * (time.perf_counter() - start) / options.steps)
    require(math.isfinite(loss), "the loss", loss, "finite")
    ms = statistics.median(times)
    rate = 1e3 * experiment.data.batch_size * experiment.data.sequence_length / ms
    found = {
        "ms": ms,
        "least": min(times),
        "greatest": max(times),
        "tokens_per_second": rate,
        "mfu": train_step.mfu(experiment, case.mesh, rate),
        "gib": remat.compiled_bytes(step.memory_analysis()) / 2**30,
        "loss": loss,
    }
    if options.traced and case.mesh.size > 1:
        events = step_profile.trace(lambda: steps(options.traced))
        found |= collectives(events, options.traced)
    return found


def collectives(events: Iterable[step_profile.Event], steps: int) -> dict[str, float]:
    """Returns a GPU's time in collectives and beside them, in milliseconds a step.

    Args:
      events: of a device, from all its streams, in nanoseconds.
      steps: how many they are of.

    Returns:
      busy_ms: in any kernel; collectives_ms: in those that talk to other devices; hidden: the
      share of the latter in which another kernel ran. Nothing if there are no events.
    """
    talk, work = [], []
    for event in events:
        kind = talk if _COLLECTIVE.search(event.kernel) else work
        kind.append((event.start, event.stop))
    if not talk and not work:
        return {}
    talking, working, both = (_length(spans) for spans in (talk, work, [*talk, *work]))
    return {
        "busy_ms": both / 1e6 / steps,
        "collectives_ms": talking / 1e6 / steps,
        "hidden": (talking + working - both) / talking if talking else 0.0,
    }


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """Returns how much of the line all spans cover."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _reason(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class _States:
    """Initial states of the attentions: made once, then copied, which needs no compiler."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, case: Case) -> Any:
        if jax.process_count() > 1:
            return train_step.initial_state(case.attention, case.experiment, case.mesh)
        if case.attention not in self._made:
            one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
            made = train_step.initial_state(case.attention, case.experiment, one)
            self._made = {case.attention: made}
        changes = train_step.KINDS[case.attention]
        experiment = train_step.with_attention(case.experiment, **changes)
        shardings = train_step.state_factory(experiment, case.mesh).shardings
        # The step consumes what it is given, and `device_put` shares what lies there already.
        return jax.device_put(_copy(self._made[case.attention]), shardings)


def _compile_all(wanted: Sequence[Case], pool: ThreadPoolExecutor) -> list[Future[Any]]:
    """Returns the compiled steps, or what went wrong; waits for all."""
    futures = []
    for case in wanted:
        try:
            data = case.experiment.data
            sharding.check_batch(case.mesh, data.batch_size, 1, data.sequence_length)
            lowered = train_step.lowered_step(case.attention, case.experiment, case.mesh)
            futures.append(pool.submit(lowered.compile))
        except Exception as error:  # The other meshes may work.
            futures.append(Future())
            futures[-1].set_exception(error)
    for future in futures:
        future.exception()  # no compiler runs beside what is timed
    return futures


def _say(options: flags.FlagValues, record: dict[str, Any]) -> None:
    if jax.process_index():
        return
    print(json.dumps(record), flush=True)
    if options.output:
        with open(options.output, "a") as file:
            file.write(json.dumps(record) + "\n")


def _check(options: flags.FlagValues) -> ExperimentConfig:
    if options.config is None:
        raise InputError("--config is not given, but it must be a config file.")
    for name in ("tokens", "steps", "rounds"):
        require(options[name].value >= 1, "--" + name, options[name].value, "at least 1")
    for text in options.meshes:
        mesh_config(text)
    for name in options.lengths:
        require(name.isdecimal() and int(name) >= 2, "--lengths", name, "at least 2")
    for name, allowed in (("attentions", train_step.KINDS), ("scaling", SCALINGS)):
        for value in options[name].value:
            require(value in allowed, "--" + name, value, "one of " + ", ".join(allowed))
    experiment = from_config_dict(options.config)
    policy = experiment.model.remat
    require(policy != "auto", "model.remat", policy, "another, the same for all meshes")
    if options.output:
        pathlib.Path(options.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    return experiment


def _run(options: flags.FlagValues) -> int:
    """Returns the exit status: 1 if something could not be measured."""
    began = time.perf_counter()
    experiment = _check(options)
    distributed.initialize(options)
    states, failed = _States(), False
    model = experiment.model
    common = {
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        **provenance.made_by("benchmarks.scaling"),
        "width": model.width,
        "layers": model.num_layers,
        "remat": model.remat,
        "scan_layers": model.scan_layers,
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for length in map(int, options.lengths):
            wanted = list(cases(experiment, length, options))
            start = time.perf_counter()
            compiled = _compile_all(wanted, pool)
            common["compile_s"] = time.perf_counter() - start
            one: float | None = None
            for case, future in zip(wanted, compiled, strict=True):
                if options.deadline and time.perf_counter() - began > options.deadline:
                    return int(failed)
                if jax.process_count() > 1:
                    distributed.wait_for_all(f"{length} {case.attention} {case.split}")
                record: dict[str, Any] = {
                    **common,
                    "length": length,
                    "attention": case.attention,
                    "rows": case.experiment.data.batch_size,
                    "devices": case.mesh.size,
                    "mesh": case.split,
                    "scaling": case.scaling,
                }
                try:
                    state = states(case)
                    record["parameters"] = parameter_counts(state.params)["total"]
                    record |= measure(case, future.result(), state, options)
                    rate = record["tokens_per_second"]
                    if case.split is None:
                        one = rate
                    elif one is not None:
                        record["efficiency"] = rate / one / case.mesh.size
                except Exception as error:  # The other meshes may work.
                    record["error"] = _reason(error)
                    one, failed = None if case.split is None else one, True
                _say(options, record)
    return int(failed)


def main(argv: Sequence[str]) -> int:
    """Measures one device, then each mesh; returns the exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        return _run(flags.FLAGS)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def define(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; not at import, since other programs have some of the same names."""
    where: dict[str, Any] = {"flag_values": values}
    config_flags.DEFINE_config_file("config", None, "As in train.py.", sys_argv=argv, **where)
    flags.DEFINE_list("lengths", ["4096", "16384"], "Tokens a row.", **where)
    flags.DEFINE_integer("tokens", 32_768, "Tokens a step of one device.", **where)
    kinds = "Of " + ", ".join(train_step.KINDS)
    flags.DEFINE_list("attentions", ["lazy", "cudnn"], kinds, **where)
    axes = "Axes of each mesh, as in fsdp+tensor:2; one of them may take the rest."
    flags.DEFINE_list("meshes", list(sharding.MESH_AXES), axes, **where)
    flags.DEFINE_list("scaling", ["weak"], "Of " + ", ".join(SCALINGS), **where)
    flags.DEFINE_integer("steps", 5, "Steps a round.", **where)
    flags.DEFINE_integer("rounds", 3, "Rounds, of which the median counts.", **where)
    flags.DEFINE_integer("traced", 2, "Steps to trace on several devices; 0: none.", **where)
    flags.DEFINE_float("deadline", 0.0, "Seconds after which nothing is begun; 0: none.", **where)
    paths.define("output", None, "File to add a JSON line a measurement to.", **where)
    distributed.define(values)


if __name__ == "__main__":
    define(sys.argv)
    app.run(main, flags_parser=train_step.parse)
