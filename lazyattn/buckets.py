"""Folders in buckets, `gs://BUCKET/FOLDER` and `s3://BUCKET/FOLDER`: the one place that knows them.

They are `etils.epath` paths, which do what `pathlib.Path` does by way of fsspec (gcsfs, s3fs).
An object appears whole or not at all, can't be appended to, and nothing is renamed; there are no
locks. gcsfs, s3fs and TensorStore try a request again, with longer and longer pauses, that was
slow, answered 429 or 5xx, or whose connection broke.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from etils import epath

from lazyattn.errors import InputError, bad_value
from lazyattn.patience import no_answer, within

# The package that fsspec needs, and the extra of ours that has it.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_SCHEME = re.compile(r"([a-z0-9]+)://")
_PROBE = ".lazyattn-can-write"
# Of a request to S3, a random time up to 1, 2, 4, ... s apart: two minutes, as a rule.
_RETRIES = 8
# Seconds until a bucket must have answered for the first time: as long as requests are tried again.
_FIRST_ANSWER = 120
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_AT_ONCE = 8  # requests
_answered: set[tuple[str, ...]] = set()  # buckets


@dataclasses.dataclass(frozen=True)
class Object:
    """What a bucket says of an object.

    Attributes:
      size: bytes.
      changed: nanoseconds since 1970.
    """

    size: int
    changed: int


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
    if logging.getLogger("gcsfs").level == logging.NOTSET:
        # It logs tracebacks of what it raises, and of what goes well at the next try.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)


def check_writable(name: str, folder: Path) -> None:
    """Writes an object into a bucket's folder and removes it.

    Raises:
      InputError: if that fails, saying why: no credentials, no such bucket, forbidden.
    """
    probe = folder / f"{_PROBE}.{uuid.uuid4().hex}"  # every process has its own

    def write() -> None:
        probe.write_text("")
        probe.unlink()

    try:
        _answer(name, folder, write)
    except Exception as error:  # each library has errors of its own
        raise InputError(
            f"{name} is {str(folder)!r}, but nothing can be written there ({_why(error)})."
        ) from None


def check_readable(name: str, path: str | os.PathLike[str]) -> None:
    """Looks whether a bucket can be read, so that later nothing but a fault can keep it from that.

    Args:
      name: the flag or setting that has the path, for errors.
      path: any path; one on this machine is not looked at.

    Raises:
      InputError: if it can't, saying why: no credentials, forbidden.
    """
    if is_bucket(path):
        found = bucket_path(name, path)
        with told(name, found):
            _answer(name, found, found.exists)


def _answer(name: str, path: Path, request: Callable[[], object]) -> None:
    """Makes a first request of a bucket, which has its time, and says what it waits for."""

    def what() -> str:
        found = f"an answer of the bucket of {name}, {str(path)!r}"
        endpoints = [os.environ[each] for each in _S3_ENDPOINTS if os.environ.get(each)]
        if scheme(path) != "s3" or not endpoints:
            return found
        url = urlsplit(endpoints[0])
        port = url.port or (443 if url.scheme == "https" else 80)
        why = no_answer(url.hostname or "", port)
        return f"{found} at {endpoints[0]}" + (f" ({why})" if why else "")

    within(_FIRST_ANSWER, what, request)
    _answered.add(_bucket(path))


def _bucket(path: str | os.PathLike[str]) -> tuple[str, ...]:
    return epath.Path(path).parts[:3]


def objects(name: str, path: Path) -> dict[str, Object]:
    """Returns the objects of a folder in a bucket by their names in it; one alone is "".

    Raises:
      InputError: if they can't be listed, saying why.
    """
    start = str(path).partition("://")[2].rstrip("/")
    with told(name, path):
        found = _file_system(path).find(str(path), detail=True)
    made = {}
    for each, about in found.items():
        if about["type"] == "file" and not each.endswith("/"):  # some tools make such for folders
            changed = about.get("mtime") or about["LastModified"]
            size = Object(int(about["size"]), _nanoseconds(changed))
            made[each.removeprefix(start).lstrip("/")] = size
    return made


def _nanoseconds(when: datetime.datetime) -> int:
    since = when - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return since // datetime.timedelta(microseconds=1) * 1000


def matches(name: str, pattern: str) -> list[str]:
    """Returns the URLs of what a pattern in a bucket stands for.

    Raises:
      InputError: as `objects`.
    """
    path = bucket_path(name, pattern)
    with told(name, path):
        return [f"{scheme(pattern)}://{each}" for each in _file_system(path).glob(pattern)]


def read(path: Path) -> bytes | None:
    """Returns what an object holds now, by one request; None: there is none."""
    try:
        return bytes(_file_system(path).cat_file(str(path)))
    except FileNotFoundError:
        return None


def download(name: str, path: Path, target: Path) -> None:
    """Copies an object to a file.

    Raises:
      InputError: if it can't be read, saying why.
    """
    with told(name, path):
        _file_system(path).get_file(str(path), str(target))


@contextlib.contextmanager
def told(name: str, path: Path) -> Iterator[None]:
    """Turns whatever a library raises when it reads into one sentence.

    Args:
      name: the flag or setting that has the path.
      path: what is read.

    Raises:
      InputError: that sentence.
    """
    try:
        if _bucket(path) not in _answered:
            _answer(name, path, path.exists)
        yield
    except Exception as error:  # each library has errors of its own
        raise InputError(f"{name} is {str(path)!r}, but can't be read ({_why(error)}).") from None


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
    if isinstance(error, TimeoutError) or "Connect" in kind or "Timeout" in kind:
        return f"it does not answer: {text}"
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
        files = _file_system(path)
        start, end = (str(each).partition("://")[2] for each in (path, target))
        for name in files.find(start):
            files.cp_file(name, end + name.removeprefix(start))
        files.rm(start, recursive=True)
    else:
        path.rename(target)


def size(folder: Path) -> int:
    """Returns how many bytes a folder's files have, in a bucket or not; there a file's, too."""
    if is_bucket(folder):
        return int(_file_system(folder).du(str(folder)))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def names(folder: Path) -> set[str]:
    """Returns what is in a folder; nothing, where there is no folder."""
    return {each.name for each in folder.iterdir()} if folder.is_dir() else set()


def upload(source: Path, target: Path, last: str | None = None) -> None:
    """Copies a folder of this machine into a bucket.

    Args:
      source: the folder.
      target: that in the bucket.
      last: name of the file to copy when all others are there: what readers look for.

    Raises:
      InputError: if that fails, saying why.
    """
    files = sorted(file for file in source.rglob("*") if file.is_file())

    def put(file: Path) -> None:
        where = target / file.relative_to(source).as_posix()
        _file_system(where).put_file(str(file), str(where))

    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(put, (file for file in files if file != source / str(last))):
                pass
        if last is not None:
            put(source / last)
    except Exception as error:  # each library has errors of its own
        raise InputError(f"{str(target)!r} can't be written ({_why(error)}).") from None


@contextlib.contextmanager
def staged(target: Path, last: str | None = None) -> Iterator[Path]:
    """Yields a folder of this machine which is copied to a bucket at the end; see `upload`.

    Raises:
      InputError: if that fails.
    """
    with tempfile.TemporaryDirectory(prefix="lazyattn-") as folder:
        yield Path(folder)
        upload(Path(folder), target, last)


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to: the one given or, for a bucket, one that is copied there.

    Raises:
      InputError: as `staged`.
    """
    if is_bucket(folder):
        with staged(folder) as work:
            yield work
    else:
        yield folder


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
