"""Files and folders that a user names: on this machine, as buckets can't be used yet."""

import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lazyattn.allowed import Allowed
from lazyattn.errors import require

# A scheme and a slash: `Path` leaves one of the two in "gs://bucket". No drive letters.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
LOCAL = Allowed(
    lambda path: not _URL.match(os.fspath(path)),
    "a path on this machine, not a URL; mount the bucket and give the path",
)


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Refuses a URL, which would otherwise be taken for a folder called `gs:`.

    Args:
      name: what the user wrote, e.g. "--workdir" or "data.path".
      path: the path.

    Raises:
      InputError: if it is a URL of any scheme.
    """
    require(LOCAL.holds(path), name, os.fspath(path), LOCAL.words)


def local_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` expanded.

    Raises:
      InputError: as `check_local`.
    """
    check_local(name, path)
    return Path(path).expanduser()


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

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        check_local(f"--{self._name}", argument)
        return argument


class _PathListParser(flags.ListParser):
    """Parses paths with commas between them."""

    def __init__(self, name: str, allowed: str | None = None):
        super().__init__()
        self._flag = name
        self._allowed = allowed

    def parse(self, argument: str | list[str]) -> list[str]:
        paths = super().parse(argument)
        for path in paths:
            if self._allowed is None or not path.startswith(self._allowed):
                check_local(f"--{self._flag}", path)
        return paths


def define(
    name: str,
    default: str | None,
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    required: bool = False,
) -> flags.FlagHolder[Any]:
    """Defines a flag whose value is a path; a URL is refused when it is parsed."""
    parser = _PathParser(name)
    return flags.DEFINE(parser, name, default, help, flag_values=flag_values, required=required)


def define_list(
    name: str,
    default: Sequence[str],
    help: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    allowed: str | None = None,
) -> flags.FlagHolder[Any]:
    """Defines a flag of paths with commas between them; `allowed`: a scheme that may stand."""
    serializer = flags.CsvListSerializer(",")
    parser = _PathListParser(name, allowed)
    return flags.DEFINE(
        parser, name, list(default), help, flag_values=flag_values, serializer=serializer
    )


def define_multi(
    name: str, default: Sequence[str], help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder[Any]:
    """Defines a flag whose value is a path, and which may be given several times."""
    return flags.DEFINE_multi(
        _PathParser(name),
        flags.ArgumentSerializer(),
        name,
        list(default),
        help,
        flag_values=flag_values,
    )
