"""What `data.source` may name, and how its documents are read."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from lazyattn.data import manifest
from lazyattn.data.corpus import Document, stdlib_documents
from lazyattn.errors import InputError, bad_value

# Another kind of text is another branch of `documents` and `identity`.
STDLIB = "stdlib"
_ALLOWED = f"'{STDLIB}' or an existing folder of .txt files (UTF-8, one document each)"


def documents(source: str) -> Iterator[Document]:
    """Yields the documents of a source, always in the same order.

    Args:
      source: `DataConfig.source`: "stdlib", or a folder whose `.txt` files, at any
        depth, are one document each; files of nothing but white space are skipped.

    Raises:
      InputError: if the source is unknown, missing, empty, unreadable or not UTF-8.
    """
    if source == STDLIB:
        yield from stdlib_documents()
        return
    folder = _folder(source)
    found = False
    for path in _text_files(folder):
        try:
            text = _read(path).decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"data.source: {path} is not valid UTF-8 at byte {error.start}; convert it or"
                " remove it."
            ) from error
        if text.strip():
            found = True
            yield Document(path.relative_to(folder).as_posix(), text)
    if not found:
        raise InputError(f"data.source is {source!r}, but its .txt files hold no text.")


def identity(source: str) -> dict[str, str]:
    """Returns what tells this source's content from any other, as plain data.

    The standard library is known by the Python it belongs to. A folder of texts is
    read in full, so that a changed file is never missed.

    Raises:
      InputError: if the source is unknown, missing, empty or unreadable.
    """
    if source == STDLIB:
        return {"kind": STDLIB, "python": sys.version}
    folder = _folder(source)
    digest = hashlib.sha256()
    for path in _text_files(folder):
        content = _read(path)
        name = path.relative_to(folder).as_posix()
        digest.update(f"{len(name.encode())} {name} {len(content)} ".encode())
        digest.update(content)
    return {"kind": "text", "sha256": digest.hexdigest()}


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        raise bad_value("data.source", source, _ALLOWED)
    if (folder / manifest.NAME).is_file():
        raise InputError(
            f"data.source is {source!r}, a folder of tokenised shards; give it as data.path."
        )
    return folder


def _text_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not paths:
        raise InputError(f"data.source is {str(folder)!r}, but that folder holds no .txt file.")
    return paths


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"data.source: {path} cannot be read ({error.strerror}).") from error
