"""What an emulator of a bucket is told to do to requests, by files in a folder.

`fail` has a number and what happens to every so many requests, each in its turn: answers such as
429, or `reset`, a connection that breaks. `refuse` has the answer to all, `deny` a part of a name:
objects with it may not be written. `kill` has a process and
the end of a name: whoever begins to write such an object dies, and it is not written. `answered`
gets a line for each of them.
"""

import itertools
import os
import signal
import socket
import struct
from pathlib import Path

RESET = "reset"


class Faults:
    """Called with each request, it says what becomes of it."""

    def __init__(self, folder):
        self._folder, self._count = Path(folder), itertools.count(1)

    def __call__(self, method, name):
        """Returns a status, `RESET`, or None: as usual."""
        answer = self._answer(method, name)
        if answer is not None:
            with (self._folder / "answered").open("a") as file:
                file.write(f"{answer} {method} {name}\n")
        return answer

    def _answer(self, method, name):
        if refuse := self._told("refuse"):
            return int(refuse[0])
        writes = method in ("POST", "PUT")
        if (deny := self._told("deny")) and writes and deny[0] in name:
            return 403
        if kill := self._told("kill"):
            process, end = kill
            if writes and name.endswith(end):
                os.kill(int(process), signal.SIGKILL)
                return 500
        if fail := self._told("fail"):
            turn, rest = divmod(next(self._count), int(fail[0]))
            if rest == 0:
                answer = fail[1:][turn % len(fail[1:])]
                return answer if answer == RESET else int(answer)
        return None

    def _told(self, name):
        try:
            return (self._folder / name).read_text().split()
        except FileNotFoundError:
            return None


def break_off(connection):
    """Breaks a connection, whatever of a request is still to come."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)
