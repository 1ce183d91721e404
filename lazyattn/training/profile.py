"""`--profile=FIRST:LAST`: a trace of some steps, for xprof and TensorBoard."""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from lazyattn import buckets
from lazyattn.errors import InputError, bad_value

FOLDER = "profile"


def parse(text: str | None, steps: int) -> tuple[int, int] | None:
    """Returns the first and the last step to trace; None: none.

    Args:
      text: of the flag, "100:105"; both steps are traced.
      steps: of the run.

    Raises:
      InputError: if it is of another form, or those are no steps of the run.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise bad_value("--profile", text, "the first and the last step to trace, such as 100:105")
    if last > steps:
        raise InputError(f"--profile is {text!r}, but the run has {steps} steps (training.steps).")
    return first, last


class StepProfile:
    """Traces steps on the first process; use it as a context manager around the run.

    A run that resumes between the two steps traces what is left of them.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None = None):
        """Traces nothing yet.

        Args:
          workdir: the run's folder, which gets a folder `profile`.
          steps: first and last; None: it never traces.
        """
        self.folder = workdir / FOLDER
        self._steps = steps if jax.process_index() == 0 else None
        self._tracing: contextlib.ExitStack | None = None  # which publishes the trace

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before(self, step: int, earlier: Any) -> float:
        """Starts the trace if it begins with this step, when the step before is done.

        Returns:
          Seconds that starting took.
        """
        if self._steps is None or self._tracing is not None:
            return 0.0
        if not self._steps[0] <= step <= self._steps[1]:
            return 0.0
        jax.block_until_ready(earlier)
        begin = time.perf_counter()
        self._tracing = contextlib.ExitStack()
        jax.profiler.start_trace(self._tracing.enter_context(buckets.written(self.folder)))
        return time.perf_counter() - begin

    def after(self, step: int, arrays: Any) -> float:
        """Ends the trace if this step is its last, when the step is done.

        Returns:
          Seconds that writing took.
        """
        if self._tracing is None or self._steps is None or step < self._steps[1]:
            return 0.0
        jax.block_until_ready(arrays)
        begin = time.perf_counter()
        self._stop()
        return time.perf_counter() - begin

    def _stop(self) -> None:
        """Writes what is traced; a disk that is full ends the trace and not the run."""
        if self._tracing is None:
            return
        publish, self._tracing = self._tracing, None
        try:
            with publish:
                jax.profiler.stop_trace()
        except Exception as error:  # jaxlib raises what its file system says as RuntimeError, too
            logging.warning("the profile in %s can't be written (%s)", self.folder, error)
            return
        print(f"profile written to {self.folder} (tensorboard or xprof --logdir)", flush=True)
