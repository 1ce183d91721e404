"""Folders of tokenized shards, opened for reading and checked against each other."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from lazyattn.data import manifest
from lazyattn.data.config import DataConfig
from lazyattn.data.manifest import Manifest
from lazyattn.data.packing import Format
from lazyattn.data.shards import Shards
from lazyattn.data.streams import Documents
from lazyattn.data.tokenizer import CONFIG_NAME, Tokenizer
from lazyattn.errors import InputError, bad_value


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """What a split holds, over all folders.

    Attributes:
      documents: documents.
      targets: their tokens and their ends: what there is to predict.
    """

    documents: int
    targets: int


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Tokenized documents in one or several folders.

    Attributes:
      tokenizer: the tokenizer all of them were made with.
      ids: before a document, after it, and of padding.
      train, validation: documents of each folder.
      weights: of the folders.
      counts: `ShardCounts` of "train" and "validation".
      fingerprint: SHA-256 over what the manifests say; equal exactly where the data is.
    """

    tokenizer: Tokenizer
    ids: tuple[int, int, int]
    train: tuple[Documents, ...]
    validation: tuple[Documents, ...]
    weights: tuple[float, ...]
    counts: dict[str, ShardCounts]
    fingerprint: str

    def format(self, config: DataConfig) -> Format:
        """Returns how the documents become rows."""
        bos_id, eos_id, pad_id = self.ids
        return Format(
            length=config.sequence_length,
            packing=config.packing,
            long_documents=config.long_documents,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
        )


def open_folders(config: DataConfig, weighted_paths: Sequence[tuple[str, float]]) -> TrainingData:
    """Opens folders of shards, each checked against its manifest.

    Every file's size and the tokenizer's SHA-256 are compared; what is inside a shard
    is checked piece by piece when it is read (ArrayRecord keeps a hash of each record).

    Args:
      config: the settings.
      weighted_paths: the folders, and the share of the rows that each has.

    Raises:
      InputError: if a folder or one of its files is missing or not what its manifest
        says, a split is empty, or tokenizers differ.
    """
    folders = [folder for folder, _ in weighted_paths]
    name = "a folder of data.sources" if config.sources else "data.path"
    manifests = [
        manifest.verify(folder, deep=config.verify_checksums, name=name) for folder in folders
    ]
    manifest.require_same_tokenizer(folders, manifests)
    made_with = manifests[0].tokenizer
    tokenizer = Tokenizer.load(Path(folders[0]).expanduser() / made_with.file)
    if tokenizer.eos_id != made_with.end_of_document:
        raise InputError(
            f"{folders[0]!r} was prepared with token {made_with.end_of_document} as the end of a"
            f" document, but its tokenizer says {tokenizer.eos_id}; restore its {CONFIG_NAME} or"
            " prepare the data again."
        )
    if config.tokenizer is not None:
        given = Tokenizer.load(config.tokenizer)
        if not given.same_ids(tokenizer):
            raise bad_value(
                "data.tokenizer",
                config.tokenizer,
                f"None or the tokenizer that the shards in {folders[0]!r} were made with",
            )
    counts = {}
    for split in manifest.SPLITS:
        for folder, content in zip(folders, manifests, strict=True):
            if not content.splits[split].documents:
                raise InputError(
                    f"The folder {folder!r} has no {split} documents; prepare it with another"
                    " share for validation, or from more text."
                )
        documents = sum(content.splits[split].documents for content in manifests)
        tokens = sum(content.splits[split].tokens for content in manifests)
        counts[split] = ShardCounts(documents, tokens + documents)
    digest = hashlib.sha256()
    for content in manifests:
        digest.update(content.fingerprint.encode())
    return TrainingData(
        tokenizer=tokenizer,
        ids=(made_with.beginning_of_document, made_with.end_of_document, made_with.padding),
        train=_opened("train", folders, manifests),
        validation=_opened("validation", folders, manifests),
        weights=tuple(weight for _, weight in weighted_paths),
        counts=counts,
        fingerprint=digest.hexdigest(),
    )


def _opened(
    split: str, folders: Sequence[str], manifests: Sequence[Manifest]
) -> tuple[Documents, ...]:
    return tuple(
        Shards(folder, split, content) for folder, content in zip(folders, manifests, strict=True)
    )
