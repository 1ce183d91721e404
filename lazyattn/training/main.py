"""A training run from its settings: check, prepare, resume, train, sum up."""

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax

from lazyattn import sharding
from lazyattn.checkpoint import workdir as folders
from lazyattn.checkpoint.manager import Checkpoints, SaveError
from lazyattn.checkpoint.state import Params, make_state_factory
from lazyattn.data.pipeline import TrainingData, packing_report
from lazyattn.distributed import not_left_waiting, say
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig
from lazyattn.model import fp8
from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.patience import waiting
from lazyattn.quantity import quantity
from lazyattn.training import balance, remat
from lazyattn.training.beginning import Beginning, going_on
from lazyattn.training.claim import claimed
from lazyattn.training.hooks import Finished, Hooks, Started
from lazyattn.training.interrupt import StopSignal
from lazyattn.training.kept_step import KeptStep
from lazyattn.training.log import RunLog
from lazyattn.training.loop import NonFiniteError, Run, fit
from lazyattn.training.profile import StepProfile
from lazyattn.training.teaching import make_run_optimizer
from lazyattn.training.weights_and_biases import WeightsAndBiases


def train(
    experiment: ExperimentConfig,
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    hooks: Hooks | None = None,
    profile: tuple[int, int] | None = None,
    wandb: bool = False,
) -> int:
    """Trains, going on from the newest checkpoint if the folder has one.

    Args:
      experiment: all settings.
      path: the run's folder (`--workdir`).
      cache_dir: where prepared data is kept; None: the user's cache.
      hooks: what to do besides training, such as `lazyattn.hooks.HOOKS`; None: nothing.
      profile: first and last step of a trace; None: none.
      wandb: send curves to Weights & Biases, too.

    Returns:
      The program's exit status: 0 when training is complete, 143 when SIGTERM ended it,
      130 when Ctrl-C did.

    Raises:
      InputError: if something the user gave is wrong; as much as possible is found
        before data is prepared or anything compiled.
      NonFiniteError: if too many steps in a row weren't finite.
      SaveError: if too many checkpoints in a row, or the last, couldn't be written.
    """
    began = time.perf_counter()
    hooks = hooks or Hooks()
    length, steps = experiment.data.sequence_length, experiment.training.steps
    mesh = sharding.make_mesh(experiment.mesh)
    microbatches = experiment.training.microbatches
    sharding.check_batch(mesh, experiment.data.batch_size, microbatches, length)
    fp8.check_devices(experiment.training.quantization, mesh)
    hooks.check(experiment)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        workdir = stack.enter_context(claimed(path))
        checkpoints = stack.enter_context(_checkpoints(workdir, experiment))

        # What is wrong with settings and checkpoints comes out before data is prepared.
        newest = checkpoints.newest_experiment()
        at, saved = newest or (0, None)
        experiment, changes = going_on(experiment, saved)
        kept = KeptStep(experiment, mesh) if at < steps else None
        if at > steps:
            say(f"already at step {at}, past training.steps = {steps}: nothing was done")
            return 0
        optimizer = make_run_optimizer(experiment)
        factory = make_state_factory(experiment, mesh, optimizer)
        beginning = Beginning(experiment, mesh, factory, checkpoints, newest)
        curves = WeightsAndBiases(workdir, experiment.to_dict(), enabled=wandb)
        stack.enter_context(curves)

        say(_where_the_data_is(experiment))
        data, batches = beginning.open_data(cache_dir)
        stack.enter_context(contextlib.closing(batches))
        if jax.process_index() == 0:
            folders.keep_tokenizer(workdir, data.tokenizer)
        beginning.read(batches)

        start, shardings = beginning.step, factory.shardings.params
        started = Started(path, workdir, experiment, mesh, shardings, data, start, say)
        sample = stack.enter_context(hooks.sample(started))
        validate, inspect = hooks.validate(started), hooks.inspect(started)
        tasks = hooks.tasks(started)
        if jax.process_index() == 0 and start < steps:
            folders.write_experiment(workdir, experiment)
        for line in (
            *_describe(experiment, mesh, factory.abstract.params, data),
            *beginning.lines(changes),
        ):
            say(line)

        # What makes the state is compiled beside the step.
        beginning.begin_state()
        policy: list[str] = []
        if start < steps:
            log = stack.enter_context(_log(started, began, curves))
            make = functools.partial(
                remat.make_step, experiment, mesh, optimizer, factory.shardings, factory.abstract
            )
            with waiting(lambda: "" if jax.process_index() else "the step to be compiled"):
                kept = kept or KeptStep(experiment, mesh)
                step_fn, policy = kept.or_made(make, factory.abstract)
        state = beginning.take_state()
        for line in (*balance.describe(experiment.model, mesh, length, state.params), *policy):
            say(line)

        record: dict[str, Any] = {}
        spent: list[str] = []
        if start < steps:
            run = Run(
                config=experiment.training,
                experiment=experiment.to_dict(),
                mesh=mesh,
                step_fn=step_fn,
                batches=batches,
                checkpoints=checkpoints,
                log=log,
                validate=validate,
                stop=stop,
                inspect=inspect,
                sample=sample,
                tasks=tasks,
                profile=stack.enter_context(StepProfile(workdir, profile)),
            )
            stop.arm()
            with not_left_waiting(InputError, NonFiniteError, SaveError):
                state, record = fit(run, state)
            spent = log.goodput.lines()

        last = int(state.step)
        if last < steps:
            assert stop.received is not None
            say(
                f"{stop.received.name}: stopped after step {last}, which is saved; run the same"
                " command to go on"
            )
            return stop.exit_status
        if hooks.summary is not None:
            record = record or validate(state.evaluated(experiment.training.use_ema))
            if jax.process_index() == 0:
                folder, best = checkpoints.folder / str(last), checkpoints.best()
                hooks.summary(started, Finished(state, folder, best, spent, record))
    return 0


def _checkpoints(workdir: Path, experiment: ExperimentConfig) -> Checkpoints:
    training = experiment.training
    return Checkpoints(
        workdir,
        keep=training.keep,
        keep_every=training.keep_every,
        max_failed=training.max_failed_saves,
    )


def _log(run: Started, began: float, curves: WeightsAndBiases) -> RunLog:
    experiment = run.experiment
    return RunLog(
        run.workdir,
        step=run.step,
        steps=experiment.training.steps,
        log_every=experiment.training.log_every,
        flops_per_token=flops_per_token(experiment.model, experiment.data.sequence_length).training,
        began=began,
        curves=(curves,),
    )


def _describe(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, params: Params, prepared: TrainingData
) -> list[str]:
    """Returns lines on what is about to run."""
    model, attention = experiment.model, experiment.model.attention
    total = parameter_counts(params)["total"]
    kind = attention.variant
    if attention.has_bias:
        decay = attention.bias_kind == "decay"
        kind += ", decaying bias" if decay else f", {attention.bias_init} bias table"
    if attention.has_offset:
        kind += f", offset {attention.offset_init:g}"
    if experiment.training.quantization != "none":
        kind += f", products in {experiment.training.quantization}"
    counts = prepared.counts
    devices = {name: size for name, size in mesh.shape.items() if size > 1}
    return [
        f"model    {total:,} parameters, {quantity(model.num_layers, 'layer')} of width"
        f" {model.width}, {quantity(attention.num_heads, 'head')}, attention: {kind}",
        f"data     {experiment.data.name}: {quantity(counts['train'].documents, 'document')},"
        f" {quantity(counts['train'].targets, 'token')} to train on,"
        f" {counts['validation'].targets:,} to validate on",
        *_packing(experiment, prepared),
        f"devices  {mesh.size} {mesh.devices.flat[0].device_kind}"
        + (f" as {devices}" if devices else "")
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
    ]


def _where_the_data_is(experiment: ExperimentConfig) -> str:
    if experiment.data.tokenised:
        return f"data     checking {experiment.data.name} against what its manifest says"
    return f"data     preparing {experiment.data.source}, unless the cache has it"


def _packing(experiment: ExperimentConfig, prepared: TrainingData) -> list[str]:
    """Returns a line for each source on how its documents fill rows."""
    data = experiment.data
    names = [folder for folder, _ in data.weighted_paths] or [data.source]
    return [
        f"packing  {name}: {report.efficiency:.1%} of {quantity(report.rows, 'row')} filled by"
        f" {data.packing}, {report.cut_off:.1%} of the tokens of"
        f" {quantity(report.documents, 'document')} cut off"
        for name, report in zip(names, packing_report(prepared, data), strict=True)
    ]
