"""Checkpoints of a run: written in the background, read back even if the last is torn.

    workdir/checkpoints/<step>/state        parameters, optimiser, counters, rng (arrays)
                              /data         state of the data iterator; where there was a
                                            validation, its loss (JSON)
                              /experiment   the settings (JSON)
    workdir/damaged/<step>-<n>              what could not be read back, moved aside

Orbax writes a step under another name and renames it when all of it is there, so
that a killed process leaves no half of one; in a bucket, a last file says that all is
there. Truncated files are still possible (a
full disk, a power cut); a step that can't be read is then passed over.

A checkpoint that can't be written leaves those before as they are: they are deleted
only when a later one is whole. The one with the lowest validation loss is never deleted.
"""

import dataclasses
import gc
import json
import logging as standard_logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from lazyattn import buckets
from lazyattn.checkpoint import s3, schema
from lazyattn.checkpoint.save_agreement import SaveAgreement
from lazyattn.checkpoint.save_agreement import brief as _brief
from lazyattn.checkpoint.state import TrainState
from lazyattn.distributed import wait_for_all
from lazyattn.errors import InputError
from lazyattn.paths import folder
from lazyattn.patience import waiting

FOLDER = "checkpoints"
BEST = "best"
_LOSS = "validation_loss"


class SaveError(RuntimeError):
    """Checkpoints can't be written; the message is one sentence that says which is the last."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      state: the state, on the devices its shapes' shardings named.
      data: the data iterator's state.
      experiment: the settings it was made with, as plain data.
    """

    state: TrainState
    data: Any
    experiment: dict[str, Any]


class Checkpoints:
    """The checkpoints of one working folder.

    Use it as a context manager: leaving it waits for a save under way.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 1,
        keep_every: int = 0,
        max_failed: int = 1,
        read_only: bool = False,
    ):
        """Opens (and unless `read_only` makes) the folder.

        Args:
          workdir: the run's folder.
          keep: newest checkpoints kept.
          keep_every: those at multiples of this are kept for good; 0: none.
          max_failed: saves in a row that may fail before `save` raises an error.
          read_only: never write, nor move damaged checkpoints aside.
        """
        self.folder = folder("--workdir", workdir) / FOLDER
        if buckets.scheme(self.folder) == "s3":
            s3.teach_orbax()
        self._read_only = read_only
        self._max_failed = max_failed
        self._failed_in_row = 0
        self._under_way: int | None = None
        self._failed: set[int] = set()
        self._agreement = SaveAgreement()
        logging.get_absl_logger().addFilter(_no_traceback)
        standard_logging.getLogger("asyncio").addFilter(_retrieved)
        self._keep, self._keep_every = keep, keep_every
        self._losses: dict[int, float | None] = {}
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait()
        self._manager.close()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes what there is of saves that failed.

        More than once, since threads of such a save may still be making files. Now and then
        Orbax even gives a folder its final name of which a part could not be written.
        """
        if jax.process_index() == 0:
            for step in self._failed:
                unfinished = self.folder.glob(f"{step}.orbax-checkpoint-tmp*")
                for leftover in (*unfinished, self.folder / str(step)):
                    buckets.remove(leftover)

    def steps(self) -> list[int]:
        """Returns the steps there are checkpoints of, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best(self) -> tuple[int, float] | None:
        """Returns step and validation loss of the best checkpoint; of equals the latest.

        Returns:
          None if no checkpoint is of a step that was validated.
        """
        losses = [(loss, -step) for step in self.steps() if (loss := self._loss(step)) is not None]
        if not losses:
            return None
        loss, negative = min(losses)
        return -negative, loss

    def choose(self, step: int | str | None) -> int | None:
        """Returns the step that `--step` means: a number, "best", or None for the newest.

        Raises:
          InputError: if there is no such checkpoint.
        """
        if step is None:
            return None
        if step == BEST:
            best = self.best()
            if best is None:
                raise InputError(
                    f"--step is 'best', but no checkpoint in {self.folder} is of a step that was"
                    " validated (training.eval_every); give a number."
                )
            return best[0]
        steps = self.steps()
        if step not in steps:
            raise InputError(
                f"--step is {step}, but the checkpoints in {self.folder} are of"
                f" {'steps' if len(steps) > 1 else 'step'} {', '.join(map(str, steps[::-1]))}."
            )
        return int(step)

    def _loss(self, step: int) -> float | None:
        """Returns the validation loss at a checkpoint's step; None: it has none to read."""
        if step not in self._losses:
            try:
                loss = json.loads((self.folder / str(step) / "data" / "metadata").read_text())[
                    _LOSS
                ]
            except Exception:  # of a bucket, too
                loss = None
            self._losses[step] = loss if isinstance(loss, float) and math.isfinite(loss) else None
        return self._losses[step]

    def save(
        self,
        step: int,
        state: TrainState,
        data: Any,
        experiment: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts writing a checkpoint, having waited for the one before.

        The arrays are copied first, so the state may be donated as soon as this
        returns. A step that has one already is left alone.

        Args:
          step: steps taken.
          state: to save.
          data: state of the data iterator after `step` batches, fit for JSON.
          experiment: the settings, fit for JSON.
          validation_loss: at this step; None: it was not validated.

        Raises:
          SaveError: if the last `max_failed` saves have failed.
        """
        assert not self._read_only
        problem = self.wait()
        if problem is not None and self._failed_in_row >= self._max_failed:
            times = (
                "a save" if self._failed_in_row == 1 else f"{self._failed_in_row} saves in a row"
            )
            raise SaveError(
                f"Stopped after {times} that failed (training.max_failed_saves): {problem}."
            )
        if step in self._manager.all_steps():
            return
        self._under_way = step
        self._failed.discard(step)
        self._agreement.begin()
        finite = validation_loss is not None and math.isfinite(validation_loss)
        self._losses[step] = validation_loss if finite else None
        measured = {_LOSS: validation_loss} if finite else {}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data=ocp.args.JsonSave({"iterator": data, **measured}),
                experiment=ocp.args.JsonSave(schema.stamped(experiment)),
            ),
            force=True,
        )

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._losses.clear()
        self._manager.reload()

    def wait(self) -> str | None:
        """Waits until what was saved is on disk, on all processes.

        Returns:
          None, or why it could not be written and which checkpoint is the last good one.
          That is warned of, too, and what there is of the failed one is removed.
        """
        step, self._under_way = self._under_way, None
        if step is None:
            return None
        self._remove_leftovers()
        error: Exception | None = None
        what = f"the checkpoint of step {step} to be written" if jax.process_index() == 0 else ""
        with waiting(lambda: what):
            try:
                self._manager.wait_until_finished()
            except Exception as caught:
                error = caught
            why = self._agreement.end(error)
        if error is not None:
            error.__traceback__ = None
            gc.collect()  # what it leaves half done would complain when the program ends
        if why is None:
            self._failed_in_row = 0
            return None
        self._failed_in_row += 1
        self._failed.add(step)
        self._remove_leftovers()
        self._open_again()
        saved = self.steps()
        last = f"the last good one is of step {saved[0]}" if saved else "there is none before it"
        problem = f"the checkpoint of step {step} could not be written ({why}); {last}"
        if jax.process_index() == 0:
            logging.warning("%s", problem)
        return problem

    def newest_experiment(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Returns step and settings of the newest checkpoint whose settings can be read.

        Args:
          step: the only checkpoint to look at; None: all.

        Returns:
          None if there is no checkpoint, or none of them can be read.

        Raises:
          InputError: if its settings are of a schema that this version can't read.
        """
        for number in self.steps() if step is None else [step]:
            try:
                saved = self._restore(number, experiment=ocp.args.JsonRestore())["experiment"]
            except Exception as error:
                logging.warning("checkpoint %d: settings not readable (%s)", number, _brief(error))
                continue
            return number, schema.upgraded(saved, self.folder / str(number))
        return None

    def data_state(self, step: int) -> Any:
        """Returns where a checkpoint's data stood, as `Restored.data`; None: it can't be read."""
        try:
            return self._restore(step, data=ocp.args.JsonRestore())["data"]["iterator"]
        except Exception:  # `restore` says what is wrong
            return None

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored | None:
        """Returns the newest checkpoint that can be read whole.

        Those that can't are reported, and moved aside so that their steps can be
        saved again.

        Args:
          abstract: the state's shapes, dtypes and shardings; None in place of a
            field (say, `opt_state`) leaves it unread.
          step: the only checkpoint to read; None: the newest that can be.

        Returns:
          None if there is no checkpoint.

        Raises:
          InputError: if there are checkpoints but none can be read, or not that of `step`.
        """
        problems: list[tuple[int, str]] = []
        wanted = step
        for step in self.steps() if wanted is None else [wanted]:
            try:
                restored = self._restore_step(step, abstract)
            except Exception as error:
                problems.append((step, _brief(error)))
                if wanted is not None:
                    raise InputError(
                        f"the checkpoint of step {step} in {self.folder} can't be read"
                        f" ({_brief(error)}); choose another with --step."
                    ) from None
                logging.warning(
                    "checkpoint %d in %s can't be read (%s); trying the one before",
                    *(step, self.folder, _brief(error)),
                )
                continue
            if not self._read_only:
                for damaged, _ in problems:
                    self._move_aside(damaged)
            experiment = schema.upgraded(restored.experiment, self.folder / str(step))
            return dataclasses.replace(restored, experiment=experiment)
        if problems:
            step, problem = problems[0]
            raise InputError(
                f"none of the checkpoints in {self.folder} can be read (the newest, of step {step}:"
                f" {problem}); move that folder away to start from the beginning."
            )
        return None

    def _restore_step(self, step: int, abstract: TrainState) -> Restored:
        wanted = {
            field.name: value
            for field in dataclasses.fields(abstract)
            if (value := getattr(abstract, field.name)) is not None
        }
        items = self._restore(
            step,
            state=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
            data=ocp.args.JsonRestore(),
            experiment=ocp.args.JsonRestore(),
        )
        state = dataclasses.replace(abstract, **items["state"])
        if int(state.step) != step:
            raise ValueError(f"it says it is of step {int(state.step)}")
        return Restored(state, items["data"]["iterator"], items["experiment"])

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _open(self) -> ocp.CheckpointManager:
        policies: list[Any] = [
            checkpoint_managers.preservation_policy.LatestN(self._keep),
            _KeepBest(self),
        ]
        if self._keep_every:
            policies.append(checkpoint_managers.preservation_policy.EveryNSteps(self._keep_every))
        # In a bucket nothing can be renamed. Orbax knows that of Google's alone.
        mode = "commit_file" if buckets.is_bucket(self.folder) else "auto"
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.preservation_policy.AnyPreservationPolicy(
                    policies
                ),
                create=not self._read_only,
                cleanup_tmp_directories=not self._read_only,
                save_root_metadata=not self._read_only,
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._agreement),
                atomicity_options=ocp.options.AtomicityOptions(ocp.options.AtomicityMode(mode)),
            ),
            handler_registry=_registry(),
        )

    def _open_again(self) -> None:
        """Starts afresh after a failed save, of which Orbax reports some errors twice."""
        for _ in range(3):
            try:
                self._manager.close()
                break
            except Exception as error:
                logging.info("%s", _brief(error))
        # Before it opens, for then Orbax removes such folders, in the background.
        self._remove_leftovers()
        self._manager = self._open()

    def _move_aside(self, step: int) -> None:
        shelf = self.folder.parent / "damaged"
        shelf.mkdir(exist_ok=True)
        target = next(path for path in _numbered(shelf, step) if not path.exists())
        wait_for_all("checkpoints are read")
        if jax.process_index() == 0:
            buckets.move(self.folder / str(step), target)
        wait_for_all("damaged checkpoints are moved")
        self.reload()
        logging.warning("moved the unreadable checkpoint %d to %s", step, target)


class _KeepBest(checkpoint_managers.preservation_policy.PreservationPolicy):
    """Keeps the checkpoint with the lowest validation loss.

    Orbax's own `BestN` reads losses from an item that keeps the manager from opening when
    it is torn; ours are beside the data iterator's state, and one that is torn counts for none.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each of Orbax's checkpoints whether it stays."""
        del context
        losses = [self._checkpoints._loss(info.step) for info in checkpoints]
        known = [(loss, -index) for index, loss in enumerate(losses) if loss is not None]
        best = -min(known)[1] if known else None
        return [index == best for index in range(len(checkpoints))]


def _registry() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Returns the item names and who reads and writes them."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave)
    registry.add("state", ocp.args.PyTreeRestore)
    for name in ("data", "experiment"):
        registry.add(name, ocp.args.JsonSave)
        registry.add(name, ocp.args.JsonRestore)
    return registry


def _numbered(folder: Path, step: int) -> Iterator[Path]:
    n = 0
    while True:
        n += 1
        yield folder / f"{step}-{n}"


def _no_traceback(record: standard_logging.LogRecord) -> bool:
    """Keeps Orbax from printing tracebacks of what is reported in a sentence."""
    return not (record.exc_info and "orbax" in record.pathname)


def _retrieved(record: standard_logging.LogRecord) -> bool:
    """Keeps asyncio from printing the other errors of a save that is reported as failed.

    Each array of a save is written by a task of its own, and Orbax asks only the first that
    fails why. Nothing else in this program uses asyncio.
    """
    return "exception was never retrieved" not in record.getMessage()
