"""Timing of work that a GPU does while the host goes on."""

import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class Kernel(NamedTuple):
    """A kernel that ran on the device.

    Attributes:
      name: its own.
      start, stop: nanoseconds.
      grid: its programs, such as "96,1,1"; "" where it isn't known.
    """

    name: str
    start: float
    stop: float
    grid: str = ""


def timeline(run: Callable[[], Any]) -> list[Kernel]:
    """Returns what a call of `run` ran on the first GPU, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    found = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        lines = list(plane.lines)
        for line in [line for line in lines if "Stream" in line.name] or lines:
            for event in line.events:
                start, details = event.start_ns, dict(event.stats).get("kernel_details", "")
                grid = re.search(r"grid:(\S+)", str(details))
                stop = start + event.duration_ns
                found.append(Kernel(event.name, start, stop, grid[1] if grid else ""))
    return sorted(found, key=lambda kernel: kernel.start)


def kernels(run: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Returns milliseconds a call of each kernel on the device, longest first."""
    totals: dict[str, float] = {}
    for kernel in timeline(lambda: [run() for _ in range(calls)]):
        ms = (kernel.stop - kernel.start) / 1e6 / calls
        totals[kernel.name] = totals.get(kernel.name, 0.0) + ms
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def breakdown(ran: Sequence[Kernel], calls: int) -> dict[str, Any]:
    """Returns where the time of some calls in a row went.

    Args:
      ran: what they ran.
      calls: how many they are.

    Returns:
      of a call: `runs`, how many kernels; `busy_ms`, in which one ran; `gap_ms`, between kernels;
      `kernels`, of each name and grid how often it ran and its milliseconds, longest first.
      Numbers at the end of a name are left out, since layers differ by these.
    """
    found: dict[str, list[float]] = {}
    gaps, stop = 0.0, None
    for kernel in ran:
        name = re.sub(r"[_.]\d+$", "", kernel.name)
        entry = found.setdefault(f"{name} {kernel.grid}".strip(), [0.0, 0.0])
        entry[0] += 1 / calls
        entry[1] += (kernel.stop - kernel.start) / 1e6 / calls
        if stop is not None:
            gaps += max(0.0, kernel.start - stop)
        stop = kernel.stop if stop is None else max(stop, kernel.stop)
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return {
        "runs": round(len(ran) / calls, 2),
        "busy_ms": round(sum(ms for _, ms in found.values()), 4),
        "gap_ms": round(gaps / 1e6 / calls, 4),
        "kernels": {name: [round(runs, 2), round(ms, 4)] for name, (runs, ms) in ordered},
    }
