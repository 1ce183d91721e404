import logging
import os
import time
from pathlib import Path

import pytest

from lazyattn.data import cache, manifest
from lazyattn.data.shards import Shards
from lazyattn.errors import InputError
from tests.data.shard_folders import write_folder


class Builder:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        write_folder(folder, seed=self.calls, train=12)


def _is_of_call(path, number, tmp_path):
    """Returns whether a folder is what the call of a number builds, all of it."""
    other = tmp_path.parent / f"{tmp_path.name}-{number}"
    write_folder(other, seed=number, train=12)
    return manifest.verify(path, deep=True) == manifest.read(other)


def test_built_once_then_found(tmp_path):
    build = Builder()
    for _ in range(2):
        path = cache.entry(tmp_path / "deep" / "cache", "name", build)
        assert path == tmp_path / "deep" / "cache" / "name"
        assert len(Shards(path, "train")) == 12
    assert build.calls == 1
    assert os.listdir(path.parent) == ["name"]  # no scaffolding is left


SHARD = "train-00001-of-00002.arrayrecord"


def _truncate(path):
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])


def _flip(path):
    content = bytearray((path / SHARD).read_bytes())
    content[-1] ^= 1
    (path / SHARD).write_bytes(content)


def _remove(path):
    (path / "tokenizer.json").unlink()


def _remove_manifest(path):
    (path / manifest.NAME).unlink()


def _truncate_manifest(path):
    text = (path / manifest.NAME).read_text()
    (path / manifest.NAME).write_text(text[: len(text) // 2])


@pytest.mark.parametrize("harm", [_truncate, _flip, _remove, _remove_manifest, _truncate_manifest])
def test_damage_is_noticed_and_mended_with_a_warning(tmp_path, caplog, harm):
    build = Builder()
    path = cache.entry(tmp_path, "name", build)
    harm(path)
    with caplog.at_level(logging.WARNING, logger="absl"):
        cache.entry(tmp_path, "name", build)
    assert build.calls == 2
    assert _is_of_call(path, 2, tmp_path)
    assert "is damaged" in caplog.text and str(path) in caplog.text
    assert os.listdir(tmp_path) == ["name"]
    cache.entry(tmp_path, "name", build)
    assert build.calls == 2


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        folder.mkdir()
        (folder / SHARD).write_bytes(b"half")
        (folder.parent / "beside").write_bytes(b"it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry(tmp_path, "name", build)
    assert os.listdir(tmp_path) == []


def test_of_two_builders_at_once_the_first_wins(tmp_path):
    inner = Builder()

    def outer(folder):
        cache.entry(tmp_path, "name", inner)
        write_folder(folder, seed=7, train=12)

    path = cache.entry(tmp_path, "name", outer)
    assert _is_of_call(path, 1, tmp_path)
    assert os.listdir(tmp_path) == ["name"]


def test_old_leftovers_are_swept_and_young_ones_spared(tmp_path):
    for name, age in {".building-old": 7200, ".building-young": 60}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.entry(tmp_path, "name", Builder())
    assert sorted(os.listdir(tmp_path)) == [".building-young", "name"]


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"^The data cache folder .* \(Not a directory\); give"):
        cache.entry(tmp_path / "file" / "cache", "name", Builder())


def test_a_read_only_cache_is_still_read(tmp_path, monkeypatch):
    cache.entry(tmp_path, "name", Builder())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert cache.entry(tmp_path, "name", Builder()) == tmp_path / "name"
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
