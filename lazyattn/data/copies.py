"""Copies on this machine of what lies in a bucket, for readers that need files.

CACHE/copies/gs/BUCKET/PATH has a file for each object below gs://BUCKET/PATH, with its size and
its time of change. What has both is taken to be the object still, and is not copied again. A file
gets its name when it is whole.
"""

import fnmatch
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import filelock

from lazyattn import buckets
from lazyattn.buckets import Object
from lazyattn.data.cache import default_cache_dir
from lazyattn.errors import InputError, bad_value
from lazyattn.paths import check_local, local_path

_AT_ONCE = 8
_WORTH_TELLING = 100 * 10**6  # bytes


def here(
    name: str,
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    without: str | None = None,
) -> Path:
    """Returns a file or folder on this machine: that of the path, or a copy of what is in a bucket.

    Args:
      name: the flag or setting that has the path, for errors.
      path: the path; `~` is expanded.
      cache_dir: the folder for prepared data, which gets copies too; None: the user's cache.
      without: pattern of names in a folder that are not copied; None: all are.

    Raises:
      InputError: if nothing is there, it can't be read or copied, or it is a URL of another kind.
    """
    check_local(name, path, buckets=True)
    if not buckets.is_bucket(path):
        return local_path(name, path)
    source = buckets.bucket_path(name, path)
    objects = {
        each: found
        for each, found in buckets.objects(name, source).items()
        if not _matches(each, without)
    }
    if not objects:
        raise bad_value(name, str(path), "a file or a folder that is there")
    for each in objects:
        if ".." in PurePosixPath(each).parts:
            raise InputError(f"{name} is {str(path)!r}, which has an object {each!r}; remove it.")
    target = place("copies", source, cache_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(_cache(cache_dir) / "copies" / f".{source.parts[2]}.lock"):
            _make(name, source, target, objects, without)
    except (OSError, NotImplementedError) as error:  # the latter where there are no locks
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name} is {str(path)!r}, but no copy can be made in {str(target)!r} ({why}); set"
            " LAZYATTN_CACHE to a folder that can have it."
        ) from error
    return target


def place(kind: str, path: Path, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder of the cache that stands for a path in a bucket."""
    inside = PurePosixPath(str(path).replace("://", "/", 1))
    if ".." in inside.parts:
        raise bad_value("A path in a bucket", str(path), "without '..'")
    return _cache(cache_dir) / kind / inside


def _cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    cache = default_cache_dir() if cache_dir is None else local_path("--cache_dir", cache_dir)
    return cache.absolute()


def _make(
    name: str, source: Path, target: Path, objects: Mapping[str, Object], without: str | None
) -> None:
    """Makes `target` what `objects` are, and nothing else."""
    if ("" in objects) == target.is_dir():  # it was a folder and is a file, or the reverse
        buckets.remove(target)
    for file in target.rglob("*"):
        inside = file.relative_to(target).as_posix()
        if file.is_file() and inside not in objects and not _matches(inside, without):
            file.unlink()
    wanted = {each: found for each, found in objects.items() if not _is(target / each, found)}
    size = sum(found.size for found in wanted.values())
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise InputError(
            f"{name} is {str(source)!r}, of which {size / 1e9:,.1f} GB are not on this machine yet,"
            f" but {str(target)!r} has room for {free / 1e9:,.1f} GB; set LAZYATTN_CACHE to a"
            " larger disk, or mount the bucket and give the path."
        )
    if size > _WORTH_TELLING:
        print(f"copying  {size / 1e9:,.1f} GB of {source} to {target}", file=sys.stderr, flush=True)

    def copy(each: str) -> None:
        file, found = target / each, objects[each]
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        buckets.download(name, source / each if each else source, temporary)
        os.utime(temporary, ns=(found.changed, found.changed))
        if not _is(temporary, found):
            raise InputError(f"{name} is {str(source)!r}, but {each!r} there is changing; wait.")
        temporary.replace(file)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(copy, wanted):
            pass


def _matches(name: str, pattern: str | None) -> bool:
    return pattern is not None and fnmatch.fnmatch(name, pattern)


def _is(file: Path, found: Object) -> bool:
    if not file.is_file():
        return False
    status = file.stat()
    return (status.st_size, status.st_mtime_ns) == (found.size, found.changed)
