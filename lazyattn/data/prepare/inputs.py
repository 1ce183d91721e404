"""What files there are to prepare, and how they are cut into pieces of work."""

import dataclasses
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from lazyattn.data.parquet import DamagedFileError, open_parquet
from lazyattn.data.prepare.readers import Unit
from lazyattn.data.prepare.selection import Selection, require_fields
from lazyattn.errors import InputError, bad_value

KINDS = ("parquet", "jsonl.zst", "jsonl.gz", "jsonl")
_DATASET = "dataset_info.json"  # in the folder of a built TensorFlow dataset
_ALLOWED = (
    "folders, files or patterns of them: .parquet, .jsonl, .jsonl.zst, .jsonl.gz, or the folder of"
    " a built TensorFlow dataset"
)

# A piece of work is what a killed preparation loses, and what one process does at a
# time; its training documents become one shard. Small corpora are cut smaller.
_PIECES = 256
_SMALLEST = 8 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """A file of the corpus.

    Attributes:
      path: where it lies.
      file: its path below the folder that all files share.
      size: bytes.
      modified: time of its last change, in nanoseconds since 1970.
      error: why it can't be read at all; None: it can.
    """

    path: str
    file: str
    size: int
    modified: int
    error: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All files and all pieces of work; a function of the files and the arguments.

    Attributes:
      files: the files, sorted.
      units: the pieces of work, in the order of the corpus.
    """

    files: tuple[PlannedFile, ...]
    units: tuple[Unit, ...]


def make_plan(inputs: Sequence[str], selection: Selection, largest: int) -> Plan:
    """Looks at every file and cuts it into pieces of work.

    Args:
      inputs: folders, files or glob patterns; a file that is named twice is read once.
      selection: fields that the files must have.
      largest: bytes of text that a piece should have at most. A row group of Parquet
        is cut; a compressed jsonl file can't be.

    Raises:
      InputError: if an input is missing or of an unknown kind, a file lacks a field,
        or no file can be read.
    """
    paths = _paths(inputs)
    parent = os.path.commonpath([os.path.dirname(path) for path in paths])
    files, ranges = [], []
    for path in paths:
        status = os.stat(path)
        error = None
        try:
            ranges.append(list(_ranges(path, selection)))
        except DamagedFileError as damaged:
            error = str(damaged)
        relative = Path(os.path.relpath(path, parent)).as_posix()
        files.append(PlannedFile(path, relative, status.st_size, status.st_mtime_ns, error))
    if all(file.error is not None for file in files):
        raise InputError(f"No file of --input can be read: {files[0].path}: {files[0].error}.")
    total = sum(unit.weight for units in ranges for unit in units)
    target = min(max(total // _PIECES, _SMALLEST), largest)
    units = [part for units in ranges for part in _cut(units, target)]
    numbered = (dataclasses.replace(unit, index=index) for index, unit in enumerate(units))
    return Plan(tuple(files), tuple(numbered))


def _paths(inputs: Sequence[str]) -> list[str]:
    """Returns the files that the inputs name, each once, sorted.

    A link to a file keeps its own name: what it leads to may have one without suffix,
    as in the cache of the Hugging Face hub. Of several names of a file the first counts,
    and a link's only if there is no other.
    """
    found: set[str] = set()
    for given in inputs:
        expanded = os.path.expanduser(given)
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [file for match in matches for file in _files(match)]
        if not files:
            raise bad_value("--input", given, _ALLOWED)
        found.update(_named(file) for file in files)
    if not found:
        raise bad_value("--input", ",".join(inputs), _ALLOWED)
    names: dict[str, str] = {}
    for file in sorted(found, key=lambda file: (os.path.islink(file), file)):
        if not os.path.exists(file):
            raise InputError(
                f"--input has {file!r}, a link to {os.readlink(file)!r}, which is not there; finish"
                " the download, or remove the link."
            )
        names.setdefault(os.path.realpath(file), file)
    return sorted(names.values())


def _files(path: str) -> list[str]:
    if os.path.isfile(path) or _leads_nowhere(path):
        if _kind(path) is None:
            raise bad_value("--input", path, _ALLOWED)
        return [path]
    folder = Path(path)
    if (folder / _DATASET).is_file():
        return [str(file) for file in folder.iterdir() if ".array_record" in file.name]
    return [
        file
        for file in _below(folder)
        if _kind(file) and (os.path.isfile(file) or _leads_nowhere(file))
    ]


def _named(file: str) -> str:
    """Returns an absolute path in which all links are resolved but the file itself."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)


def _leads_nowhere(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _below(folder: Path) -> Iterator[str]:
    """Yields all files below a folder; links to folders are followed, each folder once."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(parent, file) for file in files)


def _kind(path: str) -> str | None:
    if ".array_record" in os.path.basename(path):
        return "tfds" if os.path.isfile(os.path.join(os.path.dirname(path), _DATASET)) else None
    return next((kind for kind in KINDS if path.endswith("." + kind)), None)


def _ranges(path: str, selection: Selection) -> Iterator[Unit]:
    """Yields a file's smallest pieces that can be read by themselves."""
    kind = _kind(path)
    assert kind is not None
    size = os.path.getsize(path)
    if kind == "parquet":
        file = open_parquet(path)
        require_fields(file.schema_arrow.names, selection, path)
        yield from _row_groups(path, file.metadata, selection)
    elif kind == "tfds":
        from lazyattn.data.fineweb_edu import shard_documents

        split, start, stop = shard_documents(path)
        yield Unit(0, path, kind, start, stop, size, split)
    elif size:
        yield Unit(0, path, kind, 0, size, size)


def _row_groups(path: str, metadata: pq.FileMetaData, selection: Selection) -> Iterator[Unit]:
    begin = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(column) for column in range(metadata.num_columns))
        weight = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema == selection.text_field
        )
        if group.num_rows:
            yield Unit(0, path, "parquet", begin, begin + group.num_rows, max(1, weight))
        begin += group.num_rows


def _cut(units: list[Unit], target: int) -> Iterator[Unit]:
    """Joins and cuts a file's pieces so that each has about `target` bytes."""
    joined: Unit | None = None
    for unit in units:
        if joined is not None and joined.weight + unit.weight <= target:
            joined = dataclasses.replace(joined, stop=unit.stop, weight=joined.weight + unit.weight)
            continue
        if joined is not None:
            yield joined
        joined = None
        length = unit.stop - unit.start
        parts = 1 if unit.kind in ("jsonl.zst", "jsonl.gz") else -(-unit.weight // target)
        parts = min(parts, length)
        if parts == 1:
            joined = unit
            continue
        bounds = [unit.start + length * part // parts for part in range(parts + 1)]
        for start, stop in itertools.pairwise(bounds):
            weight = unit.weight * (stop - start) // length
            yield dataclasses.replace(unit, start=start, stop=stop, weight=weight)
    if joined is not None:
        yield joined
