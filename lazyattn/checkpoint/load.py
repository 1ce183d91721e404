"""A trained model, as every mode but training reads it: of a run, or of an export."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import optax

from lazyattn import buckets, sharding
from lazyattn.checkpoint.manager import FOLDER, Checkpoints
from lazyattn.checkpoint.state import Params, make_state_factory
from lazyattn.checkpoint.workdir import find_tokenizer
from lazyattn.data.copies import here
from lazyattn.data.tokenizer import FILE_NAMES, Tokenizer
from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import ExperimentConfig, from_config_dict, resumption_changes
from lazyattn.model.lora import merged
from lazyattn.paths import folder
from lazyattn.pretrained.load import PARAMS, load_model


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as a checkpoint holds it.

    Attributes:
      experiment: its settings, without LoRA, which is merged.
      step: steps it was trained for.
      params: its parameters, on `mesh`; their average where `training.use_ema` says so.
      param_shardings: their shardings.
      mesh: the devices in use.
      tokenizer: its tokenizer.
      checkpoint: the checkpoint's folder, or the export's.
      exported: whether it is of an export. The data and training in `experiment` are then
        defaults, but for its tokenizer and the length of its rows.
    """

    experiment: ExperimentConfig
    step: int
    params: Params
    param_shardings: Params
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    checkpoint: Path
    exported: bool = False

    @property
    def name(self) -> str:
        """The name of the folder of the run or of the export."""
        return (self.checkpoint if self.exported else self.checkpoint.parents[1]).name

    def require_data(self, flag: str) -> None:
        """Refuses what needs the text that the model was trained on.

        Args:
          flag: the flag that would name another text.

        Raises:
          InputError: if the model is of an export.
        """
        if self.exported:
            raise InputError(
                f"{flag} is not given, but it must name a text, since {str(self.checkpoint)!r} is"
                " an export, which has none of its own."
            )


def load_trained(
    path: str | os.PathLike[str],
    experiment: ExperimentConfig | None = None,
    step: int | str | None = None,
    flag: str = "--workdir",
) -> TrainedModel:
    """Returns a checkpoint's model, or an export's.

    Args:
      path: the run's folder, or an export's (`--mode=export`), imported ones included.
      experiment: settings to use; None: the checkpoint's own, on all devices. An export has
        its own.
      step: the checkpoint's step; "best": that with the lowest validation loss; None: the
        newest that can be read.
      flag: which flag names the folder, for messages.

    Raises:
      InputError: if there is no checkpoint, none or not that of `step` can be read, or it
        is of another model than `experiment`'s; of an export, if `experiment` or `step` is
        given, or it has no tokenizer.
    """
    buckets.check_readable(flag, path)
    workdir = folder(flag, path)
    missing = bad_value(
        flag, str(path), "the folder of a run with a checkpoint (--mode=train makes one)"
    )
    if not (workdir / FOLDER).is_dir():
        if (workdir / PARAMS).is_dir() or any(workdir.glob("*.safetensors")):
            return _exported(here(flag, path), experiment, step)
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
        unread: dict[str, Any] = {"params" if averaged else "ema": None, "teacher": None}
        abstract = dataclasses.replace(abstract, **unread)
        restored = checkpoints.restore(abstract, chosen)
        if restored is None:
            raise missing
        reached = int(restored.state.step)
        params = restored.state.evaluated(averaged)
        if experiment.model.lora_rank:
            experiment, params = _without_lora(experiment, params, mesh)
        return TrainedModel(
            experiment=experiment,
            step=reached,
            params=params,
            param_shardings=jax.tree.map(lambda x: x.sharding, params),
            mesh=mesh,
            tokenizer=Tokenizer.load(find_tokenizer(workdir) or workdir / FILE_NAMES[0]),
            checkpoint=checkpoints.folder / str(reached),
        )


def _without_lora(
    experiment: ExperimentConfig, params: Params, mesh: jax.sharding.Mesh
) -> tuple[ExperimentConfig, Params]:
    """Returns the settings and parameters of the same model with LoRA merged into its matrices."""
    model = dataclasses.replace(experiment.model, lora_rank=0)
    found = dataclasses.replace(experiment, model=model)
    shardings = make_state_factory(found, mesh, optax.identity()).shardings.params
    merge = jax.jit(lambda params: merged(params, experiment.model), out_shardings=shardings)
    return found, merge(params)


def _exported(
    folder: Path, experiment: ExperimentConfig | None, step: int | str | None
) -> TrainedModel:
    for flag, value in (("--config", experiment), ("--step", step)):
        if value is not None:
            raise InputError(
                f"{flag} is given, but {str(folder)!r} is an export, which is one model with its"
                " own settings; leave it out."
            )
    own = from_config_dict({})
    mesh = sharding.make_mesh(own.mesh)
    model = load_model(folder, mesh)
    if model.tokenizer is None:
        raise InputError(f"{str(folder)!r} has no tokenizer; put its tokenizer.json there.")
    data = dataclasses.replace(
        own.data,
        tokenizer=str(find_tokenizer(folder)),
        sequence_length=model.facts.sequence_length,
    )
    return TrainedModel(
        experiment=dataclasses.replace(own, model=model.config, data=data),
        step=model.facts.step or 0,
        params=model.params,
        param_shardings=jax.tree.map(lambda x: x.sharding, model.params),
        mesh=mesh,
        tokenizer=model.tokenizer,
        checkpoint=folder,
        exported=True,
    )
