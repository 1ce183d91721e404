"""Datasets of the Hugging Face hub, streamed by the package `datasets`: nothing is downloaded.

A file of the dataset is a piece of work. Its rows come as they are read, so what is done
of a file is lost with the process, and what is done of the others isn't.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from lazyattn.data.parquet import reason
from lazyattn.errors import InputError, bad_value

SCHEME = "hf://"
_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?")
_UNKNOWN_SIZE = 1 << 28  # bytes of a file, for the progress bar


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the hub.

    Attributes:
      name: OWNER/NAME.
      revision: a branch, tag or commit; None: the main branch.
      pattern: which of its files, as `data_files` of the package has it; None: all.
      config: which of its configurations; None: its only or default one.
      split: which of its splits.
      files: how many files there are; 0: not known yet.
    """

    name: str
    revision: str | None = None
    pattern: str | None = None
    config: str | None = None
    split: str = "train"
    files: int = 0

    @property
    def url(self) -> str:
        """How `--input` names it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}datasets/{self.name}{revision}{f'/{self.pattern}' if self.pattern else ''}"

    @property
    def label(self) -> str:
        """All that tells its rows from others."""
        config = f"{self.config}, " if self.config else ""
        return f"{self.url} ({config}{self.split}, {self.files} files)"


def is_hub(path: str) -> bool:
    """Returns whether an input is meant for the hub."""
    return path.startswith(SCHEME)


def parse(flag: str, url: str, config: str | None, split: str) -> HubDataset:
    """Returns what a URL names.

    Raises:
      InputError: if it names no dataset, or a folder here has that name, which the
        package would read instead.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise bad_value(
            flag,
            url,
            "hf://datasets/OWNER/NAME, and after it perhaps @REVISION and /PATTERN of files",
        )
    name, revision, pattern = match.groups()
    if os.path.exists(name):
        raise InputError(
            f"{flag} is {url!r}, but there is {name!r} in the current folder, which the package"
            " datasets would read instead; start it in another folder."
        )
    return HubDataset(name, revision and unquote(revision), pattern, config, split)


def pinned(dataset: HubDataset) -> tuple[HubDataset, list[str], int]:
    """Asks the hub about a dataset.

    Returns:
      The dataset with the commit that it is at now and its number of files, the names of
      its columns, and the bytes of a file, roughly.

    Raises:
      InputError: if the package isn't installed, or the hub can't be reached or has
        nothing of that name.
    """
    _package(dataset)
    try:
        dataset = dataclasses.replace(dataset, revision=_commit(dataset))
    except Exception as error:  # of many kinds
        raise _unreadable(dataset, error) from error
    stream = _opened(dataset)
    dataset = dataclasses.replace(dataset, files=stream.num_shards)
    try:
        columns = stream.column_names or list(next(iter(stream), {}))
    except Exception as error:
        raise _unreadable(dataset, error) from error
    size = getattr((stream.info.splits or {}).get(dataset.split), "num_bytes", None)
    weight = size // max(1, dataset.files) if size else _UNKNOWN_SIZE
    return dataset, columns, max(1, weight)


def hub_rows(
    dataset: HubDataset, index: int, fields: Sequence[str | None]
) -> Iterator[tuple[Any, ...]]:
    """Yields what the fields hold in each row of one file; None for no field.

    Raises:
      InputError: if the stream breaks.
    """
    stream = _opened(dataclasses.replace(dataset, files=0))
    if stream.num_shards != dataset.files:
        raise InputError(
            f"{dataset.url} had {dataset.files} files and has {stream.num_shards} now; prepare it"
            " anew."
        )
    columns = [field for field in fields if field is not None]
    row = 0
    try:
        for found in stream.select_columns(columns).shard(num_shards=dataset.files, index=index):
            yield tuple(None if field is None else found.get(field) for field in fields)
            row += 1
    except Exception as error:  # of many kinds: the network's, or the file's
        raise InputError(
            f"The stream of {dataset.label} broke at row {row:,} of file {index}"
            f" ({reason(error)}); the same command goes on after the files that are done."
        ) from error


@functools.lru_cache(maxsize=8)
def _opened(dataset: HubDataset) -> Any:
    """Returns a dataset as a stream, opened once by each process."""
    package = _package(dataset)
    files = {dataset.split: dataset.pattern} if dataset.pattern else None
    try:
        return package.load_dataset(
            dataset.name,
            dataset.config,
            split=dataset.split,
            data_files=files,
            revision=dataset.revision,
            streaming=True,
        )
    except Exception as error:  # of many kinds
        raise _unreadable(dataset, error) from error


def _package(dataset: HubDataset) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{dataset.url} is a dataset of the Hugging Face hub, which needs the package datasets"
            f" ({error}); `pip install datasets` adds it."
        ) from error
    return datasets


def _commit(dataset: HubDataset) -> str:
    import huggingface_hub  # the package datasets needs it

    commit = huggingface_hub.HfApi().dataset_info(dataset.name, revision=dataset.revision).sha
    if not commit:
        raise ValueError("it tells no commit")
    return commit


def _unreadable(dataset: HubDataset, error: Exception) -> InputError:
    named = f"--hub_config={dataset.config}, " if dataset.config else ""
    return InputError(
        f"{dataset.url} can't be read from the Hugging Face hub ({named}split {dataset.split!r}:"
        f" {reason(error)})."
    )
