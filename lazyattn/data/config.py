"""What the data is."""

import dataclasses
from typing import Annotated, Any, Literal

from lazyattn.allowed import Allowed, at_least, check_settings
from lazyattn.errors import InputError, bad_value, require
from lazyattn.paths import ANYWHERE, check_local


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Attributes:
      source: "stdlib" (English that every Python carries: its language reference
        and its docstrings), or a folder of `.txt` files (UTF-8, one document each).
      path: a folder of tokenised shards, read instead of `source`.
      sources: several such folders as ((folder, weight), ...), instead of `path`. A
        weight is the folder's share of the rows, relative to the sum of all weights.
      tokenizer: path of a `tokenizer.json` or a SentencePiece model; None: trained on
        the source once, with `vocab_size` entries, and kept with the data. Shards
        bring their own; given all the same, it must be that one.
      vocab_size: entries of a trained tokenizer.
      sequence_length: tokens a row.
      batch_size: rows a step, over all devices and accumulated microbatches.
      packing: "split" (concatenate documents, cut at row ends) or "first_fit"
        (whole documents into the first row with room).
      long_documents: of a document longer than a row, "split" keeps all, in several
        rows; "truncate" keeps what fits into one.
      validation_fraction: share of documents held out, chosen by hash. Shards have
        been split already.
      streams_per_row: streams of documents that fill a row of the batches in turn.
        More of them keep a long document out of successive steps, which matters where
        a batch has few rows.
      shuffle_seed: seed of the order, a new order every epoch.
      num_workers: reader processes; 0: read in the training process.
      prefetch: batches made ahead.
      verify_checksums: before the start, read tokenised shards in full and compare
        their SHA-256 with the manifest's, not their sizes alone.
    """

    source: Annotated[str, ANYWHERE] = "stdlib"
    path: Annotated[str, ANYWHERE] | None = None
    sources: tuple[tuple[str, float], ...] = ()
    tokenizer: Annotated[str, ANYWHERE] | None = None
    vocab_size: Annotated[int, at_least(260)] = 4096
    sequence_length: Annotated[int, at_least(1)] = 256
    batch_size: Annotated[int, at_least(1)] = 16
    packing: Literal["split", "first_fit"] = "split"
    long_documents: Literal["split", "truncate"] = "split"
    validation_fraction: Annotated[float, Allowed(lambda x: 0 < x < 1, "between 0 and 1")] = 0.02
    streams_per_row: Annotated[int, at_least(1)] = 1
    shuffle_seed: int = 0
    num_workers: Annotated[int, at_least(0)] = 0
    prefetch: Annotated[int, at_least(0)] = 2
    verify_checksums: bool = False

    def __post_init__(self):
        object.__setattr__(self, "sources", _checked_sources(self.sources))
        check_settings(self, "data.")
        for folder, _ in self.sources:
            check_local("a folder of data.sources", folder, buckets=True)
        if self.path is not None and self.sources:
            raise InputError(
                f"data.path is {self.path!r}, but data.sources names folders, too; give one."
            )

    @property
    def tokenised(self) -> bool:
        """Whether folders of tokenized shards are given, and no text."""
        return self.path is not None or bool(self.sources)

    @property
    def name(self) -> str:
        """What the data is, for people."""
        total = sum(weight for _, weight in self.weighted_paths)
        if len(self.weighted_paths) < 2:
            return self.weighted_paths[0][0] if self.tokenised else self.source
        return ", ".join(
            f"{folder} ({weight / total:.1%})" for folder, weight in self.weighted_paths
        )

    @property
    def weighted_paths(self) -> tuple[tuple[str, float], ...]:
        """The folders of tokenised shards with their weights; () if it is none."""
        return self.sources if self.path is None else ((self.path, 1.0),)


def _checked_sources(sources: Any) -> tuple[tuple[str, float], ...]:
    """Returns `sources` as tuples, which JSON and config files may have made lists."""
    allowed = "((folder, weight), ...) with weights above 0 and no folder twice"
    try:
        checked = tuple((folder, float(weight)) for folder, weight in sources)
    except (TypeError, ValueError):
        raise bad_value("data.sources", sources, allowed) from None
    folders = [folder for folder, _ in checked]
    require(
        all(isinstance(folder, str) and 0 < weight < float("inf") for folder, weight in checked)
        and len(set(folders)) == len(folders),
        "data.sources",
        sources,
        allowed,
    )
    return checked
