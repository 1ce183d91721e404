"""Where a run begins: at its newest checkpoint, at the weights of another model, or afresh."""

import dataclasses
import functools
import os
from typing import Any

import jax

from lazyattn import sharding
from lazyattn.checkpoint.manager import Checkpoints, Restored
from lazyattn.checkpoint.state import StateFactory, TrainState
from lazyattn.checkpoint.workdir import check_vocabulary
from lazyattn.data.pipeline import (
    BatchIterator,
    TrainingData,
    known_tokenizer,
    prepare,
    train_iterator,
)
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.distributed import gather_rows, together
from lazyattn.experiment import ExperimentConfig, from_config_dict, resumption_changes
from lazyattn.training import resume_data
from lazyattn.training.initialize import Source, Weights, check_teaching, find_weights


def going_on(
    experiment: ExperimentConfig, saved: dict[str, Any] | None
) -> tuple[ExperimentConfig, dict[str, tuple[Any, Any]]]:
    """Returns the settings of a run that goes on, and what differs from its checkpoint's.

    Args:
      experiment: what the run is asked to be.
      saved: settings of the checkpoint as plain data; None: there is none.

    Raises:
      InputError: if it can't go on so.
    """
    if saved is None:
        return experiment, {}
    changes = resumption_changes(saved, experiment)
    resume_data.require_same_kind(saved, experiment)
    before = from_config_dict(saved).training.init_from
    training = dataclasses.replace(experiment.training, init_from=before)
    return dataclasses.replace(experiment, training=training), changes


class Beginning:
    """What a run begins with. What can be wrong with it is looked at before it is read.

    Attributes:
      step: steps taken before, once `read` has returned.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        mesh: jax.sharding.Mesh,
        factory: StateFactory,
        checkpoints: Checkpoints,
        newest: tuple[int, dict[str, Any]] | None,
    ):
        """Looks at the newest checkpoint, or else at what `training.init_from` names.

        Args:
          experiment: settings as `going_on` returned them.
          mesh: the devices.
          factory: of the state.
          checkpoints: of the run.
          newest: step and settings of the newest checkpoint, as the run asked for them.

        Raises:
          InputError: if no checkpoint can be read, or weights don't fit the settings.
        """
        self._experiment, self._mesh = experiment, mesh
        self._factory, self._checkpoints = factory, checkpoints
        # Where no settings can be read, nothing else can: `restore` says so.
        self._restored: Restored | None = (
            checkpoints.restore(factory.abstract) if newest is None else None
        )
        self._source: Source | None = None
        self._weights: Weights | None = None
        self._position: tuple[Any, dict[str, Any]] | None = None
        self.step = 0
        if newest is not None:
            self._position = checkpoints.data_state(newest[0]), newest[1]
        elif experiment.training.init_from is not None:
            self._source = find_weights(experiment)
        else:
            check_teaching(experiment, None)

    def open_data(
        self, cache_dir: str | os.PathLike[str] | None
    ) -> tuple[TrainingData, BatchIterator]:
        """Returns the data, which is the model's, and this process's share of its batches.

        Args:
          cache_dir: where prepared data is kept; None: the user's cache.

        Raises:
          InputError: on all processes, if it can't be used on one; if the model has fewer tokens
            or learned others; if it is not what it was for the checkpoint.
        """
        return together("data", lambda: self._open_data(cache_dir))

    def _open_data(
        self, cache_dir: str | os.PathLike[str] | None
    ) -> tuple[TrainingData, BatchIterator]:
        config = self._experiment.data
        early = known_tokenizer(config)
        if early is not None:
            self._check_tokenizer(early)
        data = prepare(config, cache_dir)
        self._check_tokenizer(data.tokenizer)
        share = sharding.batch_share(self._mesh)
        batches = train_iterator(
            data,
            config,
            process_index=share.index,
            process_count=share.count,
            gather=functools.partial(gather_rows, shares=sharding.shares_by_process(self._mesh)),
        )
        if self._position is not None and self._position[0] is not None:
            resume_data.resume(batches, *self._position, self._experiment)
        return data, batches

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        check_vocabulary(tokenizer, self._experiment)
        if self._source is not None:
            self._source.check_tokenizer(tokenizer)

    def read(self, batches: BatchIterator) -> None:
        """Reads the checkpoint or the weights; batches go on where the checkpoint's stood.

        Raises:
          InputError: if there are some and they can't be read, or they don't fit the settings.
        """
        if self._restored is None:
            self._restored = self._checkpoints.restore(self._factory.abstract)
        if self._restored is not None:
            saved = self._restored
            self.step = int(saved.state.step)
            resume_data.resume(batches, saved.data, saved.experiment, self._experiment)
        elif self._source is not None:
            self._weights = self._source.read(self._mesh, self._factory.shardings.params)

    def lines(self, changes: dict[str, tuple[Any, Any]]) -> list[str]:
        """Returns lines on where the run begins; `changes` as `going_on` returned them."""
        if self._weights is not None:
            return list(self._weights.said)
        if self._restored is None:
            return []
        if self.step == self._experiment.training.steps:
            last = f"already at step {self.step}, the last (training.steps)"
            return [f"{last}: nothing is left to train"]
        return [
            f"resuming after step {self.step}",
            *(
                f"  config.{key}: {old!r} before, {new!r} now"
                for key, (old, new) in changes.items()
            ),
        ]

    def begin_state(self) -> None:
        """Begins to compile what makes the state, if that is what `take_state` will do."""
        if self._restored is None and self._weights is None:
            self._factory.begin()

    def take_state(self) -> TrainState:
        """Returns the state, once: nothing is kept of it here."""
        restored, weights = self._restored, self._weights
        self._restored = self._weights = None
        if restored is not None:
            return restored.state
        return self._factory.create(None if weights is None else weights.params)
