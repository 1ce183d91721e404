"""A run's folder while a training has it.

Another training is kept out of it, and one that was refused before its first step leaves
nothing behind. Several processes of one run are one training: the first has the lock.
"""

import contextlib
import itertools
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from lazyattn import buckets
from lazyattn.checkpoint.manager import FOLDER
from lazyattn.checkpoint.workdir import CONFIG, METRICS, SAMPLES, TENSORBOARD, open_workdir
from lazyattn.data.tokenizer import CONFIG_NAME, FILE_NAMES
from lazyattn.distributed import tell_all
from lazyattn.errors import InputError
from lazyattn.file_lock import LockedError, locked
from lazyattn.paths import folder
from lazyattn.training import claim_object
from lazyattn.training.profile import FOLDER as PROFILE
from lazyattn.training.weights_and_biases import FOLDER as WANDB

LOCK = ".lock"
_OURS = (FOLDER, CONFIG, METRICS, SAMPLES, TENSORBOARD, PROFILE, WANDB, CONFIG_NAME, *FILE_NAMES)
_times = itertools.count(1)
# Seconds in which a file that one host writes is there on all others, over NFS.
_NOTICED = 30.0


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str], *, keep: bool = True) -> Iterator[Path]:
    """Makes a run's folder if need be and has it to itself; all processes of a run enter.

    Args:
      path: the folder.
      keep: what is written stays once a step is taken; False: a folder where none was is
        removed in any case, with what this training wrote.

    Yields:
      The folder.

    Raises:
      InputError: on all processes, if it can't be written to or another training has it.
    """
    workdir = folder("--workdir", path)
    in_bucket = buckets.is_bucket(workdir)
    made = (
        []
        if in_bucket  # there are no folders, only names of objects
        else [each for each in (workdir, *workdir.parents) if not each.exists()]
    )
    before: set[str] = set()
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                open_workdir(path)
                before = buckets.names(workdir)
                lock = claim_object.held if in_bucket else locked
                stack.enter_context(lock(workdir / LOCK))
            except InputError as error:
                problem = str(error)
            except LockedError as who:
                problem = (
                    f"--workdir is {str(path)!r}, but another training is at work there right now"
                    f" ({who}); wait for it or give another folder."
                )
        problem = tell_all(f"workdir {next(_times)}", problem)[0]
        if problem:
            raise InputError(problem)
        if jax.process_index() > 0:
            open_workdir(path)
        stays = False
        try:
            if not in_bucket:
                _require_shared(workdir)
            yield workdir
            stays = keep
        finally:
            if not stays and jax.process_index() == 0 and not _begun(workdir):
                _clear(workdir, before)
                for each in made:
                    with contextlib.suppress(OSError):
                        each.rmdir()


def _require_shared(workdir: Path) -> None:
    """Checks that all processes see the same folder, by a file that the first one writes.

    Raises:
      InputError: on all of them, if some don't.
    """
    if jax.process_count() == 1:
        return
    number = next(_times)
    mark = Path()
    if jax.process_index() == 0:
        mark = workdir / f".seen-by-all-{uuid.uuid4().hex}"
        mark.touch()
    mark = workdir / tell_all(f"workdir {number}: mark", mark.name)[0]
    deadline = time.monotonic() + _NOTICED
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = tell_all(f"workdir {number}: seen", "" if seen else socket.gethostname())
    if jax.process_index() == 0:
        mark.unlink()
    if blind := [f"process {process} on {host}" for process, host in enumerate(told) if host]:
        raise InputError(
            f"--workdir is {str(workdir)!r}, but {blind[0]} does not see what process 0 writes"
            " there; it must be a folder that all processes see, or one in a bucket."
        )


def _begun(workdir: Path) -> bool:
    """Returns whether a step was taken there, in this training or in an earlier one."""
    checkpoints = workdir / FOLDER
    return bool(buckets.read_log(workdir / METRICS)) or (
        checkpoints.is_dir() and any(checkpoints.glob("[0-9]*"))
    )


def _clear(workdir: Path, before: set[str]) -> None:
    """Removes what this training wrote, and nothing else."""
    parts = {buckets.parts_folder(workdir / name).name for name in (METRICS, SAMPLES)}
    for name in {*_OURS, LOCK, *parts} - before:
        buckets.remove(workdir / name)
