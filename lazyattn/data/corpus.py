"""The embedded corpus: the English that every Python carries."""

import ast
import dataclasses
import hashlib
import importlib.machinery
import pkgutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazyattn.errors import InputError

# Not prose: tests and their fixtures, generated code pages, examples of code to be
# transformed; and the topics themselves, which are no docstrings.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "pydoc_data"}

# In characters. Shorter docstrings are mostly of the kind "Return the name.".
_SHORTEST_DOCSTRING = 24
_SHORTEST_DOCUMENT = 200


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and a name for it that never changes.

    Attributes:
      id: unique within its source; the split it belongs to depends on it alone.
      text: valid Unicode (no lone surrogates).
    """

    id: str
    text: str


def stdlib_documents(search_path: Sequence[str] | None = None) -> Iterator[Document]:
    """Yields the embedded corpus: Python's language reference and its docstrings.

    One document is a topic of `pydoc_data`, or the docstrings of one module of the
    standard library joined in source order. The modules are read, never imported;
    those without source are skipped. A docstring that occurred before is dropped,
    and so are very short ones. The order depends on the Python installation alone.

    Args:
      search_path: folders and zip files to look for modules in; None: where this
        Python keeps its standard library.

    Raises:
      InputError: if there is no text at all, as in a stripped installation.
    """
    found = False
    seen: set[bytes] = set()
    for name, text in sorted(_topics().items()):
        if _is_new(text, _SHORTEST_DOCUMENT, seen):
            found = True
            yield Document(f"topics/{name}", text)
    for name, source in _module_sources(search_path or _stdlib_path()):
        kept = [t for t in _docstrings(source) if _is_new(t, _SHORTEST_DOCSTRING, seen)]
        text = "\n\n".join(kept)
        if len(text) >= _SHORTEST_DOCUMENT:
            found = True
            yield Document(f"modules/{name}", text)
    if not found:
        raise InputError(
            "data.source is 'stdlib', but this Python carries neither pydoc_data nor the"
            " source of its standard library; give a folder of .txt files instead."
        )


def is_validation(document_id: str, fraction: float) -> bool:
    """Returns whether a document is held out; a document's answer never changes.

    Args:
      document_id: `Document.id`.
      fraction: share of all documents to hold out. A document held out at one
        fraction is held out at every larger one.
    """
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _topics() -> dict[str, str]:
    """Returns the texts of `help("TOPICS")` by name; none where they aren't installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: text.strip() for name, text in topics.items()}


def _stdlib_path() -> list[str]:
    zipped = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    zips = [entry for entry in sys.path if Path(entry).name == zipped]
    return [*zips, sysconfig.get_path("stdlib")]


def _module_sources(search_path: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (module name, source) of the standard library, sorted by name."""
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        yield from _walk(name, search_path)


def _walk(name: str, search_path: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields a module and what is below it, importing nothing."""
    spec = importlib.machinery.PathFinder.find_spec(name, list(search_path))
    if spec is None:
        return
    try:
        source = spec.loader.get_source(name)  # type: ignore[union-attr]
    except (AttributeError, ImportError, SyntaxError, UnicodeDecodeError):
        source = None  # an extension module, compiled only, or of unknown encoding
    if source:
        yield name, source
    if spec.submodule_search_locations:
        below = list(spec.submodule_search_locations)
        for child in sorted({module.name for module in pkgutil.iter_modules(below)}):
            if child not in _LEFT_OUT:
                yield from _walk(f"{name}.{child}", below)


def _docstrings(source: str) -> Iterator[str]:
    """Yields a module's docstrings in source order, indentation removed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield text
        pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _is_new(text: str, shortest: int, seen: set[bytes]) -> bool:
    """Returns whether to keep a text, and adds it to the digests in `seen`."""
    if len(text) < shortest:
        return False
    try:
        digest = hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError:  # a lone surrogate: an example of bad text
        return False
    if digest in seen:
        return False
    seen.add(digest)
    return True
