import dataclasses
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import patience
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import TrainState
from lazyattn.errors import InputError
from lazyattn.sharding import MeshConfig, make_mesh, shard_batch
from tests.training import toy

# Tensorstore calls back into an event loop that a failed read has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _state(step):
    """Returns a state large enough that its arrays get data files of their own."""
    random = np.random.default_rng(step)
    params = {
        "embedding": jnp.asarray(random.normal(size=(64, 48)), jnp.float32),
        "final_norm": jnp.asarray(random.normal(size=5), jnp.float32),
    }
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=({"mu": jax.tree.map(lambda x: -x, params)}, {"count": jnp.asarray(step)}),
        rng=jax.random.PRNGKey(step),
        nonfinite_total=jnp.asarray(3, jnp.int32),
        nonfinite_in_row=jnp.asarray(1, jnp.int32),
    )


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _save(folder, steps, **settings):
    with Checkpoints(folder, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step), {"index": step}, {"training": {"steps": 9}})


def _assert_is(restored, step):
    jax.tree.map(np.testing.assert_array_equal, restored.state, _state(step))
    assert restored.data == {"index": step}
    assert restored.experiment == {"training": {"steps": 9}}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    _save(folder, [1, 2], keep=2)
    return folder


@pytest.fixture
def workdir(two_steps, tmp_path):
    """A run with checkpoints 1 and 2 to destroy."""
    return shutil.copytree(two_steps, tmp_path / "run")


def test_round_trip(two_steps):
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 1]
        _assert_is(checkpoints.restore(_abstract(_state(0))), 2)
        assert checkpoints.newest_experiment() == (2, {"training": {"steps": 9}})


def test_a_save_that_is_waited_for_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(patience, "NOTICE", 0.1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), {}, {})
        finish = checkpoints._manager.wait_until_finished
        slow = [lambda: time.sleep(0.4), finish]
        monkeypatch.setattr(
            checkpoints._manager, "wait_until_finished", lambda: [each() for each in slow]
        )
        assert checkpoints.wait() is None
    assert (
        "Waiting for the checkpoint of step 1 to be written: 0 s so far." in capfd.readouterr().err
    )


def test_part_of_a_state(two_steps):
    abstract = dataclasses.replace(_abstract(_state(0)), opt_state=None)
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        state = checkpoints.restore(abstract).state
    assert state.opt_state is None
    jax.tree.map(np.testing.assert_array_equal, state.params, _state(2).params)


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(_abstract(_state(0))) is None
        assert checkpoints.newest_experiment() is None


def test_keeps_the_newest_and_every_kth(tmp_path):
    _save(tmp_path, [1, 2, 3, 4, 5, 6, 7], keep=2, keep_every=3)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [7, 6, 3]


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, _state(2), {"index": 2}, {"training": {"steps": 9}})
        checkpoints.save(2, _state(5), {"index": 5}, {})
        checkpoints.wait()
        _assert_is(checkpoints.restore(_abstract(_state(0))), 2)


def test_leftovers_of_a_killed_save_are_removed(workdir):
    leftover = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-7"
    leftover.mkdir()
    (leftover / "half").write_text("of a checkpoint")
    with Checkpoints(workdir, keep=5) as checkpoints:
        assert checkpoints.steps() == [2, 1]
        checkpoints.save(3, _state(3), {"index": 3}, {"training": {"steps": 9}})
        checkpoints.wait()
        _assert_is(checkpoints.restore(_abstract(_state(0))), 3)
    assert not leftover.exists()


def test_donating_the_state_does_not_touch_a_save_under_way(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    factory, step = toy.make(mesh)
    state, expected = factory.create(), {}
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for n in range(1, 6):
            state, _ = step(state, shard_batch(toy.batch(n), mesh))
            expected[n] = jax.tree.map(np.array, state)
            checkpoints.save(n, state, None, {})
            for _ in range(3):  # overwrite the buffers while the save is running
                state, _ = step(state, shard_batch(toy.batch(n), mesh))
            state = dataclasses.replace(state, step=state.step - 3)
        for n in (5, 4, 3, 2, 1):
            checkpoints.wait()
            jax.tree.map(
                np.testing.assert_array_equal,
                checkpoints.restore(factory.abstract).state,
                expected[n],
            )
            shutil.rmtree(checkpoints.folder / str(n))
            checkpoints.reload()


# Files of a checkpoint that must be whole for it to be used; the rest are bookkeeping.
NEEDED = ["data/metadata", "experiment/metadata", "state/_METADATA", "state/manifest.ocdbt"]


@pytest.mark.parametrize("keep_bytes", [0, 0.5, -1])
@pytest.mark.parametrize("name", NEEDED)
def test_a_torn_checkpoint_falls_back_to_the_one_before(workdir, name, keep_bytes, caplog):
    _truncate(workdir / "checkpoints" / "2" / name, keep_bytes)
    with Checkpoints(workdir) as checkpoints:
        _assert_is(checkpoints.restore(_abstract(_state(0))), 1)
        assert checkpoints.steps() == [1]
        assert "checkpoint 2 in" in caplog.text and "trying the one before" in caplog.text
        assert (workdir / "damaged" / "2-1" / name).exists()
        # The step can be written again, and is now sound.
        checkpoints.save(2, _state(2), {"index": 2}, {"training": {"steps": 9}})
        checkpoints.wait()
        _assert_is(checkpoints.restore(_abstract(_state(0))), 2)


@pytest.mark.parametrize("keep_bytes", [None, 0, 0.5, -1])
def test_whatever_file_is_torn_what_comes_back_is_right(two_steps, tmp_path, keep_bytes):
    """Truncates (None: deletes) every file in turn, the arrays' data among them."""
    files = [path for path in (two_steps / "checkpoints" / "2").rglob("*") if path.is_file()]
    steps = []
    for number, path in enumerate(sorted(files)):
        folder = shutil.copytree(two_steps, tmp_path / str(number))
        torn = folder / path.relative_to(two_steps)
        torn.unlink() if keep_bytes is None else _truncate(torn, keep_bytes)
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(_abstract(_state(0)))
        steps.append(int(restored.state.step))
        _assert_is(restored, steps[-1])
    # Some files must have mattered: the JSON items, the tree's, and the arrays' data.
    assert steps.count(1) > len(NEEDED)


def test_a_deleted_checkpoint_falls_back_to_the_one_before(workdir):
    shutil.rmtree(workdir / "checkpoints" / "2")
    with Checkpoints(workdir) as checkpoints:
        _assert_is(checkpoints.restore(_abstract(_state(0))), 1)


def test_a_checkpoint_of_another_step_is_not_believed(workdir):
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "2")
    with Checkpoints(workdir) as checkpoints:
        _assert_is(checkpoints.restore(_abstract(_state(0))), 1)


def test_reading_only_leaves_a_torn_checkpoint_where_it_is(workdir):
    _truncate(workdir / "checkpoints" / "2" / "data" / "metadata", 0)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        _assert_is(checkpoints.restore(_abstract(_state(0))), 1)
    assert (workdir / "checkpoints" / "2").exists()


def test_no_readable_checkpoint_is_an_error_and_nothing_is_moved(workdir):
    for step in ("1", "2"):
        _truncate(workdir / "checkpoints" / step / "experiment" / "metadata", 0.5)
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(InputError, match=r"none of the checkpoints in .* can be read .*step 2"):
            checkpoints.restore(_abstract(_state(0)))
        assert checkpoints.steps() == [2, 1]


def _truncate(path, keep_bytes):
    """Keeps a share of a file's bytes; -1: all but the last byte."""
    size = path.stat().st_size
    os.truncate(path, size - 1 if keep_bytes == -1 else int(size * keep_bytes))
