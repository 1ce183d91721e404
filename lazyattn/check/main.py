"""`--mode=check`: a dry run, so that what is wrong comes out before a long run begins.

It is a training of one step in a folder inside the run's, which is removed afterwards. So
it takes the very way of a run: data, compilation, step, validation, logs, checkpoint.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax

import lazyattn
from lazyattn import buckets, sharding
from lazyattn.checkpoint import workdir as folders
from lazyattn.checkpoint.manager import FOLDER, Checkpoints
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.distributed import say, tell_all
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig
from lazyattn.quantity import quantity
from lazyattn.training.beginning import Beginning, going_on
from lazyattn.training.claim import claimed
from lazyattn.training.goodput import device_memory
from lazyattn.training.hooks import Hooks
from lazyattn.training.main import train
from lazyattn.training.teaching import make_run_optimizer

_TRIAL = ".check"


def check(
    experiment: ExperimentConfig,
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    hooks: Hooks | None = None,
) -> int:
    """Takes one step of a run, prints what was seen, and leaves the run's folder as it was.

    Prepared data stays in the cache. A run that has checkpoints is asked whether it could
    go on: its settings and data are compared, and its newest checkpoint is read.

    Args:
      experiment: all settings.
      path: the run's folder (`--workdir`).
      cache_dir: where prepared data is kept; None: the user's cache.
      hooks: of the run, of which the summary is left out.

    Returns:
      The program's exit status: 0 if a run could begin, 1 if the step's loss or gradient
      was not finite, 130 after Ctrl-C.

    Raises:
      InputError: as `train`.
      SaveError: if the checkpoint can't be written.
    """
    began = time.perf_counter()
    hooks = dataclasses.replace(hooks or Hooks(), summary=None)
    for line in _hosts(experiment):
        say(line)
    with claimed(path, keep=False) as workdir:
        reached = _read_newest(workdir, experiment, cache_dir)
        trial = workdir / _TRIAL
        _remove(trial)  # of a check that was killed
        try:
            settings = _one_step(experiment, resumes=reached is not None)
            status = train(settings, trial, cache_dir, hooks=hooks)
            if status:
                return status
            found = _look(workdir) if jax.process_index() == 0 else None
            size, free, skipped = json.loads(tell_all("check", json.dumps(found))[0])
        finally:
            _remove(trial)
    training = experiment.training
    say(
        f"checkpoint  {_bytes(size)}, written and removed;"
        + ("" if free is None else f" {_bytes(free)} free")
        + f" in {workdir}, for training.keep = {training.keep} and the best"
    )
    if free is not None and size * (training.keep + 2) > free:  # one more while it is being written
        say(
            f"  too little: {quantity(training.keep + 2, 'checkpoint')} need"
            f" {_bytes(size * (training.keep + 2))}"
        )
    if skipped:
        say(
            "The loss of the first step or its gradient is not finite; a run would skip that step.",
            sys.stderr,
        )
        return 1
    goes_on = "start" if reached is None else f"resume after step {reached}"
    seconds = time.perf_counter() - began
    say(f"checked in {seconds:.0f} s: --mode=train would {goes_on}; nothing of this is kept")
    return 0


def _remove(trial: Path) -> None:
    if jax.process_index() == 0:
        buckets.remove(trial)


def _look(workdir: Path) -> tuple[int, int | None, bool]:
    """Returns a checkpoint's bytes, those that are free, and whether the step was skipped."""
    trial = workdir / _TRIAL
    (record,) = map(json.loads, (trial / folders.METRICS).read_text().splitlines())
    free = None if buckets.is_bucket(workdir) else shutil.disk_usage(workdir).free
    return buckets.size(trial / FOLDER), free, bool(record["skipped"])


def _one_step(experiment: ExperimentConfig, *, resumes: bool) -> ExperimentConfig:
    """Returns settings of a run of one step with all that a run does."""
    training = dataclasses.replace(
        experiment.training,
        steps=1,
        eval_batches=1,
        inspect_every=min(experiment.training.inspect_every, 1),
        sample_every=min(experiment.training.sample_every, 1),
        tasks_every=min(experiment.training.tasks_every, 1),
        max_failed_saves=1,
    )
    teaching = dataclasses.replace(
        experiment.teaching,
        offset_steps=min(experiment.teaching.offset_steps, 1),
        bias_steps=min(experiment.teaching.bias_steps, 1),
    )
    if resumes:  # what it started from need not be there any more
        training = dataclasses.replace(training, init_from=None)
        teaching = dataclasses.replace(
            teaching, offset_steps=0, bias_steps=0, slope_share=1.0, distill=0.0
        )
    return dataclasses.replace(experiment, training=training, teaching=teaching)


def _read_newest(
    workdir: Path, experiment: ExperimentConfig, cache_dir: str | os.PathLike[str] | None
) -> int | None:
    """Returns the step that the run would resume after; None: it has no checkpoint.

    Begins as the run would, with its data.

    Raises:
      InputError: if it could not.
    """
    if not (workdir / FOLDER).is_dir():
        return None
    with Checkpoints(workdir, read_only=True) as checkpoints:
        found = checkpoints.newest_experiment()
        if found is None:
            return None
        steps = experiment.training.steps
        if found[0] >= steps:
            raise InputError(
                f"training.steps is {steps}, but the run in {workdir} is at step {found[0]}"
                " already: nothing is left to train."
            )
        experiment, _ = going_on(experiment, found[1])
        mesh = sharding.make_mesh(experiment.mesh)
        factory = make_state_factory(experiment, mesh, make_run_optimizer(experiment))
        beginning = Beginning(experiment, mesh, factory, checkpoints, found)
        _, batches = beginning.open_data(cache_dir)
        with contextlib.closing(batches):
            beginning.read(batches)
        return beginning.step


def _hosts(experiment: ExperimentConfig) -> list[str]:
    """Returns lines on the machine of each process, its devices and its share of a batch."""
    share = sharding.batch_share(sharding.make_mesh(experiment.mesh))
    mine = jax.local_devices()
    devices = quantity(len(mine), "device") + f" {mine[0].device_kind}"
    if limit := device_memory().get("memory_limit_bytes"):
        devices += f" of {_bytes(limit)}"
    rows = experiment.data.batch_size // share.count
    devices += f", reads {quantity(rows, 'row')} of a batch (part {share.index + 1} of"
    devices += f" {share.count})"
    told = [json.loads(one) for one in tell_all("hosts", json.dumps([_machine(), devices]))]
    if len(told) == 1:
        return [f"host     {told[0][0]}"]
    return [f"host     {machine}; process {n}: {seen}" for n, (machine, seen) in enumerate(told)]


def _machine() -> str:
    """Returns what this machine and its software are."""
    memory = ""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {_bytes(total)} of memory"
    return (
        f"{platform.node()}: {quantity(os.cpu_count() or 1, 'processor')}{memory};"
        f" Python {platform.python_version()}, jax {jax.__version__},"
        f" lazyattn {lazyattn.__version__}"
    )


def _bytes(number: Any) -> str:
    """Returns an amount of memory for people."""
    size, unit = float(number), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
