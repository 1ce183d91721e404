"""What a run does besides training: handed in, so that training knows nothing of it."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from lazyattn.checkpoint.state import Params, TrainState
from lazyattn.data.pipeline import TrainingData
from lazyattn.experiment import ExperimentConfig

Scalars = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Started:
    """A run that is about to train, as its hooks see it.

    Attributes:
      path: the run's folder, as the user wrote it.
      workdir: the same, absolute.
      experiment: all settings.
      mesh: where the parameters are.
      param_shardings: their shardings.
      data: tokenizer, training and validation text.
      step: steps taken before.
      say: prints a line, on the first process.
    """

    path: str | os.PathLike[str]
    workdir: Path
    experiment: ExperimentConfig
    mesh: jax.sharding.Mesh
    param_shardings: Params
    data: TrainingData
    step: int
    say: Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has taken its last step.

    Attributes:
      state: the last.
      checkpoint: its folder.
      best: step and validation loss of the best checkpoint, if one is known.
      spent: lines on time and memory.
      record: the last step's metrics and validation.
    """

    state: TrainState
    checkpoint: Path
    best: tuple[int, float] | None
    spent: Sequence[str]
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Each is called once with the run, before the first step; `lazyattn.hooks` has a run's own.

    Attributes:
      check: called with the settings before data is prepared; raises InputError where what is
        asked for can't be done here.
      validate: returns a function of parameters whose scalars join the step's metrics. The
        best checkpoint is that with the lowest "validation_loss" among them.
      inspect: the same, for every `training.inspect_every` steps.
      sample: returns, in a context, a function of step and parameters for every
        `training.sample_every` steps.
      tasks: returns a function of parameters, for every `training.tasks_every` steps, whose
        scalars begin with "tasks_".
      summary: called with the finished run, on the first process; None: there is none.
    """

    check: Callable[[ExperimentConfig], None] = lambda experiment: None
    validate: Callable[[Started], Callable[[Params], Scalars]] = lambda run: lambda params: {}
    inspect: Callable[[Started], Callable[[Params], Scalars]] = lambda run: lambda params: {}
    sample: Callable[[Started], AbstractContextManager[Callable[[int, Params], None]]] = (
        lambda run: contextlib.nullcontext(lambda step, params: None)
    )
    tasks: Callable[[Started], Callable[[Params], Scalars]] = lambda run: lambda params: {}
    summary: Callable[[Started, Finished], None] | None = None
