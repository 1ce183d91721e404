"""A source of text to packed rows in the cache."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from absl import logging

from lazyattn.data import cache, sources
from lazyattn.data.config import DataConfig
from lazyattn.data.corpus import Document, is_validation
from lazyattn.data.packing import PACKERS, join
from lazyattn.data.rows import PackedRows
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError

# Part of the key: raise it whenever the same settings come to give other rows.
SCHEMA = 1
_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """What a split holds.

    Attributes:
      documents: documents.
      bytes: their text as UTF-8.
      tokens: their tokens, `bos` and `eos` of each included.
      targets: tokens that are predicted, one fewer a document.
      rows: packed rows.
      packing_efficiency: targets / (rows * sequence_length), up to 1.
    """

    documents: int
    bytes: int
    tokens: int
    targets: int
    rows: int
    packing_efficiency: float


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Tokenised, packed data, ready to be read.

    Attributes:
      folder: where it lies in the cache; `manifest.json` there says all of this.
      tokenizer: the tokenizer it was made with.
      train, validation: the rows of each split.
      counts: `SplitCounts` of "train" and "validation".
      fingerprint: SHA-256 over rows and tokenizer; equal exactly where the data is.
    """

    folder: Path
    tokenizer: Tokenizer
    train: PackedRows
    validation: PackedRows
    counts: dict[str, SplitCounts]
    fingerprint: str


def prepare(config: DataConfig, cache_dir: str | os.PathLike[str] | None = None) -> PreparedData:
    """Reads, tokenises and packs a source, or finds that done in the cache.

    A preparation that was interrupted is done again, and a damaged one, too. The
    tokenizer, where it is trained, sees the training documents alone.

    Args:
      config: what to prepare. Batch size, seed and readers don't matter here.
      cache_dir: folder to keep prepared data in; None: `cache.default_cache_dir()`.

    Raises:
      InputError: if the source or the tokenizer is missing or unusable, a split
        would be empty, or the cache folder cannot be written to.
    """
    tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    source = sources.identity(config.source)
    settings = {
        "schema": SCHEMA,
        "source": source,
        "tokenizer": (
            tokenizer.fingerprint
            if tokenizer
            else {"library": tokenizers.__version__, "vocab_size": config.vocab_size}
        ),
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "validation_fraction": config.validation_fraction,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder, content = cache.entry(
        cache.default_cache_dir() if cache_dir is None else cache_dir,
        f"{source['kind']}-{config.sequence_length}-{key[:16]}",
        lambda work: {"settings": settings, **_build(config, tokenizer, work)},
    )
    return PreparedData(
        folder=folder,
        tokenizer=Tokenizer.load(folder / _TOKENIZER),
        train=PackedRows(folder / "train.npy"),
        validation=PackedRows(folder / "validation.npy"),
        counts={name: SplitCounts(**counts) for name, counts in content["counts"].items()},
        fingerprint=content["fingerprint"],
    )


def _build(config: DataConfig, tokenizer: Tokenizer | None, work: Path) -> dict[str, Any]:
    """Writes tokenizer and rows into `work`; returns what the manifest says of them."""
    logging.info("Preparing data from %s.", config.source)
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in sources.documents(config.source):
        held_out = is_validation(document.id, config.validation_fraction)
        splits["validation" if held_out else "train"].append(document)
    for name, members in splits.items():
        if not members:
            total = sum(map(len, splits.values()))
            raise InputError(
                f"data.validation_fraction is {config.validation_fraction}, which leaves no"
                f" {name} document among the {total} of data.source {config.source!r}; change the"
                " fraction or give more documents."
            )
    if tokenizer is None:
        texts = (document.text for document in splits["train"])
        tokenizer = Tokenizer.train(texts, config.vocab_size)
    tokenizer.save(work / _TOKENIZER)
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    counts = {}
    for name, members in splits.items():
        ids = tokenizer.encode_batch([document.text for document in members])
        tokens = join(ids, tokenizer.bos_id, tokenizer.eos_id)
        rows = PACKERS[config.packing](tokens, config.sequence_length, tokenizer.pad_id)
        PackedRows.write(work / f"{name}.npy", rows)
        for field in rows.values():
            digest.update(np.ascontiguousarray(field).data)
        number = rows["inputs"].shape[0]
        targets = int((rows["segment_ids"] > 0).sum())
        counts[name] = SplitCounts(
            documents=len(members),
            bytes=sum(len(document.text.encode()) for document in members),
            tokens=tokens.ids.size,
            targets=targets,
            rows=number,
            packing_efficiency=targets / (number * config.sequence_length),
        )
    return {
        "fingerprint": digest.hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "counts": {name: dataclasses.asdict(split) for name, split in counts.items()},
    }
