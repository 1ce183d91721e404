"""What files there are to prepare, and how they are cut into pieces of work."""

import dataclasses
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from lazyattn import buckets
from lazyattn.data import copies
from lazyattn.data.parquet import DamagedFileError, open_parquet
from lazyattn.data.prepare import hub
from lazyattn.data.prepare.readers import Unit, csv_header
from lazyattn.data.prepare.selection import Selection, require_fields
from lazyattn.errors import InputError, bad_value

KINDS = ("parquet", "jsonl.zst", "jsonl.gz", "jsonl")
# In a folder these are read where it has none of the others: they may be notes.
PLAIN_KINDS = ("json", "csv", "txt")
_WHOLE_KINDS = ("jsonl.zst", "jsonl.gz", *PLAIN_KINDS)  # can't be cut
_DATASET = "dataset_info.json"  # in the folder of a built TensorFlow dataset
_ALLOWED = (
    "folders, files or patterns of them: .parquet, .jsonl, .jsonl.zst, .jsonl.gz, .json, .csv,"
    " .txt, or the folder of a built TensorFlow dataset; or hf://datasets/OWNER/NAME"
)

# A piece of work is what a killed preparation loses, and what one process does at a
# time; its training documents become one shard. Small corpora are cut smaller.
_PIECES = 256
_SMALLEST = 8 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """A file of the corpus, or a dataset of the hub.

    Attributes:
      path: where it lies.
      file: its path below the folder that all files share.
      size: bytes; 0 for a dataset, whose path tells its commit.
      modified: time of its last change, in nanoseconds since 1970; 0 for a dataset.
      error: why it can't be read at all; None: it can.
    """

    path: str
    file: str
    size: int
    modified: int
    error: str | None


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """What is read of datasets on the Hugging Face hub.

    Attributes:
      config: name of the configuration; None: the only or default one.
      split: the split that `--input` reads.
      validation_split: the one that `--validation_input` reads.
    """

    config: str | None = None
    split: str = "train"
    validation_split: str = "validation"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All files and all pieces of work; a function of the files and the arguments.

    Attributes:
      files: the files, sorted.
      units: the pieces of work, in the order of the corpus.
    """

    files: tuple[PlannedFile, ...]
    units: tuple[Unit, ...]


def make_plan(
    inputs: Sequence[str],
    selection: Selection,
    largest: int,
    validation: Sequence[str] = (),
    options: HubOptions | None = None,
) -> Plan:
    """Looks at every file and cuts it into pieces of work.

    Args:
      inputs: folders, files or glob patterns; a file that is named twice is read once.
        After them come datasets of the hub, `hf://datasets/OWNER/NAME`.
      selection: fields that the files must have.
      largest: bytes of text that a piece should have at most. A row group of Parquet
        is cut; a compressed jsonl file can't be.
      validation: the same for held-out documents; all of `inputs` is training data
        then. (): each document's id decides.
      options: for datasets of the hub.

    Raises:
      InputError: if an input is missing or of an unknown kind, a file lacks a field,
        or no file can be read.
    """
    streams = _streams(inputs, validation, selection, options or HubOptions())
    paths = _paths(inputs)
    held_out = _paths(validation, "--validation_input")
    for path in held_out:
        if os.path.realpath(path) in map(os.path.realpath, paths):
            raise InputError(f"--validation_input has {path!r}, which --input has, too.")
    paths = [*paths, *held_out]
    parent = os.path.commonpath([os.path.dirname(path) for path in paths] or ["."])
    files, ranges = [], []
    for path in paths:
        status = os.stat(path)
        error = None
        try:
            split = "" if not validation else "validation" if path in held_out else "train"
            units = [dataclasses.replace(u, goes_to=split) for u in _ranges(path, selection)]
            ranges.append(units)
        except DamagedFileError as damaged:
            error = str(damaged)
        relative = Path(os.path.relpath(path, parent)).as_posix()
        files.append(PlannedFile(path, relative, status.st_size, status.st_mtime_ns, error))
    if not streams and all(file.error is not None for file in files):
        raise InputError(f"No file of --input can be read: {files[0].path}: {files[0].error}.")
    total = sum(unit.weight for units in ranges for unit in units)
    target = min(max(total // _PIECES, _SMALLEST), largest)
    units = list(_joined([part for units in ranges for part in _cut(units, target)], target))
    for file, stream in streams:
        files.append(file)
        units += stream
    numbered = (dataclasses.replace(unit, index=index) for index, unit in enumerate(units))
    return Plan(tuple(files), tuple(numbered))


def _paths(inputs: Sequence[str], flag: str = "--input") -> list[str]:
    """Returns the files that the inputs name, each once, sorted.

    A link to a file keeps its own name: what it leads to may have one without suffix,
    as in the cache of the Hugging Face hub. Of several names of a file the first counts,
    and a link's only if there is no other.
    """
    found: set[str] = set()
    local = [each for given in inputs if not hub.is_hub(given) for each in _here(given, flag)]
    for given in local:
        expanded = os.path.expanduser(given)
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [file for match in matches for file in _files(match, flag)]
        if not files:
            raise bad_value(flag, given, _ALLOWED)
        found.update(_named(file) for file in files)
    if local and not found:
        raise bad_value(flag, ",".join(inputs), _ALLOWED)
    names: dict[str, str] = {}
    for file in sorted(found, key=lambda file: (os.path.islink(file), file)):
        if not os.path.exists(file):
            raise InputError(
                f"{flag} has {file!r}, a link to {os.readlink(file)!r}, which is not there; finish"
                " the download, or remove the link."
            )
        names.setdefault(os.path.realpath(file), file)
    return sorted(names.values())


def _here(given: str, flag: str) -> list[str]:
    """Returns an input, or the copies of what it is in a bucket."""
    if not buckets.is_bucket(given):
        return [given]
    urls = buckets.matches(flag, given) if glob.has_magic(given) else [given]
    if not urls:
        raise bad_value(flag, given, _ALLOWED)
    return [str(copies.here(flag, url)) for url in urls]


def _streams(
    inputs: Sequence[str], validation: Sequence[str], selection: Selection, options: HubOptions
) -> list[tuple[PlannedFile, list[Unit]]]:
    """Returns the datasets of the hub, each once, and a piece of work for each of their files.

    Raises:
      InputError: if one can't be read, lacks a field, or is both trained on and held out.
    """
    found: dict[str, tuple[PlannedFile, list[Unit]]] = {}
    for flag, urls, split in (
        ("--input", inputs, options.split),
        ("--validation_input", validation, options.validation_split),
    ):
        goes_to = "" if not validation else "train" if flag == "--input" else "validation"
        for url in dict.fromkeys(url for url in urls if hub.is_hub(url)):
            dataset, columns, weight = hub.pinned(hub.parse(flag, url, options.config, split))
            require_fields(columns, selection, dataset.url)
            path = dataset.label
            if flag != "--input" and path in found:
                raise InputError(
                    f"--validation_input has {url!r}, whose split {split!r} --input has, too;"
                    " --hub_validation_split names another."
                )
            units = [
                Unit(0, path, "hub", index, index + 1, weight, goes_to=goes_to, hub=dataset)
                for index in range(dataset.files)
            ]
            found[path] = (PlannedFile(path, path, 0, 0, None), units)
    return list(found.values())


def _files(path: str, flag: str) -> list[str]:
    if os.path.isfile(path) or _leads_nowhere(path):
        if _kind(path) is None:
            raise bad_value(flag, path, _ALLOWED)
        return [path]
    folder = Path(path)
    if (folder / _DATASET).is_file():
        return [str(file) for file in folder.iterdir() if ".array_record" in file.name]
    files = [
        file
        for file in _below(folder)
        if _kind(file) and (os.path.isfile(file) or _leads_nowhere(file))
    ]
    return [file for file in files if _kind(file) not in PLAIN_KINDS] or files


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
    return next((kind for kind in (*KINDS, *PLAIN_KINDS) if path.endswith("." + kind)), None)


def _ranges(path: str, selection: Selection) -> Iterator[Unit]:
    """Yields a file's smallest pieces that can be read by themselves."""
    kind = _kind(path)
    assert kind is not None
    size = os.path.getsize(path)
    if selection.chat_template is not None and kind in ("csv", "txt"):
        raise InputError(
            f"--chat_template is given, but {path} is a .{kind} file, without messages."
        )
    if kind == "parquet":
        file = open_parquet(path)
        require_fields(file.schema_arrow.names, selection, path)
        yield from _row_groups(path, file.metadata, selection)
    elif kind == "tfds":
        from lazyattn.data.fineweb_edu import shard_documents

        split, start, stop = shard_documents(path)
        yield Unit(0, path, kind, start, stop, size, split)
    elif kind == "txt":
        if selection.min_int_score is not None:
            raise InputError(
                f"--min_int_score is {selection.min_int_score}, but {path} is a .txt file, which"
                " has no score."
            )
        if size:
            yield Unit(0, path, kind, 0, size, size, texts=(path,))
    elif size:
        if kind == "csv":
            require_fields(csv_header(path), selection, path)
        yield Unit(0, path, kind, 0, size, size)


def _row_groups(path: str, metadata: pq.FileMetaData, selection: Selection) -> Iterator[Unit]:
    begin = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(column) for column in range(metadata.num_columns))
        weight = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] == selection.text_field.split(".")[0]
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
        parts = 1 if unit.kind in _WHOLE_KINDS else -(-unit.weight // target)
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


def _joined(units: list[Unit], target: int) -> Iterator[Unit]:
    """Joins .txt files that follow one another to pieces of about `target` bytes."""
    last: Unit | None = None
    for unit in units:
        if (
            last is not None
            and last.texts
            and unit.texts
            and last.goes_to == unit.goes_to
            and last.weight + unit.weight <= target
        ):
            weight = last.weight + unit.weight
            texts = (*last.texts, *unit.texts)
            last = dataclasses.replace(last, stop=weight, weight=weight, texts=texts)
            continue
        if last is not None:
            yield last
        last = unit
    if last is not None:
        yield last
