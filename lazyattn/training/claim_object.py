"""A run's folder in a bucket while a training has it. Buckets have no locks.

Whoever trains writes an object and writes it anew every `PERIOD`. Whoever finds one looks for
`LOOKS` periods whether it changes: then its owner is at work. If not, that one was killed, and the
object is taken over. No clocks are compared.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from lazyattn import buckets
from lazyattn.file_lock import LockedError

PERIOD = 10.0
LOOKS = 3
# Of two that begin at once the first to write sees the other's name after so long.
_SETTLED = 1.0


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Has the object while entered, and removes it afterwards.

    Raises:
      LockedError: if another training is at work; the message says which.
      InputError: if the bucket can't be read or written.
    """
    claim = _Claim(path)
    with buckets.told("--workdir", path.parent):
        who = claim.other()
    if who:
        raise LockedError(who)
    over = threading.Event()
    thread = threading.Thread(target=claim.renew, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PERIOD)
        claim.remove()


class _Claim:
    def __init__(self, path: Path):
        self._path = path
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._who = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        self._id = uuid.uuid4().hex
        self._times = 0

    def other(self) -> str:
        """Takes the object, or returns whose it is."""
        found = self._read()
        if found is not None:
            seconds = PERIOD * LOOKS
            print(
                f"lock     {self._path} is of {_owner(found)}; {seconds:g} s will show whether it"
                " is still at work",
                file=sys.stderr,
                flush=True,
            )
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(PERIOD / 4)
                now = self._read()
                if now is None:
                    break
                if now != found:
                    return _owner(now)
        self._write()
        time.sleep(_SETTLED)
        return self._robbed()

    def renew(self, over: threading.Event) -> None:
        """Writes the object anew until `over`; says so if another training takes it."""
        while not over.wait(PERIOD):
            with contextlib.suppress(Exception):  # each library has errors of its own
                if who := self._robbed():
                    logging.error(
                        "another training has begun in %s (%s): each overwrites what the other"
                        " saves; end one of them",
                        *(self._path.parent, who),
                    )
                    return
                self._write()

    def remove(self) -> None:
        """Removes the object, if it is this training's."""
        with contextlib.suppress(Exception):
            if not self._robbed():
                self._path.unlink()

    def _robbed(self) -> str:
        """Returns who has the object now; "": this training, or nobody."""
        found = self._read()
        return "" if found is None or self._id in found else _owner(found)

    def _read(self) -> str | None:
        found = buckets.read(self._path)
        return None if found is None else found.decode(errors="replace")

    def _write(self) -> None:
        self._times += 1
        self._path.write_text(f"{self._who}\n{self._id} {self._times}\n")


def _owner(text: str) -> str:
    return (text.splitlines() or [""])[0] or "another process"
