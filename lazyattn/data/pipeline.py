"""Text to batches, on one road: text, shards, streams, batches.

`prepare` opens folders of shards; text of a small source becomes such a folder in the
cache first. The global batch of a step is the same for any number of processes and
workers.
"""

import os
from collections.abc import Iterator

from lazyattn import buckets
from lazyattn.data import batches, copies, manifest
from lazyattn.data.batches import (
    Batch,
    BatchIterator,
    Gather,
    OtherDataError,
    local_batch_size,
)
from lazyattn.data.config import DataConfig
from lazyattn.data.folders import TrainingData, open_folders
from lazyattn.data.mixture import DocumentOrder
from lazyattn.data.prepare.source import prepare_source
from lazyattn.data.streams import PackingReport, measure_packing
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.data.unigram import unigram_entropy

__all__ = [
    "Batch",
    "BatchIterator",
    "OtherDataError",
    "TrainingData",
    "known_tokenizer",
    "packing_report",
    "prepare",
    "train_iterator",
    "unigram_entropy",
    "validation_batches",
]

# Part of the state: raise it whenever the same settings come to give other batches.
_ORDER = 1


def known_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Returns the tokenizer of the data before any of it is copied or prepared.

    Returns:
      None if it is trained on the text.

    Raises:
      InputError: if a folder of shards or the tokenizer is missing, damaged or unusable.
    """
    if not config.tokenised:
        return None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    folders = [folder for folder, _ in config.weighted_paths]
    manifests = [_manifest(config, folder) for folder in folders]
    manifest.require_same_tokenizer(folders, manifests)
    return Tokenizer.load(manifest.tokenizer_file(folders[0], manifests[0]))


def _manifest(config: DataConfig, folder: str) -> manifest.Manifest:
    name = _setting(config)
    buckets.check_readable(name, folder)
    return manifest.read(folder, name)


def _setting(config: DataConfig) -> str:
    return "a folder of data.sources" if config.sources else "data.path"


def prepare(config: DataConfig, cache_dir: str | os.PathLike[str] | None = None) -> TrainingData:
    """Opens tokenized shards; text is made into them unless the cache has it.

    Args:
      config: what to read.
      cache_dir: where text that was prepared is kept, and copies of shards in buckets; None:
        the user's cache. Shards in a folder of this machine stay where they are.

    Raises:
      InputError: if the data is missing, damaged or unusable.
    """
    if config.tokenised:
        copied = []
        for folder, weight in config.weighted_paths:
            _manifest(config, folder)  # before anything is copied
            here = copies.here(_setting(config), folder, cache_dir=cache_dir)
            copied.append((str(here), weight))
        return open_folders(config, copied)
    return open_folders(config, ((str(prepare_source(config, cache_dir)), 1.0),))


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
        None: the state tells where this process's rows stand.

    Returns:
      A Grain iterator over dicts of `inputs`, `targets`, `segment_ids` and
      `positions`, each int32 [batch_size / process_count, sequence_length].

    Raises:
      InputError: if the batch can't be split over the processes.
    """
    order = (
        _ORDER,
        prepared.fingerprint,
        prepared.weights,
        *(config.sequence_length, config.batch_size, config.packing, config.long_documents),
        config.shuffle_seed,
        *((config.streams_per_row,) if config.streams_per_row > 1 else ()),
    )
    return BatchIterator(
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
    count = local_batch_size(config, process_index, process_count)
    return batches.validation_batches(
        prepared.validation, prepared.format(config), config, process_index * count, count
    )


def packing_report(prepared: TrainingData, config: DataConfig) -> list[PackingReport]:
    """Returns how well the first documents of each source pack."""
    return [
        measure_packing(
            documents,
            DocumentOrder(len(documents), config.shuffle_seed, source),
            prepared.format(config),
        )
        for source, documents in enumerate(prepared.train)
    ]
