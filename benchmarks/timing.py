"""Timing of work that a GPU does while the host goes on."""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def milliseconds(run: Callable[[], Any], *, calls: int = 10, rounds: int = 5) -> float:
    """Returns the median time of a call, `calls` of them in flight at once."""
    return rounds_of({"": run}, calls=calls, rounds=rounds)[""][0]


def rounds_of(
    runs: dict[str, Callable[[], Any]], *, calls: int, rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Times several functions in turn, so that a clock that drifts favours none.

    Args:
      runs: functions that start one call and return its results without waiting.
      calls: calls in a row, so that starting them costs nothing.
      rounds: how often each is timed; once more before, to warm up.

    Returns:
      median, least and greatest milliseconds a call.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                # The results before are given up, and their memory serves again, as in training.
                results = run()
            jax.block_until_ready(results)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: _summary(x) for name, x in times.items()}


def _summary(x: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(x), min(x), max(x)


def kernels(run: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Returns milliseconds a call of each kernel on the device, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(calls)])
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    totals: dict[str, float] = {}
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        lines = list(plane.lines)
        for line in [line for line in lines if "Stream" in line.name] or lines:
            for event in line.events:
                name = event.name
                totals[name] = totals.get(name, 0.0) + event.duration_ns / 1e6 / calls
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
