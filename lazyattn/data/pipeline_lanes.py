"""Lanes of tokenised documents to batches: packed on the way, resumable at any step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from lazyattn.data.config import DataConfig
from lazyattn.data.lanes import Documents, Format, Lane
from lazyattn.data.mixture import DocumentOrder, Mixture
from lazyattn.data.packing import FIELDS, PACKERS, Tokens
from lazyattn.data.pipeline_base import Batch, BatchIterator, local_batch_size
from lazyattn.errors import InputError

Cursors = Int32[np.ndarray, "lanes sources 2"]
# From some rows of numbers of each process to those of all processes, in any order.
Gather = Callable[[Int32[np.ndarray, "rows columns"]], Int32[np.ndarray, "all_rows columns"]]

_CURSORS = "cursors"
_VALIDATION_GROUP = 256  # documents packed together


class LaneDataset(grain.IterDataset):
    """Batches of some lanes, as a beginning of Grain's pipeline.

    An element is a dict of `FIELDS`, each int32 [lanes, length], and of `cursors`,
    int32 [lanes, sources, 2]: where the lanes stand after it. So the state of a batch
    comes with it from whichever process made it.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        mixture: Mixture,
        format: Format,
        seed: int,
        *,
        lanes: int,
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
          lanes: rows of a batch over all processes.
          first: the first lane of this process; it has as many as there are `cursors`.
          step: batches before the next.
          cursors: where each lane stands in each source.
        """
        super().__init__()
        self._sources = tuple(sources)
        self._mixture = mixture
        self._format = format
        self._seed = seed
        self._lanes = lanes
        self._first = first
        self._step = step
        self._cursors = cursors

    def set_slice(self, part: slice, sequential_slice: bool = False) -> None:
        """Keeps a worker's share of the lanes; Grain's `mp_prefetch` calls it.

        Args:
          part: slice(worker, None, workers). The lanes are split into as many runs,
            so that the workers' elements joined are a batch.
          sequential_slice: what Grain passes; lanes know no other way.
        """
        del sequential_slice
        bounds = np.arange(part.step + 1) * len(self._cursors) // part.step
        begin, end = bounds[part.start : part.start + 2].tolist()
        self._first += begin
        self._cursors = self._cursors[begin:end]

    def __iter__(self) -> "LaneIterator":
        orders = [
            DocumentOrder(len(documents), self._seed, source)
            for source, documents in enumerate(self._sources)
        ]
        lanes = [
            [
                Lane(
                    documents,
                    order,
                    self._format,
                    lane=self._first + row,
                    lanes=self._lanes,
                    cursor=tuple(cursor.tolist()),
                )
                for documents, order, cursor in zip(self._sources, orders, cursors, strict=True)
            ]
            for row, cursors in enumerate(self._cursors)
        ]
        return LaneIterator(
            lanes,
            self._mixture,
            self._format.length,
            next_row=self._step * self._lanes + self._first,
            stride=self._lanes,
        )


class LaneIterator(grain.DatasetIterator):
    """Iterates over a `LaneDataset`."""

    def __init__(
        self,
        lanes: Sequence[Sequence[Lane]],
        mixture: Mixture,
        length: int,
        *,
        next_row: int,
        stride: int,
    ):
        """Made by `LaneDataset`.

        Args:
          lanes: for each row, its lane in each source.
          mixture: which source a row comes from.
          length: pairs a row.
          next_row: the next batch's first row here, counted over all batches.
          stride: rows of a batch over all processes.
        """
        super().__init__()
        self._lanes = lanes
        self._mixture = mixture
        self._length = length
        self._next_row = next_row
        self._stride = stride

    def __next__(self) -> dict[str, np.ndarray]:
        batch = {name: np.empty((len(self._lanes), self._length), np.int32) for name in FIELDS}
        for row, lanes in enumerate(self._lanes):
            lanes[self._mixture[self._next_row + row]].fill(batch, row)
        self._next_row += self._stride
        return batch | {_CURSORS: self._cursors()}

    def get_state(self) -> dict[str, Any]:
        """Returns the state, for Grain."""
        return {"next_row": self._next_row, _CURSORS: self._cursors()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Stands where `get_state` was called."""
        self._next_row = state["next_row"]
        for lanes, cursors in zip(self._lanes, state[_CURSORS], strict=True):
            for lane, cursor in zip(lanes, cursors, strict=True):
                lane.move_to(tuple(cursor.tolist()))

    def _cursors(self) -> Cursors:
        return np.asarray([[lane.cursor for lane in lanes] for lanes in self._lanes], np.int32)


class PackingIterator(BatchIterator):
    """One process's share of the endless batches of all lanes.

    The state has every lane's cursors besides the step, two integers a source. With
    `gather` it has those of all processes; without, only this one's, and
    `merge_states` joins them. Any number of processes can go on from all of them.
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
        """Iterates from step 0; called by `pipeline.train_iterator`.

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
        local = local_batch_size(config, process_index, process_count)
        workers = min(config.num_workers, local)
        super().__init__(data, num_workers=workers, prefetch=config.prefetch)
        self._sources = sources
        self._mixture = Mixture(weights)
        self._format = format
        self._seed = config.shuffle_seed
        self._lanes = config.batch_size
        self._first = process_index * local
        self._gather = gather if process_count > 1 else None
        self._cursors = np.zeros((local, len(sources), 2), np.int32)

    def position(self) -> tuple[int, Cursors]:
        """Returns where this process stands, for `state_at`; costs nothing."""
        return self._step, self._cursors

    def state_at(self, position: tuple[int, Cursors]) -> dict[str, Any]:
        """Returns the state as plain data: step, data, first_lane and cursors.

        With `gather`, all processes must call this (or `get_state`) for the same step.
        """
        step, cursors = position
        first = self._first
        if self._gather is not None:
            first, cursors = 0, self._gathered(cursors)
        return super().state_at(step) | {"first_lane": first, _CURSORS: cursors.tolist()}

    def _gathered(self, cursors: Cursors) -> Cursors:
        """Returns the cursors of all lanes, of which processes may share some."""
        numbers = self._first + np.arange(len(cursors), dtype=np.int32)
        mine = np.column_stack([numbers, cursors.reshape(numbers.size, -1)])
        every = np.unique(np.asarray(self._gather(mine)), axis=0)  # type: ignore[misc]
        if not np.array_equal(every[:, 0], np.arange(self._lanes)):
            raise RuntimeError("The processes' positions in the data are not those of one batch.")
        return every[:, 1:].reshape(self._lanes, *cursors.shape[1:])

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after `state["step"]` batches, whoever read them.

        Raises:
          InputError: if the state belongs to other data, or lacks one of this
            process's lanes.
        """
        super().set_state(state)
        begin = self._first - state["first_lane"]
        cursors = np.asarray(state[_CURSORS], np.int32)[max(begin, 0) :][: len(self._cursors)]
        if begin < 0 or cursors.shape != self._cursors.shape:
            raise InputError(
                "The checkpoint has the position in the data of some processes only, and not of"
                f" rows {self._first} to {self._first + len(self._cursors) - 1} of a batch; resume"
                " from one that all processes wrote together."
            )
        self._cursors = cursors

    def _dataset(self) -> grain.IterDataset:
        dataset: grain.IterDataset = LaneDataset(
            self._sources,
            self._mixture,
            self._format,
            self._seed,
            lanes=self._lanes,
            first=self._first,
            step=self._step,
            cursors=self._cursors,
        )
        if self._prefetch and not self._num_workers:
            dataset = grain.experimental.ThreadPrefetchIterDataset(
                dataset, prefetch_buffer_size=self._prefetch
            )
        return dataset

    def _take(self, reader: grain.DatasetIterator) -> Batch:
        # Grain takes from the workers in turn, and each has a part of every batch.
        parts = [next(reader) for _ in range(max(1, self._num_workers))]
        batch = {
            name: parts[0][name] if len(parts) == 1 else np.concatenate([p[name] for p in parts])
            for name in (*FIELDS, _CURSORS)
        }
        self._cursors = batch.pop(_CURSORS)
        return batch


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the states of all processes, taken without `gather` after the same step.

    Raises:
      InputError: if they are of different steps or data, or some are missing.
    """
    states = sorted(states, key=lambda state: state["first_lane"])
    cursors: list[Any] = []
    for state in states:
        if state["first_lane"] != len(cursors) or any(
            state[name] != states[0][name] for name in ("step", "data")
        ):
            raise InputError(
                "The data states of the processes don't belong together: they are of different"
                " steps or data, or one is missing."
            )
        cursors += state[_CURSORS]
    return states[0] | {_CURSORS: cursors}


def validation_rows(
    sources: Sequence[Documents], format: Format, config: DataConfig, first: int, count: int
) -> Iterator[Batch]:
    """Yields some rows of the validation batches, each document once, in order.

    Every process packs all documents, since only so it knows where its rows begin.

    Args:
      sources: documents of each source.
      format: how documents become rows.
      config: batch size and packing.
      first: first row of each batch to yield.
      count: rows of each batch to yield.
    """
    fill = {"inputs": format.pad_id, "targets": format.pad_id}
    waiting = {name: np.zeros((0, format.length), np.int32) for name in FIELDS}
    for group in _groups(sources, _VALIDATION_GROUP):
        parts = [
            np.concatenate([[format.bos_id], *format.target_tokens(ids)]).astype(np.int32)
            for ids in group
        ]
        tokens = Tokens(np.concatenate(parts), np.asarray([part.size for part in parts]))
        rows = PACKERS[format.packing](tokens, format.length, format.pad_id)
        waiting = {name: np.concatenate([waiting[name], rows[name]]) for name in FIELDS}
        while waiting["inputs"].shape[0] >= config.batch_size:
            yield {name: array[first : first + count].copy() for name, array in waiting.items()}
            waiting = {name: array[config.batch_size :] for name, array in waiting.items()}
    missing = config.batch_size - waiting["inputs"].shape[0]
    if missing < config.batch_size:
        yield {
            name: np.pad(waiting[name], ((0, missing), (0, 0)), constant_values=fill.get(name, 0))[
                first : first + count
            ]
            for name in FIELDS
        }


def _groups(sources: Sequence[Documents], size: int) -> Iterator[Sequence[np.ndarray]]:
    for documents in sources:
        for start in range(0, len(documents), size):
            yield documents.read(range(start, min(start + size, len(documents))))
