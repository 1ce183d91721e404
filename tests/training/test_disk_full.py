"""A disk that fills up under a run: a real one of a few megabytes, in memory."""

import contextlib
import json
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.checkpoint.manager import Checkpoints, SaveError
from lazyattn.training.log import RunLog
from tests.training import toy
from tests.training.test_loop import MESH, _steps, _train

FILLING = "filling"


@pytest.fixture
def disk(tmp_path):
    """A file system with room for some checkpoints; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder, after):
    """Writes until no byte more fits, when the checkpoint of step `after` is there."""
    deadline = time.monotonic() + 60
    while not (folder / "run" / "checkpoints" / str(after)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with contextlib.suppress(OSError), open(folder / FILLING, "ab", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.fixture(scope="module")
def toy_step():
    return toy.make(MESH)


def _at_step(monkeypatch, actions):
    """Does something as soon as a step is in the log."""
    write = RunLog.write

    def acting(log, record):
        write(log, record)
        actions.get(record["step"], lambda: None)()

    monkeypatch.setattr(RunLog, "write", acting)


def test_training_goes_on_and_saves_again_when_there_is_room(
    disk, toy_step, tmp_path, monkeypatch, caplog, capfd
):
    run = disk / "run"
    free = lambda: (disk / FILLING).unlink()  # noqa: E731
    remove = Checkpoints._remove_leftovers

    def removing(checkpoints):
        # What is removed leaves room, now and then enough for the next save.
        remove(checkpoints)
        if (disk / FILLING).exists():
            _fill(disk, 3)

    monkeypatch.setattr(Checkpoints, "_remove_leftovers", removing)
    _at_step(monkeypatch, {5: lambda: _fill(disk, 3), 11: free})
    state, _ = _train(run, toy_step, checkpoint_every=3, keep=2, max_failed_saves=3)
    for part in ("checkpoint of step 6 could not", "step 9", "last good one is of step 3"):
        assert part in caplog.text
    assert "No space left on device" in caplog.text
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert _steps(run) == [12, 3]
    assert not list((run / "checkpoints").glob("*tmp*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    monkeypatch.undo()
    whole, _ = _train(tmp_path / "whole", toy_step)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_training_stops_by_setting_and_goes_on_from_the_last_good_checkpoint(
    disk, toy_step, tmp_path, monkeypatch
):
    run = disk / "run"
    _at_step(monkeypatch, {5: lambda: _fill(disk, 3)})
    with pytest.raises(SaveError) as caught:
        _train(run, toy_step, checkpoint_every=3, max_failed_saves=1)
    message = str(caught.value)
    for part in (
        *("Stopped after a save that failed (training.max_failed_saves)", "step 6"),
        *("No space left on device", "the last good one is of step 3."),
    ):
        assert part in message
    assert "\n" not in message
    assert _steps(run) == [3]
    monkeypatch.undo()
    (disk / FILLING).unlink()
    state, _ = _train(run, toy_step, checkpoint_every=3)
    whole, _ = _train(tmp_path / "whole", toy_step)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_a_last_checkpoint_that_can_not_be_written_is_an_error(disk, toy_step, monkeypatch):
    run = disk / "run"
    _at_step(monkeypatch, {11: lambda: _fill(disk, 10)})
    with pytest.raises(SaveError, match=r"Stopped at step 12, but .* good one is of step 10\."):
        _train(run, toy_step)
    assert _steps(run) == [10, 5]


def test_arrays_larger_than_the_room_left(disk, caplog):
    """Not a byte short of room but a megabyte: what fails is the arrays' own writing."""
    factory, _ = toy.make(MESH)
    state = factory.create()
    big = {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(1024, 2048)))}
    with Checkpoints(disk / "run", keep=2) as checkpoints:
        state = state.replace(step=state.step + 1)
        checkpoints.save(1, state, None, {})
        assert checkpoints.wait() is None
        checkpoints.save(2, state.replace(params=big), None, {})
        assert "the last good one is of step 1" in checkpoints.wait()
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(factory.abstract)
        jax.tree.map(np.testing.assert_array_equal, restored.state.params, state.params)
    assert shutil.disk_usage(disk).free > 2**21  # nothing of the failed one is left
