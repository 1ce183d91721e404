"""What the data is."""

import dataclasses
from typing import Literal

from lazyattn.errors import require


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Attributes:
      source: "stdlib" (English that every Python carries: its language reference
        and its docstrings), or a folder of `.txt` files (UTF-8, one document each).
      tokenizer: path of a `tokenizer.json`; None: trained on the source once, with
        `vocab_size` entries, and kept with the data.
      vocab_size: entries of a trained tokenizer.
      sequence_length: tokens a row.
      batch_size: rows a step, over all devices and accumulated microbatches.
      packing: "split" (concatenate documents, cut at row ends) or "first_fit"
        (whole documents into the first row with room).
      validation_fraction: share of documents held out, chosen by hash.
      shuffle_seed: seed of the order of rows, a new order every epoch.
      num_workers: reader processes; 0: read in the training process.
      prefetch: batches made ahead.
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    vocab_size: int = 4096
    sequence_length: int = 256
    batch_size: int = 16
    packing: Literal["split", "first_fit"] = "split"
    validation_fraction: float = 0.02
    shuffle_seed: int = 0
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        for name in ("sequence_length", "batch_size"):
            require(getattr(self, name) >= 1, "data." + name, getattr(self, name), "at least 1")
        require(self.vocab_size >= 260, "data.vocab_size", self.vocab_size, "at least 260")
        require(
            self.packing in ("split", "first_fit"),
            "data.packing",
            self.packing,
            "split or first_fit",
        )
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "between 0 and 1",
        )
        for name in ("num_workers", "prefetch"):
            require(getattr(self, name) >= 0, "data." + name, getattr(self, name), "at least 0")
