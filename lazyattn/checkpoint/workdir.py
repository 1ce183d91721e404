"""The folder of a run.

workdir/config.json     the settings of the last start
        tokenizer.json  the tokenizer (tokenizer.model if it is SentencePiece's), so
                        that the folder is all one needs; tokenizer_config.json
                        if the end of a document had to be named
        metrics.jsonl   one JSON line a step; in a bucket metrics.jsonl.parts/ has the newest
        tensorboard/    event files
        checkpoints/    see `lazyattn.checkpoint.manager`
        .lock           see `lazyattn.training.claim`
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from lazyattn import buckets
from lazyattn.checkpoint.manager import FOLDER
from lazyattn.data.tokenizer import FILE_NAMES, Tokenizer
from lazyattn.errors import InputError, bad_value
from lazyattn.experiment import ExperimentConfig
from lazyattn.paths import folder
from lazyattn.pretrained.load import PARAMS

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SAMPLES = "samples.jsonl"


def open_workdir(path: str | os.PathLike[str]) -> Path:
    """Returns the folder, made if need be.

    Raises:
      InputError: if it is a URL that can't be used, nothing can be written there, or a model or
        something else is there.
    """
    workdir = folder("--workdir", path)
    if buckets.is_bucket(workdir):
        buckets.check_writable("--workdir", workdir)
        _check_ours(workdir, path)
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise bad_value(
            "--workdir", str(path), f"a folder that can be written to ({error.strerror})"
        ) from None
    _check_ours(workdir, path)
    return workdir


def _check_ours(workdir: Path, path: str | os.PathLike[str]) -> None:
    """Refuses a folder whose files a run would overwrite though they are not of one."""
    there = buckets.names(workdir)
    if FOLDER in there:
        return
    config, foreign = {}, None
    if CONFIG in there:
        with contextlib.suppress(ValueError):
            config = json.loads((workdir / CONFIG).read_text())
    if PARAMS in there or any(name.endswith(".safetensors") for name in there):
        foreign = "a model is"
    elif CONFIG in there and not (
        isinstance(config, dict) and {"model", "training"} <= set(config)
    ):
        foreign = f"a {CONFIG} of something else is"
    elif METRICS in there and CONFIG not in there:
        foreign = f"a {METRICS} of something else is"
    if foreign:
        raise bad_value("--workdir", str(path), f"a new folder or a run's, and {foreign} there")


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
        kept = Tokenizer.load(path)
        if kept.fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"{path} is not the tokenizer of this data (another Python or other settings);"
                " use what it was made with, or choose another --workdir."
            )
        if kept.eos_id != tokenizer.eos_id:
            raise InputError(
                f"{path} ends documents with token {kept.eos_id} and this data with"
                f" {tokenizer.eos_id}; prepare the data with the same --eos_token, or choose"
                " another --workdir."
            )
        return
    if buckets.is_bucket(workdir):
        with buckets.staged(workdir, last=tokenizer.file_name) as staged:
            tokenizer.save_in(staged)
    else:
        tokenizer.save_in(workdir)


def find_tokenizer(workdir: Path) -> Path | None:
    """Returns the tokenizer's file in a run's folder, whichever kind it is; None: none."""
    for name in FILE_NAMES:
        if (workdir / name).is_file():
            return workdir / name
    return None


def check_tokenizer(path: str | os.PathLike[str], flag: str = "--workdir") -> None:
    """Checks that the folder of a run, named by `flag`, has a tokenizer, before long work.

    Raises:
      InputError: if there are checkpoints but no tokenizer.
    """
    buckets.check_readable(flag, path)
    workdir = folder(flag, path)
    if (workdir / FOLDER).is_dir() and find_tokenizer(workdir) is None:
        raise bad_value(flag, str(path), "a folder with a tokenizer.json beside its checkpoints")


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
