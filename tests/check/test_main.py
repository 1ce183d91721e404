"""`--mode=check`: it does what a run does, keeps nothing, and says in a sentence what is wrong."""

import jax.numpy as jnp
import pytest

from lazyattn.check import main as module
from lazyattn.errors import InputError
from lazyattn.hooks import HOOKS
from lazyattn.training import remat
from lazyattn.training.claim import LOCK, claimed
from tests.training import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def check(experiment, folder, cache):
    return module.check(experiment, folder, cache, HOOKS)


def _files(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != LOCK}  # says who was last


def test_a_new_run(text, cache, tmp_path, capsys):
    assert check(tiny.experiment(text), tmp_path / "runs" / "a", cache) == 0
    assert not (tmp_path / "runs").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("host     ") and "lazyattn 0." in lines[0]
    starts = ("model ", "data ", "devices  1 cpu", "step 1/1  loss", "step 1/1  validation")
    for start in (*starts, "checkpoint  ", "checked in "):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].endswith("--mode=train would start; nothing of this is kept")
    assert not any("sample" in line for line in lines)


@pytest.mark.slow
def test_a_run_that_would_resume(cache, tmp_path, capsys):
    text = tiny.write_text(tmp_path / "text")
    assert tiny.train(tiny.experiment(text, training__steps=2), tmp_path / "run", cache) == 0
    before = _files(tmp_path / "run")
    assert check(tiny.experiment(text, training__steps=4), tmp_path / "run", cache) == 0
    assert "--mode=train would resume after step 2;" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"training.steps is 2, but .* is at step 2 already"):
        check(tiny.experiment(text, training__steps=2), tmp_path / "run", cache)
    with pytest.raises(InputError, match=r"config.model.width is 32, but the checkpoints .* 16"):
        check(tiny.experiment(text, model__width=32), tmp_path / "run", cache)
    (text / "000.txt").write_text("attention may look at nothing. " * 9)
    with pytest.raises(InputError, match=r"data.source is .*, but it does not hold what it held"):
        check(tiny.experiment(text, training__steps=4), tmp_path / "run", cache)
    assert _files(tmp_path / "run") == before


def test_weights_that_a_run_began_with_need_not_be_there(text):
    experiment = tiny.experiment(text, training__init_from="gone")
    assert module._one_step(experiment, resumes=True).training.init_from is None
    assert module._one_step(experiment, resumes=False).training.init_from == "gone"


def test_a_ramp_is_as_short_as_the_run(text):
    experiment = tiny.experiment(text, teaching__bias_steps=1000)
    assert module._one_step(experiment, resumes=False).teaching.bias_steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "/no/such/folder"}, "data.source is '/no/such/folder'"),
        ({"training__init_from": "/no/such/run"}, "--init_from is '/no/such/run', but it must be"),
        ({"mesh__tensor": 3, "mesh__data": 1}, "mesh is "),
    ],
)
def test_what_is_wrong_comes_out(text, cache, tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        check(tiny.experiment(text, **changes), tmp_path / "run", cache)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_in_use(text, cache, tmp_path):
    with claimed(tmp_path), pytest.raises(InputError, match="another training is at work there"):
        check(tiny.experiment(text), tmp_path, cache)


def test_a_first_step_that_is_not_finite_and_a_disk_with_little_room(
    text, cache, tmp_path, capsys, monkeypatch
):
    make = remat.make_train_step

    def poisoned(*arguments, **options):
        step = make(*arguments, **options)

        def take(state, batch):
            state, metrics = step(state, batch)
            return state, metrics | {"skipped": jnp.int32(1), "loss": jnp.float32(jnp.nan)}

        return take

    class Usage:
        free = 1000

    monkeypatch.setattr(remat, "make_train_step", poisoned)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: Usage)
    assert check(tiny.experiment(text), tmp_path / "run", cache) == 1
    told = capsys.readouterr()
    assert "The loss of the first step or its gradient is not finite;" in told.err
    assert "  too little: 5 checkpoints need " in told.out
    assert "checked" not in told.out and not (tmp_path / "run").exists()
