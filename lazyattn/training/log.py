"""The log of a run: one record a step, sent to wherever numbers go."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from lazyattn.checkpoint.workdir import METRICS, TENSORBOARD
from lazyattn.patience import waiting
from lazyattn.quantity import duration
from lazyattn.training.goodput import Goodput
from lazyattn.training.metrics import JsonLines, MeanLoss, Progress, TensorBoard


class Curves(Protocol):
    """Where values go that become curves."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a value to each of these curves."""


class RunLog:
    """Sends each step's record on; silent on all processes but the first.

    Use it as a context manager: leaving it closes the files.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        steps: int,
        log_every: int,
        flops_per_token: float,
        began: float | None = None,
        curves: Sequence[Curves] = (),
    ):
        """Opens the files, cutting back what an earlier run wrote past `step`.

        Args:
          workdir: the run's folder.
          step: steps taken before.
          steps: steps in all.
          log_every: steps between lines on the terminal and points in TensorBoard.
          flops_per_token: of a training step, for utilisation.
          began: `time.perf_counter` when the program began, for goodput; None: now.
          curves: where curves go besides TensorBoard.
        """
        self.enabled = jax.process_index() == 0
        self._workdir = workdir
        self._log_every = log_every
        self._steps = steps
        self._opened = self._last = time.perf_counter()
        self._first_step: int | None = None
        self._loss = MeanLoss()
        self._began = self._opened if began is None else began
        if not self.enabled:
            self.goodput = Goodput(self._began)
            return
        self._progress = Progress(
            sys.stdout,
            step=step,
            steps=steps,
            flops_per_token=flops_per_token,
            device_kind=jax.devices()[0].device_kind,
            devices=jax.device_count(),
        )
        self._lines = JsonLines(workdir / METRICS, step)
        self.goodput = Goodput(self._began, earlier=self._lines.last)
        self._tensorboard = TensorBoard(workdir / TENSORBOARD, step)
        self._curves: list[Curves] = [self._tensorboard, *curves]
        self._tokens = self._lines.tokens

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.enabled:
            with waiting(self._written):
                self._lines.close()
                self._tensorboard.close()

    def sync(self) -> None:
        """Writes what waits, as it does in a bucket; before a checkpoint of the last step."""
        if self.enabled:
            with waiting(self._written):
                self._lines.sync()
                self._tensorboard.sync()

    def _written(self) -> str:
        return f"the logs in {self._workdir} to be written"

    def line(self, text: str) -> None:
        """Prints a line for people."""
        if self.enabled:
            print(text, flush=True)

    def started(self, step: int) -> None:
        """Says that the first step, `step`, is done; rates count from here.

        Its compilation would blur them.
        """
        self._last = time.perf_counter()
        self._first_step = step
        self.goodput.lose("start", self._last - self._began)
        self.line(f"first step after {duration(self._last - self._opened)}, compilation included")
        if self.enabled:
            self._progress.restart(step)

    def pause(self, seconds: float, reason: str) -> None:
        """Leaves time spent on one of `goodput.REASONS` out of the rates."""
        self._last += seconds
        if self._first_step is not None:  # else it is part of the start
            self.goodput.lose(reason, seconds)
        if self.enabled:
            self._progress.pause(seconds)

    @contextlib.contextmanager
    def pausing(self, reason: str) -> Iterator[None]:
        """Leaves the time spent within out of the rates, as `pause` does."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.pause(time.perf_counter() - begin, reason)

    def write(self, record: Mapping[str, Any]) -> None:
        """Logs a step.

        The loss on the terminal and in TensorBoard is the mean over the tokens since the
        last line; `metrics.jsonl` has each step's own.

        Args:
          record: the step and its metrics, with "validation_..." where there was a
            validation, "attention_..." where attention was measured, and "tasks_...".
        """
        if not self.enabled:
            return
        now = time.perf_counter()
        if self._tokens is not None:
            self._tokens += record["tokens"]
        record = {
            **record,
            "seconds": max(now - self._last, 0.0),
            "wall_time": round(time.time(), 3),
            "tokens_total": self._tokens,
        }
        self._last = now
        timed = record["step"] != self._first_step
        skipped = bool(record.get("skipped", False))
        self.goodput.step(record["seconds"], skipped=skipped, timed=timed)
        record |= self.goodput.totals()
        self._loss.add(record["loss"], record["tokens"])
        step = record["step"]
        if step != self._first_step:
            self._progress.count(record["tokens"])
        scalars: dict[str, Any] = {}
        if step % self._log_every == 0 or step == self._steps:
            since_last_line = record | {"loss": self._loss.take()}
            rates = self._progress.report(step, since_last_line) | self.goodput.numbers()
            record |= rates
            names = ("loss", "learning_rate", "gradient_norm", "nonfinite_total", *rates)
            scalars |= {f"training/{name}": (since_last_line | rates)[name] for name in names}
        for group in ("validation", "attention", "tasks"):
            values = {
                name.removeprefix(f"{group}_"): value
                for name, value in record.items()
                if name.startswith(f"{group}_")
            }
            if values:
                parts = "  ".join(f"{name} {_shown(value)}" for name, value in values.items())
                self._progress.line(f"step {step}/{self._steps}  {group}: {parts}")
                scalars |= {f"{group}/{name}": value for name, value in values.items()}
        self._lines.write(record)
        for each in self._curves:
            each.write(step, scalars)


def _shown(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
