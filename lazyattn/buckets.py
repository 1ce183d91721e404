"""Folders in buckets, `gs://BUCKET/FOLDER` and `s3://BUCKET/FOLDER`: the one place that knows them.

They are `etils.epath` paths, which do what `pathlib.Path` does by way of fsspec (gcsfs, s3fs).
An object appears whole or not at all, can't be appended to, and nothing is renamed; there are no
locks. gcsfs, s3fs and TensorStore try a request again, with longer and longer pauses, that was
slow, answered 429 or 5xx, or whose connection broke.
"""

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from etils import epath

from lazyattn.errors import InputError, bad_value

# The package that fsspec needs, and the extra of ours that has it.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_SCHEME = re.compile(r"([a-z0-9]+)://")
_PROBE = ".lazyattn-can-write"
# Of a request to S3, a random time up to 1, 2, 4, ... s apart: two minutes, as a rule.
_RETRIES = 8


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return scheme(path) in _PACKAGES


def scheme(path: str | os.PathLike[str]) -> str | None:
    """Returns what a URL begins with, "gs"; None: it is none."""
    match = _SCHEME.match(os.fspath(path))
    return match.group(1) if match else None


def bucket_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns a path in a bucket, which does what `pathlib.Path` does.

    Args:
      name: what the user wrote, e.g. "--workdir".
      path: the URL.

    Raises:
      InputError: if the package for such buckets is not installed, or no bucket is named.
    """
    text = os.fspath(path)
    kind = scheme(text) or ""
    package, extra = _PACKAGES[kind]
    if not text.removeprefix(f"{kind}://").partition("/")[0]:
        raise bad_value(name, text, f"{kind}://BUCKET/FOLDER")
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{name} is {text!r}, which needs the package {package}; pip install"
            f" 'lazyattn[{extra}]'."
        )
    _set_up(kind)
    return cast(Path, epath.Path(text))


def _set_up(kind: str) -> None:
    """Has fsspec ask the bucket what there is, and s3fs be as patient as gcsfs."""
    import fsspec.config

    for protocol in {"gs": ("gs", "gcs"), "s3": ("s3",)}[kind]:
        settings = fsspec.config.conf.setdefault(protocol, {})
        settings.setdefault("use_listings_cache", False)  # TensorStore and others write, too
        if kind == "s3" and "AWS_MAX_ATTEMPTS" not in os.environ:
            settings.setdefault("config_kwargs", {"retries": {"max_attempts": _RETRIES}})


def check_writable(name: str, folder: Path) -> None:
    """Writes an object into a bucket's folder and removes it.

    Raises:
      InputError: if that fails, saying why: no credentials, no such bucket, forbidden.
    """
    probe = folder / f"{_PROBE}.{uuid.uuid4().hex}"  # every process has its own
    try:
        with _silent("gcsfs"):  # which logs tracebacks of what it raises
            probe.write_text("")
            probe.unlink()
    except Exception as error:  # each library has errors of its own
        raise InputError(
            f"{name} is {str(folder)!r}, but nothing can be written there ({_why(error)})."
        ) from None


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _why(error: BaseException) -> str:
    kind = type(error).__name__
    text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    code = str(getattr(error, "code", ""))
    if "Credential" in kind or "Credential" in text or code == "401" or "Anonymous" in text:
        return f"there are no credentials for it: {text}"
    if isinstance(error, FileNotFoundError) or code == "404":
        return f"there is no such bucket: {text}"
    if isinstance(error, PermissionError) or code == "403" or "Forbidden" in text:
        return f"it is forbidden: {text}"
    return f"{kind}: {text}"


def remove(path: Path) -> None:
    """Removes a file or a folder with all in it, in a bucket or not; nothing there is fine."""
    if is_bucket(path):
        with contextlib.suppress(FileNotFoundError):
            _file_system(path).rm(str(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def move(path: Path, target: Path) -> None:
    """Moves a folder; in a bucket each object is copied and then removed."""
    if is_bucket(path):
        _file_system(path).mv(str(path), str(target), recursive=True)
    else:
        path.rename(target)


def size(folder: Path) -> int:
    """Returns how many bytes a folder's files have, in a bucket or not."""
    if is_bucket(folder):
        return int(_file_system(folder).du(str(folder)))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def names(folder: Path) -> set[str]:
    """Returns what is in a folder; nothing, where there is no folder."""
    return {each.name for each in folder.iterdir()} if folder.is_dir() else set()


def results(
    output: str | None, workdir: str | os.PathLike[str], name: str, needed: bool = True
) -> str | os.PathLike[str]:
    """Returns where a mode writes what it found: `output`, else a folder in the run's.

    Raises:
      InputError: if that would be in a bucket, and it is `needed`.
    """
    if output:
        return output
    if is_bucket(workdir):
        if needed:
            raise InputError(
                f"--output is not given, but it must be a folder on this machine, since --workdir"
                f" is in a bucket ({os.fspath(workdir)})."
            )
        return name
    return Path(workdir) / name


def upload(source: Path, target: Path, last: str | None = None) -> None:
    """Copies a folder of this machine into a bucket.

    Args:
      source: the folder.
      target: that in the bucket.
      last: name of the file to copy when all others are there: what readers look for.
    """
    files = sorted(
        (file for file in source.rglob("*") if file.is_file()),
        key=lambda file: (file == source / str(last), file),
    )
    for file in files:
        where = target / file.relative_to(source).as_posix()
        _file_system(where).put_file(str(file), str(where))


@contextlib.contextmanager
def staged(target: Path, last: str | None = None) -> Iterator[Path]:
    """Yields a folder of this machine which is copied to a bucket at the end; see `upload`.

    Raises:
      InputError: if that fails.
    """
    with tempfile.TemporaryDirectory(prefix="lazyattn-") as folder:
        yield Path(folder)
        try:
            upload(Path(folder), target, last)
        except Exception as error:
            raise InputError(f"{str(target)!r} can't be written ({_why(error)}).") from None


def _file_system(path: Path) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


# A log in a bucket: NAME has the lines of earlier starts, and each file of NAME.parts/ some of
# this one's. Once in a while, and at the end, NAME gets them all.
def parts_folder(path: Path) -> Path:
    """Returns the folder with the newest lines of a log."""
    return path.with_name(f"{path.name}.parts")


def read_log(path: Path) -> bytes | None:
    """Returns all of a log's lines, in a bucket or not; None: there is no log."""
    if not is_bucket(path):
        return path.read_bytes() if path.is_file() else None
    parts = b"".join(part.read_bytes() for part in _parts(path))
    whole = path.read_bytes() if path.exists() else None
    if whole is None:
        return parts or None
    # Whoever was about to remove parts that are in it removes the oldest first.
    return whole if whole.endswith(parts) else whole + parts


def write_log(path: Path, content: bytes) -> None:
    """Makes `content` all that a log in a bucket has."""
    parts = _parts(path)
    path.write_bytes(content)
    for part in parts:
        part.unlink()


def _parts(path: Path) -> list[Path]:
    folder = parts_folder(path)
    return sorted(folder.iterdir(), key=lambda part: part.name) if folder.is_dir() else []
