"""`--wandb`: a run's curves in Weights & Biases, by way of its own package.

Its environment variables say the rest: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from lazyattn import buckets
from lazyattn.errors import InputError

FOLDER = "wandb"
_PROJECT = "lazyattn"
_ID = "lazyattn_run_id"


class WeightsAndBiases:
    """One run there, which a resumed training goes on with; on the first process only.

    Use it as a context manager: leaving it ends the run there. What goes wrong once it has
    begun is warned of, and training goes on without.
    """

    def __init__(self, workdir: Path, experiment: Mapping[str, Any], *, enabled: bool = True):
        """Starts the run, or goes on with it.

        Args:
          workdir: the run's folder, whose name the run there has; the package writes to
            `wandb/` in it. If that is in a bucket, it only keeps the run's id there, and
            the package writes where WANDB_DIR says, or here.
          experiment: all settings as plain data, which become the run's config.
          enabled: False: does nothing at all, nor does any process but the first.

        Raises:
          InputError: if the package is missing, or the run can't start.
        """
        self._run: Any = None
        if not enabled or jax.process_index() > 0:
            return
        try:
            package = importlib.import_module("wandb")
        except ImportError:
            raise InputError(
                "--wandb is given, but the package wandb is not installed; pip install wandb."
            ) from None
        kept = workdir / FOLDER / _ID
        known = kept.read_text().strip() if kept.is_file() else None
        try:
            self._run = package.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.environ.get("WANDB_NAME", workdir.name),
                dir=None if buckets.is_bucket(workdir) else str(workdir),
                id=os.environ.get("WANDB_RUN_ID", known),
                resume="allow" if known else None,
                config=dict(experiment),
            )
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"--wandb is given, but Weights & Biases can't start ({why}); WANDB_MODE=offline"
                " needs no account."
            ) from None
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{self._run.id}\n")

    def __enter__(self) -> "WeightsAndBiases":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._run is not None:
            self._try("finish", exit_code=0 if kind is None else 1)
            self._run = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a value to each of these curves.

        Steps that a killed run took past its checkpoint are there already, and a resumed
        run takes the same ones again: these are left out.
        """
        if self._run is not None and scalars and step >= self._run.step:
            self._try("log", dict(scalars), step=step)

    def _try(self, method: str, *arguments: Any, **named: Any) -> None:
        try:
            getattr(self._run, method)(*arguments, **named)
        except Exception as error:
            logging.warning(
                "Weights & Biases failed (%s); training goes on without it",
                str(error) or type(error).__name__,
            )
            self._run = None
