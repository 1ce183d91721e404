"""How far a preparation is, and how long it still takes."""

import sys
import time
from typing import TextIO

from lazyattn.data.prepare.unit import Progress
from lazyattn.quantity import duration, quantity

_WIDTH = 24
_SECONDS_ON_TERMINAL = 0.2
_SECONDS_ELSEWHERE = 30.0


class ProgressLine:
    """One line on a terminal, redrawn in place; a new line now and then anywhere else."""

    def __init__(self, total: int, finished: int, stream: TextIO | None = None):
        """Starts the clock.

        Args:
          total: weight of all units.
          finished: weight of those that an earlier run finished.
          stream: where to write; None: standard error.
        """
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._every = _SECONDS_ON_TERMINAL if self._terminal else _SECONDS_ELSEWHERE
        self.total = total
        self.finished = finished
        self._began = self._shown = time.monotonic()
        self.done = Progress()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def add(self, progress: Progress) -> None:
        """Adds what was done, and shows it if it is time to."""
        self.done = Progress(
            self.done.weight + progress.weight,
            self.done.documents + progress.documents,
            self.done.bytes + progress.bytes,
            self.done.tokens + progress.tokens,
        )
        self.show()

    def show(self) -> None:
        """Shows the line if it is time to."""
        if time.monotonic() - self._shown < self._every:
            return
        self._shown = time.monotonic()
        text = self.text()
        self._stream.write(f"\r{text} \033[K" if self._terminal else f"{text}\n")
        self._stream.flush()

    def text(self) -> str:
        """Returns the line."""
        seconds = max(self.seconds, 1e-9)
        share = min(1.0, (self.finished + self.done.weight) / max(1, self.total))
        left = self.total - self.finished - self.done.weight
        rate = self.done.weight / seconds
        bar = ("#" * int(share * _WIDTH)).ljust(_WIDTH)
        return (
            f"prepare  [{bar}] {share:4.0%}  {self.done.bytes / 1e6 / seconds:.1f} MB/s"
            f"  {self.done.tokens / seconds:,.0f} tokens/s"
            f"  {quantity(self.done.documents, 'document')}"
            f"  {duration(left / rate) if rate else '?'} left"
        )

    def line(self, text: str) -> None:
        """Writes a line of its own above the bar."""
        self._stream.write(f"\r\033[K{text}\n" if self._terminal else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipes the bar."""
        if self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()
