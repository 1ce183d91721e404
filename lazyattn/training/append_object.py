"""A log in a bucket, where no file can grow: lines go there in parts, now and then."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from absl import logging

from lazyattn import buckets

# Seconds that lines may wait, and how many parts there may be before they become one.
PERIOD = 20.0
MOST_PARTS = 64


class AppendedObject:
    """As `append.AppendedFile`: what could not be written stays in memory and waits.

    A thread writes, so that a slow bucket holds no step up. `sync` waits for it.
    """

    def __init__(self, path: Path):
        """Writes nothing yet; the log has no parts (see `buckets.write_log`)."""
        self._path = path
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self._parts: list[bytes] = []
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None
        self._next = time.monotonic() + PERIOD
        self._warned = False

    def write(self, data: bytes) -> int:
        """Takes bytes for a later part; returns how many."""
        with self._lock:
            self._waiting += data
        return len(data)

    def flush(self) -> None:
        """Begins to write what is waiting, if the last time is `PERIOD` ago and is over."""
        busy = self._under_way is not None and not self._under_way.done()
        if not busy and time.monotonic() >= self._next:
            self._next = time.monotonic() + PERIOD
            self._under_way = self._pool.submit(self._write)

    def sync(self) -> None:
        """Writes what is waiting and returns when it is there, or can't be written."""
        self._pool.submit(self._write).result()
        self._next = time.monotonic() + PERIOD

    def close(self) -> None:
        """Writes what is waiting, if it can, and makes one object of all parts."""
        self._pool.submit(self._write, 1).result()
        self._pool.shutdown()
        if self._waiting:
            logging.warning("%s lacks its last %d bytes", self._path, len(self._waiting))

    def _write(self, most_parts: int | None = None) -> None:
        with self._lock:
            data = bytes(self._waiting)
        try:
            if data:
                folder = buckets.parts_folder(self._path)
                (folder / f"{len(self._parts) + 1:08d}").write_bytes(data)
                self._parts.append(data)
                with self._lock:
                    del self._waiting[: len(data)]
            if len(self._parts) >= (MOST_PARTS if most_parts is None else most_parts):
                buckets.write_log(self._path, buckets.read_log(self._path) or b"")
                self._parts.clear()
        except Exception as error:  # gcsfs and s3fs have errors of their own
            if not self._warned:
                logging.warning(
                    "%s can't be written (%s); what is new waits until it can be",
                    *(self._path, str(error) or type(error).__name__),
                )
            self._warned = True
            return
        self._warned = False
