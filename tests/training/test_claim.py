"""A run's folder is one training's at a time, and holds nothing of one that never began."""

import os
import time

import pytest

from lazyattn.errors import InputError
from lazyattn.file_lock import locked
from lazyattn.training import claim_object
from lazyattn.training.claim import LOCK, claimed
from tests.bucket_fake import URL, bucket

__all__ = ["bucket"]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(claim_object, "PERIOD", 0.05)
    monkeypatch.setattr(claim_object, "_SETTLED", 0.0)


def test_a_second_training_is_refused_and_changes_nothing(tmp_path):
    workdir = tmp_path / "run"
    with claimed(workdir) as found:
        assert found == workdir
        with pytest.raises(InputError) as refused, claimed(workdir):
            pass
        assert workdir.is_dir() and (workdir / LOCK).exists()
    text = str(refused.value)
    assert text.startswith(f"--workdir is '{workdir}', but another training is at work there right")
    assert f"process {os.getpid()} on " in text and text.endswith("give another folder.")
    with claimed(workdir):
        pass


def test_by_another_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    refused = pytest.raises(InputError, match="another training is at work")
    with claimed(tmp_path / "run"), refused, claimed(tmp_path / "link"):
        pass


def test_reading_a_run_needs_no_lock(tmp_path):
    """`--mode=eval` and the others may look at a run that is under way."""
    from lazyattn.checkpoint.load import load_trained

    with claimed(tmp_path), pytest.raises(InputError, match="a run with a checkpoint"):
        load_trained(tmp_path)


@pytest.mark.parametrize("error", [InputError("bad"), KeyboardInterrupt(), SystemExit(130)])
def test_what_never_began_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), claimed(tmp_path / "a" / "run") as workdir:
        (workdir / "config.json").write_text("{}")
        (workdir / "checkpoints").mkdir()
        (workdir / "metrics.jsonl").write_text("")
        raise error
    assert os.listdir(tmp_path) == []


def test_what_began_stays(tmp_path):
    for name in ("metrics.jsonl", "checkpoints/4/state"):
        with pytest.raises(InputError), claimed(tmp_path / "run") as workdir:
            (workdir / name).parent.mkdir(parents=True, exist_ok=True)
            (workdir / name).write_text('{"step": 1}\n')
            raise InputError("stopped")
        assert (workdir / name).exists()
        (workdir / name).unlink()


def test_files_of_the_user_stay(tmp_path):
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError), claimed(tmp_path) as workdir:
        (workdir / "tensorboard").mkdir()
        raise InputError("bad")
    assert sorted(os.listdir(tmp_path)) == ["mine.json", "notes"]


def test_prepare_and_train_have_locks_of_the_same_kind(tmp_path):
    refused = pytest.raises(InputError, match="another training")
    with locked(tmp_path / LOCK), refused, claimed(tmp_path):
        pass


def test_a_second_training_in_a_bucket_is_refused_while_the_first_is_at_work(bucket, hasty):
    with claimed(f"{URL}/run") as workdir:
        (workdir / "notes").write_text("1")
        refused = pytest.raises(
            InputError, match=f"training is at work .*process {os.getpid()} on "
        )
        with refused, claimed(f"{URL}/run"):
            pass
        assert f"bucket/run/{LOCK}" in bucket.store
    assert list(bucket.store) == ["bucket/run/notes"]


def test_a_folder_in_a_bucket_that_a_killed_training_left_is_taken_over(bucket, hasty, capfd):
    left = "process 7 on host, since then\nid 3\n"
    bucket().pipe_file(f"bucket/run/{LOCK}", left.encode())
    with claimed(f"{URL}/run"):
        assert f"process {os.getpid()} on " in (bucket().cat_file(f"bucket/run/{LOCK}").decode())
    assert bucket.store == {}
    assert "is of process 7 on host, since then; 0.15 s will show" in capfd.readouterr().err


def test_a_training_in_a_bucket_that_is_robbed_says_so(bucket, hasty, caplog):
    with claimed(f"{URL}/run") as workdir:
        (workdir / LOCK).write_text("process 7 on host\nid 3\n")
        for _ in range(100):
            if caplog.records:
                break
            time.sleep(0.05)
    assert "another training has begun in s3://bucket/run (process 7 on host): " in caplog.text
    assert list(bucket.store) == [f"bucket/run/{LOCK}"]  # it is the other's
