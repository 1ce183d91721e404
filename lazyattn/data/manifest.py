"""What a folder of tokenised shards says about itself, and how it is checked."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazyattn import buckets
from lazyattn.errors import InputError
from lazyattn.paths import anywhere
from lazyattn.quantity import quantity

NAME = "manifest.json"
# Raise it whenever an older reader would misread a newer folder, or the reverse.
SCHEMA_VERSION = 1

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of documents.

    Attributes:
      file: its name in the folder.
      documents: documents, one record each.
      tokens: their tokens, no special ones among them.
      bytes: their text as UTF-8.
      size: bytes of the file.
      sha256: of the file, in hexadecimal.
    """

    file: str
    documents: int
    tokens: int
    bytes: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of "train" or "validation", in order."""

    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards, without special tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(shard.bytes for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens.

    Attributes:
      kind: "tokenizer.json" (of the `tokenizers` library) or "sentencepiece".
      file: its file in the folder.
      sha256: of that file, in hexadecimal; `Tokenizer.fingerprint`.
      vocab_size: number of ids.
      beginning_of_document, end_of_document, padding: the ids that a reader puts
        before and after each document, and where there is nothing.
    """

    kind: str
    file: str
    sha256: str
    vocab_size: int
    beginning_of_document: int
    end_of_document: int
    padding: int


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file that was read.

    Attributes:
      file: its path below the input's common folder.
      size: bytes.
      modified: time of its last change, in nanoseconds since 1970.
      documents: documents found in it, skipped ones included.
      error: why it was skipped from some point on; None: all of it was read.
    """

    file: str
    size: int
    modified: int
    documents: int
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
      created_by: name and version of what wrote it.
      tokenizer: the tokenizer.
      token_dtype: of the ids in a record, little-endian: "uint16" or "uint32".
      splits: "train" and "validation".
      sources: the files that were read.
      settings: how documents were chosen: `min_int_score` (None: all),
        `validation_fraction`, and the fields of text, id and score.
      skipped: documents left out, by reason.
    """

    created_by: str
    tokenizer: TokenizerRecord
    token_dtype: str
    splits: dict[str, Split]
    sources: tuple[SourceFile, ...]
    settings: dict[str, Any]
    skipped: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokenizer and shards; equal exactly where the data is."""
        digest = hashlib.sha256(f"{self.tokenizer.sha256} {self.token_dtype}".encode())
        for name in sorted(self.splits):
            for shard in self.splits[name].shards:
                digest.update(f" {name} {shard.documents} {shard.sha256}".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """Returns the manifest as text, totals of each split included."""
        content = {
            "schema_version": SCHEMA_VERSION,
            **dataclasses.asdict(self),
            "text": {
                "documents": sum(split.documents for split in self.splits.values()),
                "bytes": sum(split.bytes for split in self.splits.values()),
            },
            "splits": {
                name: {
                    "documents": split.documents,
                    "tokens": split.tokens,
                    "bytes": split.bytes,
                    "shards": [dataclasses.asdict(shard) for shard in split.shards],
                }
                for name, split in self.splits.items()
            },
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads what `to_json` wrote.

        Raises:
          ValueError, KeyError, TypeError: if it is something else, or its totals
            don't add up.
        """
        content = json.loads(text)
        splits = {}
        for name in SPLITS:
            listed = content["splits"][name]
            split = Split(tuple(Shard(**shard) for shard in listed["shards"]))
            if any(
                getattr(split, total) != listed[total] for total in ("documents", "tokens", "bytes")
            ):
                raise ValueError(f"the totals of {name} don't add up")
            splits[name] = split
        if content["token_dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"token_dtype is {content['token_dtype']!r}")
        return cls(
            created_by=content["created_by"],
            tokenizer=TokenizerRecord(**content["tokenizer"]),
            token_dtype=content["token_dtype"],
            splits=splits,
            sources=tuple(SourceFile(**source) for source in content["sources"]),
            settings=content["settings"],
            skipped=content["skipped"],
        )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes `manifest.json`, all of it or nothing."""
        write_whole(Path(folder) / NAME, self.to_json().encode())


def read(folder: str | os.PathLike[str], name: str | None = None) -> Manifest:
    """Returns the manifest of a folder of tokenised shards.

    Args:
      folder: the folder.
      name: of the setting that names the folder, for messages.

    Raises:
      InputError: if there is none, it is of another schema version, or damaged.
    """
    path = anywhere("the data", folder) / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            (f"{name} is {str(folder)!r}, but that" if name else repr(str(folder)))
            + f" is no folder of tokenised shards: it has no {NAME}; prepare it, or"
            " finish its preparation, with `python -m lazyattn.data.prepare`."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{str(path)!r} cannot be read ({reason}).") from error
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is damaged; prepare the data again.") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{str(path)!r} has schema_version {version!r}, but this version reads"
            f" {SCHEMA_VERSION}; prepare the data again."
        )
    try:
        return Manifest.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{str(path)!r} is damaged ({error}); prepare the data again.") from error


def verify(
    folder: str | os.PathLike[str], *, deep: bool = False, name: str | None = None
) -> Manifest:
    """Checks a folder of tokenised shards against its manifest.

    Args:
      folder: the folder.
      deep: also read every shard and compare its SHA-256; else sizes alone. The
        tokenizer's SHA-256 is compared either way.
      name: as in `read`.

    Returns:
      The manifest.

    Raises:
      InputError: if a file is missing or is not what the manifest says.
    """
    manifest = read(folder, name)
    root = anywhere("the data", folder)
    tokenizer_file(folder, manifest)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = root / shard.file
            size = _size(path)
            if size != shard.size:
                raise _changed(path, f"it has {quantity(size, 'byte')}, not {shard.size:,}")
            if deep and _sha256(path) != shard.sha256:
                raise _changed(path, "its SHA-256 is another")
    return manifest


def tokenizer_file(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Returns the tokenizer's file in a folder of tokenised shards.

    Raises:
      InputError: if it is missing or is not what the manifest says.
    """
    path = anywhere("the data", folder) / manifest.tokenizer.file
    if _sha256(path) != manifest.tokenizer.sha256:
        raise _changed(path, "its SHA-256 is another")
    return path


def require_same_tokenizer(folders: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Refuses to mix tokens of different tokenizers.

    Raises:
      InputError: naming the first two folders that differ.
    """
    first = manifests[0].tokenizer
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer.sha256 != first.sha256:
            raise InputError(
                f"{folders[0]!r} and {folder!r} were made with different tokenizers"
                f" ({first.sha256[:12]} and {manifest.tokenizer.sha256[:12]}), so they can't be"
                " mixed; prepare one of them again with the other's tokenizer."
            )
        if manifest.tokenizer.end_of_document != first.end_of_document:
            raise InputError(
                f"{folders[0]!r} and {folder!r} end documents with different tokens"
                f" ({first.end_of_document} and {manifest.tokenizer.end_of_document}), so they"
                " can't be mixed; prepare one of them again with the other's --eos_token."
            )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with anywhere("a file of the data", path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that whoever finds it finds all of it, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _size(path: Path) -> int:
    try:
        return buckets.size(path) if buckets.is_bucket(path) else path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{str(path)!r} is named by the manifest, but cannot be read ({error.strerror})."
    )


def _changed(path: Path, how: str) -> InputError:
    return InputError(
        f"{str(path)!r} is not the file its manifest describes: {how}; prepare the data again or"
        " restore the file."
    )
