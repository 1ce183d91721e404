"""Packed rows on disk, read without loading them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from lazyattn.data.packing import FIELDS, Rows


class PackedRows:
    """Packed rows in a memory-mapped `.npy` file of int32 [rows, 4, length].

    A Grain random-access data source: `rows[i]` is a dict of `FIELDS`, each int32
    [length]. Pickles as its path, so reader processes map the file themselves.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a file written by `write`."""
        self.path = Path(path)
        self._array = np.asarray(np.load(self.path, mmap_mode="r"))  # indexes faster than memmap

    @staticmethod
    def write(path: str | os.PathLike[str], rows: Mapping[str, Int32[np.ndarray, "rows length"]]):
        """Writes the fields of all rows, each int32 [rows, length], to a file."""
        np.save(path, np.stack([rows[name] for name in FIELDS], axis=1))

    def __len__(self) -> int:
        return self._array.shape[0]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Int32[np.ndarray, " length"]]:
        return dict(zip(FIELDS, np.array(self._array[index]), strict=True))

    def __reduce__(self):
        return PackedRows, (self.path,)

    @property
    def length(self) -> int:
        """Pairs a row."""
        return self._array.shape[2]

    def column(self, field: str) -> Int32[np.ndarray, "rows length"]:
        """Returns one field of all rows, as a view of the file."""
        return self._array[:, FIELDS.index(field)]

    def block(self, start: int, stop: int) -> Rows:
        """Returns rows start to stop as arrays in memory, each int32 [stop - start, length]."""
        block = np.array(self._array[start:stop])
        return {name: np.ascontiguousarray(block[:, i]) for i, name in enumerate(FIELDS)}
