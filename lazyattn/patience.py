"""A sentence about what a program waits for, so that it is not silent for long."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Seconds until the first sentence, and between it and the others.
NOTICE = 10.0
AGAIN = 60.0


@contextlib.contextmanager
def waiting(
    what: Callable[[], str],
    limit: float | None = None,
    at_limit: Callable[[str], None] = lambda what: None,
) -> Iterator[None]:
    """Says on standard error what is waited for, once it takes longer than `NOTICE`.

    Args:
      what: returns what, to follow "Waiting for"; "" says nothing. A thread calls it.
      limit: seconds after which `at_limit` is called; None: there is no limit.
      at_limit: gets what is waited for. The thread calls it, so it can't raise errors.
    """
    over = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        last = None if limit is None else began + limit
        due = began + NOTICE
        most = "" if limit is None else f", {limit:g} s at most"
        while not over.wait((due if last is None else min(due, last)) - time.monotonic()):
            now, found = time.monotonic(), what()
            if last is not None and now >= last:
                at_limit(found)
                return
            if now < due or over.is_set():
                continue
            if found:
                text = f"Waiting for {found}: {now - began:.0f} s so far{most}."
                print(text, file=sys.stderr, flush=True)
            due = now + AGAIN

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def within[T](limit: float, what: Callable[[], str], call: Callable[[], T]) -> T:
    """Returns what `call` returns, of a thread that is left alone once it takes too long.

    Args:
      limit: seconds.
      what: as for `waiting`.
      call: what to do.

    Raises:
      TimeoutError: after `limit`.
      BaseException: whatever `call` raises.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with waiting(what, limit):
        thread.start()
        thread.join(limit)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"no answer in {limit:g} s")
    return returned[0]


def no_answer(host: str, port: int) -> str | None:
    """Returns why nobody answers there; None: somebody does."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
