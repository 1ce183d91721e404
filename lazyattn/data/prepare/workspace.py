"""The folder of work in progress: whose it is, and what of it is done."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyattn import buckets
from lazyattn.data import manifest
from lazyattn.data.manifest import Manifest
from lazyattn.data.prepare.hub import is_hub
from lazyattn.data.prepare.inputs import Plan
from lazyattn.data.prepare.unit import UnitResult, result_path, shard_path
from lazyattn.errors import InputError
from lazyattn.file_lock import LockedError
from lazyattn.file_lock import locked as file_locked

_FOLDER = ".preparation"
_PLAN = "plan.json"

# All that the shards depend on, as plain data: "settings" and "sources".
Identity = dict[str, Any]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Keeps other processes out of an output folder; the lock goes with this process.

    A folder that was made for it and holds nothing afterwards is removed again.

    Yields:
      The folder of work in progress, made if absent.

    Raises:
      InputError: if another process has it.
    """
    work = folder / _FOLDER
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_locked(work / "lock"))
        except LockedError as who:
            raise InputError(
                f"--output is {str(folder)!r}, but another process is preparing it right now"
                f" ({who}); wait for it or give another folder."
            ) from None
        try:
            yield work
        finally:
            if not (work / _PLAN).exists():  # finished, or never begun
                shutil.rmtree(work, ignore_errors=True)
                for each in made:
                    with contextlib.suppress(OSError):  # it holds something
                        each.rmdir()


def identity(settings: dict[str, Any], plan: Plan) -> Identity:
    """Returns what tells this preparation from another."""
    sources = [[file.file, file.size, file.modified] for file in plan.files]
    return {"settings": settings, "sources": sources}


def claim(folder: Path, work: Path, wanted: Identity) -> None:
    """Takes an output folder for a preparation, or finds it begun.

    Raises:
      InputError: if the folder holds something else.
    """
    if (work / _PLAN).exists():
        _require_same(folder, json.loads((work / _PLAN).read_text()), wanted)
        return
    require_empty(folder, work.name)
    manifest.write_whole(work / _PLAN, (json.dumps(wanted, indent=2) + "\n").encode())


def require_empty(folder: Path, *but: str) -> None:
    """Checks that an output folder, in a bucket or not, holds nothing `but` these names.

    Raises:
      InputError: if it does.
    """
    others = sorted(buckets.names(folder).difference(but))
    if others:
        raise InputError(
            f"--output is {str(folder)!r}, but it must be a new or empty folder, or one where this"
            f" preparation was begun; it holds {others[0]}."
        )


def give_up(work: Path) -> None:
    """Makes `locked` remove the folder of work in progress: nothing will come of it."""
    (work / _PLAN).unlink()


def require_finished(folder: Path, wanted: Identity) -> Manifest:
    """Returns the manifest of an output folder that is finished.

    Raises:
      InputError: if it is of another preparation, or damaged.
    """
    content = manifest.verify(folder)
    sources = [[source.file, source.size, source.modified] for source in content.sources]
    _require_same(folder, {"settings": content.settings, "sources": sources}, wanted)
    return content


def finished_units(work: Path, plan: Plan) -> dict[int, UnitResult]:
    """Returns the units that an earlier run finished, and clears away what it didn't."""
    for path in work.glob(".*"):
        path.unlink()
    results = {}
    for unit in plan.units:
        path = result_path(work, unit.index)
        if path.exists():
            results[unit.index] = UnitResult.from_json(path.read_text())
    if len(results) < len(plan.units):  # else shards may have got their names already
        for index in [index for index, result in results.items() if not _whole(work, result)]:
            del results[index]
    return results


def _whole(work: Path, result: UnitResult) -> bool:
    for split, shard in result.shards.items():
        path = shard_path(work, result.index, split)
        if not path.is_file() or path.stat().st_size != shard.size:
            return False
    return True


def _require_same(folder: Path, found: Identity, wanted: Identity) -> None:
    """Checks that what is in the output is this preparation.

    Raises:
      InputError: naming what differs.
    """
    hint = "give another --output or delete that folder"
    if found["sources"] != wanted["sources"]:
        streams = [source[0] for source in found["sources"] if is_hub(source[0])]
        if streams:
            hint += f", or name the revision that it has, as in {streams[0]}"
        raise InputError(
            f"--output is {str(folder)!r}, which was prepared, or begun, from other files or from"
            f" files that have changed since; {hint}."
        )
    for name, value in wanted["settings"].items():
        if found["settings"].get(name) != value:
            raise InputError(
                f"--output is {str(folder)!r}, which was prepared, or begun, with {name} ="
                f" {found['settings'].get(name)!r} and not {value!r}; {hint}."
            )
