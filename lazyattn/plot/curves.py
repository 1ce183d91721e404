"""A run's losses from its `metrics.jsonl`."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lazyattn import buckets
from lazyattn.checkpoint.workdir import METRICS
from lazyattn.errors import bad_value
from lazyattn.paths import folder

_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Curves:
    """The losses of a run over its tokens and its time.

    Attributes:
      name: of the run.
      training: tokens trained on, seconds of training and loss in nats a token, a row a
        point: the mean of some steps.
      validation: the same of each validation.
      steps: steps taken.
    """

    name: str
    training: Float[np.ndarray, "points 3"]
    validation: Float[np.ndarray, "points 3"]
    steps: int


def read(path: str | os.PathLike[str], name: str) -> Curves:
    """Returns the curves of the run in a folder.

    Time is that of the steps: what a run waited between an interruption and its
    resumption, and validations and checkpoints, are left out.

    Raises:
      InputError: if there are no metrics.
    """
    file = folder("--workdir", path) / METRICS
    allowed = f"the folder of a run with steps in its {METRICS}"
    log = buckets.read_log(file)
    if log is None:
        raise bad_value("--workdir or --runs", os.fspath(path), allowed)
    losses, validations = [], []
    tokens = seconds = 0.0
    steps = 0
    for record in _records(log):
        steps = record["step"]
        seconds += record.get("seconds") or 0.0
        own = record.get("tokens") or 0
        # Lines of a run that lost some of its lines have no total.
        tokens = record.get("tokens_total") or tokens + own
        loss, validation = record.get("loss"), record.get("validation_loss")
        if _is_finite(loss) and own:  # else the step was skipped
            losses.append((tokens, seconds, loss, own))
        if _is_finite(validation):
            validations.append((tokens, seconds, validation))
    if not losses:
        raise bad_value("--workdir or --runs", os.fspath(path), allowed)
    points = np.array_split(np.asarray(losses, float), min(_POINTS, len(losses)))
    training = [(*part[-1, :2], np.average(part[:, 2], weights=part[:, 3])) for part in points]
    return Curves(name, np.asarray(training), np.asarray(validations, float).reshape(-1, 3), steps)


def names(paths: list[str]) -> list[str]:
    """Returns a short name for each folder: its own, or the path where two have the same."""
    short = [Path(path).absolute().name for path in paths]
    both = zip(short, paths, strict=True)
    return [name if short.count(name) == 1 else path for name, path in both]


def _records(log: bytes) -> Iterator[Mapping[str, Any]]:
    for line in log.split(b"\n"):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue  # the last line of a run that was killed, or is under way
        yield record


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
