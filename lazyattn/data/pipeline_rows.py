"""Rows packed ahead of time to batches: rows are shuffled, and found by number."""

import hashlib
from collections.abc import Iterator

import grain
import numpy as np

from lazyattn.data.config import DataConfig
from lazyattn.data.packing import FIELDS
from lazyattn.data.pipeline_base import Batch, BatchIterator, local_batch_size
from lazyattn.data.prepare import PreparedData
from lazyattn.errors import InputError
from lazyattn.quantity import quantity


class RowIterator(BatchIterator):
    """Where a batch lies follows from (seed, step) alone: the step is the whole state."""

    def __init__(
        self,
        batches: grain.MapDataset,
        data: str,
        *,
        first: int,
        stride: int,
        num_workers: int,
        prefetch: int,
    ):
        """Iterates from step 0; called by `train_iterator`.

        Args:
          batches: the endless sequence of per-process batches.
          data: what identifies the data and its order.
          first: which batch of `batches` is this process's first.
          stride: batches from one of its steps to the next.
          num_workers: as in `DataConfig`.
          prefetch: as in `DataConfig`.
        """
        super().__init__(data, num_workers=num_workers, prefetch=prefetch)
        self._batches = batches
        self._first = first
        self._stride = stride

    def _dataset(self) -> grain.IterDataset:
        mine = self._batches[self._first + self._step * self._stride :: self._stride]
        threads = 1 if self._prefetch and not self._num_workers else 0
        return mine.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * self._prefetch)
        )


def train_iterator(
    prepared: PreparedData, config: DataConfig, *, process_index: int, process_count: int
) -> RowIterator:
    """As `pipeline.train_iterator`.

    Rows come in a new order every epoch; a batch may span two epochs, so that every
    row is seen once in each.

    Raises:
      InputError: if the batch can't be split over the processes, or the training
        split has fewer rows than a batch.
    """
    local_size = local_batch_size(config, process_index, process_count)
    rows = len(prepared.train)
    if rows < config.batch_size:
        raise InputError(
            f"data.batch_size is {config.batch_size}, but data.source {config.source!r} gives only"
            f" {quantity(rows, 'training row')} of {quantity(prepared.train.length, 'token')};"
            " lower data.batch_size or data.sequence_length, or give more text."
        )
    batches = (
        grain.MapDataset.source(prepared.train)
        .shuffle(_grain_seed(config.shuffle_seed))
        .repeat()
        .batch(local_size, drop_remainder=True)
    )
    return RowIterator(
        batches,
        f"{prepared.fingerprint}/{config.batch_size}/{config.shuffle_seed}",
        first=process_index,
        stride=process_count,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
    )


def validation_batches(
    prepared: PreparedData, config: DataConfig, *, process_index: int, process_count: int
) -> Iterator[Batch]:
    """As `pipeline.validation_batches`."""
    local_size = local_batch_size(config, process_index, process_count)
    rows = len(prepared.validation)
    for start in range(process_index * local_size, _round_up(rows, config), config.batch_size):
        block = prepared.validation.block(min(start, rows), min(start + local_size, rows))
        missing = local_size - block["inputs"].shape[0]
        fill = {"inputs": prepared.tokenizer.pad_id, "targets": prepared.tokenizer.pad_id}
        yield {
            name: np.pad(block[name], ((0, missing), (0, 0)), constant_values=fill.get(name, 0))
            for name in FIELDS
        }


def _round_up(rows: int, config: DataConfig) -> int:
    return -(-rows // config.batch_size) * config.batch_size


def _grain_seed(seed: int) -> int:
    """Returns a seed for Grain's shuffle, which adds the epoch to it.

    Hashed, or else epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    """
    return int.from_bytes(hashlib.sha256(f"shuffle {seed}".encode()).digest()[:4], "big")
