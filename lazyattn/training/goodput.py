"""How a run spent its time and its devices' memory."""

import time
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lazyattn.quantity import quantity

# What takes time and is not a step of training, in the order it is told.
REASONS = (
    *("start", "data", "skipped steps", "validation", "inspection", "samples", "tasks"),
    *("checkpoints", "profile"),
)
_RECENT = 100


class Goodput:
    """Adds up where the wall time of one program went.

    Useful is the time of steps that changed the parameters, waiting for data left out.
    A run that goes on also counts from its first start: what it had done past its checkpoint, and
    the time until it was started again, were of no use.

    Attributes:
      run_began: when the run was started first, in seconds since 1970.
    """

    def __init__(self, began: float, *, earlier: Mapping[str, Any] | None = None):
        """Starts the clock.

        Args:
          began: `time.perf_counter` at the start.
          earlier: `totals` at the step that the run goes on from, if it does.
        """
        self._began = began
        earlier = earlier or {}
        start = time.time() - (time.perf_counter() - began)
        self.run_began: float = earlier.get("run_began", start)
        self._useful_before: float = earlier.get("useful_seconds", 0.0)
        self._lost = dict.fromkeys(REASONS, 0.0)
        self._useful = 0.0
        self._waited = 0.0
        self._steps = array("d")

    def lose(self, reason: str, seconds: float) -> None:
        """Counts time that went into one of `REASONS`, outside of a step."""
        self._lost[reason] += seconds

    def wait(self, seconds: float) -> None:
        """Counts time within a step that went into waiting for data."""
        self._waited += seconds

    def step(self, seconds: float, *, skipped: bool, timed: bool) -> None:
        """Counts a step.

        Args:
          seconds: from the step before to this one, other things left out.
          skipped: it changed nothing.
          timed: it counts for the spread; the first, which compiles, doesn't.
        """
        waited, self._waited = min(self._waited, seconds), 0.0
        self._lost["data"] += waited
        if skipped:
            self._lost["skipped steps"] += seconds - waited
        else:
            self._useful += seconds - waited
        if timed:
            self._steps.append(seconds)

    def totals(self) -> dict[str, float]:
        """Returns what the next start of the run must know."""
        return {
            "run_began": round(self.run_began, 3),
            "useful_seconds": self._useful_before + self._useful,
        }

    def _of_all_starts(self) -> tuple[float, float]:
        """Returns the goodput since the first start, and the seconds since then."""
        wall = max(time.time() - self.run_began, 1e-9)
        return min((self._useful_before + self._useful) / wall, 1.0), wall

    def numbers(self) -> dict[str, float]:
        """Returns goodput so far, what the rest was as shares of the time, and the next.

        These are the spread of recent steps in seconds, and memory in bytes.
        """
        wall = max(time.perf_counter() - self._began, 1e-9)
        found = {
            "goodput": min(self._useful / wall, 1.0),
            "goodput_of_all_starts": self._of_all_starts()[0],
        }
        for name, seconds in self._lost.items():
            if seconds > 0:
                found[f"lost_to_{name.replace(' ', '_')}"] = seconds / wall
        if self._steps:
            median, high = np.quantile(self._steps[-_RECENT:], (0.5, 0.95))
            found |= {"step_seconds_p50": float(median), "step_seconds_p95": float(high)}
        return found | device_memory()

    def lines(self) -> list[str]:
        """Returns what the closing summary says."""
        wall = max(time.perf_counter() - self._began, 1e-9)
        found = []
        if self._steps:
            median, high = np.quantile(self._steps, (0.5, 0.95))
            found.append(
                f"step time                  {_time(median)} median, {_time(high)} at the 95th"
                f" percentile of {quantity(len(self._steps), 'step')}"
            )
        useful = self._useful / wall
        shares = {name: seconds / wall for name, seconds in self._lost.items() if seconds > 0}
        shares["other"] = max(1 - useful - sum(shares.values()), 0.0)
        rest = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        found.append(f"goodput                    {useful:.1%} of {wall:,.0f} s in steps; {rest}")
        if self._useful_before:
            share, wall = self._of_all_starts()
            found.append(f"goodput of all starts      {share:.1%} of {wall:,.0f} s since the first")
        memory = device_memory()
        if memory:
            of = memory.get("memory_limit_bytes")
            limit = "" if of is None else f" of {of / 2**30:,.1f}"
            peak = memory["memory_peak_bytes"] / 2**30
            found.append(f"device memory              {peak:,.1f}{limit} GiB at the peak")
        return found


def device_memory(devices: Iterable[jax.Device] | None = None) -> dict[str, int]:
    """Returns memory_peak_bytes, of the device that used most, and where known the limit.

    Args:
      devices: to look at; None: those of this process.

    Returns:
      Nothing where the devices don't say, as CPUs don't.
    """
    stats = [device.memory_stats() for device in (devices or jax.local_devices())]
    told = [one for one in stats if one and "peak_bytes_in_use" in one]
    if not told:
        return {}
    most = max(told, key=lambda one: one["peak_bytes_in_use"])
    found = {"memory_peak_bytes": int(most["peak_bytes_in_use"])}
    if "bytes_limit" in most:
        found["memory_limit_bytes"] = int(most["bytes_limit"])
    return found


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
