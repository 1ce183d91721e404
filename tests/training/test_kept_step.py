"""A step that is read from disk: the same one, and only where it is the same."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lazyattn import compile_cache, sharding
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.experiment import from_config_dict
from lazyattn.sharding import MeshConfig
from lazyattn.training import kept_step, remat
from lazyattn.training.optimizer import make_optimizer
from lazyattn.training.step import TrainStep
from tests.training import tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Returns an experiment, its mesh, and what makes its state."""
    config = tiny.get_config(tiny.write_text(tmp_path_factory.mktemp("text")))
    config.model.num_layers = 1
    experiment = from_config_dict(config)
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=1))
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    return experiment, mesh, make_state_factory(experiment, mesh, optimizer)


@pytest.fixture
def made(parts):
    """Returns the same, and what makes a step that is quickly compiled, and how often it did."""
    count = []

    def make():
        count.append(1)
        step = jax.jit(lambda state, batch: (state, {"sum": batch["inputs"].sum()}))
        return TrainStep(step, parts[1]), ["a line"]

    return *parts, make, count


@pytest.fixture
def really_made(parts):
    """Returns the same with the trainer's step."""
    experiment, mesh, factory = parts
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    count = []

    def make():
        count.append(1)
        state = factory.shardings, factory.abstract
        return remat.make_step(experiment, mesh, optimizer, *state)[0], ["a line"]

    return *parts, make, count


@pytest.fixture
def folder(tmp_path):
    names = (
        *("jax_enable_compilation_cache", "jax_compilation_cache_dir"),
        *("jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"),
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    compile_cache.use(tmp_path, limit=2**30)
    # JAX doesn't hand out a program that it has read itself.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    compilation_cache.reset_cache()
    yield tmp_path / "steps"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _read_or_make(made, **settings):
    *_, make, count = made
    before = len(count)
    step, said = _or_made(_kept(made, **settings), made, make)
    assert said == ["a line"]
    return step, len(count) - before


def _kept(made, **settings):
    experiment, mesh, *_ = made
    return kept_step.KeptStep(experiment, mesh, **settings)


def _or_made(kept, made, make):
    found = kept.or_made(make, made[2].abstract)
    if kept._folder is not None:
        kept._pool.shutdown()
    return found


def _check_same(made):
    first, times = _read_or_make(made)
    assert times == 1
    second, times = _read_or_make(made)
    assert times == 0
    expected, found = _two_steps(made, first), _two_steps(made, second)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _two_steps(made, step):
    experiment, mesh, factory, *_ = made
    rows, length = experiment.data.batch_size, experiment.data.sequence_length
    tokens = np.random.default_rng(0).integers(280, size=(rows, length + 1), dtype=np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }
    state = factory.create()
    for _ in range(2):
        state, metrics = step(state, sharding.shard_batch(batch, mesh))
    return jax.device_get((state, metrics))


@pytest.mark.slow
def test_a_step_that_was_kept_is_the_same_step(really_made, folder):
    _check_same(really_made)


def test_a_step_is_kept(made, folder):
    _check_same(made)
    assert len(list(folder.iterdir())) == 1
    # Another one is not it, and a file cut short is none.
    assert _read_or_make(made, kind="another")[1] == 1
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert _read_or_make(made)[1] == 1 and _read_or_make(made)[1] == 0


def test_what_makes_another_step(made, monkeypatch):
    experiment, mesh, *_ = made

    def key(experiment=experiment):
        return kept_step._name(kept_step._facts(experiment, mesh, ""))

    before = key()
    assert before == key()
    optimizer = dataclasses.replace(experiment.optimizer, learning_rate=0.5)
    changed = dataclasses.replace(experiment, optimizer=optimizer)
    assert key(changed) != before
    monkeypatch.setenv("XLA_FLAGS", "--xla_anything")
    assert key() != before
    monkeypatch.undo()
    with jax.default_matmul_precision("float32"):
        assert key() != before
    monkeypatch.setattr(kept_step.Path, "read_bytes", lambda path: b"changed")
    assert key() != before


def test_the_oldest_goes_first(made, folder, monkeypatch):
    monkeypatch.setattr(kept_step, "_NUMBER", 2)
    for kind in ("a", "b", "c"):
        _read_or_make(made, kind=kind)
    assert len(list(folder.iterdir())) == 2
    assert _read_or_make(made, kind="c")[1] == 0 and _read_or_make(made, kind="a")[1] == 1


def test_what_jax_sets_when_it_imports_mosaic_does_not_count(made, folder, monkeypatch):
    assert _read_or_make(made)[1] == 1
    for name in ("CUDA_ROOT", "RUNTIME_LIB_PATH", "NVSHMEM_BC_PATH", "NVSHMEM_SO_PATH"):
        monkeypatch.setenv(f"MOSAIC_GPU_{name}", "/elsewhere")
    assert _read_or_make(made)[1] == 0
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    assert _read_or_make(made)[1] == 1


def test_mosaic_is_there_when_a_gpu_s_step_is_read(made, folder, monkeypatch):
    assert _read_or_make(made)[1] == 1
    order = []

    class Gpu:
        platform = "gpu"
        client = jax.devices()[0].client

    class Mesh:
        devices = np.array([Gpu()])

    monkeypatch.setattr(kept_step.gpu, "import_runtime", lambda: order.append("runtime"))
    monkeypatch.setattr(
        kept_step.serialize_executable,
        "deserialize_and_load",
        lambda *_: order.append("read"),
    )
    (path,) = folder.iterdir()
    kept_step._read(path, Mesh(), {})
    assert order == ["runtime", "read"]


def test_without_a_folder_of_ours_nothing_is_kept(made, tmp_path):
    assert _read_or_make(made)[1] == 1 and _read_or_make(made)[1] == 1
    assert not list(tmp_path.iterdir())


def test_a_cpu_s_program_that_jax_had_read_is_not_kept(made, folder):
    *_, make, _ = made

    def read():
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        return make()

    _or_made(_kept(made), made, read)
    assert not list(folder.glob("*"))
    _or_made(_kept(made), made, make)
    assert len(list(folder.glob("*"))) == 1
