"""Where a run begins: at its newest checkpoint, at the weights of another model, or afresh."""

import dataclasses
from typing import Any

import jax

from lazyattn.checkpoint.manager import Checkpoints, Restored
from lazyattn.checkpoint.state import StateFactory, TrainState
from lazyattn.checkpoint.workdir import check_vocabulary
from lazyattn.data.pipeline import BatchIterator, TrainingData
from lazyattn.experiment import ExperimentConfig, from_config_dict, resumption_changes
from lazyattn.training import resume_data
from lazyattn.training.initialize import Weights, check_teaching, read_weights


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
    """What a run begins with.

    Attributes:
      step: steps taken before.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        mesh: jax.sharding.Mesh,
        factory: StateFactory,
        checkpoints: Checkpoints,
    ):
        """Reads the newest checkpoint, or else the weights in `training.init_from`.

        Raises:
          InputError: if there are some and they can't be read, or they don't fit the settings.
        """
        self._experiment = experiment
        self._factory = factory
        self._restored: Restored | None = checkpoints.restore(factory.abstract)
        self._weights: Weights | None = None
        self.step = 0
        if self._restored is not None:
            self.step = int(self._restored.state.step)
        elif experiment.training.init_from is not None:
            self._weights = read_weights(experiment, mesh, factory.shardings.params)
        else:
            check_teaching(experiment, None)

    def set_data(self, prepared: TrainingData, batches: BatchIterator) -> None:
        """Makes the batches go on where the checkpoint's stood.

        Raises:
          InputError: if the data is not what it was, or has another tokenizer than the model.
        """
        if self._restored is not None:
            saved = self._restored
            resume_data.resume(batches, saved.data, saved.experiment, self._experiment)
        check_vocabulary(prepared.tokenizer, self._experiment)
        if self._weights is not None:
            self._weights.check_tokenizer(prepared.tokenizer)

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

    def take_state(self) -> TrainState:
        """Returns the state, once: nothing is kept of it here."""
        restored, weights = self._restored, self._weights
        self._restored = self._weights = None
        if restored is not None:
            return restored.state
        return self._factory.create(None if weights is None else weights.params)
