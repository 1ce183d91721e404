"""Turns at a device: one process trains while others compile."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lazyattn.file_lock import LockedError, locked

_ASK_EVERY = 0.2  # seconds


@contextlib.contextmanager
def turn(path: Path, too_late: Callable[[], bool]) -> Iterator[bool]:
    """Waits for the lock of a file, and has it while entered.

    Args:
      path: the file; it is made where it doesn't exist.
      too_late: asked while waiting; where it says so, the wait is over.

    Yields:
      Whether the lock is this process's.
    """
    while not too_late():
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path))
            except LockedError:
                time.sleep(_ASK_EVERY)
                continue
            yield True
            return
    yield False
