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
from lazyattn.data.read_ahead import BatchIterator, ReadAhead, Rows
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
      profile: traces some of the steps.
      inspect: parameters -> scalars on attention, every `config.inspect_every` steps.
      sample: step, parameters -> nothing, every `config.sample_every` steps.
      tasks: parameters -> scalars of benchmarks, every `config.tasks_every` steps.
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
    profile: StepProfile
    inspect: Callable[[Params], dict[str, float]] = lambda params: {}
    sample: Callable[[int, Params], None] = lambda step, params: None
    tasks: Callable[[Params], dict[str, float]] = lambda params: {}


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
    config, start = run.config, int(state.step)
    ahead = ReadAhead.AHEAD if jax.process_count() > 1 else 0
    batches = ReadAhead(run.batches, config.steps - start, ahead)
    steps = _Steps(run, batches, state)
    agreement = StopAgreement()
    try:
        for number in range(start + 1, config.steps + 1):
            steps.take(number)
            stopping = _all_stop(run, agreement, batches.error, number)
            last = stopping or number == config.steps
            due = _due(config, number) | ({"validation", "checkpoints"} if last else set())
            if stopping:
                due -= {"validation"}  # who stops a run may not wait for it
            if due:
                steps.measure(due)
            if stopping and agreement.why:
                raise InputError(agreement.why) from batches.error
            if "checkpoints" in due and (last or not steps.record["nonfinite_in_row"]):
                steps.save()
            if stopping:
                break
    except InputError as error:
        if steps.number == start:
            raise
        raise steps.saved_despite(error) from error
    with run.log.pausing("checkpoints"):
        problem = run.checkpoints.wait()
    if problem:
        raise SaveError(f"Stopped at step {steps.number}, but {problem}.")
    return steps.state, steps.record


class _Steps:
    """The steps of a run, one after the other.

    Attributes:
      state: after the last one.
      number: of the last one.
      record: its metrics, and what was measured, once that has been waited for.
    """

    def __init__(self, run: Run, batches: ReadAhead, state: TrainState):
        self.state = state
        self.number = int(state.step)
        self.record: dict[str, Any] = {}
        self._run = run
        self._batches = batches
        self._first = self.number + 1
        self._pending: Metrics | None = None  # of the last step, on the devices

    def take(self, number: int) -> None:
        """Dispatches a step, and waits for the one before."""
        run, log, before = self._run, self._run.log, self._pending
        log.pause(run.profile.before(number, before), "profile")
        rows = self._next_rows()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch = sharding.shard_batch(rows, run.mesh)
            self.state, metrics = run.step_fn(self.state, batch)
        # Only now wait for the step before, so that the device always has work.
        if before is not None:
            log.write(_fetched(run, self.number, before))
        self.number, self._pending = number, metrics
        log.pause(run.profile.after(number, metrics), "profile")
        if number == self._first:
            jax.block_until_ready(metrics)
            log.started(number)  # compilation is over: rates count from here

    def measure(self, due: set[str]) -> None:
        """Waits for the last step, measures what is due with its parameters, and logs it all."""
        run = self._run
        self._fetch()
        params = self.state.evaluated(run.config.use_ema)
        # Logged in any case and first: no checkpoint may be of a step that the log lacks.
        try:
            if "validation" in due:
                with run.log.pausing("validation"):
                    self.record |= run.validate(params)
            if "inspection" in due:
                with run.log.pausing("inspection"):
                    self.record |= run.inspect(params)
            if "samples" in due:
                with run.log.pausing("samples"):
                    run.sample(self.number, params)
            if "tasks" in due:
                with run.log.pausing("tasks"):
                    self.record |= run.tasks(params)
        finally:
            run.log.write(self.record)

    def save(self) -> None:
        """Begins to save the last step, which the log has."""
        run = self._run
        with run.log.pausing("checkpoints"):
            run.log.sync()
            # The data iterator stands behind this very step: the next batch comes later.
            data, loss = self._batches.get_state(), self.record.get("validation_loss")
            run.checkpoints.save(self.number, self.state, data, run.experiment, loss)

    def saved_despite(self, error: InputError) -> InputError:
        """Saves the last step taken before data failed; returns the error that says so."""
        if self._pending is not None:
            self._fetch()
            self._run.log.write(self.record)
        if self.record["nonfinite_in_row"]:
            return InputError(str(error))
        self.save()
        problem = self._run.checkpoints.wait()
        end = f"but {problem}" if problem else "which is saved"
        return InputError(f"{error} Training stopped after step {self.number}, {end}.")

    def _next_rows(self) -> Rows:
        begin, idle = time.perf_counter(), self._is_idle()
        rows = next(self._batches)
        # At most so long had the device nothing to do.
        if self._pending is not None and (idle or self._is_idle()):
            self._run.log.goodput.wait(time.perf_counter() - begin)
        return rows

    def _is_idle(self) -> bool:
        """Returns whether no step is under way."""
        return all(array.is_ready() for array in jax.tree.leaves(self._pending))

    def _fetch(self) -> None:
        """Makes a record of the metrics of the last step, waiting for them if need be."""
        assert self._pending is not None
        self.record = _fetched(self._run, self.number, self._pending)
        self._pending = None


def _due(config: TrainingConfig, number: int) -> set[str]:
    """Returns what is to be done after a step, by the names of `goodput.REASONS`."""
    every = {
        "validation": config.eval_every,
        "inspection": config.inspect_every,
        "samples": config.sample_every,
        "tasks": config.tasks_every,
        "checkpoints": config.checkpoint_every,
    }
    return {what for what, steps in every.items() if steps > 0 and number % steps == 0}


def _all_stop(run: Run, agreement: StopAgreement, broken: InputError | None, number: int) -> bool:
    """Returns whether all processes stop after this step; `broken`: what this one can't read."""
    asked = run.stop.received is not None or broken is not None
    stopping = agreement(asked, number, "" if broken is None else str(broken))
    stopping = stopping and number < run.config.steps
    if stopping and run.stop.received is None and not agreement.why:
        run.stop.received = signal.SIGTERM  # another process has it
    return stopping


def _fetched(run: Run, number: int, metrics: Metrics) -> dict[str, Any]:
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
