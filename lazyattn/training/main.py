"""A training run from its settings: check, prepare, resume, train, sum up."""

import contextlib
import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax

from lazyattn import sharding
from lazyattn.checkpoint import workdir as folders
from lazyattn.checkpoint.manager import Checkpoints, Restored, SaveError
from lazyattn.checkpoint.state import Params, make_state_factory
from lazyattn.data.pipeline import (
    BatchIterator,
    TrainingData,
    packing_report,
    prepare,
    train_iterator,
)
from lazyattn.distributed import gather_rows, not_left_waiting
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig, from_config_dict, resumption_changes
from lazyattn.model.accounting import flops_per_token, parameter_counts
from lazyattn.quantity import quantity
from lazyattn.training import balance, kept_step, remat, resume_data
from lazyattn.training.claim import claimed
from lazyattn.training.hooks import Finished, Hooks, Started
from lazyattn.training.initialize import Weights, check_teaching, read_weights
from lazyattn.training.interrupt import StopSignal
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
    hooks.check(experiment)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        workdir = stack.enter_context(claimed(path))
        checkpoints = stack.enter_context(_checkpoints(workdir, experiment))

        # What is wrong with settings and checkpoints comes out before data is prepared.
        found = checkpoints.newest_experiment()
        if found is not None and found[0] > steps:
            _say(f"already at step {found[0]}, past training.steps = {steps}: nothing was done")
            return 0
        experiment, changes = _going_on(experiment, None if found is None else found[1])
        optimizer = make_run_optimizer(experiment)
        factory = make_state_factory(experiment, mesh, optimizer)
        restored = checkpoints.restore(factory.abstract)
        weights: Weights | None = None
        if restored is None and experiment.training.init_from is None:
            check_teaching(experiment, None)
        elif restored is None:
            weights = read_weights(experiment, mesh, factory.shardings.params)
        curves = WeightsAndBiases(workdir, experiment.to_dict(), enabled=wandb)
        stack.enter_context(curves)

        _say(_where_the_data_is(experiment))
        prepared = prepare(experiment.data, cache_dir)
        batches = _batches(prepared, experiment, mesh)
        stack.callback(batches.close)
        if restored is not None:
            resume_data.resume(batches, restored.data, restored.experiment, experiment)
        folders.check_vocabulary(prepared.tokenizer, experiment)
        if weights is not None:
            weights.check_tokenizer(prepared.tokenizer)

        start = 0 if restored is None else int(restored.state.step)
        shardings = factory.shardings.params
        started = Started(path, workdir, experiment, mesh, shardings, prepared, start, _say)
        sample = stack.enter_context(hooks.sample(started))
        validate, inspect = hooks.validate(started), hooks.inspect(started)
        tasks = hooks.tasks(started)
        if jax.process_index() == 0:
            folders.keep_tokenizer(workdir, prepared.tokenizer)
            if start < steps:
                folders.write_experiment(workdir, experiment)
        said = () if weights is None else weights.said
        if restored is not None:
            state = restored.state
        else:
            state = factory.create(None if weights is None else weights.params)
            weights = None  # consumed
        for line in (
            *_describe(experiment, mesh, factory.abstract.params, prepared),
            *said,
            *_where_from(restored, changes, steps),
            *balance.describe(experiment.model, mesh, length, state.params),
        ):
            _say(line)

        record: dict[str, Any] = {}
        spent: list[str] = []
        if start < steps:
            log = RunLog(
                workdir,
                step=start,
                steps=steps,
                log_every=experiment.training.log_every,
                flops_per_token=flops_per_token(experiment.model, length).training,
                began=began,
                curves=(curves,),
            )
            stack.enter_context(log)
            make = functools.partial(
                remat.make_step, experiment, mesh, optimizer, factory.shardings, factory.abstract
            )
            step_fn, policy = kept_step.read_or_make(make, experiment, mesh, factory.abstract)
            for line in policy:
                _say(line)
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
            _say(
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


def _going_on(
    experiment: ExperimentConfig, saved: dict[str, Any] | None
) -> tuple[ExperimentConfig, dict[str, tuple[Any, Any]]]:
    """Returns the settings of a run that goes on with a checkpoint's, and what differs.

    Raises:
      InputError: if they can't.
    """
    if saved is None:
        return experiment, {}
    changes = resumption_changes(saved, experiment)
    resume_data.require_same_kind(saved, experiment)
    before = from_config_dict(saved).training.init_from
    training = dataclasses.replace(experiment.training, init_from=before)
    return dataclasses.replace(experiment, training=training), changes


def _batches(
    prepared: TrainingData, experiment: ExperimentConfig, mesh: jax.sharding.Mesh
) -> BatchIterator:
    """Returns this process's share of the batches."""
    share = sharding.batch_share(mesh)
    return train_iterator(
        prepared,
        experiment.data,
        process_index=share.index,
        process_count=share.count,
        gather=functools.partial(gather_rows, shares=sharding.shares_by_process(mesh)),
    )


def _say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


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


def _where_from(
    restored: Restored | None, changes: dict[str, tuple[Any, Any]], steps: int
) -> list[str]:
    """Returns lines on where the run goes on."""
    if restored is None:
        return []
    step = int(restored.state.step)
    if step == steps:
        return [f"already at step {step}, the last (training.steps): nothing is left to train"]
    lines = [f"resuming after step {step}"]
    lines += [f"  config.{key}: {old!r} before, {new!r} now" for key, (old, new) in changes.items()]
    return lines
