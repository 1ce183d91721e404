"""Times whole training steps with several kinds of attention, in turn, on the devices at hand.

    python -m benchmarks.train_step --config=configs/fineweb_edu.py:lazy_340m_10b --batch=8

The step is that of `train.py`: model, loss, gradients, optimizer. Parameters are freshly
initialised, tokens are random, every row is one document. Kinds of attention:
  lazy      the config as it is
  biased    the same with the distance bias alone, softmax's weights
  softmax   the same model with ordinary softmax attention by our kernels
  cudnn     the same with softmax attention by cuDNN (by XLA where there is no GPU)
  paper     the config with the paper's recipe
Writes a JSON file and a Markdown table. All kinds' states are in memory at once.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import provenance, softmax_by_jax
from lazyattn import command_line, paths, sharding
from lazyattn.checkpoint.state import StateFactory, TrainState, make_state_factory
from lazyattn.compile.chips import CHIPS
from lazyattn.errors import InputError, require
from lazyattn.experiment import ExperimentConfig, from_config_dict
from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.model.config import RECIPES, AttentionConfig
from lazyattn.model.objective import Batch
from lazyattn.training import kept_step, remat
from lazyattn.training.optimizer import make_optimizer

# Changes to the config's attention. That of `cudnn` is replaced besides.
KINDS: dict[str, dict[str, Any]] = {
    "lazy": {},
    "biased": {"variant": "biased_softmax"},
    "softmax": {"variant": "softmax"},
    "cudnn": {"variant": "softmax"},
    "paper": RECIPES["paper"],
}
# JAX's names of devices whose peak is that of a chip of the table; NVIDIA's data sheets
# give the H200 SXM the same one as the H100 SXM.
_CHIP = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h100"}
_CALL = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass
class Result:
    """One line of the table.

    Attributes:
      attention: a key of `KINDS`.
      parameters: of the model.
      milliseconds, least, greatest: median and extremes of a step, over rounds.
      tokens_per_second: by the median, over all devices.
      mfu: model FLOPs by `flops_per_token` over time and peak; None: peak not known.
      arguments, temporaries: bytes a device of state and batch, and of all else, as the
        compiler says.
      loss: of the last step, nats a token.
      steps: taken in all.
      compile_seconds: tracing and compiling.
      kernels: custom calls in the compiled program and how often each stands there.
      error: why there is nothing else.
    """

    attention: str
    parameters: int = 0
    milliseconds: float = 0.0
    least: float = 0.0
    greatest: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float | None = None
    arguments: int = 0
    temporaries: int = 0
    loss: float = 0.0
    steps: int = 0
    compile_seconds: float = 0.0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str | None = None


@dataclasses.dataclass
class _Run:
    """A compiled step and the state it goes on from."""

    result: Result
    step: Callable[[TrainState, Batch], Any]
    state: TrainState
    times: list[float] = dataclasses.field(default_factory=list)


def with_attention(experiment: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    """Returns the experiment with another attention layer."""
    attention: AttentionConfig = dataclasses.replace(experiment.model.attention, **changes)
    model = dataclasses.replace(experiment.model, attention=attention)
    return dataclasses.replace(experiment, model=model)


def random_batch(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, random: np.random.Generator
) -> Batch:
    """Returns rows of random tokens on the mesh, each row one document without padding."""
    rows, length = experiment.data.batch_size, experiment.data.sequence_length
    tokens = random.integers(experiment.model.vocab_size, size=(rows, length + 1), dtype=np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }
    if not mesh.is_multi_process:
        place = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length"))
        return jax.device_put(batch, place)
    share = sharding.batch_share(mesh)
    mine = {name: np.split(array, share.count)[share.index] for name, array in batch.items()}
    return sharding.shard_batch(mine, mesh)


def state_factory(experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> StateFactory:
    """Returns what makes the experiment's initial state."""
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    return make_state_factory(experiment, mesh, optimizer)


def compiled_step(kind: str, experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the trainer's step with a kind of attention, compiled: state, batch -> both."""
    return _compiled(lowered_step(kind, experiment, mesh))


def compiled_beside_state(
    kind: str, experiment: ExperimentConfig, mesh: jax.sharding.Mesh
) -> tuple[Any, StateFactory]:
    """Returns the same, and a factory whose `create` was compiled beside, as the trainer does."""
    step, factory = _step(kind, experiment, mesh, begin_state=True)
    return _compiled(step), factory


def lowered_step(kind: str, experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the trainer's step, ready to be compiled; compiled, if it was kept or had to be."""
    return _step(kind, experiment, mesh, begin_state=False)[0]


def _compiled(step: Any) -> Any:
    return step if isinstance(step, jax.stages.Compiled) else step.compile()


def _step(
    kind: str, experiment: ExperimentConfig, mesh: jax.sharding.Mesh, *, begin_state: bool
) -> tuple[Any, StateFactory]:
    experiment = with_attention(experiment, **KINDS[kind])
    kept = kept_step.KeptStep(experiment, mesh, kind=kind)
    factory = state_factory(experiment, mesh)
    if begin_state:
        factory.begin()
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    with softmax_by_jax.instead_of_ours() if kind == "cudnn" else contextlib.nullcontext():
        make = functools.partial(
            remat.make_step, experiment, mesh, optimizer, factory.shardings, factory.abstract
        )
        step, said = kept.or_made(make, factory.abstract)
        for line in said:
            print(line, file=sys.stderr, flush=True)
        if isinstance(step.jitted, jax.stages.Compiled):
            return step.jitted, factory
        batch = remat.abstract_batch(experiment, mesh)
        return step.lower(factory.abstract, batch), factory


def initial_state(kind: str, experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state that such a step begins with."""
    return state_factory(with_attention(experiment, **KINDS[kind]), mesh).create()


def _prepare(kind: str, experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> _Run:
    """Compiles the step, makes the state and takes one step."""
    start = time.perf_counter()
    compiled = compiled_step(kind, experiment, mesh)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    state = initial_state(kind, experiment, mesh)
    result = Result(
        kind,
        parameters=parameter_counts(state.params)["total"],
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        compile_seconds=seconds,
        kernels=dict(Counter(_CALL.findall(compiled.as_text() or ""))),
    )
    batch = random_batch(experiment, mesh, np.random.default_rng(0))
    state, _ = jax.block_until_ready(compiled(state, batch))
    return _Run(result, compiled, state)


def _take(run: _Run, batches: Sequence[Batch]) -> None:
    """Takes a step with each batch and keeps the time of all."""
    start = time.perf_counter()
    for batch in batches:
        run.state, metrics = run.step(run.state, batch)
    jax.block_until_ready((run.state, metrics))
    run.times.append(1e3 * (time.perf_counter() - start) / len(batches))
    run.result.loss = float(metrics["loss"])


def measure(
    experiment: ExperimentConfig, attentions: Sequence[str], *, steps: int, rounds: int
) -> list[Result]:
    """Times the experiment's step with each kind of attention.

    Args:
      experiment: the settings.
      attentions: keys of `KINDS`.
      steps: in a row, between waiting for the devices.
      rounds: how often each kind has its turn; once more before, to warm up. Every kind
        sees the same batches, no batch comes twice.

    Returns:
      A line for each, in order; with its error where a step can't be compiled or run.
    """
    for kind in attentions:
        require(kind in KINDS, "--attentions", kind, "one of " + ", ".join(KINDS))
    for name, value in (("--steps", steps), ("--rounds", rounds)):
        require(value >= 1, name, value, "at least 1")
    data = experiment.data
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_batch(
        mesh, data.batch_size, experiment.training.microbatches, data.sequence_length
    )
    results, runs = [], []
    for kind in attentions:
        try:
            runs.append(_prepare(kind, experiment, mesh))
            results.append(runs[-1].result)
        except Exception as error:  # A line that says so is worth more than no table.
            line = (str(error).splitlines() or [""])[0][:200]
            results.append(Result(kind, error=f"{type(error).__name__}: {line}"))
            print(kind, results[-1].error, file=sys.stderr, flush=True)
    random = np.random.default_rng(1)
    for _ in range(rounds + 1):
        batches = [random_batch(experiment, mesh, random) for _ in range(steps)]
        jax.block_until_ready(batches)
        for run in runs:
            _take(run, batches)
    for run in runs:
        times = run.times[1:]
        result = run.result
        result.milliseconds = statistics.median(times)
        result.least, result.greatest = min(times), max(times)
        result.steps = int(run.state.step)
        tokens = data.batch_size * data.sequence_length
        result.tokens_per_second = 1e3 * tokens / result.milliseconds
        result.mfu = mfu(experiment, mesh, result.tokens_per_second)
    return results


def mfu(experiment: ExperimentConfig, mesh: jax.sharding.Mesh, rate: float) -> float | None:
    """Returns the utilization at a rate of tokens a second; None: the peak is not known."""
    chip = _CHIP.get(mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    flops = flops_per_token(experiment.model, experiment.data.sequence_length).training
    return rate * flops / CHIPS[chip].flops / mesh.size


def table(results: Sequence[Result]) -> str:
    """Returns the results as Markdown."""
    rates = {result.attention: result.tokens_per_second for result in results}
    base = rates.get("cudnn")
    lines = [
        "| attention | tokens/s | ms a step | least-greatest | MFU | GiB a device | of it temporary"
        " | last loss | tokens/s over cudnn's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [r.attention, r.error or "", *[""] * 7]
        if r.error is None:
            cells = [
                r.attention,
                f"{r.tokens_per_second:,.0f}",
                f"{r.milliseconds:.1f}",
                f"{r.least:.1f}-{r.greatest:.1f}",
                "" if r.mfu is None else f"{r.mfu:.1%}",
                f"{(r.arguments + r.temporaries) / 2**30:.2f}",
                f"{r.temporaries / 2**30:.2f}",
                f"{r.loss:.4f}",
                f"{r.tokens_per_second / base:.3f}" if base else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def about(experiment: ExperimentConfig, steps: int, rounds: int) -> dict[str, Any]:
    """Returns what the numbers depend on, besides the attention."""
    device = jax.devices()[0]
    model, data = experiment.model, experiment.data
    flops = flops_per_token(model, data.sequence_length)
    chip = _CHIP.get(device.device_kind)
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "batch": data.batch_size,
        "length": data.sequence_length,
        "microbatches": experiment.training.microbatches,
        "steps": steps,
        "rounds": rounds,
        "flops_per_token": flops.training,
        "attention_share": flops.attention / flops.forward,
        "peak_flops": None if chip is None else CHIPS[chip].flops,
        "peak_bytes_all_kinds": stats.get("peak_bytes_in_use"),
        "model": dataclasses.asdict(model),
    }


def report(facts: dict[str, Any], results: Sequence[Result]) -> str:
    """Returns the Markdown: the settings, the table and what is counted."""
    model = facts["model"]
    head = (
        f"{facts['devices']} x {facts['device']}, jax {facts['jax']}. {model['num_layers']} layers"
        f" of width {model['width']}, {model['attention']['num_heads']} heads,"
        f" {model['compute_dtype']}, remat {model['remat']}; {facts['batch']} rows of"
        f" {facts['length']} tokens a step in {facts['microbatches']} microbatches. Medians of"
        f" {facts['rounds']} rounds of {facts['steps']} steps.\n\n"
    )
    peak = facts["peak_flops"]
    counted = (
        "Model FLOPs are those of softmax attention, causal pairs only, whatever the attention:"
        f" {facts['flops_per_token'] / 1e9:.3f} GFLOP a token forward and backward, recomputation"
        f" not counted; {facts['attention_share']:.1%} of them in attention."
        + ("" if peak is None else f" MFU is over {peak / 1e12:,.0f} TFLOP/s a device.")
        + " Memory is what the compiler allots: parameters, optimizer and batch, and temporaries."
        " Tokens are random and parameters stay near their initial values, so lazy attention"
        " skips what the initial distance bias lets it skip.\n"
    )
    return head + table(results) + "\n" + counted


def with_batch(
    experiment: ExperimentConfig, batch: int | None, length: int | None, microbatches: int | None
) -> ExperimentConfig:
    """Returns the experiment with other sizes; None: its own."""
    data, training = experiment.data, experiment.training
    return dataclasses.replace(
        experiment,
        data=dataclasses.replace(
            data,
            batch_size=data.batch_size if batch is None else batch,
            sequence_length=data.sequence_length if length is None else length,
        ),
        training=dataclasses.replace(
            training,
            microbatches=training.microbatches if microbatches is None else microbatches,
        ),
    )


def _run(options: flags.FlagValues) -> None:
    if options.config is None:
        raise InputError("--config is not given, but it must be a config file.")
    experiment = from_config_dict(options.config)
    experiment = with_batch(experiment, options.batch, options.length, options.microbatches)
    steps, rounds = options.steps, options.rounds
    results = measure(experiment, options.attentions, steps=steps, rounds=rounds)
    facts = about(experiment, steps, rounds)
    text = report(facts, results)
    print(text)
    for result in results:
        print(f"{result.attention}: compiled in {result.compile_seconds:.0f} s, {result.kernels}")
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts |= provenance.made_by("benchmarks.train_step")
    facts["results"] = [dataclasses.asdict(result) for result in results]
    output.with_name(output.name + ".json").write_text(json.dumps(facts, indent=1) + "\n")
    output.with_name(output.name + ".md").write_text(text)


def main(argv: Sequence[str]) -> int:
    """Times and writes what came out; returns the exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        _run(flags.FLAGS)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def define_experiment(argv: list[str], values: flags.FlagValues) -> None:
    """Defines the flags of a config and of the sizes of its step; see `with_batch`."""
    where: dict[str, Any] = {"flag_values": values}
    config_flags.DEFINE_config_file("config", None, "As in train.py.", sys_argv=argv, **where)
    flags.DEFINE_integer("batch", None, "Rows a step; default: the config's.", **where)
    flags.DEFINE_integer("length", None, "Tokens a row; default: the config's.", **where)
    flags.DEFINE_integer("microbatches", None, "Default: the config's.", **where)


def define(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; not at import, since other programs have some of the same names."""
    where: dict[str, Any] = {"flag_values": values}
    define_experiment(argv, values)
    flags.DEFINE_list("attentions", ["lazy", "cudnn"], "Of " + ", ".join(KINDS), **where)
    flags.DEFINE_integer("steps", 10, "Steps in a row.", **where)
    flags.DEFINE_integer("rounds", 5, "Times each is timed; the median counts.", **where)
    paths.define("output", "benchmarks/results/train_step", "Without suffix.", **where)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; what is wrong with it is said in one sentence, status 2."""
    try:
        return command_line.parse(argv)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    define(sys.argv)
    app.run(main, flags_parser=parse)
