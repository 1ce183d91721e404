"""Which document comes when, and which source fills which row: functions of numbers alone."""

import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from lazyattn.errors import require

_ROUNDS = 4  # of the permutation; Grain's shuffle takes as many
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it fill 0..2^64 evenly


class DocumentOrder:
    """The endless order of a source's documents: a new permutation every epoch.

    Place k is in epoch k // documents. A place's document costs the same wherever it
    is, and nothing is kept in memory.
    """

    def __init__(self, documents: int, seed: int, source: int = 0):
        """Fixes the order.

        Args:
          documents: how many there are.
          seed: any integer.
          source: which of several sources this is; each has an order of its own.
        """
        require(documents >= 1, "documents", documents, "at least 1")
        self._documents = documents
        self._name = f"documents {seed} {source}"
        self._seed = (-1, 0)  # epoch, seed

    def __getitem__(self, place: int) -> int:
        """Returns the document at a place, from 0 on."""
        epoch, index = divmod(place, self._documents)
        if self._seed[0] != epoch:
            digest = hashlib.sha256(f"{self._name} {epoch}".encode()).digest()
            self._seed = epoch, int.from_bytes(digest[:4], "big")
        return grain.experimental.index_shuffle(
            index, max_index=self._documents - 1, seed=self._seed[1], rounds=_ROUNDS
        )


class Mixture:
    """Which source each row of the endless sequence of rows comes from.

    Row n belongs to the source in whose share of [0, 1) the fraction of n times the
    golden ratio falls. Such fractions are spread so evenly that among any n rows in
    succession a source has its share of n, give or take a few rows.
    """

    def __init__(self, weights: Sequence[float]):
        """Fixes the shares.

        Args:
          weights: of the sources, each above 0; relative to their sum.
        """
        bounds = np.cumsum(np.asarray(weights, np.float64))
        self._bounds = bounds / bounds[-1]

    def __getitem__(self, row: int) -> int:
        """Returns the source of a row, from 0 on."""
        if self._bounds.size == 1:
            return 0
        fraction = (row * _GOLDEN % 2**64) / 2**64
        return min(
            int(np.searchsorted(self._bounds, fraction, side="right")), self._bounds.size - 1
        )
