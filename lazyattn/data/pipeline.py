"""Packed rows to batches: shuffled, sharded by process, resumable at any step."""

import hashlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from lazyattn.data.config import DataConfig
from lazyattn.data.packing import FIELDS
from lazyattn.data.prepare import PreparedData, prepare
from lazyattn.data.unigram import unigram_entropy
from lazyattn.errors import InputError, require

__all__ = [
    "Batch",
    "BatchIterator",
    "PreparedData",
    "prepare",
    "train_iterator",
    "unigram_entropy",
    "validation_batches",
]

Batch = dict[str, Int32[np.ndarray, "batch length"]]


class BatchIterator(grain.DatasetIterator):
    """This process's share of the endless training batches.

    Its whole state is how many steps were taken and of which data: where a batch
    lies follows from (seed, step) alone. So the state is the same for any number of
    processes, workers and prefetched batches, and one saved by 2 processes restores
    on 4. Grain's own checkpointing (Orbax's `StatefulCheckpointable`, or
    `grain.checkpoint.CheckpointSave`) works with it, as does JSON.
    """

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
        super().__init__()
        self._batches = batches
        self._data = data
        self._first = first
        self._stride = stride
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._step = 0
        self._reader: grain.DatasetIterator | None = None

    @property
    def step(self) -> int:
        """Batches taken since the start of training."""
        return self._step

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("The data iterator is closed.")
        batch = next(self._open())
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the state as plain data: {"step": int, "data": str}."""
        return {"step": self._step, "data": self._data}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after `state["step"]` batches.

        Raises:
          InputError: if the state belongs to other data: another source, tokenizer,
            row length, packing, batch size or shuffle seed.
        """
        if state.get("data") != self._data:
            raise InputError(
                "The checkpoint was made with other data (source, tokenizer, sequence_length,"
                " packing, batch_size or shuffle_seed), so training cannot resume exactly; restore"
                " those settings or start a new workdir."
            )
        self._drop_reader()
        self._step = int(state["step"])

    def start_prefetch(self) -> None:
        """Begins to read ahead."""
        self._open().start_prefetch()

    def close(self) -> None:
        """Stops the readers; no batch can be taken any more."""
        self._closed = True
        self._drop_reader()

    def _open(self) -> grain.DatasetIterator:
        """Returns the iterator over Grain's pipeline, positioned at the step."""
        if self._reader is None:
            mine = self._batches[self._first + self._step * self._stride :: self._stride]
            threads = 1 if self._prefetch and not self._num_workers else 0
            dataset = mine.to_iter_dataset(
                grain.ReadOptions(
                    num_threads=threads, prefetch_buffer_size=threads * self._prefetch
                )
            )
            if self._num_workers:
                if not flags.FLAGS.is_parsed():  # Grain asks flags; outside absl's app, none are
                    flags.FLAGS.mark_as_parsed()
                dataset = dataset.mp_prefetch(
                    grain.MultiprocessingOptions(
                        num_workers=self._num_workers,
                        per_worker_buffer_size=max(1, self._prefetch),
                    )
                )
            self._reader = iter(dataset)
        return self._reader

    def _drop_reader(self) -> None:
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.close()
        self._reader = None


def train_iterator(
    prepared: PreparedData,
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Returns this process's endless training batches, from step 0.

    Rows come in a new order every epoch; a batch may span two epochs, so that every
    row is seen once in each. Global batch s is the same for any number of processes:
    it is their batches s one after the other, process 0's rows first.

    Args:
      prepared: what `prepare(config)` returned.
      config: batch size, seed and readers.
      process_index: this process, as `jax.process_index()`.
      process_count: all processes, as `jax.process_count()`.

    Returns:
      A Grain iterator over dicts of `inputs`, `targets`, `segment_ids` and
      `positions`, each int32 [batch_size / process_count, sequence_length].

    Raises:
      InputError: if the batch can't be split over the processes, or the training
        split has fewer rows than a batch.
    """
    local_size = _local_size(config, process_index, process_count)
    rows = len(prepared.train)
    if rows < config.batch_size:
        raise InputError(
            f"data.batch_size is {config.batch_size}, but data.source {config.source!r} gives only"
            f" {rows} training rows of {prepared.train.length} tokens; lower data.batch_size or"
            " data.sequence_length, or give more text."
        )
    batches = (
        grain.MapDataset.source(prepared.train)
        .shuffle(_grain_seed(config.shuffle_seed))
        .repeat()
        .batch(local_size, drop_remainder=True)
    )
    return BatchIterator(
        batches,
        f"{prepared.fingerprint}/{config.batch_size}/{config.shuffle_seed}",
        first=process_index,
        stride=process_count,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
    )


def validation_batches(
    prepared: PreparedData,
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's share of the validation split, once, in order.

    Every batch has the full shape; where rows run out, `segment_ids` is 0. All
    processes yield the same number of batches, ceil(validation rows / batch_size).

    Args, Raises: as `train_iterator`.
    """
    local_size = _local_size(config, process_index, process_count)
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


def _local_size(config: DataConfig, process_index: int, process_count: int) -> int:
    require(
        0 <= process_index < process_count,
        "process_index",
        process_index,
        f"at least 0 and below process_count = {process_count}",
    )
    require(
        config.batch_size % process_count == 0,
        "data.batch_size",
        config.batch_size,
        f"a multiple of the number of processes, {process_count}",
    )
    return config.batch_size // process_count


def _grain_seed(seed: int) -> int:
    """Returns a seed for Grain's shuffle, which adds the epoch to it.

    Hashed, or else epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    """
    return int.from_bytes(hashlib.sha256(f"shuffle {seed}".encode()).digest()[:4], "big")
