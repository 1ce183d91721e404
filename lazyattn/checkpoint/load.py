"""A trained model, as every mode but training reads it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import optax

from lazyattn import sharding
from lazyattn.checkpoint.manager import FOLDER, Checkpoints
from lazyattn.checkpoint.state import Params, make_state_factory
from lazyattn.checkpoint.workdir import find_tokenizer
from lazyattn.data.tokenizer import FILE_NAMES, Tokenizer
from lazyattn.errors import bad_value
from lazyattn.experiment import ExperimentConfig, from_config_dict, resumption_changes
from lazyattn.paths import local_path


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as a checkpoint holds it.

    Attributes:
      experiment: its settings.
      step: steps it was trained for.
      params: its parameters, on `mesh`; their average where `training.use_ema` says so.
      param_shardings: their shardings.
      mesh: the devices in use.
      tokenizer: its tokenizer.
      checkpoint: the checkpoint's folder.
    """

    experiment: ExperimentConfig
    step: int
    params: Params
    param_shardings: Params
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    checkpoint: Path


def load_trained(
    path: str | os.PathLike[str],
    experiment: ExperimentConfig | None = None,
    step: int | str | None = None,
) -> TrainedModel:
    """Returns a checkpoint's model.

    Args:
      path: the run's folder.
      experiment: settings to use; None: the checkpoint's own, on all devices.
      step: the checkpoint's step; "best": that with the lowest validation loss; None: the
        newest that can be read.

    Raises:
      InputError: if there is no checkpoint, none or not that of `step` can be read, or it
        is of another model than `experiment`'s.
    """
    workdir = local_path("--workdir", path).absolute()
    missing = bad_value(
        "--workdir", str(path), "the folder of a run with a checkpoint (--mode=train makes one)"
    )
    if not (workdir / FOLDER).is_dir():
        raise missing
    with Checkpoints(workdir, read_only=True) as checkpoints:
        if not checkpoints.steps():
            raise missing
        chosen = checkpoints.choose(step)
        found = checkpoints.newest_experiment(chosen)
        if found is not None and experiment is not None:
            resumption_changes(found[1], experiment)
        if experiment is None:
            saved = from_config_dict(found[1] if found else {})
            experiment = dataclasses.replace(saved, mesh=sharding.MeshConfig())
        mesh = sharding.make_mesh(experiment.mesh)
        # No optimizer: nothing of its state is read.
        factory = make_state_factory(experiment, mesh, optax.identity())
        abstract = dataclasses.replace(factory.abstract, opt_state=None)
        averaged = experiment.training.use_ema and abstract.ema is not None
        unread: dict[str, Any] = {"params" if averaged else "ema": None}
        abstract = dataclasses.replace(abstract, **unread)
        restored = checkpoints.restore(abstract, chosen)
        if restored is None:
            raise missing
        reached = int(restored.state.step)
        return TrainedModel(
            experiment=experiment,
            step=reached,
            params=restored.state.evaluated(averaged),
            param_shardings=factory.shardings.params,
            mesh=mesh,
            tokenizer=Tokenizer.load(find_tokenizer(workdir) or workdir / FILE_NAMES[0]),
            checkpoint=checkpoints.folder / str(reached),
        )
