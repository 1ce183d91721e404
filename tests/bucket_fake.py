"""A bucket of S3 in memory, for what needs no emulator."""

import importlib.machinery
import importlib.util
import sys

import fsspec.config
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

URL = "s3://bucket"


class Store(MemoryFileSystem):
    """Objects by their names; it counts what is read."""

    protocol = ("s3",)
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    reads = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("s3://").strip("/")

    def find(self, path, detail=False, **_):
        found = super().find(path, detail=True)
        for name, each in found.items():
            each["LastModified"] = self.store[name].modified
        return found if detail else list(found)

    def get_file(self, path, target, **_):
        self.reads.append(self._strip_protocol(path))
        with open(target, "wb") as file:
            file.write(self.cat_file(path))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket, and a cache of one's own."""
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("s3fs", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "s3fs" else find(name)
    )
    monkeypatch.setenv("LAZYATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Store)
    for cache in (Store.store, Store.reads):
        cache.clear()
    Store.pseudo_dirs[:] = [""]
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Store
    backend.fsspec_backend._get_filesystem.cache_clear()
