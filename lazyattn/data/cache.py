"""Cache folders that are whole or absent, and notice damage."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from lazyattn.errors import InputError
from lazyattn.paths import local_path

MANIFEST = "manifest.json"
_ABANDONED_AFTER = 3600.0  # seconds; no build takes as long


def default_cache_dir() -> Path:
    """Returns where prepared data is kept unless told otherwise.

    LAZYATTN_CACHE if set, else XDG_CACHE_HOME/lazyattn, else ~/.cache/lazyattn.

    Raises:
      InputError: if one of them is a URL.
    """
    if own := os.environ.get("LAZYATTN_CACHE"):
        return local_path("LAZYATTN_CACHE", own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return local_path("XDG_CACHE_HOME", shared) / "lazyattn"
    return Path.home() / ".cache" / "lazyattn"


def entry(
    cache_dir: str | os.PathLike[str], name: str, build: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Returns a folder of the cache, built now unless it is there and whole.

    The folder is built under another name beside its place and renamed, so whoever
    finds it under `name` finds all of it, even if a build is killed or two run at
    once. Its manifest holds size and SHA-256 of every file; an entry that doesn't
    match is built again, with a warning.

    Args:
      cache_dir: folder of all entries, made if absent.
      name: of the entry; must tell apart all that `build` depends on.
      build: writes files straight into the folder it is given, and returns plain
        data to keep with them.

    Returns:
      The entry's folder, and what `build` returned.

    Raises:
      InputError: if the cache folder is a URL or cannot be written to.
    """
    path = local_path("--cache_dir", cache_dir) / name
    damage = _damage(path)
    if damage is not None:
        if path.exists():
            logging.warning("Prepared data %s is damaged (%s); preparing it again.", path, damage)
        _build(path, build)
    return path, _manifest(path)["content"]


def _build(path: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=path.parent))
    except OSError as error:
        raise InputError(
            f"The data cache folder {str(path.parent)!r} cannot be written to ({error.strerror});"
            " set LAZYATTN_CACHE to a folder that can."
        ) from error
    try:
        ready = work / path.name
        ready.mkdir()
        content = build(ready)
        files = {file.name: _describe(file) for file in sorted(ready.iterdir())}
        manifest = {"content": content, "files": files}
        (ready / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if path.exists() and _damage(path) is not None:
            path.rename(work / "damaged")
        try:
            ready.rename(path)
        except OSError:
            if _damage(path) is not None:  # else another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _damage(path: Path) -> str | None:
    """Returns what is wrong with an entry, None if nothing is."""
    try:
        manifest = _manifest(path)
        if "content" not in manifest:
            return f"{MANIFEST} is incomplete"
        for name, described in manifest["files"].items():
            if _describe(path / name) != described:
                return f"{name} has changed"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be understood"
    return None


def _remove_abandoned(cache_dir: Path) -> None:
    """Removes what killed builds left behind."""
    for path in cache_dir.glob(".building-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(path, ignore_errors=True)
