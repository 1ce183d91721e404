"""SIGTERM and Ctrl-C end a run after the step under way, not in the middle of it."""

import os
import signal
from types import FrameType
from typing import Any

from lazyattn.distributed import joined


class StopSignal:
    """While entered, SIGTERM and SIGINT set `received` instead of ending the process.

    A second SIGINT interrupts at once. Before `arm` there is nothing to save: either
    signal then ends the program where it stands. Of several processes it does so without cleaning
    up: JAX would wait for the others, who wait for this one, until it is killed.

    Attributes:
      received: the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._armed = False
        self._previous: dict[signal.Signals, Any] = {}

    def arm(self) -> None:
        """From now on a signal waits for the step to end."""
        self._armed = True

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C and 143 after SIGTERM, as of programs that these end.

        A scheduler that preempts a run must not take it for one that is complete.
        """
        return 128 + int(self.received or 0)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signal.Signals(number)
        if not self._armed:
            if joined():
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            # Not print, whose buffer the signal may have come into.
            os.write(2, f"{self.received.name}: stopped before a step was taken\n".encode())
            raise SystemExit(self.exit_status)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
