"""One program at a time in a folder: a lock that goes with the process that has it.

`flock` holds between hosts where the file system passes it on, as NFS (by way of byte-range
locks), Lustre mounted with `flock`, GPFS and CephFS do. Where there are no locks at all, a
warning says so.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging

# `flock` on NFS may say that permission is denied where another host has the lock.
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LockedError(Exception):
    """Another process has the lock; the message says which, for people."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Has a lock while entered. The file stays; whoever removes it must have the lock.

    Args:
      path: of the lock's file, in a folder that exists. It says who has the lock.

    Raises:
      LockedError: if another process has it.
      OSError: if the file can't be made.
    """
    file = _take(path)
    try:
        with contextlib.suppress(OSError):  # a full disk: it is locked all the same
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S %z")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _take(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                file.seek(0)
                who = file.read().strip() or "another process"
                file.close()
                raise LockedError(who) from None
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            logging.warning(
                "%s can't be locked (%s): a second program in this folder would not be noticed",
                *(path, error.strerror),
            )
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had it has just removed the file
