"""Training one run: steps in a row, nothing waited for but at the points of the curve."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.study import data, look, measures
from benchmarks.study.programs import Programs
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import TrainState
from lazyattn.experiment import ExperimentConfig

POINTS = 60  # of the loss curve
LOOKS = 8  # of the visited share, the last one apart
CHECKPOINT_EVERY = 500


class Cut(Exception):  # noqa: N818
    """The time is up; the run goes on from its checkpoint another time."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that wasn't finite."""


@dataclasses.dataclass
class History:
    """What is kept of a run's course, fit for JSON.

    Attributes:
      curve: [tokens, seconds of training, mean loss since the point before].
      visited: [tokens, share of the causal tiles visited, live].
      seconds: of training.
    """

    curve: list[list[float]] = dataclasses.field(default_factory=list)
    visited: list[list[float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Course:
    """Data on the device, and which rows a run sees.

    Attributes:
      stream: all tokens.
      starts: first token of each row, by step.
      found: what the model is measured on.
    """

    stream: jax.Array
    starts: jax.Array
    found: measures.Material


def train(
    programs: Programs,
    experiment: ExperimentConfig,
    course: Course,
    *,
    workdir: Path | None,
    looks: bool,
    stop: Callable[[int, float], bool] = lambda step, seconds_a_step: False,
    every: int = CHECKPOINT_EVERY,
    said: Callable[[str], None] = lambda text: None,
    start: Callable[[TrainState], TrainState] = lambda state: state,
) -> tuple[TrainState, History]:
    """Trains to the end, from a checkpoint where there is one.

    Args:
      programs: of these settings, but for the seed and the learning rate.
      experiment: the run's settings.
      course: the data.
      workdir: where checkpoints go; None: none are made.
      looks: count tiles on the way.
      stop: asked at the points of the curve, of the step and the seconds a step; where it
        says so, training ends with a checkpoint.
      every: steps between checkpoints, which are made at points of the curve.
      said: told how it goes.
      start: makes the state to begin with of a fresh one.

    Raises:
      Cut: stopped.
      NonFiniteError: too many steps in a row were skipped.
    """
    history = History()
    state: TrainState | None = None
    checkpoints = None if workdir is None else Checkpoints(workdir)
    try:
        if checkpoints is not None and checkpoints.steps():
            restored = checkpoints.restore(programs.factory.abstract)
            if restored is not None:
                state, history = restored.state, History(**restored.data)
                said(f"goes on at step {int(state.step)}")
        if state is None:
            peak = np.float32(experiment.optimizer.learning_rate)
            fresh = programs.create().result().run(np.int32(experiment.training.seed), peak)
            state = start(fresh)
        return _steps(
            programs, experiment, course, state, history, checkpoints, looks, stop, every, said
        )
    finally:
        if checkpoints is not None:
            checkpoints.__exit__(None, None, None)


def _steps(
    programs: Programs,
    experiment: ExperimentConfig,
    course: Course,
    state: TrainState,
    history: History,
    checkpoints: Checkpoints | None,
    looks: bool,
    stop: Callable[[int, float], bool],
    every: int,
    said: Callable[[str], None],
) -> tuple[TrainState, History]:
    step_fn, cut = programs.step().result().run, programs.cut().result().run
    steps = experiment.training.steps
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    points = {-(-steps * n // POINTS) for n in range(1, POINTS + 1)}
    look_at = {steps * n // LOOKS for n in range(LOOKS)} if looks else set()
    begun = int(state.step)
    before, start = history.seconds, time.perf_counter()
    losses: list[Any] = []
    waiting: tuple[int, list[Any], Any] | None = None
    counts: list[tuple[int, Any]] = []
    late, saved = False, begun
    each: float | None = None  # seconds of a step, lately
    seen = (begun, 0.0)  # step and seconds of the last point that is over

    def finish(point: tuple[int, list[Any], Any]) -> None:
        """Waits for a point's steps."""
        nonlocal seen, each
        step, own, metrics = point
        fetched, skipped = jax.device_get((own, metrics["nonfinite_in_row"]))
        seconds = time.perf_counter() - start
        each = (seconds - seen[1]) / (step - seen[0])
        seen = step, seconds
        history.curve.append([step * tokens, before + seconds, float(np.mean(fetched))])
        if int(skipped) >= experiment.training.max_nonfinite_steps:
            raise NonFiniteError(f"non-finite: {int(skipped)} steps in a row at step {step}")
        loss = history.curve[-1][2]
        said(f"step {step} of {steps}, loss {loss:.4f}, {1e3 * each:.1f} ms")

    def settle() -> None:
        nonlocal waiting
        if waiting is not None:
            finish(waiting)
            waiting = None
        for step, found in counts:
            share = look.shares(jax.device_get(found))
            history.visited.append([step * tokens, share["visited_64"], share["live_64"]])
        counts.clear()
        history.seconds = before + time.perf_counter() - start

    for step in range(begun, steps):
        # A program that is still being compiled isn't waited for: the count comes later.
        late = late or step in look_at
        if late and measures.can_look(programs, course.found):
            late = False
            counts.append((step, measures.visited(programs, state.params, course.found)))
        batch = cut(course.stream, course.starts, np.int32(step))
        state, metrics = step_fn(state, batch)
        losses.append(metrics["loss"])
        done = step + 1
        if done not in points:
            continue
        # The point before is waited for, so that the device always has the next steps.
        if waiting is not None:
            finish(waiting)
        waiting, losses = (done, losses, metrics), []
        if done == steps:
            break
        stopped = each is not None and stop(done, each)
        if stopped or (checkpoints is not None and done - saved >= every):
            settle()
            saved = done
            if checkpoints is not None:
                checkpoints.save(done, state, dataclasses.asdict(history), experiment.to_dict())
            if stopped:
                raise Cut(f"at step {done} of {steps}")
    if waiting is not None:
        settle()
    return state, history


def save(workdir: Path, experiment: ExperimentConfig, state: TrainState, history: History) -> None:
    """Keeps a run that is trained, but not measured."""
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(int(state.step), state, dataclasses.asdict(history), experiment.to_dict())


def time_steps(
    programs: Programs, course: Course, state: TrainState, *, cudnn: bool, steps: int, rounds: int
) -> tuple[float, TrainState]:
    """Returns the milliseconds of a step, and a state that has gone on; it consumes its own.

    The median of `rounds` rounds of `steps` steps; two before to warm up. Rows are those of
    the run's last steps.
    """
    step_fn, cut = programs.step(cudnn).result().run, programs.cut().result().run
    last = course.starts.shape[0]
    times = []
    for number in range(rounds + 1):
        size = steps if number else min(2, steps)
        batches = [
            cut(course.stream, course.starts, np.int32((last - 1 - n) % last)) for n in range(size)
        ]
        jax.block_until_ready(batches)
        start = time.perf_counter()
        for batch in batches:
            state, metrics = step_fn(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(1e3 * (time.perf_counter() - start) / size)
    return float(np.median(times[1:])), state


def order_of(tokens: data.Tokens, experiment: ExperimentConfig) -> data.Order:
    """Returns which rows the run sees."""
    return data.order(
        tokens.train.size,
        experiment.data.sequence_length,
        experiment.training.steps,
        experiment.data.batch_size,
        experiment.training.seed,
    )
