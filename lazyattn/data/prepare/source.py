"""A small source of text to a folder of shards in the cache."""

import hashlib
import json
import os
from pathlib import Path

import tokenizers
from absl import logging

from lazyattn.data import cache, sources
from lazyattn.data.config import DataConfig
from lazyattn.data.corpus import is_validation
from lazyattn.data.prepare.run import TRAIN, Preparation, prepare_shards
from lazyattn.data.prepare.selection import Selection
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError

# Part of the key: raise it whenever the same settings come to give other shards.
SCHEMA = 2
_ALL = 10**9  # MB: a tokenizer is trained on all of a small source


def prepare_source(config: DataConfig, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Makes a source of text into shards, or finds that done in the cache.

    A preparation that was interrupted is done again, and a damaged one, too. The
    tokenizer, where it is trained, sees the training documents alone.

    Args:
      config: source, tokenizer and share for validation; nothing else matters here.
      cache_dir: folder to keep prepared data in; None: `cache.default_cache_dir()`.

    Returns:
      The folder of the shards.

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
            tokenizer.fingerprint + (f" {tokenizer.eos_token}" if tokenizer.eos_token else "")
            if tokenizer
            else {"library": tokenizers.__version__, "vocab_size": config.vocab_size}
        ),
        "validation_fraction": config.validation_fraction,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cache.entry(
        cache.default_cache_dir() if cache_dir is None else cache_dir,
        f"{source['kind']}-{key[:16]}",
        lambda folder: _build(config, folder),
    )


def _build(config: DataConfig, folder: Path) -> None:
    """Writes the documents beside the folder, and prepares them as any corpus."""
    logging.info("Preparing data from %s.", config.source)
    documents = folder.with_suffix(".jsonl")
    _write(config, documents)
    prepare_shards(
        Preparation(
            inputs=(str(documents),),
            output=str(folder),
            tokenizer=config.tokenizer or TRAIN,
            vocab_size=config.vocab_size,
            sample_mb=_ALL,
            selection=Selection(validation_fraction=config.validation_fraction),
            num_workers=1,  # a script that trains need not guard its main module
            on_fault="fail",
        )
    )


def _write(config: DataConfig, path: Path) -> None:
    """Writes the documents of the source as lines of JSON.

    Raises:
      InputError: if one of the splits would be empty.
    """
    documents = {"train": 0, "validation": 0}
    with path.open("w", encoding="ascii") as file:
        for document in sources.documents(config.source):
            held_out = is_validation(document.id, config.validation_fraction)
            documents["validation" if held_out else "train"] += 1
            file.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
    os.utime(path, (0, 0))  # part of the manifest, which says nothing of today
    for name, number in documents.items():
        if not number:
            raise InputError(
                f"data.validation_fraction is {config.validation_fraction}, which leaves no"
                f" {name} document among the {sum(documents.values())} of data.source"
                f" {config.source!r}; change the fraction or give more documents."
            )
