"""`--wandb`, with a package of that name made here; the slow test has the real one, offline."""

import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from lazyattn import paths
from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict
from lazyattn.training import beginning
from lazyattn.training.weights_and_biases import WeightsAndBiases
from tests.bucket_fake import URL, bucket
from tests.training import tiny

__all__ = ["bucket"]
ROOT = Path(__file__).parents[2]


class Fake(types.ModuleType):
    """Keeps what was sent; as the real one, it knows the last step of a run."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.curves, self.ended = [], {}, []
        self.step = 0
        self.id = "made1234"
        self.error = None

    def init(self, **settings):
        if self.error is not None:
            raise self.error
        self.started.append(settings)
        return self

    def log(self, scalars, step):
        if self.error is not None:
            raise self.error
        assert step >= self.step
        self.step = step
        self.curves.setdefault(step, {}).update(scalars)

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def fake(monkeypatch):
    found = Fake()
    monkeypatch.setitem(sys.modules, "wandb", found)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return found


def _experiment(text, steps):
    config = tiny.get_config(text)
    config.training.steps = steps
    config.training.log_every = 2
    return from_config_dict(config)


@pytest.mark.slow
def test_a_run_and_its_resumption(fake, tmp_path):
    text, cache, workdir = tiny.write_text(tmp_path / "text"), tmp_path / "cache", tmp_path / "mine"
    assert tiny.train(_experiment(text, 4), workdir, cache, summary=False, wandb=True) == 0
    (started,) = fake.started
    assert (started["project"], started["name"], started["id"]) == ("lazyattn", "mine", None)
    assert started["config"]["model"]["width"] == 16 and started["dir"] == str(workdir)
    assert set(fake.curves) == {2, 4} and fake.ended == [0]
    assert "training/loss" in fake.curves[2] and "validation/loss" in fake.curves[4]
    # It had gone on to step 6 when it was killed.
    fake.step, before = 6, dict(fake.curves)
    assert tiny.train(_experiment(text, 8), workdir, cache, summary=False, wandb=True) == 0
    assert (fake.started[1]["id"], fake.started[1]["resume"]) == ("made1234", "allow")
    assert set(fake.curves) == {*before, 6, 8} and fake.ended == [0, 0]


def test_without_the_flag_nothing_is_imported(fake, tmp_path):
    with WeightsAndBiases(tmp_path, {}, enabled=False) as off:
        off.write(1, {"training/loss": 1.0})
    assert fake.started == [] and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(beginning, "prepare", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=r"^--wandb is given, but the package wandb is not inst"):
        tiny.train(_experiment(tmp_path, 2), tmp_path / "run", tmp_path, wandb=True)
    assert not (tmp_path / "run").exists()


def test_what_keeps_it_from_starting_is_one_sentence(fake, tmp_path):
    fake.error = RuntimeError("No API key configured.\nUse wandb login")
    with pytest.raises(InputError) as caught:
        WeightsAndBiases(tmp_path, {})
    assert str(caught.value) == (
        "--wandb is given, but Weights & Biases can't start (No API key configured);"
        " WANDB_MODE=offline needs no account."
    )


def test_what_fails_later_stops_nothing(fake, tmp_path, caplog):
    with WeightsAndBiases(tmp_path, {}) as log:
        fake.error = OSError("No space left on device")
        log.write(1, {"training/loss": 1.0})
        fake.error = None
        log.write(2, {"training/loss": 1.0})
    assert fake.curves == {} and fake.ended == []
    assert caplog.text.count("Weights & Biases failed (No space left on device); training") == 1


def test_a_run_in_a_bucket_keeps_its_id_there(fake, bucket):
    for _ in range(2):
        with WeightsAndBiases(paths.folder("--workdir", f"{URL}/runs/one"), {}):
            pass
    assert [(each["dir"], each["name"], each["id"]) for each in fake.started] == [
        (None, "one", None),
        (None, "one", "made1234"),
    ]


def test_an_error_ends_the_run_there_as_failed(fake, tmp_path):
    with pytest.raises(ValueError, match="broken"), WeightsAndBiases(tmp_path, {}):
        raise ValueError("broken")
    assert fake.ended == [1]


@pytest.mark.slow
def test_the_real_package_offline(tmp_path):
    """In an environment of its own on top of this one; asks a package index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([python, "-c", purelib], text=True).strip()
    Path(site, "under.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "wandb"]
    subprocess.run(install, check=True)
    text = tiny.write_text(tmp_path / "text")
    settings = (f"--config={ROOT / 'tests' / 'training' / 'tiny.py'}:{text}", "--wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"LAZYATTN_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    for steps in (10, 20):
        done = subprocess.run(
            [
                *(python, ROOT / "train.py", *settings, f"--workdir={tmp_path / 'run'}"),
                f"--config.training.steps={steps}",
            ],
            env=environment | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    logs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 2 and len({log.name for log in logs}) == 1  # the same run
    for log in logs:
        assert b"validation/loss" in log.read_bytes()
