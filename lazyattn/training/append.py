"""A file that grows by whole records, on a disk that may be full for a while."""

import os
from pathlib import Path

from absl import logging


class AppendedFile:
    """Appends what was written at every flush: all of it, or none until there is room.

    What has to wait stays in memory, and a warning says so once.
    """

    def __init__(self, path: Path):
        """Opens the file, or makes it."""
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._size = path.stat().st_size
        self._waiting = bytearray()
        self._warned = False

    def write(self, data: bytes) -> int:
        """Takes bytes for the next flush; returns how many."""
        self._waiting += data
        return len(data)

    def flush(self) -> None:
        """Appends what is waiting."""
        try:
            written = 0
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:]) or 0
        except OSError as error:
            os.truncate(self._path, self._size)
            if not self._warned:
                logging.warning(
                    "%s can't be written (%s); what is new waits until it can be",
                    *(self._path, error.strerror),
                )
            self._warned = True
            return
        self._size += written
        self._waiting.clear()
        self._warned = False

    def sync(self) -> None:
        """As `append_object.AppendedObject`: nothing is left to do."""

    def close(self) -> None:
        """Appends what is waiting, if it can, and closes the file."""
        if self._file.closed:
            return
        self.flush()
        if self._waiting:
            logging.warning("%s lacks its last %d bytes", self._path, len(self._waiting))
        self._file.close()
