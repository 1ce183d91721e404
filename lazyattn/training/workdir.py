"""The folder of a run, and what is read back from it.

workdir/config.json     the settings of the last start
        tokenizer.json  the tokenizer (tokenizer.model if it is SentencePiece's), so
                        that the folder is all one needs
        metrics.jsonl   one JSON line a step
        tensorboard/    event files
        checkpoints/    see `lazyattn.training.checkpoint`
        .lock           see `lazyattn.training.claim`
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax

from lazyattn import sharding
from lazyattn.data.tokenizer import FILE_NAMES, Tokenizer
from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import ExperimentConfig, from_config_dict, resumption_changes
from lazyattn.model.parameters import init_params, partition_specs
from lazyattn.paths import local_path
from lazyattn.training.checkpoint import FOLDER, Checkpoints
from lazyattn.training.optimizer import make_optimizer
from lazyattn.training.state import Params, StateFactory

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as a checkpoint holds it.

    Attributes:
      experiment: its settings.
      step: steps it was trained for.
      params: its parameters, on `mesh`.
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


def open_workdir(path: str | os.PathLike[str]) -> Path:
    """Returns the folder, made if need be.

    Raises:
      InputError: if it is a URL, or nothing can be written there.
    """
    workdir = local_path("--workdir", path).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise bad_value(
            "--workdir", str(path), f"a folder that can be written to ({error.strerror})"
        ) from None
    return workdir


def write_experiment(workdir: Path, experiment: ExperimentConfig) -> None:
    """Writes `config.json`, for people to read; checkpoints hold their own."""
    (workdir / CONFIG).write_text(json.dumps(experiment.to_dict(), indent=2) + "\n")


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Copies the tokenizer into the folder, or checks that it is the one there.

    Raises:
      InputError: if the folder has another one: its model wouldn't understand.
    """
    path = find_tokenizer(workdir)
    if path is not None:
        if Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{path} is not the tokenizer of this data (another Python or other settings);"
                " use what it was made with, or choose another --workdir."
            )
        return
    temporary = workdir / f"tmp.{tokenizer.file_name}"
    tokenizer.save(temporary)
    os.replace(temporary, workdir / tokenizer.file_name)


def find_tokenizer(workdir: Path) -> Path | None:
    """Returns the tokenizer's file in a run's folder, whichever kind it is; None: none."""
    for name in FILE_NAMES:
        if (workdir / name).is_file():
            return workdir / name
    return None


def check_tokenizer(path: str | os.PathLike[str]) -> None:
    """Checks that a run's folder has a tokenizer, before anything long begins.

    Raises:
      InputError: if there are checkpoints but no tokenizer.
    """
    workdir = local_path("--workdir", path).absolute()
    if (workdir / FOLDER).is_dir() and find_tokenizer(workdir) is None:
        raise bad_value(
            "--workdir", str(path), "a folder with a tokenizer.json beside its checkpoints"
        )


def check_vocabulary(tokenizer: Tokenizer, experiment: ExperimentConfig) -> None:
    """Checks that the model has an embedding for every token.

    Raises:
      InputError: if the tokenizer is bigger than the model's vocabulary.
    """
    if tokenizer.vocab_size > experiment.model.vocab_size:
        raise bad_value(
            "model.vocab_size",
            experiment.model.vocab_size,
            f"at least {tokenizer.vocab_size}, the size of the tokenizer",
        )


def make_state_factory(experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> StateFactory:
    """Returns the shapes and shardings of the experiment's state, and how to make it."""
    return StateFactory(
        lambda key: init_params(experiment.model, key),
        partition_specs(experiment.model),
        make_optimizer(experiment.optimizer, experiment.training.steps),
        mesh,
        experiment.training.seed,
    )


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
        factory = make_state_factory(experiment, mesh)
        abstract = dataclasses.replace(factory.abstract, opt_state=None)
        restored = checkpoints.restore(abstract, chosen)
        if restored is None:
            raise missing
        reached = int(restored.state.step)
        return TrainedModel(
            experiment=experiment,
            step=reached,
            params=restored.state.params,
            param_shardings=factory.shardings.params,
            mesh=mesh,
            tokenizer=Tokenizer.load(find_tokenizer(workdir) or workdir / FILE_NAMES[0]),
            checkpoint=checkpoints.folder / str(reached),
        )
