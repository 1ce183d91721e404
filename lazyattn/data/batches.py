"""Streams of tokenized documents to batches: sharded by process, resumable at any step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from lazyattn.data.config import DataConfig
from lazyattn.data.mixture import DocumentOrder, Mixture
from lazyattn.data.packing import FIELDS, Format, Plan, plan_all
from lazyattn.data.streams import Documents, Stream
from lazyattn.errors import InputError, require

Batch = dict[str, Int32[np.ndarray, "batch length"]]
Cursors = Int32[np.ndarray, "streams sources 2"]
# From some rows of numbers of each process to those of all processes, in any order.
Gather = Callable[[Int32[np.ndarray, "rows columns"]], Int32[np.ndarray, "all_rows columns"]]
Position = tuple[int, Cursors]

_CURSORS = "cursors"
_FIRST = "first_lane"  # so checkpoints call the first stream that a state is of
_VALIDATION_GROUP = 256  # documents packed together


class OtherDataError(InputError):
    """A checkpoint's position is one in other data."""


class StreamDataset(grain.IterDataset):
    """Batches of some streams, as a beginning of Grain's pipeline.

    A row has one stream or several, which fill it in turn. An element is a dict of
    `FIELDS`, each int32 [rows, length], and of `cursors`, int32 [streams, sources, 2]:
    where the streams stand after it. So the state of a batch comes with it from
    whichever process made it.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        mixture: Mixture,
        format: Format,
        seed: int,
        *,
        rows: int,
        turns: int,
        first: int,
        step: int,
        cursors: Cursors,
    ):
        """Stands after a step.

        Args:
          sources: documents of each source.
          mixture: which source a row comes from.
          format: how documents become rows.
          seed: of the documents' order.
          rows: rows of a batch over all processes.
          turns: streams of a row.
          first: the first row of this process; the rows it has are those of `cursors`.
          step: batches before the next.
          cursors: where each stream stands in each source.
        """
        super().__init__()
        self.mixture = mixture
        self.format = format
        self.rows = rows
        self.turns = turns
        self._sources = tuple(sources)
        self._seed = seed
        self._first = first
        self._step = step
        self._cursors = cursors

    @property
    def next_row(self) -> int:
        """The next batch's first row here, counted over all batches."""
        return self._step * self.rows + self._first

    def set_slice(self, part: slice, sequential_slice: bool = False) -> None:
        """Keeps a worker's share of the rows; Grain's `mp_prefetch` calls it.

        Args:
          part: slice(worker, None, workers). The rows are split into as many runs,
            so that the workers' elements joined are a batch.
          sequential_slice: what Grain passes; rows know no other way.
        """
        del sequential_slice
        bounds = np.arange(part.step + 1) * (len(self._cursors) // self.turns) // part.step
        begin, end = bounds[part.start : part.start + 2].tolist()
        self._first += begin
        self._cursors = self._cursors[begin * self.turns : end * self.turns]

    def __iter__(self) -> "StreamIterator":
        return StreamIterator(self)

    def streams(self) -> list[list[Stream]]:
        """Returns the streams one after the other, each in each source."""
        orders = [
            DocumentOrder(len(documents), self._seed, source)
            for source, documents in enumerate(self._sources)
        ]
        return [
            [
                Stream(
                    documents,
                    order,
                    self.format,
                    stream=self._first * self.turns + number,
                    streams=self.rows * self.turns,
                    cursor=tuple(cursor.tolist()),
                )
                for documents, order, cursor in zip(self._sources, orders, cursors, strict=True)
            ]
            for number, cursors in enumerate(self._cursors)
        ]


class StreamIterator(grain.DatasetIterator):
    """Iterates over a `StreamDataset`."""

    def __init__(self, dataset: StreamDataset):
        """Stands where the dataset does."""
        super().__init__()
        self._dataset = dataset
        self._streams = dataset.streams()
        self._next_row = dataset.next_row

    def __next__(self) -> dict[str, np.ndarray]:
        turns, stride = self._dataset.turns, self._dataset.rows
        rows = len(self._streams) // turns
        batch: dict[str, np.ndarray] = {
            name: np.empty((rows, self._dataset.format.length), np.int32) for name in FIELDS
        }
        for row, streams in enumerate(self._streams[self._next_row // stride % turns :: turns]):
            streams[self._dataset.mixture[self._next_row + row]].fill(batch, row)
        self._next_row += stride
        return batch | {_CURSORS: self._cursors()}

    def get_state(self) -> dict[str, Any]:
        """Returns the state, for Grain."""
        return {"next_row": self._next_row, _CURSORS: self._cursors()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Stands where `get_state` was called."""
        self._next_row = state["next_row"]
        for streams, cursors in zip(self._streams, state[_CURSORS], strict=True):
            for stream, cursor in zip(streams, cursors, strict=True):
                stream.move_to(tuple(cursor.tolist()))

    def _cursors(self) -> Cursors:
        return np.asarray(
            [[stream.cursor for stream in streams] for streams in self._streams], np.int32
        )


class BatchIterator(grain.DatasetIterator):
    """One process's share of the endless training batches.

    Its state is plain data that says how many steps were taken, of which data, and
    where every stream stands: two integers a source. It doesn't depend on the number of
    processes, workers and prefetched batches: it belongs to the batches taken, not to
    those read ahead. With `gather` it has the streams of all processes, from which any
    number of processes can resume; without, only this one's. Grain's own checkpointing
    (Orbax's `StatefulCheckpointable`, or `grain.checkpoint.CheckpointSave`) works with it,
    as does JSON.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float],
        format: Format,
        data: str,
        config: DataConfig,
        *,
        process_index: int,
        process_count: int,
        gather: Gather | None,
    ):
        """Stands at step 0; called by `pipeline.train_iterator`.

        Args:
          sources: documents of each source.
          weights: of the sources.
          format: how documents become rows.
          data: what identifies the data and its order.
          config: batch size, seed and readers.
          process_index: this process.
          process_count: all processes.
          gather: joins rows of numbers of all processes, when all of them call it.
        """
        super().__init__()
        local = local_batch_size(config, process_index, process_count)
        self._sources = sources
        self._mixture = Mixture(weights)
        self._format = format
        self._data = data
        self._seed = config.shuffle_seed
        self._num_workers = min(config.num_workers, local)
        self._prefetch = config.prefetch
        self._rows = config.batch_size
        self._turns = config.streams_per_row
        self._row = process_index * local
        self._gather = gather if process_count > 1 else None
        self._cursors = np.zeros((local * self._turns, len(sources), 2), np.int32)
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
            # Grain takes from the workers in turn, and each has a part of every batch.
            reader = self._open()
            parts = [next(reader) for _ in range(max(1, self._num_workers))]
        except InputError as error:
            # The state is still that of the batch before; a later call tries again.
            self._drop_reader()
            # Grain adds lines of its own to the message.
            raise InputError(str(error).split("\n", 1)[0]) from error
        batch = {
            name: parts[0][name] if len(parts) == 1 else np.concatenate([p[name] for p in parts])
            for name in (*FIELDS, _CURSORS)
        }
        self._cursors = batch.pop(_CURSORS)
        self._step += 1
        return batch

    def position(self) -> Position:
        """Returns where this process stands, for `state_at`; costs nothing."""
        return self._step, self._cursors

    def state_at(self, position: Position) -> dict[str, Any]:
        """Returns the state as of an earlier `position()`, as `get_state` does."""
        step, cursors = position
        first = self._row * self._turns
        if self._gather is not None:
            first, cursors = 0, self._gathered(self._gather, cursors)
        return {"step": step, "data": self._data, _FIRST: first, _CURSORS: cursors.tolist()}

    def get_state(self) -> dict[str, Any]:
        """Returns the state as plain data: step, data, first stream and cursors.

        With `gather`, all processes must call this (or `state_at`) for the same step.
        """
        return self.state_at(self.position())

    def _gathered(self, gather: Gather, cursors: Cursors) -> Cursors:
        """Returns the cursors of all streams, of which processes may share some."""
        numbers = self._row * self._turns + np.arange(len(cursors), dtype=np.int32)
        mine = np.column_stack([numbers, cursors.reshape(numbers.size, -1)])
        every = np.unique(np.asarray(gather(mine)), axis=0)
        if not np.array_equal(every[:, 0], np.arange(self._rows * self._turns)):
            raise RuntimeError("The processes' positions in the data are not those of one batch.")
        return every[:, 1:].reshape(len(every), *cursors.shape[1:])

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after `state["step"]` batches, whoever read them.

        Raises:
          OtherDataError: if the state belongs to other data, or to another order of it.
          InputError: if it lacks one of this process's streams, or is too old.
        """
        if "data" in state and _CURSORS not in state:
            raise InputError(
                "The checkpoint is of an older version, which read text in another order, so"
                " training cannot resume exactly; resume it with that version or start a new"
                " workdir."
            )
        if state.get("data") != self._data:
            raise OtherDataError(
                "The checkpoint was made with other data (source or shards, their weights,"
                " tokenizer, sequence_length, packing, long_documents, batch_size, streams_per_row"
                " or shuffle_seed), so training cannot resume exactly; restore those settings or"
                " start a new workdir."
            )
        begin = self._row * self._turns - state[_FIRST]
        cursors = np.asarray(state[_CURSORS], np.int32)[max(begin, 0) :][: len(self._cursors)]
        if begin < 0 or cursors.shape != self._cursors.shape:
            raise InputError(
                "The checkpoint has the position in the data of some processes only, and not of"
                f" rows {self._row} to {self._row + len(self._cursors) // self._turns - 1} of a"
                " batch; resume from one that all processes wrote together."
            )
        self._drop_reader()
        self._step = int(state["step"])
        self._cursors = cursors

    def start_prefetch(self) -> None:
        """Begins to read ahead."""
        self._open().start_prefetch()

    def close(self) -> None:
        """Stops the readers; no batch can be taken any more."""
        self._closed = True
        self._drop_reader()

    def _dataset(self) -> grain.IterDataset:
        """Returns what is left of Grain's pipeline, ahead of any worker processes."""
        dataset: grain.IterDataset = StreamDataset(
            self._sources,
            self._mixture,
            self._format,
            self._seed,
            rows=self._rows,
            turns=self._turns,
            first=self._row,
            step=self._step,
            cursors=self._cursors,
        )
        if self._prefetch and not self._num_workers:
            dataset = grain.experimental.ThreadPrefetchIterDataset(
                dataset, prefetch_buffer_size=self._prefetch
            )
        return dataset

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


def validation_batches(
    sources: Sequence[Documents], format: Format, config: DataConfig, first: int, count: int
) -> Iterator[Batch]:
    """Yields some rows of the validation batches, each document once, in order.

    Every process packs all documents, since only so it knows where its rows begin.

    Args:
      sources: documents of each source.
      format: how documents become rows.
      config: batch size.
      first: first row of each batch to yield.
      count: rows of each batch to yield.
    """
    batch, row = format.empty(count), 0
    for plan in _validation_plans(sources, format):
        for number in range(len(plan)):
            if first <= row < first + count:
                plan.fill(batch, row - first, number, format)
            row += 1
            if row == config.batch_size:
                yield batch
                batch, row = format.empty(count), 0
    if row:
        yield batch


def _validation_plans(sources: Sequence[Documents], format: Format) -> Iterator[Plan]:
    for documents in sources:
        for start in range(0, len(documents), _VALIDATION_GROUP):
            end = min(start + _VALIDATION_GROUP, len(documents))
            yield plan_all(documents.read(range(start, end)), format)


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
