"""Several processes that write one checkpoint agree on whether it was written.

Orbax lets processes wait for one another while a save is under way, but one whose disk
is full leaves the others waiting until their patience ends. Here it joins them, having
told that it failed; so all of them learn of it at once, and none commits the checkpoint.
"""

import errno
import os
import sys
import threading

import jax

from lazyattn.distributed import client

# What all processes must have got to before any goes on.
_STAGES = ("written", "committed", "over")
# Orbax's barriers in a save that are not of a stage: two before it, two behind.
_BEFORE = 2
_MINUTES = 60_000


class SaveAgreement:
    """The barriers of the saves of one `orbax.checkpoint.CheckpointManager`.

    Give it to Orbax as `AsyncOptions.barrier_sync_fn`; call `begin` before a save, and
    `end` when this process's part of it is over.
    """

    _PREFIX = "lazyattn/save"
    _count = 0  # of saves in this process, over all managers: keys are never used again

    def __init__(self) -> None:
        self._client = client()
        self._key = ""
        self._seen = 0
        self._met: set[str] = set()
        self._waiting = threading.Lock()

    def begin(self) -> None:
        """A save begins, in all processes."""
        SaveAgreement._count += 1
        self._key = f"{self._PREFIX}/{SaveAgreement._count}"
        self._seen = 0
        self._met = set()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes, as Orbax asks; called from its threads.

        Raises:
          OSError: if a process could not do its part.
        """
        if "async_write_complete" in key or "async_commit_complete" in key:
            self._meet("written" if "write" in key else "committed", timeout_ms)
            if failures := self._failures():
                raise OSError(failures[0])
            return
        self._seen += 1
        if self._seen == _BEFORE + 1:
            # Orbax is done with the save. A stage not reached means that it failed.
            if "committed" not in self._met:
                error = sys.exception()
                self._tell("an unknown error" if error is None else brief(error))
            self._catch_up(timeout_ms)
        self._meet(f"barrier {self._seen}", timeout_ms)

    def end(self, error: BaseException | None) -> str | None:
        """Waits for all processes; returns why the save failed, or None.

        Args:
          error: what went wrong in this process.
        """
        if self._client is None:
            return None if error is None else brief(error)
        if error is not None:
            self._tell(brief(error))
        self._catch_up(20 * _MINUTES)
        self._meet("over", 20 * _MINUTES)
        failures = self._failures()
        return failures[0] if failures else None

    def _tell(self, what: str) -> None:
        """Lets the others know, unless one of them has failed before."""
        if self._client is not None and not self._failures():
            process = jax.process_index()
            self._client.key_value_set(
                f"{self._key}/failed/{process}", f"process {process}: {what}"
            )

    def _failures(self) -> list[str]:
        if self._client is None:
            return []
        return [text for _, text in sorted(self._client.key_value_dir_get(f"{self._key}/failed/"))]

    def _catch_up(self, timeout_ms: int) -> None:
        for stage in _STAGES[:-1]:
            self._meet(stage, timeout_ms)

    def _meet(self, stage: str, timeout_ms: int) -> None:
        if self._client is None:
            return
        with self._waiting:  # two threads may want the same
            if stage not in self._met:
                self._client.wait_at_barrier(f"{self._key}/{stage}", timeout_ms)
                self._met.add(stage)


def brief(error: BaseException) -> str:
    """Returns what went wrong: that a disk is full, or the first line of the message."""
    text = str(error).strip()
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in text:
            return os.strerror(number)
    lines = text.splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
