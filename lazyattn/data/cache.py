"""Folders of shards in the cache: whole or absent, and damage is noticed."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from lazyattn.data import manifest
from lazyattn.errors import InputError
from lazyattn.paths import local_path

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


def entry(cache_dir: str | os.PathLike[str], name: str, build: Callable[[Path], Any]) -> Path:
    """Returns a folder of shards in the cache, built now unless it is there and whole.

    The folder is built under another name beside its place and renamed, so whoever
    finds it under `name` finds all of it, even if a build is killed or two run at
    once. One that doesn't match its manifest, by SHA-256, is built again, with a
    warning.

    Args:
      cache_dir: folder of all entries, made if absent.
      name: of the entry; must tell apart all that `build` depends on.
      build: makes the folder it is given, with a manifest. What else it needs, it may
        put beside it: that is removed.

    Raises:
      InputError: if the cache folder is a URL or cannot be written to.
    """
    path = local_path("--cache_dir", cache_dir) / name
    damage = _damage(path)
    if damage is not None:
        if path.exists():
            logging.warning("Prepared data is damaged and prepared again. %s", damage)
        _build(path, build)
    return path


def _build(path: Path, build: Callable[[Path], Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=path.parent))
    except OSError as error:
        raise InputError(
            f"The data cache folder {str(path.parent)!r} cannot be written to ({error.strerror});"
            " give another by --cache_dir or LAZYATTN_CACHE."
        ) from error
    try:
        ready = work / path.name
        build(ready)
        if path.exists() and _damage(path) is not None:
            path.rename(work / "damaged")
        try:
            ready.rename(path)
        except OSError:
            if _damage(path) is not None:  # else another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _damage(path: Path) -> str | None:
    """Returns what is wrong with an entry, None if nothing is."""
    try:
        manifest.verify(path, deep=True)
    except InputError as error:
        return str(error)
    return None


def _remove_abandoned(cache_dir: Path) -> None:
    """Removes what killed builds left behind."""
    for path in cache_dir.glob(".building-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(path, ignore_errors=True)
