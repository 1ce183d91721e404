"""Where a run's numbers go: the terminal, `metrics.jsonl` and TensorBoard."""

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from absl import logging
from tensorboardX import SummaryWriter

from lazyattn import buckets
from lazyattn.data.manifest import write_whole
from lazyattn.quantity import duration
from lazyattn.training.append import AppendedFile
from lazyattn.training.append_object import AppendedObject

# Peak FLOP/s of dense bfloat16 matrix products of one device, by
# `jax.Device.device_kind`, as the makers' data sheets state them.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def utilisation(
    tokens_per_second: float, flops_per_token: float, device_kind: str, devices: int
) -> float | None:
    """Returns model FLOPs utilisation, from 0 to 1.

    Args:
      tokens_per_second: over all devices.
      flops_per_token: of a training step, forward and backward.
      device_kind: `jax.Device.device_kind`.
      devices: how many there are.

    Returns:
      None where the device's peak isn't known.
    """
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)


class JsonLines:
    """`metrics.jsonl`: one JSON object a step, flushed as it is written.

    Opened again at a step, it is first cut back to that step, so that a run which
    was killed and resumed has every step once. Numbers that JSON lacks (NaN,
    infinities) are written as null.

    Attributes:
      tokens: trained on up to the step the file was opened at, or None where lines of
        it are missing.
      last: the last line that was kept; {}: there was none.
    """

    def __init__(self, path: Path, step: int):
        """Opens the file.

        Args:
          path: the file.
          step: lines of later steps, and a last line cut short, are dropped.
        """
        self.tokens, self.last = _cut_back(path, step)
        self._file = AppendedObject(path) if buckets.is_bucket(path) else AppendedFile(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line; where the disk is full it waits for the next."""
        line = json.dumps({name: _plain(value) for name, value in record.items()}) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    def sync(self) -> None:
        """Writes what waits for its turn, as it does in a bucket."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_back(path: Path, step: int) -> tuple[int | None, dict[str, Any]]:
    """Keeps the whole lines of steps up to `step`, in one atomic replacement.

    Returns:
      Tokens of those steps, None where lines are missing; and the last line kept.
    """
    last, kept = 0, []
    newest: dict[str, Any] = {}
    tokens: int | None = 0
    content = buckets.read_log(path)
    if content is None:
        return (0 if step == 0 else None), newest
    for line in content.decode(errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            keep = line.endswith("\n") and record["step"] <= step
        except (ValueError, TypeError, KeyError):
            keep = False
        if keep:
            kept.append(line)
            # Lines of an older version have no total.
            before = tokens if record["step"] == last + 1 else None
            if "tokens_total" in record:
                tokens = record["tokens_total"]
            else:
                tokens = None if before is None else before + record.get("tokens", 0)
            last, newest = record["step"], record
    write = buckets.write_log if buckets.is_bucket(path) else write_whole
    write(path, "".join(kept).encode())
    return (tokens if last == step else None), newest


class MeanLoss:
    """The mean loss of some steps, each weighing what its tokens weigh."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    def add(self, loss: float, tokens: int) -> None:
        """Adds a step; one whose loss isn't finite was skipped, and is left out."""
        if math.isfinite(loss):
            self._sum += loss * tokens
            self._tokens += tokens

    def take(self) -> float:
        """Returns the mean since the last call; NaN if there was nothing."""
        mean = self._sum / self._tokens if self._tokens else math.nan
        self._sum, self._tokens = 0.0, 0
        return mean


class Progress:
    """Lines for people: whole ones, so that they read the same in a log file."""

    def __init__(
        self,
        out: TextIO,
        *,
        step: int,
        steps: int,
        flops_per_token: float,
        device_kind: str,
        devices: int,
    ):
        """Starts the clock."""
        self._out = out
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._device = device_kind, devices
        self._step = step
        self._tokens = 0
        self._time = time.perf_counter()

    def restart(self, step: int) -> None:
        """Starts the clock again after `step` steps."""
        self._step, self._tokens, self._time = step, 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Counts the tokens of a step; `report` gives their rate."""
        self._tokens += tokens

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else than steps."""
        self._time += seconds

    def report(self, step: int, record: Mapping[str, Any]) -> dict[str, float]:
        """Prints a line on the steps since the last one.

        Args:
          step: steps taken.
          record: the metrics of that step, but for "loss", which is the mean of the steps.

        Returns:
          tokens_per_second, and mfu where the device's peak is known; empty if there
          was nothing to time.
        """
        now = time.perf_counter()
        width = len(str(self._steps))
        parts = [
            f"step {step:{width}d}/{self._steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"grad norm {record['gradient_norm']:.3f}",
        ]
        rates = {}
        if self._tokens:  # none have been timed just after the start
            seconds = max(now - self._time, 1e-9)
            rates["tokens_per_second"] = self._tokens / seconds
            parts.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
            mfu = utilisation(rates["tokens_per_second"], self._flops_per_token, *self._device)
            if mfu is not None:
                rates["mfu"] = mfu
                parts.append(f"MFU {mfu:.1%}")
            steps_per_second = max(step - self._step, 1) / seconds
            parts.append(f"{duration((self._steps - step) / steps_per_second)} left")
        if record["nonfinite_total"]:
            parts.append(f"skipped {record['nonfinite_total']}")
        self.line("  ".join(parts))
        self.restart(step)
        return rates

    def line(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._out, flush=True)


class TensorBoard:
    """Event files for TensorBoard; after a resumption later steps are overwritten."""

    def __init__(self, folder: Path, step: int):
        """Opens a new event file.

        Args:
          folder: where event files lie.
          step: what an earlier run wrote past this step is purged.
        """
        self._bucket = folder if buckets.is_bucket(folder) else None
        if self._bucket is not None:  # there it is written anew by every `sync`
            self._local = tempfile.TemporaryDirectory(prefix="lazyattn-")
            folder = Path(self._local.name)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30)
        # Its thread would die of a full disk, and then whoever writes would wait for ever.
        events: Any = self._writer.file_writer.event_writer._ev_writer
        records = events._py_recordio_writer
        with events._lock:  # the thread has begun already
            records._writer.close()
            records._writer = AppendedFile(Path(records.path))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a value to each of these curves."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Copies the file into the bucket, if it is to be in one."""
        if self._bucket is not None:
            self._writer.flush()
            self._copy(self._bucket)

    def _copy(self, bucket: Path) -> None:
        try:
            buckets.upload(Path(self._local.name), bucket)
        except Exception as error:  # the next time has it all
            logging.warning("%s", error)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
        if self._bucket is not None:
            self._copy(self._bucket)
            self._local.cleanup()
