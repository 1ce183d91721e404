"""A resumed run must go on with the data it began with: the setting at fault is named."""

from collections.abc import Mapping
from typing import Any

from lazyattn.data.config import DataConfig
from lazyattn.data.pipeline import BatchIterator, OtherDataError
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig, from_config_dict

_ADVICE = "set it back or choose another --workdir"


def require_same_kind(saved: Mapping[str, Any], experiment: ExperimentConfig) -> None:
    """Refuses text where the run began with tokenised shards, and the reverse.

    Args:
      saved: `ExperimentConfig.to_dict()` of the checkpoint.
      experiment: what the run is asked to be.

    Raises:
      InputError: naming `data.path` or `data.sources`, before any data is read.
    """
    old, new = from_config_dict(saved).data, experiment.data
    if old.tokenised != new.tokenised:
        name, _ = _where(old if old.tokenised else new)
        raise InputError(
            f"config.data.{name} is {getattr(new, name)!r}, but the checkpoints in the workdir were"
            f" made with {getattr(old, name)!r}; {_ADVICE}."
        )


def resume(
    batches: BatchIterator, state: Any, saved: Mapping[str, Any], experiment: ExperimentConfig
) -> None:
    """Makes an iterator go on where a checkpoint's stood.

    Args:
      batches: of the run's data.
      state: of the iterator in the checkpoint.
      saved: as in `require_same_kind`.
      experiment: what the run is asked to be.

    Raises:
      InputError: if the data is not what it was, naming the setting that says where it is.
    """
    try:
        batches.set_state(state)
    except OtherDataError:
        old, new = _where(from_config_dict(saved).data), _where(experiment.data)
        name, value = new
        if old == new:
            raise InputError(
                f"config.data.{name} is {value!r}, but it does not hold what it held when the"
                " checkpoints in the workdir were made; bring that back or choose another"
                " --workdir."
            ) from None
        raise InputError(
            f"config.data.{name} is {value!r}, which is other data than data.{old[0]} ="
            f" {old[1]!r}, with which the checkpoints in the workdir were made; {_ADVICE}."
        ) from None


def _where(data: DataConfig) -> tuple[str, Any]:
    """Returns the setting that says where the data is, and its value."""
    name = "path" if data.path is not None else "sources" if data.sources else "source"
    return name, getattr(data, name)
