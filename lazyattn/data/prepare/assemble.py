"""Shards of finished units get their names."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from lazyattn.data import shards
from lazyattn.data.manifest import Shard, Split
from lazyattn.data.prepare.unit import UnitResult, shard_path
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError

_RECORDS = 256  # read at once


def name_shards(
    results: Sequence[UnitResult], work: Path, folder: Path, largest: int, tokenizer: Tokenizer
) -> dict[str, Split]:
    """Moves the units' shards into the output folder, validation joined into few files.

    If it is killed it can be done again: what has been moved is found where it belongs.

    Args:
      results: of all units, in order.
      work: where their shards are.
      folder: where they go.
      largest: bytes of text a joined shard should have at most.
      tokenizer: what they were made with.

    Returns:
      The splits, for the manifest.
    """
    return {
        "train": Split(tuple(_move(results, work, folder))),
        "validation": Split(tuple(_join(results, work, folder, largest, tokenizer))),
    }


def total_skipped(results: Sequence[UnitResult]) -> dict[str, int]:
    """Returns the documents left out, by reason, over all units."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.skipped)
    return dict(sorted(total.items()))


def _of_split(results: Sequence[UnitResult], split: str) -> list[tuple[int, Shard]]:
    return [(result.index, result.shards[split]) for result in results if split in result.shards]


def _move(results: Sequence[UnitResult], work: Path, folder: Path) -> Iterator[Shard]:
    found = _of_split(results, "train")
    for number, (index, shard) in enumerate(found):
        name = shards.shard_name("train", number, len(found))
        source = shard_path(work, index, "train")
        if source.exists():
            os.replace(source, folder / name)
        elif not (folder / name).is_file():
            raise InputError(
                f"{str(source)!r} is gone; delete {str(folder)!r} and prepare it anew."
            )
        yield dataclasses.replace(shard, file=name)


def _join(
    results: Sequence[UnitResult], work: Path, folder: Path, largest: int, tokenizer: Tokenizer
) -> Iterator[Shard]:
    groups: list[list[tuple[int, Shard]]] = []
    size = 0
    for index, shard in _of_split(results, "validation"):
        if not groups or size + shard.bytes > largest:
            groups.append([])
            size = 0
        groups[-1].append((index, shard))
        size += shard.bytes
    dtype = shards.token_dtype(tokenizer.vocab_size)
    for number, group in enumerate(groups):
        path = folder / shards.shard_name("validation", number, len(groups))
        paths = [shard_path(work, index, "validation") for index, _ in group]
        documents = ((ids, 0) for part in paths for ids in _read(part, dtype))
        joined = shards.write_shard(path, documents, dtype)
        yield dataclasses.replace(joined, bytes=sum(shard.bytes for _, shard in group))


def _read(path: Path, dtype: str) -> Iterator[shards.Ids]:
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        for begin in range(0, count, _RECORDS):
            for record in reader.read(begin, min(begin + _RECORDS, count)):
                yield np.frombuffer(record, np.dtype(dtype).newbyteorder("<"))
    finally:
        reader.close()
