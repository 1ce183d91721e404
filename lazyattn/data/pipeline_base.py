"""What all iterators over training batches have in common."""

import abc
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from lazyattn.data.config import DataConfig
from lazyattn.errors import InputError, require

Batch = dict[str, Int32[np.ndarray, "batch length"]]


class OtherDataError(InputError):
    """A checkpoint's position is one in other data."""


class BatchIterator(grain.DatasetIterator):
    """One process's share of the endless training batches.

    Its state is plain data that says how many steps were taken, of which data, and
    where that left off. It doesn't depend on the number of processes, workers and
    prefetched batches: it belongs to the batches taken, not to those read ahead.
    Grain's own checkpointing (Orbax's `StatefulCheckpointable`, or
    `grain.checkpoint.CheckpointSave`) works with it, as does JSON.
    """

    def __init__(self, data: str, *, num_workers: int, prefetch: int):
        """Stands at step 0.

        Args:
          data: what identifies the data and its order.
          num_workers: as in `DataConfig`.
          prefetch: as in `DataConfig`.
        """
        super().__init__()
        self._data = data
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
        try:
            batch = self._take(self._open())
        except InputError as error:
            # The state is still that of the batch before; a later call tries again.
            self._drop_reader()
            # Grain adds lines of its own to the message.
            raise InputError(str(error).split("\n", 1)[0]) from error
        self._step += 1
        return batch

    def position(self) -> Any:
        """Returns where this process stands, for `state_at`; costs nothing."""
        return self._step

    def state_at(self, position: Any) -> dict[str, Any]:
        """Returns the state as of an earlier `position()`, as `get_state` does."""
        return {"step": position, "data": self._data}

    def get_state(self) -> dict[str, Any]:
        """Returns the state as plain data, "step" and "data" among it."""
        return self.state_at(self.position())

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after `state["step"]` batches.

        Raises:
          OtherDataError: if the state belongs to other data, or to another order of it.
        """
        if state.get("data") != self._data:
            raise OtherDataError(
                "The checkpoint was made with other data (source or shards, their weights,"
                " tokenizer, sequence_length, packing, long_documents, batch_size or shuffle_seed),"
                " so training cannot resume exactly; restore those settings or start a new workdir."
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

    @abc.abstractmethod
    def _dataset(self) -> grain.IterDataset:
        """Returns what is left of Grain's pipeline, ahead of any worker processes."""

    def _take(self, reader: grain.DatasetIterator) -> Batch:
        return next(reader)

    def _open(self) -> grain.DatasetIterator:
        """Returns the iterator over Grain's pipeline, positioned at the step."""
        if self._reader is None:
            dataset = self._dataset()
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


def local_batch_size(config: DataConfig, process_index: int, process_count: int) -> int:
    """Returns the rows of a batch that one of several processes reads.

    Raises:
      InputError: if the batch can't be split over the processes.
    """
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
