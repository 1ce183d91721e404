"""Data to batches: shuffled, sharded by process, resumable at any step.

Text of a small source is packed into rows ahead of time (`pipeline_rows`); tokenised
shards of any size are packed while they are read (`pipeline_lanes`). Either way the
global batch of a step is the same for any number of processes and workers.
"""

import os
from collections.abc import Iterator

from lazyattn.data import pipeline_lanes, pipeline_rows
from lazyattn.data.config import DataConfig
from lazyattn.data.lanes import PackingReport, measure_packing
from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.pipeline_base import Batch, BatchIterator, OtherDataError, local_batch_size
from lazyattn.data.pipeline_lanes import Gather, merge_states
from lazyattn.data.pipeline_shards import ShardedData, open_shards
from lazyattn.data.prepare import PreparedData
from lazyattn.data.prepare import prepare as prepare_text
from lazyattn.data.unigram import unigram_entropy

__all__ = [
    "Batch",
    "BatchIterator",
    "OtherDataError",
    "PreparedData",
    "ShardedData",
    "TrainingData",
    "merge_states",
    "packing_report",
    "prepare",
    "train_iterator",
    "unigram_entropy",
    "validation_batches",
]

# Part of the state: raise it whenever the same settings come to give other batches.
_ORDER = 1

TrainingData = PreparedData | ShardedData


def prepare(config: DataConfig, cache_dir: str | os.PathLike[str] | None = None) -> TrainingData:
    """Opens tokenised shards, or prepares text unless the cache has it.

    Args:
      config: what to read.
      cache_dir: where prepared text is kept; None: the user's cache. Shards stay
        where they are.

    Raises:
      InputError: if the data is missing, damaged or unusable.
    """
    return open_shards(config) if config.tokenised else prepare_text(config, cache_dir)


def train_iterator(
    prepared: TrainingData,
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    gather: Gather | None = None,
) -> BatchIterator:
    """Returns this process's endless training batches, from step 0.

    The order is new every epoch. Global batch s is the same for any number of
    processes: it is their batches s one after the other, process 0's rows first.

    Args:
      prepared: what `prepare(config)` returned.
      config: batch size, seed and readers.
      process_index: this process, as `jax.process_index()`.
      process_count: all processes, as `jax.process_count()`.
      gather: from an int32 array [rows, columns] of each process to the rows of all of
        them; called by all processes when the state is asked for.
        None: the state of tokenised shards tells where this process's rows stand,
        and `merge_states` makes one of several.

    Returns:
      A Grain iterator over dicts of `inputs`, `targets`, `segment_ids` and
      `positions`, each int32 [batch_size / process_count, sequence_length].

    Raises:
      InputError: if the batch can't be split over the processes, or text prepared
        ahead gives fewer rows than a batch.
    """
    if isinstance(prepared, PreparedData):
        return pipeline_rows.train_iterator(
            prepared, config, process_index=process_index, process_count=process_count
        )
    order = (
        _ORDER,
        prepared.fingerprint,
        prepared.weights,
        *(config.sequence_length, config.batch_size, config.packing, config.long_documents),
        config.shuffle_seed,
    )
    return pipeline_lanes.PackingIterator(
        prepared.train,
        prepared.weights,
        prepared.format(config),
        "/".join(map(str, order)),
        config,
        process_index=process_index,
        process_count=process_count,
        gather=gather,
    )


def validation_batches(
    prepared: TrainingData,
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
    if isinstance(prepared, PreparedData):
        return pipeline_rows.validation_batches(
            prepared, config, process_index=process_index, process_count=process_count
        )
    count = local_batch_size(config, process_index, process_count)
    return pipeline_lanes.validation_rows(
        prepared.validation, prepared.format(config), config, process_index * count, count
    )


def packing_report(prepared: ShardedData, config: DataConfig) -> list[PackingReport]:
    """Returns how well the first documents of each source pack."""
    return [
        measure_packing(
            documents,
            DocumentOrder(len(documents), config.shuffle_seed, source),
            prepared.format(config),
        )
        for source, documents in enumerate(prepared.train)
    ]
