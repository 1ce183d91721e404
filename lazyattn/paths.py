"""Files and folders that a user names: on this machine or, where it says so, in a bucket."""

import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lazyattn.allowed import Allowed
from lazyattn.buckets import bucket_path, check_writable, is_bucket
from lazyattn.errors import bad_value, require

# A scheme and a slash: `Path` leaves one of the two in "gs://bucket". No drive letters.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_MOUNT = "mount the bucket and give the path"
LOCAL = Allowed(
    lambda path: not _URL.match(os.fspath(path)), f"a path on this machine, not a URL; {_MOUNT}"
)
ANYWHERE = Allowed(
    lambda path: LOCAL.holds(path) or is_bucket(path),
    "a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH; of another bucket, " + _MOUNT,
)


def check_local(name: str, path: str | os.PathLike[str], buckets: bool = False) -> None:
    """Refuses a URL, which would otherwise be taken for a folder called `gs:`.

    Args:
      name: what the user wrote, e.g. "--workdir" or "data.path".
      path: the path.
      buckets: whether one in a bucket is fine.

    Raises:
      InputError: if it is a URL of another scheme.
    """
    allowed = ANYWHERE if buckets else LOCAL
    if not allowed.holds(path):
        raise bad_value(name, os.fspath(path), allowed.words)


def local_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` expanded.

    Raises:
      InputError: as `check_local`.
    """
    check_local(name, path)
    return Path(path).expanduser()


def anywhere(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` expanded; in a bucket it does what `pathlib.Path` does.

    Raises:
      InputError: as `check_local`, or if the package for such buckets is not installed.
    """
    return bucket_path(name, path) if is_bucket(path) else local_path(name, path)


def folder(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns a folder as an absolute path; in a bucket as `anywhere`.

    Raises:
      InputError: as `anywhere`.
    """
    check_local(name, path, buckets=True)
    found = anywhere(name, path)
    return found if is_bucket(path) else found.absolute()


def results(
    output: str | None, workdir: str | os.PathLike[str], name: str, writes: bool = True
) -> Path:
    """Returns where a mode writes what it finds: `output`, else a folder in the run's.

    Args:
      output: of the flag; None: it is not given.
      workdir: the run's folder.
      name: of the folder in it.
      writes: whether anything will be written; then it is tried whether it can be.

    Raises:
      InputError: as `folder`, or if nothing can be written there.
    """
    flag, path, below = ("--output", output, "") if output else ("--workdir", workdir, name)
    if not is_bucket(path):
        own = local_path(flag, path) / below
        if writes:
            there = next(each for each in (own, *own.absolute().parents) if each.exists())
            can = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
            require(can, "--output", str(own), "a folder that can be written to")
        return own
    found = bucket_path(flag, path) / below
    if writes:
        check_writable(flag, found)
    return found


def umask() -> int:
    """Returns which permissions this process leaves off the files it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def print_any_name() -> None:
    """Lets standard output show names that are no text, "caf\\udce9.txt", as errors do.

    A file system allows bytes that are no UTF-8; printing such a name would end in an
    error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _PathParser(flags.ArgumentParser[str]):
    """Parses a path."""

    syntactic_help = "a path"

    def __init__(self, name: str, buckets: bool = False):
        self._name, self._buckets = name, buckets

    def parse(self, argument: str) -> str:
        check_local(f"--{self._name}", argument, self._buckets)
        return argument


class _PathListParser(flags.ListParser):
    """Parses paths with commas between them."""

    def __init__(self, name: str, buckets: bool, allowed: str | None):
        super().__init__()
        self._flag, self._buckets, self._allowed = name, buckets, allowed

    def parse(self, argument: str | list[str]) -> list[str]:
        paths = super().parse(argument)
        for path in paths:
            if self._allowed is None or not path.startswith(self._allowed):
                check_local(f"--{self._flag}", path, self._buckets)
        return paths


def define(
    name: str,
    default: str | None,
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    required: bool = False,
    buckets: bool = False,
) -> flags.FlagHolder[Any]:
    """Defines a flag whose value is a path; a URL is refused when it is parsed.

    With `buckets` that of one is not: what it can't be used for refuses it itself.
    """
    parser = _PathParser(name, buckets)
    return flags.DEFINE(parser, name, default, help, flag_values=flag_values, required=required)


def define_list(
    name: str,
    default: Sequence[str],
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    buckets: bool = False,
    allowed: str | None = None,
) -> flags.FlagHolder[Any]:
    """Defines a flag of paths with commas between them; `allowed`: a scheme that may stand."""
    serializer = flags.CsvListSerializer(",")
    parser = _PathListParser(name, buckets, allowed)
    return flags.DEFINE(
        parser, name, list(default), help, flag_values=flag_values, serializer=serializer
    )


def define_multi(
    name: str,
    default: Sequence[str],
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    buckets: bool = False,
) -> flags.FlagHolder[Any]:
    """Defines a flag whose value is a path, and which may be given several times."""
    return flags.DEFINE_multi(
        _PathParser(name, buckets),
        flags.ArgumentSerializer(),
        name,
        list(default),
        help,
        flag_values=flag_values,
    )
