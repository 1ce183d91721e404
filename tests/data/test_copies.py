"""Copies on this machine of what lies in a bucket."""

import datetime
import shutil

import pytest

from lazyattn import buckets
from lazyattn.data import copies
from lazyattn.errors import InputError
from tests.bucket_fake import URL, Store, bucket

__all__ = ["bucket"]


def _put(name, content, when=None):
    store = Store(skip_instance_cache=True)
    store.pipe_file(f"bucket/{name}", content.encode())
    if when is not None:
        store.store[f"bucket/{name}"].modified = when


def _files(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_path_on_this_machine_is_itself(tmp_path):
    assert copies.here("--text", str(tmp_path)) == tmp_path


def test_a_folder_is_copied_once_and_then_what_has_changed(bucket, tmp_path):
    _put("data/a.txt", "a")
    _put("data/more/b.txt", "b")
    _put("database", "another")
    found = copies.here("--text", f"{URL}/data")
    assert found == tmp_path / "cache" / "copies" / "s3" / "bucket" / "data"
    assert _files(found) == {"a.txt": "a", "more/b.txt": "b"}
    bucket.reads.clear()
    assert copies.here("--text", f"{URL}/data/") == found and bucket.reads == []
    _put("data/a.txt", "A", datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC))
    _put("data/c.txt", "c")
    Store.store.pop("bucket/data/more/b.txt")
    copies.here("--text", f"{URL}/data")
    assert sorted(bucket.reads) == ["bucket/data/a.txt", "bucket/data/c.txt"]
    assert _files(found) == {"a.txt": "A", "c.txt": "c"}


def test_a_file_that_becomes_a_folder(bucket):
    _put("x", "one")
    assert copies.here("--text", f"{URL}/x").read_text() == "one"
    Store.store.clear()
    _put("x/a.txt", "two")
    assert _files(copies.here("--text", f"{URL}/x")) == {"a.txt": "two"}
    Store.store.clear()
    _put("x", "three")
    assert copies.here("--text", f"{URL}/x").read_text() == "three"


def test_what_is_left_out(bucket):
    for name in ("train-1", "validation-1", "manifest.json"):
        _put(f"data/{name}", name)
    found = copies.here("--text", f"{URL}/data", without="train-*")
    assert sorted(_files(found)) == ["manifest.json", "validation-1"]
    copies.here("data.path", f"{URL}/data")
    copies.here("--text", f"{URL}/data", without="train-*")
    assert sorted(_files(found)) == ["manifest.json", "train-1", "validation-1"]


def test_a_copy_that_failed_is_finished(bucket, monkeypatch):
    _put("data/a", "a")
    _put("data/b", "b")
    download = buckets.download

    def fails(name, path, target):
        if path.name == "b":
            target.write_text("half")
            raise OSError("the disk is gone")
        download(name, path, target)

    with monkeypatch.context() as patched:
        patched.setattr(buckets, "download", fails)
        with pytest.raises(InputError, match=r"^data.path is '.*', but no copy .* disk is gone"):
            copies.here("data.path", f"{URL}/data")
    bucket.reads.clear()
    assert _files(copies.here("data.path", f"{URL}/data")) == {"a": "a", "b": "b"}
    assert bucket.reads == ["bucket/data/b"]


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("nothing", r"it must be a file or a folder that is there\.$"),
        ("dots", r"has an object '\.\./\.\./x'; remove it\.$"),
        ("full", r"of which 0\.0 GB are not on this machine yet, .* or mount the bucket"),
        ("fails", r"but can't be read \(it is forbidden: no\)\.$"),
    ],
)
def test_one_sentence(bucket, monkeypatch, why, message):
    if why != "nothing":
        _put("data/a.txt", "a")
    if why == "dots":
        Store.store["bucket/data/../../x"] = Store.store["bucket/data/a.txt"]
    if why == "full":
        usage = shutil.disk_usage("/")._replace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if why == "fails":

        def refuse(self, *arguments, **named):
            raise PermissionError("no")

        monkeypatch.setattr(Store, "find", refuse)
    with pytest.raises(InputError, match=rf"^data.source is 's3://bucket/data'.*{message}"):
        copies.here("data.source", f"{URL}/data")
