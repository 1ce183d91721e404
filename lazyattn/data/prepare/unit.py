"""One piece of work: a range of a file becomes a shard of each split."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lazyattn.data.manifest import Shard, write_whole
from lazyattn.data.parquet import DamagedFileError
from lazyattn.data.prepare.readers import Unit, read_unit
from lazyattn.data.prepare.selection import LOW_SCORE, UNREADABLE, Selected, Selection, select
from lazyattn.data.shards import Writer, token_dtype
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError

# Documents tokenised at once: as many as make a call worth while, in bounded memory.
_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 20

_EXAMPLES = 3  # faults named one by one for each unit; the others are counted


@dataclasses.dataclass(frozen=True)
class Progress:
    """What was done since the last report.

    Attributes:
      weight: of `Unit.weight`.
      documents, bytes, tokens: of text that was tokenised.
    """

    weight: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What a piece of work came to.

    Attributes:
      index: of the unit.
      found: documents that were there, kept or not.
      skipped: documents left out, by reason.
      examples: where the first faults are.
      error: why the rest of the range could not be read; None: all was.
      shards: the shard of each split that has documents.
    """

    index: int
    found: int
    skipped: dict[str, int]
    examples: tuple[str, ...]
    error: str | None
    shards: dict[str, Shard]

    def to_json(self) -> str:
        """Returns the result as text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "UnitResult":
        """Reads what `to_json` wrote."""
        content = json.loads(text)
        shards = {split: Shard(**shard) for split, shard in content.pop("shards").items()}
        content["examples"] = tuple(content["examples"])
        return cls(**content, shards=shards)


def result_path(work: Path, index: int) -> Path:
    """Returns where a unit's result is kept; it is there exactly if the unit is done."""
    return work / f"unit-{index:05}.json"


def shard_path(work: Path, index: int, split: str) -> Path:
    """Returns where a unit's shard is kept until all units are done."""
    return work / f"unit-{index:05}-{split}.arrayrecord"


def process_unit(
    unit: Unit,
    work: Path,
    tokenizer: Tokenizer,
    selection: Selection,
    *,
    fatal: bool,
    report: Callable[[Progress], Any],
) -> UnitResult:
    """Reads, chooses and tokenises a unit's documents, and writes them.

    The same unit gives the same bytes, so doing it twice does no harm.

    Args:
      unit: what to read.
      work: folder to write to; shards first, then the result that names them.
      tokenizer: the tokenizer.
      selection: which documents to keep.
      fatal: whether a fault of the data ends it all.
      report: told what was done, often.

    Raises:
      InputError: for a fault, if they are fatal.
      OSError: if nothing can be written.
    """
    skipped: dict[str, int] = {}
    examples: list[str] = []
    error: str | None = None
    found, done = 0, 0.0
    with ExitStack() as stack:
        writers: dict[str, Writer] = {}
        batch: list[Selected] = []

        def flush() -> None:
            nonlocal done
            tokens = 0
            ids = tokenizer.encode_batch([document.text for document in batch])
            for document, document_ids in zip(batch, ids, strict=True):
                if document.split not in writers:
                    path = shard_path(work, unit.index, document.split)
                    writer = Writer(path, token_dtype(tokenizer.vocab_size))
                    writers[document.split] = stack.enter_context(writer)
                writers[document.split].add(document_ids, document.size)
                tokens += len(document_ids)
            size = sum(document.size for document in batch)
            report(Progress(round(unit.weight * (share - done)), len(batch), size, tokens))
            done = share
            batch.clear()

        share = 0.0
        batched = 0
        try:
            for row in read_unit(unit, selection):
                found, share = found + 1, row.done
                chosen = row.fault or select(row.text, row.id, row.score, selection, unit.goes_to)
                if isinstance(chosen, str):
                    _skip(chosen, unit.name(row.place), skipped, examples, fatal)
                    continue
                batch.append(chosen)
                batched += chosen.size
                if len(batch) == _BATCH_DOCUMENTS or batched >= _BATCH_BYTES:
                    flush()
                    batched = 0
        except DamagedFileError as damaged:
            error = str(damaged)
            if fatal:
                raise InputError(_fatal(f"{unit.path} is damaged ({error})")) from damaged
            if damaged.lost:
                found += damaged.lost
                skipped[UNREADABLE] = damaged.lost
        share = 1.0
        flush()
        shards = {split: writers[split].close() for split in sorted(writers)}
    result = UnitResult(unit.index, found, skipped, tuple(examples), error, shards)
    write_whole(result_path(work, unit.index), result.to_json().encode())
    return result


def _skip(
    reason: str, where: str, skipped: dict[str, int], examples: list[str], fatal: bool
) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1
    if reason == LOW_SCORE:
        return
    if fatal:
        raise InputError(_fatal(f"{where}: {reason}"))
    if len(examples) < _EXAMPLES:
        examples.append(f"{where}: {reason}")


def _fatal(what: str) -> str:
    return f"{what}; --on_fault=skip leaves such documents out and counts them."
