"""The loop: one step dispatched while the numbers of the one before are fetched."""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import jax

from lazyattn import sharding
from lazyattn.checkpoint.manager import Checkpoints, SaveError
from lazyattn.checkpoint.state import Params, TrainState
from lazyattn.data.read_ahead import BatchIterator, ReadAhead
from lazyattn.distributed import StopAgreement
from lazyattn.errors import InputError
from lazyattn.experiment.training import TrainingConfig
from lazyattn.quantity import quantity
from lazyattn.training.interrupt import StopSignal
from lazyattn.training.log import RunLog
from lazyattn.training.profile import StepProfile
from lazyattn.training.step import Metrics, StepFn


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that wasn't finite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with.

    Attributes:
      config: steps and intervals.
      experiment: all settings as plain data, kept with every checkpoint.
      mesh: where batches go.
      step_fn: state, batch -> state, metrics.
      batches: where batches come from.
      checkpoints: where states go.
      log: where numbers go.
      validate: parameters -> scalars that join the step's metrics.
      stop: asks the loop to end early.
      inspect: parameters -> scalars on attention, every `config.inspect_every` steps.
      sample: step, parameters -> nothing, every `config.sample_every` steps.
      tasks: parameters -> scalars of benchmarks, every `config.tasks_every` steps.
      profile: traces some of the steps; None: none.
    """

    config: TrainingConfig
    experiment: dict[str, Any]
    mesh: jax.sharding.Mesh
    step_fn: StepFn
    batches: BatchIterator
    checkpoints: Checkpoints
    log: RunLog
    validate: Callable[[Params], dict[str, float]]
    stop: StopSignal
    inspect: Callable[[Params], dict[str, float]] = lambda params: {}
    sample: Callable[[int, Params], None] = lambda step, params: None
    tasks: Callable[[Params], dict[str, float]] = lambda params: {}
    profile: StepProfile | None = None


def fit(run: Run, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Takes the steps that remain.

    There is a checkpoint of the last step, whether it is the configured one or the
    one after which `run.stop` asked to end.

    Args:
      run: everything besides the state.
      state: where to go on; it is consumed.

    Returns:
      The last state, and that step's metrics with its validation ({} if no step
      was left to take).

    Raises:
      NonFiniteError: after `max_nonfinite_steps` skipped steps in a row. Checkpoints
        stay as they are: none is written while steps are being skipped.
      InputError: if data can't be read any more, on all processes if it is so on one.
        The last step is saved first.
      SaveError: if the last step, or `max_failed_saves` checkpoints in a row, can't be
        saved.
    """
    config = run.config
    agreed_to_stop = StopAgreement()
    start = int(state.step)
    pending: tuple[int, Metrics] | None = None
    record: dict[str, Any] = {}
    ahead = ReadAhead.AHEAD if jax.process_count() > 1 else 0
    batches = ReadAhead(run.batches, config.steps - start, ahead)
    for number in range(start + 1, config.steps + 1):
        if run.profile is not None:
            run.log.pause(run.profile.before(number, pending), "profile")
        begin, idle = time.perf_counter(), _is_done(pending)
        try:
            rows = next(batches)
        except InputError as error:  # with several processes, see below
            if number - 1 == start:
                raise
            if pending is not None:
                record = _fetch(run, *pending)
                run.log.write(record)
            raise _saved(run, state, record, batches, str(error)) from error
        # At most so long had the device nothing to do.
        if pending is not None and (idle or _is_done(pending)):
            run.log.goodput.wait(time.perf_counter() - begin)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch = sharding.shard_batch(rows, run.mesh)
            state, metrics = run.step_fn(state, batch)
        # Only now wait for the step before, so that the device always has work.
        if pending is not None:
            run.log.write(_fetch(run, *pending))
        pending = number, metrics
        if run.profile is not None:
            run.log.pause(run.profile.after(number, metrics), "profile")
        if number == start + 1:
            jax.block_until_ready(metrics)
            run.log.started(number)  # compilation is over: rates count from here

        broken = batches.error
        asked = run.stop.received is not None or broken is not None
        why = "" if broken is None else str(broken)
        stopping = agreed_to_stop(asked, number, why) and number < config.steps
        if stopping and run.stop.received is None and not agreed_to_stop.why:
            run.stop.received = signal.SIGTERM  # another process has it
        last = number == config.steps or stopping
        validating = not stopping and (
            last or (config.eval_every > 0 and number % config.eval_every == 0)
        )
        inspecting = config.inspect_every > 0 and number % config.inspect_every == 0
        sampling = config.sample_every > 0 and number % config.sample_every == 0
        on_tasks = config.tasks_every > 0 and number % config.tasks_every == 0
        saving = last or number % config.checkpoint_every == 0
        if not (validating or inspecting or sampling or on_tasks or saving):
            continue
        record = _fetch(run, *pending)
        pending = None
        begin = time.perf_counter()
        unreadable: InputError | None = None
        if validating:
            try:
                record |= run.validate(state.evaluated(config.use_ema))
            except InputError as error:
                unreadable = error
            run.log.pause(time.perf_counter() - begin, "validation")
        if inspecting and unreadable is None:
            begin = time.perf_counter()
            record |= run.inspect(state.evaluated(config.use_ema))
            run.log.pause(time.perf_counter() - begin, "inspection")
        if sampling and unreadable is None:
            begin = time.perf_counter()
            run.sample(number, state.evaluated(config.use_ema))
            run.log.pause(time.perf_counter() - begin, "samples")
        if on_tasks and unreadable is None:
            begin = time.perf_counter()
            record |= run.tasks(state.evaluated(config.use_ema))
            run.log.pause(time.perf_counter() - begin, "tasks")
        # Logged first: no checkpoint may be of a step that the log lacks.
        run.log.write(record)
        if unreadable is not None:
            raise _saved(run, state, record, batches, str(unreadable)) from unreadable
        if stopping and agreed_to_stop.why:
            raise _saved(run, state, record, batches, agreed_to_stop.why) from broken
        if saving and (last or not record["nonfinite_in_row"]):
            begin = time.perf_counter()
            run.log.sync()
            # The data iterator stands behind this very step: the next batch comes later.
            loss = record.get("validation_loss")
            run.checkpoints.save(number, state, batches.get_state(), run.experiment, loss)
            run.log.pause(time.perf_counter() - begin, "checkpoints")
        if last:
            break
    begin = time.perf_counter()
    problem = run.checkpoints.wait()
    run.log.pause(time.perf_counter() - begin, "checkpoints")
    if problem:
        raise SaveError(f"Stopped at step {int(state.step)}, but {problem}.")
    return state, record


def _is_done(pending: tuple[int, Metrics] | None) -> bool:
    """Returns whether a step that was dispatched is over; where there is none, True."""
    return pending is None or all(array.is_ready() for array in jax.tree.leaves(pending[1]))


def _saved(
    run: Run,
    state: TrainState,
    record: dict[str, Any],
    batches: ReadAhead,
    why: str,
) -> InputError:
    """Saves the last step taken before data failed; returns the error that says so."""
    number = record["step"]
    if record["nonfinite_in_row"]:
        return InputError(why)
    run.log.sync()
    run.checkpoints.save(number, state, batches.get_state(), run.experiment)
    if problem := run.checkpoints.wait():
        return InputError(f"{why} Training stopped after step {number}, but {problem}.")
    return InputError(f"{why} Training stopped after step {number}, which is saved.")


def _fetch(run: Run, number: int, metrics: Metrics) -> dict[str, Any]:
    """Returns a step's metrics as Python numbers, waiting for them if need be."""
    record = {"step": number} | {
        name: value.item() for name, value in jax.device_get(metrics).items()
    }
    in_row = record["nonfinite_in_row"]
    if in_row >= run.config.max_nonfinite_steps:
        run.log.write(record)
        run.checkpoints.wait()
        saved = run.checkpoints.steps()
        where = f"the last checkpoint is of step {saved[0]}" if saved else "there is no checkpoint"
        raise NonFiniteError(
            f"Stopped at step {number}: the loss or its gradient was not finite in"
            f" {quantity(in_row, 'step')} in a row (training.max_nonfinite_steps), and the"
            f" parameters are those of step {number - in_row}; {where}. A lower"
            " optimizer.learning_rate or a longer optimizer.warmup_steps usually helps."
        )
    return record
