"""What `data.source` may name, and how its documents are read."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from lazyattn.data import manifest
from lazyattn.data.copies import here
from lazyattn.data.corpus import Document, stdlib_documents
from lazyattn.data.text_files import BYTE_ORDER_MARK, read_bytes, read_text
from lazyattn.errors import InputError, bad_value

# Another kind of text is another branch of `documents` and `identity`.
STDLIB = "stdlib"
_NAME = "data.source"  # the setting
_ALLOWED = f"'{STDLIB}' or an existing folder of .txt files (UTF-8, one document each)"


def documents(source: str, name: str = _NAME) -> Iterator[Document]:
    """Yields the documents of a source, always in the same order.

    Args:
      source: `DataConfig.source`: "stdlib", or a folder whose `.txt` files, at any
        depth, are one document each; files of nothing but white space are skipped.
      name: the setting or flag that names it, for errors.

    Raises:
      InputError: if the source is unknown, missing, empty, unreadable or not UTF-8.
    """
    if source == STDLIB:
        yield from stdlib_documents()
        return
    folder = _folder(source, name)
    found = False
    for path in _text_files(folder, name):
        text = read_text(path, f"A file of {name}")
        if text.strip():
            found = True
            yield Document(path.relative_to(folder).as_posix(), text)
    if not found:
        raise InputError(f"{name} is {source!r}, but its .txt files hold no text.")


def identity(source: str) -> dict[str, str]:
    """Returns what tells this source's content from any other, as plain data.

    The standard library is known by the Python it belongs to. A folder of texts is
    read in full, so that a changed file is never missed.

    Raises:
      InputError: if the source is unknown, missing, empty or unreadable.
    """
    if source == STDLIB:
        return {"kind": STDLIB, "python": sys.version}
    folder = _folder(source, _NAME)
    digest = hashlib.sha256()
    for path in _text_files(folder, _NAME):
        content = read_bytes(path, f"A file of {_NAME}")
        content = content.removeprefix(BYTE_ORDER_MARK.encode())  # as it is read
        name = path.relative_to(folder).as_posix()
        digest.update(f"{len(name.encode())} {name} {len(content)} ".encode())
        digest.update(content)
    return {"kind": "text", "sha256": digest.hexdigest()}


def _folder(source: str, name: str) -> Path:
    folder = here(name, source) if source else Path(source)
    if not source or not folder.is_dir():
        raise bad_value(name, source, _ALLOWED)
    if (folder / manifest.NAME).is_file():
        raise InputError(
            f"{name} is {source!r}, a folder of tokenised shards; give it as data.path."
        )
    return folder


def _text_files(folder: Path, name: str) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not paths:
        raise InputError(f"{name} is {str(folder)!r}, but that folder holds no .txt file.")
    return paths
