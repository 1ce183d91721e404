"""Paths in buckets, without a bucket: what they are called, and logs that grow in parts."""

import importlib.util
import threading

import pytest

from lazyattn import buckets, paths, patience
from lazyattn.errors import InputError
from lazyattn.training import append_object
from lazyattn.training.append_object import AppendedObject
from lazyattn.training.metrics import JsonLines
from tests.bucket_fake import URL, bucket

__all__ = ["bucket"]


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("gs://b/run", True),
        ("s3://b/run", True),
        ("hf://b/run", False),
        ("gs:/b/run", False),
        ("runs/gs://b", False),
        ("/runs/a", False),
    ],
)
def test_what_is_in_a_bucket(path, is_one):
    assert buckets.is_bucket(path) == is_one


@pytest.mark.parametrize(("kind", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, kind, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    extra = {"gs": "gcs", "s3": "s3"}[kind]
    with pytest.raises(InputError, match=rf"needs the package {package}; .*lazyattn\[{extra}\]"):
        paths.folder("--output", f"{kind}://b/x")


def test_a_path_in_a_bucket_keeps_its_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    run = paths.folder("--workdir", "gs://b/runs/one/")
    assert str(run / "checkpoints") == "gs://b/runs/one/checkpoints"
    assert (run / "checkpoints" / "20").parents[1].name == "one"
    assert buckets.is_bucket(run / "metrics.jsonl")
    with pytest.raises(InputError, match=r"^--workdir is 'gs://', but it must be gs://BUCKET"):
        paths.folder("--workdir", "gs://")
    assert str(paths.folder("--workdir", "s3://b/x") / "y") == "s3://b/x/y"
    with pytest.raises(InputError, match=r"^--workdir is 'az://b/x', .* or s3://BUCKET/PATH;"):
        paths.folder("--workdir", "az://b/x")


def test_where_a_mode_writes(bucket):
    assert str(paths.results(None, "runs/a", "eval")) == "runs/a/eval"
    assert str(paths.results("out", f"{URL}/a", "eval")) == "out"
    assert str(paths.results(None, f"{URL}/a", "eval")) == f"{URL}/a/eval"
    assert bucket.store == {}  # a trial leaves nothing
    with buckets.written(paths.results(f"{URL}/b", "runs/a", "eval")) as work:
        (work / "x.md").write_text("x")
    assert list(bucket.store) == ["bucket/b/x.md"]


def test_a_bucket_that_does_not_answer_is_one_sentence(bucket, monkeypatch, capfd):
    monkeypatch.setattr(patience, "NOTICE", 0.05)
    monkeypatch.setattr(buckets, "_FIRST_ANSWER", 0.2)
    monkeypatch.setattr(buckets, "_answered", set())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")

    def wait(*_, **__):
        threading.Event().wait()

    for name in ("pipe_file", "open", "exists", "find", "glob"):
        monkeypatch.setattr(bucket, name, wait)
    run = paths.folder("--workdir", f"{URL}/run")
    asks = (
        lambda: buckets.check_writable("--workdir", run),
        lambda: buckets.check_readable("--workdir", run),
        lambda: buckets.objects("--workdir", run),
        lambda: buckets.matches("--workdir", f"{URL}/run"),
    )
    for ask in asks:
        with pytest.raises(InputError, match=r"\(it does not answer: no answer in 0.2 s\)\.$"):
            ask()
        said = capfd.readouterr().err
        at = f"the bucket of --workdir, '{URL}/run' at http://127.0.0.1:1 (Connection refused)"
        assert said == f"Waiting for an answer of {at}: 0 s so far, 0.2 s at most.\n"


def test_a_folder_is_moved(bucket):
    source = paths.folder("--workdir", f"{URL}/run/24")
    for name in ("a", "sub/b"):
        (source / name).write_text(name)
    buckets.move(source, source.parent / "damaged" / "24-1")
    assert sorted(bucket.store) == ["bucket/run/damaged/24-1/a", "bucket/run/damaged/24-1/sub/b"]


def test_a_folder_is_uploaded_with_what_readers_look_for_last(bucket, tmp_path, monkeypatch):
    for name in ("a", "sub/b", "manifest", "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    buckets.upload(tmp_path, paths.folder("--output", f"{URL}/x"), last="manifest")
    assert list(bucket.store)[-1] == "bucket/x/manifest" and len(bucket.store) == 4

    def full(self, *arguments, **named):
        raise PermissionError("no")

    bucket.store.clear()
    monkeypatch.setattr(bucket, "put_file", full)
    with pytest.raises(InputError, match=r"^'s3://bucket/x' can't be written \(it is forbidden"):
        buckets.upload(tmp_path, paths.folder("--output", f"{URL}/x"), last="manifest")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log's path that is taken for one in a bucket."""
    monkeypatch.setattr(buckets, "is_bucket", lambda path: True)
    monkeypatch.setattr(append_object, "PERIOD", 0.0)
    path = tmp_path / "metrics.jsonl"
    buckets.parts_folder(path).mkdir()
    return path


def _parts(log):
    return sorted(part.name for part in buckets.parts_folder(log).iterdir())


def test_lines_go_into_parts_and_at_the_end_into_one_object(log):
    file = AppendedObject(log)
    for line in (b"1\n", b"2\n"):
        file.write(line)
        file.sync()
    assert not log.exists() and len(_parts(log)) == 2
    assert buckets.read_log(log) == b"1\n2\n"
    file.write(b"3\n")
    file.close()
    assert log.read_bytes() == b"1\n2\n3\n" and _parts(log) == []


def test_many_parts_become_one_on_the_way(log, monkeypatch):
    monkeypatch.setattr(append_object, "MOST_PARTS", 3)
    file = AppendedObject(log)
    for number in range(7):
        file.write(b"%d\n" % number)
        file.sync()
    assert log.read_bytes() == b"0\n1\n2\n3\n4\n5\n" and _parts(log) == ["00000001"]
    assert buckets.read_log(log) == b"0\n1\n2\n3\n4\n5\n6\n"
    file.close()


def test_a_bucket_that_fails_for_a_while_loses_no_line(log, caplog):
    folder = buckets.parts_folder(log)
    folder.rmdir()
    folder.write_text("no folder")
    file = AppendedObject(log)
    for line in (b"1\n", b"2\n"):
        file.write(line)
        file.sync()
    assert sum("can't be written" in record.message for record in caplog.records) == 1
    folder.unlink()
    folder.mkdir()
    file.write(b"3\n")
    file.close()
    assert log.read_bytes() == b"1\n2\n3\n"


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_killed_while_parts_become_one(log, removed):
    parts = [b'{"step": 2, "tokens": 1}\n', b'{"step": 3, "tokens": 1}\n']
    whole = b'{"step": 1, "tokens": 1}\n' + b"".join(parts)
    log.write_bytes(whole)
    for number, part in enumerate(parts[removed:], removed + 1):
        (buckets.parts_folder(log) / f"{number:08d}").write_bytes(part)
    assert buckets.read_log(log) == whole
    lines = JsonLines(log, 2)  # resumed at step 2
    assert lines.tokens == 2 and _parts(log) == []
    lines.write({"step": 3, "loss": float("nan")})
    lines.close()
    assert log.read_bytes().splitlines()[2] == b'{"step": 3, "loss": null}'
