"""Tokenised documents on disk: ArrayRecord files, one record a document.

A record is the document's token ids and nothing else: little-endian, uint16 where the
vocabulary fits, else uint32, without special tokens. What the folder holds, its
manifest says (`lazyattn.data.manifest`).
"""

import bisect
import contextlib
import hashlib
import itertools
import operator
import os
import resource
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np
from array_record.python import array_record_module
from jaxtyping import UInt

from lazyattn.data import manifest
from lazyattn.data.manifest import Manifest, Shard, verify
from lazyattn.errors import InputError

__all__ = ["Shards", "Writer", "shard_name", "token_dtype", "verify", "write_shard"]

# One record a chunk: a document is read without its neighbours. The fastest zstd takes
# about a fifth off the size, and reading stays far above what training asks for.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0"  # else a random read fetches 16 MiB
_READER_BUFFER = 32768  # bytes

Ids = UInt[np.ndarray, " tokens"]


def token_dtype(vocab_size: int) -> str:
    """Returns "uint16" if all ids fit into it, else "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_name(split: str, index: int, count: int) -> str:
    """Returns a shard's file name, such as "train-00000-of-00012.arrayrecord"."""
    return f"{split}-{index:05}-of-{count:05}.arrayrecord"


class Writer:
    """Writes a shard; the file appears under its name when it is whole.

    As a context manager it closes on success, and leaves no file behind on failure.
    The same documents give the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str):
        """Begins a shard.

        Args:
          path: of the file to be.
          dtype: `token_dtype` of the vocabulary.
        """
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._limit = np.iinfo(self._dtype).max
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)
        self._documents = self._tokens = self._bytes = 0

    def add(self, ids: Sequence[int] | np.ndarray, size: int) -> None:
        """Appends a document.

        Args:
          ids: its tokens, each from 0 up to what the dtype holds.
          size: bytes of its text as UTF-8.

        Raises:
          ValueError: if an id doesn't fit.
          OSError: if it can't be written.
        """
        tokens = np.asarray(ids, np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= self._limit:
            raise ValueError(f"A token id is outside 0..{self._limit}.")
        with self._told():
            self._writer.write(tokens.astype(self._dtype).tobytes())
        self._documents += 1
        self._tokens += tokens.size
        self._bytes += size

    def close(self) -> Shard:
        """Finishes the file and returns what it holds.

        Raises:
          OSError: if it can't be written, as on a full disk.
        """
        with self._told():
            self._writer.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._temporary.stat().st_size
        self._temporary.replace(self._path)
        return Shard(
            file=self._path.name,
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            size=size,
            sha256=digest,
        )

    def discard(self) -> None:
        """Ends without a file."""
        with contextlib.suppress(RuntimeError):  # what could not be written before
            if self._writer.is_open():
                self._writer.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns the library's only kind of error into the one it means."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(f"{self._path}: {error}") from error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()


def write_shard(
    path: str | os.PathLike[str],
    documents: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    dtype: str,
) -> Shard:
    """Writes documents, each its ids and the bytes of its text, as one shard.

    Raises:
      ValueError: if an id doesn't fit into `dtype`.
    """
    with Writer(path, dtype) as writer:
        for ids, size in documents:
            writer.add(ids, size)
        return writer.close()


class Shards(Sequence[Ids]):
    """The documents of a split, in any order.

    A source for `grain.MapDataset.source`. It can be pickled and used from several
    threads; files are opened when they are first read.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, content: Manifest | None = None):
        """Opens a split.

        Args:
          folder: of the shards. It is not verified here; `verify` does that.
          split: "train" or "validation".
          content: the folder's manifest; None: it is read.

        Raises:
          InputError: if the folder has no usable manifest, or no such split.
        """
        content = manifest.read(folder) if content is None else content
        if split not in content.splits:
            raise InputError(
                f"split is {split!r}, but it must be one of {', '.join(content.splits)}."
            )
        shards = content.splits[split].shards
        self._folder = Path(folder).expanduser()
        self._files = [shard.file for shard in shards]
        self._ends = list(itertools.accumulate(shard.documents for shard in shards))
        self._dtype = np.dtype(content.token_dtype).newbyteorder("<")
        _allow_open_files(len(shards))
        self._forget_readers()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> Ids:  # type: ignore[override]
        """Returns a document's token ids; read-only."""
        return self.read([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Ids]:
        """Returns several documents, as Grain asks for them."""
        return self.read([operator.index(index) for index in indices])

    def read(self, indices: Sequence[int]) -> list[Ids]:
        """Returns the token ids of several documents, in the order asked for.

        Raises:
          IndexError: if an index is not in 0..len-1.
          InputError: if a shard can't be opened or read.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"document {index} of {len(self)}")
            shard = bisect.bisect_right(self._ends, index)
            before = self._ends[shard - 1] if shard else 0
            wanted.setdefault(shard, []).append((place, index - before))
        found: list[Any] = [None] * len(indices)
        for shard, places in wanted.items():
            records = self._records(shard, [record for _, record in places])
            for (place, _), record in zip(places, records, strict=True):
                found[place] = np.frombuffer(record, self._dtype)
        return found

    def _records(self, shard: int, records: list[int]) -> Sequence[bytes]:
        path = self._folder / self._files[shard]
        try:
            return self._reader(shard).read(records)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{str(path)!r} cannot be read ({error}).") from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(self._folder / self._files[shard]),
                    _READER_OPTIONS,
                    file_reader_buffer_size=_READER_BUFFER,
                )
            return self._readers[shard]

    def _forget_readers(self) -> None:
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _allow_open_files(len(self._files))
        self._forget_readers()


def _allow_open_files(number: int) -> None:
    """Raises this process's limit of open files for so many shards, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
    with contextlib.suppress(OSError, ValueError):  # then a file that can't be opened is named
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
