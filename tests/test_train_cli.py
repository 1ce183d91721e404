"""`train.py` as a user runs it: killed, stopped, damaged, and gone on with.

Starting Python with JAX takes seconds: one story serves several tests, and what does not need a
process of its own has none.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import logging as absl_logging
from absl.testing import flagsaver

from tests.training import tiny

ROOT = Path(__file__).parents[1]
STEPS = 64


@dataclasses.dataclass
class Shell:
    """Runs train.py with one cache for data; compiled functions are in that of the tests.

    They run for moments and are compiled as other tests compile them, without optimizing.
    """

    folder: Path

    def start(self, *arguments, **environment):
        environment = os.environ | {
            "LAZYATTN_CACHE": str(self.folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            **environment,
        }
        return subprocess.Popen(
            [sys.executable, "train.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments):
        """Does what the command does, in this process; returns its status, out and err."""
        import grain  # noqa: F401  (its flags would go with those that are put back)

        from lazyattn import main as train

        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        # Python's standard error is another stream by now than the one warnings are written to.
        warnings = logging.StreamHandler(err)
        absl_logging.get_absl_logger().addHandler(warnings)
        with (
            flagsaver.flagsaver(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            sys.argv = ["train.py", *arguments, f"--cache_dir={self.folder / 'cache'}"]
            try:
                train._parse(sys.argv)
                status = train.main([])
            except SystemExit as end:
                status = end.code
            finally:
                sys.argv = before
                absl_logging.get_absl_logger().removeHandler(warnings)
        return status, out.getvalue(), err.getvalue()

    def flags(self, name, *overrides):
        config = ROOT / "tests" / "training" / "tiny.py"
        return (
            f"--config={config}:{self.folder / 'text'}",
            f"--workdir={self.folder / name}",
            f"--config.training.steps={STEPS}",
            "--config.model.attention.implementation=xla_chunked",  # as without tiny's setting
            *overrides,
        )

    def train(self, name, *overrides, **environment):
        return self.start(*self.flags(name, *overrides), **environment)

    def lines(self, name):
        """Returns the whole lines of metrics.jsonl so far."""
        path = self.folder / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for_step(self, process, name, step):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            records = self.lines(name)
            if records and records[-1]["step"] >= step:
                return
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        raise AssertionError(f"step {step} never came")


def _finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@dataclasses.dataclass
class Story:
    """What happened, for the tests to look at."""

    shell: Shell
    whole: tuple
    stopped: tuple
    step_of_stop: int
    final: tuple
    torn_step: int
    step_of_kill: int


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    shell = Shell(tmp_path_factory.mktemp("cli"))
    tiny.write_text(shell.folder / "text")
    draw = random.Random(1)
    whole = shell.call(*shell.flags("whole"))

    # Saves are under way nearly all the time here, so the kill hits one mostly. The whole run has
    # compiled all that these do: nothing is written into the cache when it is killed.
    process = shell.train("killed")
    shell.wait_for_step(process, "killed", draw.randint(6, 15))
    time.sleep(draw.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step_of_kill = shell.lines("killed")[-1]["step"]

    process = shell.train("killed")
    shell.wait_for_step(process, "killed", step_of_kill + 5)
    process.send_signal(signal.SIGTERM)
    stopped = _finish(process)
    step_of_stop = shell.lines("killed")[-1]["step"]

    newest = _checkpoints(shell.folder / "killed")[-1]
    (item,) = (shell.folder / "killed" / "checkpoints" / str(newest) / "state" / "d").iterdir()
    os.truncate(item, item.stat().st_size // 2)
    final = shell.call(*shell.flags("killed"))
    return Story(shell, whole, stopped, step_of_stop, final, newest, step_of_kill)


def _checkpoints(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def test_an_uninterrupted_run(story):
    status, out, err = story.whole
    assert status == 0, err
    records = story.shell.lines("whole")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert _checkpoints(story.shell.folder / "whole") == [STEPS - 8, STEPS - 4, STEPS]
    check_summary(out, story.shell.folder / "whole")


def check_summary(out, workdir):
    for expected in (
        "parameters",
        f"step {STEPS}/{STEPS}",
        "validation loss",
        "unigram entropy",
        "bits per byte",
        "attention exactly zero",
        "attention on first token",
        "sample",
        f"checkpoint                 {workdir / 'checkpoints' / str(STEPS)}",
        "--mode=sample",
        "--mode=eval",
    ):
        assert expected in out
    assert "\r" not in out


def test_the_losses_after_a_kill_are_bit_identical(story):
    status, out, err = story.final
    assert status == 0, err
    check_summary(out, story.shell.folder / "killed")
    assert story.step_of_kill < STEPS  # or nothing was interrupted

    def curve(name):
        return [(r["step"], r["loss"], r["gradient_norm"]) for r in story.shell.lines(name)]

    assert curve("killed") == curve("whole")


def test_sigterm_saves_and_exits_with_143(story):
    status, out, err = story.stopped
    assert status == 143, err
    assert story.step_of_kill < story.step_of_stop < STEPS
    assert f"SIGTERM: stopped after step {story.step_of_stop}, which is saved" in out
    assert story.torn_step == story.step_of_stop
    assert "\r" not in out and "orbax" not in err and "Traceback" not in err


def test_a_torn_checkpoint_falls_back_with_a_warning(story):
    _, out, err = story.final
    assert f"checkpoint {story.torn_step} in" in err and "trying the one before" in err
    before = int(out.split("resuming after step ")[1].split()[0])
    assert before < story.torn_step
    assert (story.shell.folder / "killed" / "damaged" / f"{story.torn_step}-1").is_dir()


def test_eval_and_sample_on_the_checkpoint(story):
    workdir = f"--workdir={story.shell.folder / 'whole'}"
    status, out, err = story.shell.call("--mode=eval", workdir)
    assert status == 0, err
    loss = story.shell.lines("whole")[-1]["validation_loss"]
    assert re.search(
        rf"validation loss  {loss:.4f} nats a token over [\d,]+ tokens, the whole validation", out
    )
    assert "perplexity" in out and "bits per byte" in out
    sample = ("--prompt=attention may", "--max_new_tokens=8")
    status, out, err = story.shell.call("--mode=sample", workdir, *sample)
    assert status == 0, err
    assert out.startswith("attention may")
    assert len(out) > len("attention may\n")


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_losses_on_a_mesh_of_devices(story):
    folder = story.shell.folder
    shutil.copytree(folder / "whole", folder / "mesh")
    for step in (STEPS - 4, STEPS):
        shutil.rmtree(folder / "mesh" / "checkpoints" / str(step))
    status, out, err = _finish(
        story.shell.train(
            "mesh",
            *("--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
            JAX_NUM_CPU_DEVICES="4",
        )
    )
    assert status == 0, err
    assert "devices  4 cpu as {'fsdp': 2, 'tensor': 2}" in out
    assert f"resuming after step {STEPS - 8}" in out
    assert "config.mesh.fsdp: 1 before, 2 now" in out
    losses = {
        name: [r["loss"] for r in story.shell.lines(name)[STEPS - 8 :]]
        for name in ("whole", "mesh")
    }
    assert len(losses["mesh"]) == 8
    assert losses["mesh"] == pytest.approx(losses["whole"], rel=1e-4)


def test_mistakes_are_one_sentence(story):
    """One for each of the places a mistake is found."""
    shell = story.shell
    parsing = shell.call(*shell.flags("bad", "--config.optimizer.lr=1"))
    starting = shell.call(*shell.flags("whole", "--config.model.width=32"))
    running = shell.call(
        *shell.flags(
            "bad",
            "--config.optimizer.learning_rate=1e38",
            "--config.training.max_nonfinite_steps=3",
        )
    )
    for (status, out, err), expected_status, message in (
        (parsing, 2, "config.optimizer.lr is unknown; config.optimizer has name, learning_rate"),
        (starting, 2, "config.model.width is 32, but the checkpoints in the workdir were made wit"),
        (running, 1, "Stopped at step 4: the loss or its gradient was not finite in 3 steps in a"),
    ):
        assert status == expected_status
        assert "validation" not in out
        assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is not given, but --mode=train needs a config file."),
        (["--mode=tune"], "--mode is 'tune', but it must be one of train, check, eval, "),
        (["--mode=eval"], "--workdir is not given, but it must be the folder of the run."),
        (["--mode=sample"], "--workdir is not given, but it must be the folder of the run."),
        (["--mode=eval", "--workdir=/nowhere"], "--workdir is '/nowhere', but it must be the fol"),
        (["--mode=sample", "--workdir=w", "--temperature=-1"], "temperature is -1.0, but it must "),
        (
            ["--mode=eval", "--workdir=w", "--retrieval", "--retrieval_rows=1"],
            "--retrieval_rows is 1, but it must be at least 2",
        ),
        (
            ["--mode=sample", "--workdir=w", "--step=last"],
            "--step is 'last', but it must be the step of a checkpoint, or best",
        ),
        (["--mode=check", "--workdir=w"], "--config is not given, but --mode=check needs a conf"),
        (["--mode=export"], "--workdir is not given, but it must be the folder of the run."),
        (["--mode=export", "--workdir=w", "--dtype=int4"], "--dtype is 'int4', but it must be flo"),
    ],
)
def test_missing_and_bad_flags(arguments, message, monkeypatch, capsys):
    from lazyattn import main as train

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with flagsaver.flagsaver():
        train._parse(sys.argv)
        assert train.main([]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_settings_are_printed_as_they_come_out(monkeypatch, capsys):
    from lazyattn import main as train

    arguments = ["--config=configs/quickstart.py:softmax", "--config.training.steps=7"]
    arguments += ["--print_config", "--init_from=runs/a", "--config.mesh.fsdp=2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with flagsaver.flagsaver():
        train._parse(sys.argv)
        assert train.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "config.training.steps = 7",
        "config.training.init_from = 'runs/a'",
        "config.model.attention.variant = 'softmax'",
        "config.mesh.fsdp = 2",
        "config.data.tokenizer = None",
    ):
        assert lines.count(line) == 1
    assert all(re.fullmatch(r"config\.[\w.]+ = .+", line) for line in lines)


def test_ctrl_c_before_training_shows_no_traceback(monkeypatch, capsys):
    from lazyattn import main as train

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setitem(train._MODES, "train", interrupted)
    with flagsaver.flagsaver():
        train._parse(sys.argv)
        assert train.main([]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
