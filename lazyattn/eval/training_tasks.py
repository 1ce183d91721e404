"""Tasks of lm-evaluation-harness while a run trains: their figures, every so many steps."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from absl import logging

from lazyattn.checkpoint.state import Params
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig, TrainingConfig

if TYPE_CHECKING:
    from lazyattn.eval.harness import LazyAttentionLM


def check_tasks(training: TrainingConfig) -> None:
    """Checks the tasks before data is prepared; does nothing where none are asked for.

    Raises:
      InputError: if the harness is missing, does not know a task or has no items for it, or
        several processes train.
    """
    if not training.tasks_every:
        return
    if jax.process_count() > 1:
        raise InputError(
            f"training.tasks_every is {training.tasks_every}, but it must be 0 where several"
            " processes train, since none of them holds the model."
        )
    check_known("training.tasks_every", training.task_names, training.tasks_dir)


def check_known(asked_by: str, names: Sequence[str], folder: str | None) -> None:
    """Checks that there is a harness that knows some tasks, before anything takes long.

    Args:
      asked_by: the flag or setting that names the tasks, for errors.
      names, folder: as in `benchmarks.find_tasks`.

    Raises:
      InputError: if there is none, or it does not know a task or has no items for it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError(
            f"{asked_by} needs lm-evaluation-harness, which is not installed: pip install"
            " 'lazyattn[evaluation]'."
        ) from None
    from lazyattn.eval.benchmarks import find_tasks

    with tempfile.TemporaryDirectory() as work:
        try:
            find_tasks(names, folder, Path(work))
        except InputError as error:  # which names the flags of --mode=eval
            named = asked_by.removesuffix("_every")
            raise InputError(str(error).replace("--tasks", named)) from None


class Tasks:
    """Measures `training.tasks` with the parameters of the moment.

    Nothing of the training depends on it. Contexts are the length of training rows, and
    arithmetic is float32, as in `--mode=eval`.
    """

    def __init__(self, experiment: ExperimentConfig, mesh: jax.sharding.Mesh, tokenizer: Tokenizer):
        """Does nothing yet."""
        self._experiment, self._mesh, self._tokenizer = experiment, mesh, tokenizer
        self._lm: LazyAttentionLM | None = None

    def __call__(self, params: Params) -> dict[str, float]:
        """Returns the tasks' figures, as "tasks_piqa_acc".

        One that can't be measured is warned of and left out.
        """
        from lazyattn.eval import benchmarks, harness, tasks

        experiment, training = self._experiment, self._experiment.training
        if self._lm is None:
            harness.quiet()
            self._lm = harness.LazyAttentionLM(
                params,
                experiment.model,
                self._tokenizer,
                self._mesh,
                context=experiment.data.sequence_length,
            )
        self._lm.update(params)
        try:
            found = tasks.run_tasks(
                self._lm,
                training.task_names,
                tasks_dir=training.tasks_dir,
                limit=training.tasks_limit or None,
            )
        except InputError as error:  # a request that the model can't answer
            logging.warning("training.tasks could not be measured: %s", error)
            return {}
        finally:
            self._lm.update({})  # the next step overwrites them
        return {
            f"tasks_{line.task}_{line.metric}": line.value
            for line in benchmarks.lines(found.results["results"])
        }
