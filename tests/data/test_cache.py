import json
import logging
import os
import time
from pathlib import Path

import pytest

from lazyattn.data import cache
from lazyattn.errors import InputError


class Builder:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "a.bin").write_bytes(b"hello")
        (folder / "b.bin").write_bytes(b"world")
        return {"call": self.calls}


def test_built_once_then_found(tmp_path):
    build = Builder()
    for _ in range(2):
        path, content = cache.entry(tmp_path / "deep" / "cache", "name", build)
        assert content == {"call": 1}
        assert path == tmp_path / "deep" / "cache" / "name"
        assert (path / "a.bin").read_bytes() == b"hello"
    assert os.listdir(path.parent) == ["name"]  # no scaffolding is left


def _truncate(path):
    (path / "a.bin").write_bytes(b"hell")


def _flip(path):
    (path / "b.bin").write_bytes(b"w0rld")


def _remove(path):
    (path / "b.bin").unlink()


def _remove_manifest(path):
    (path / cache.MANIFEST).unlink()


def _truncate_manifest(path):
    text = (path / cache.MANIFEST).read_text()
    (path / cache.MANIFEST).write_text(text[: len(text) // 2])


def _strange_manifest(path):
    (path / cache.MANIFEST).write_text(json.dumps({"files": {}}))


@pytest.mark.parametrize(
    "harm", [_truncate, _flip, _remove, _remove_manifest, _truncate_manifest, _strange_manifest]
)
def test_damage_is_noticed_and_mended_with_a_warning(tmp_path, caplog, harm):
    build = Builder()
    path, _ = cache.entry(tmp_path, "name", build)
    harm(path)
    with caplog.at_level(logging.WARNING, logger="absl"):
        _, content = cache.entry(tmp_path, "name", build)
    assert content == {"call": 2}
    assert (path / "b.bin").read_bytes() == b"world"
    assert "is damaged" in caplog.text
    assert os.listdir(tmp_path) == ["name"]
    assert cache.entry(tmp_path, "name", build)[1] == {"call": 2}


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "a.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry(tmp_path, "name", build)
    assert os.listdir(tmp_path) == []


def test_of_two_builders_at_once_the_first_wins(tmp_path):
    inner = Builder()

    def outer(folder):
        cache.entry(tmp_path, "name", inner)
        (folder / "a.bin").write_bytes(b"later")
        return {"call": "outer"}

    path, content = cache.entry(tmp_path, "name", outer)
    assert content == {"call": 1}
    assert (path / "a.bin").read_bytes() == b"hello"
    assert os.listdir(tmp_path) == ["name"]


def test_old_leftovers_are_swept_and_young_ones_spared(tmp_path):
    for name, age in {".building-old": 7200, ".building-young": 60}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.entry(tmp_path, "name", Builder())
    assert sorted(os.listdir(tmp_path)) == [".building-young", "name"]


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"^The data cache folder .* \(Not a directory\); set"):
        cache.entry(tmp_path / "file" / "cache", "name", Builder())


def test_a_read_only_cache_is_still_read(tmp_path, monkeypatch):
    cache.entry(tmp_path, "name", Builder())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert cache.entry(tmp_path, "name", Builder())[1] == {"call": 1}
    with pytest.raises(InputError, match=r"cannot be written to \(Permission denied\)"):
        cache.entry(tmp_path, "other", Builder())


def test_default_place(monkeypatch, tmp_path):
    for name in ("LAZYATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "lazyattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.default_cache_dir() == Path("/xdg/lazyattn")
    monkeypatch.setenv("LAZYATTN_CACHE", "~/mine")
    assert cache.default_cache_dir() == tmp_path / "mine"
