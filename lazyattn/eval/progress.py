"""A bar that says how far a long evaluation is, for people who watch."""

import sys
import time
from typing import TextIO

_WIDTH = 24


class Progress:
    """One line on a terminal, redrawn in place; silent anywhere else."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None):
        """Starts at 0.

        Args:
          label: what is going on; "": draw nothing.
          total: what there is to do, in tokens.
          stream: where to draw; None: standard error.
        """
        self._stream = sys.stderr if stream is None else stream
        self._label = label
        self._total = total
        self._done = 0
        self._began = time.perf_counter()
        self._shown = bool(label) and total > 0 and self._stream.isatty()

    def advance(self, amount: int) -> None:
        """Adds to what is done, and draws."""
        self._done += amount
        if not self._shown:
            return
        share = self._done / self._total
        rate = self._done / max(time.perf_counter() - self._began, 1e-9)
        bar = ("#" * round(share * _WIDTH)).ljust(_WIDTH)
        left = (self._total - self._done) / rate
        self._stream.write(
            f"\r{self._label}  [{bar}] {share:4.0%}  {rate:,.0f} tokens/s  {left:.0f} s left \033[K"
        )
        self._stream.flush()

    def close(self) -> None:
        """Wipes the line."""
        if self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()
