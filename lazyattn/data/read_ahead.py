"""Batches read ahead, so that several processes can stop together when one can't read on."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Int

from lazyattn.distributed import StopAgreement, tell_all
from lazyattn.errors import InputError

Rows = Mapping[str, Int[np.ndarray, "rows length"]]


class BatchIterator(Protocol):
    """Where batches come from, as `lazyattn.data.pipeline.BatchIterator` has them."""

    def __next__(self) -> Rows: ...

    def position(self) -> Any:
        """Returns where the iterator stands."""

    def state_at(self, position: Any) -> Any:
        """Returns the state, fit for JSON, as of a position."""


class ReadAhead:
    """An iterator's batches, some of them read before they are asked for.

    Attributes:
      error: what keeps it from reading on, or None. With `AHEAD` it has batches for as
        many steps as a stop takes to reach all processes, nevertheless.
    """

    # One more than the steps, since a stop counts from the batch given out last.
    AHEAD = StopAgreement.STEPS_TO_SPREAD + 1

    def __init__(self, batches: BatchIterator, steps: int, ahead: int = AHEAD):
        """Reads the first ones.

        Args:
          batches: an iterator over this process's rows; it is not to be used otherwise.
          steps: batches that will be asked for.
          ahead: batches read ahead; 0 will do for one process.

        Raises:
          InputError: on all processes, if one can't read so many.
        """
        self._batches = batches
        self._unread = steps
        self._ahead = ahead
        self._position = batches.position()
        self._waiting: collections.deque[tuple[Rows, Any]] = collections.deque()
        self.error: InputError | None = None
        self._fill(ahead)
        agree_on(self.error, "first batches")

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        self._fill(1 + self._ahead)
        if not self._waiting:
            raise StopIteration if self.error is None else self.error
        rows, self._position = self._waiting.popleft()
        return rows

    def get_state(self) -> Any:
        """Returns the state after the batch given out last; all processes call this."""
        return self._batches.state_at(self._position)

    def _fill(self, count: int) -> None:
        while self.error is None and self._unread and len(self._waiting) < count:
            try:
                rows = next(self._batches)
            except InputError as error:
                self.error = error
                return
            self._waiting.append((rows, self._batches.position()))
            self._unread -= 1


def agree_on(error: InputError | None, what: str) -> None:
    """Raises an error on all processes if one has one; each of them calls this.

    Args:
      error: this process's, or None.
      what: was attempted, a name of its own for every time.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    told = [text for text in tell_all(what, "" if error is None else str(error)) if text]
    if told:
        raise InputError(told[0]) from error


def read_together(batches: Iterable[Rows], what: str) -> Iterator[Rows]:
    """Yields this process's batches, as many as every other's, as long as all can read.

    Args:
      batches: whose reading may raise an InputError.
      what: they are, a name of its own for every time.

    Raises:
      InputError: on all processes.
    """
    iterator, number = iter(batches), 0
    while True:
        rows, error = None, None
        try:
            rows = next(iterator, None)
        except InputError as caught:
            error = caught
        number += 1
        agree_on(error, f"{what} {number}")
        if rows is None:
            return
        yield rows
