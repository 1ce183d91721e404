"""Several processes of which one meets with a fault, or all do."""

import json
import shutil
import signal
import subprocess

import pytest

from tests.data.shard_folders import write_folder
from tests.training import tiny
from tests.training.test_processes import STEPS, Shell, finish, said

pytestmark = pytest.mark.slow
FSDP = "--config.mesh.fsdp=2"


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_text(folder / "text")
    return Shell(folder)


@pytest.fixture(scope="module")
def whole(shell):
    """The losses of an uninterrupted run of two processes."""
    shell.run("whole", 2, FSDP)
    return shell.losses("whole")


def _ended(processes, status):
    """Returns the errors printed by processes that must end with this status."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [p.returncode for p in processes] == [status] * len(processes), outputs
    return [err for _, err in outputs]


def _steps(shell, name):
    folder = shell.folder / name / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("process", [0, 1])
def test_killed_in_the_middle_of_a_save(shell, whole, process):
    name = f"killed{process}"
    processes = shell.start(name, 2, FSDP, fault=f"kill,12,{process}")
    assert processes[process].wait(timeout=300) == -signal.SIGKILL
    other = processes[1 - process]
    try:
        other.wait(timeout=60)
    except subprocess.TimeoutExpired:
        other.kill()
    assert other.wait() != 0
    for one in processes:
        one.communicate()
    assert _steps(shell, name)[-1] == 8
    half = list((shell.folder / name / "checkpoints").glob("12.orbax-checkpoint-tmp*"))
    assert half and any(path.is_file() for path in half[0].rglob("*"))
    (out, _) = shell.run(name, 2, FSDP)
    assert "resuming after step 8" in out
    assert shell.losses(name) == whole
    assert not half[0].exists()


@pytest.mark.parametrize("process", [0, 1])
def test_the_disk_of_one_process_is_full_for_a_while(shell, whole, process):
    name = f"full{process}"
    processes = shell.start(name, 2, FSDP, fault=f"full,12,{process}")
    first, second = _ended(processes, 0)
    why = f"process {process}: No space left on device"
    message = f"checkpoint of step 12 could not be written ({why}); the last good one is of step 8"
    assert first.count(message) == 1 and message not in second
    assert "Traceback" not in first + second
    assert shell.losses(name) == whole
    assert _steps(shell, name) == [16, 20, 24]


def test_the_disk_of_one_process_is_full_and_all_stop(shell, whole):
    stop = "--config.training.max_failed_saves=1"
    processes = shell.start("stopping", 2, FSDP, stop, fault="full,12,1")
    for err in _ended(processes, 1):
        assert "Stopped after a save that failed (training.max_failed_saves)" in err
        assert "the last good one is of step 8." in err
    assert _steps(shell, "stopping")[-1] == 8
    shell.run("stopping", 2, FSDP, stop)
    assert shell.losses("stopping") == whole


def test_rows_of_one_process_are_not_finite_for_two_steps(shell, whole):
    finish(shell.start("nan", 2, FSDP, fault="nan,11,1"))
    lines = (shell.folder / "nan" / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines)}
    assert [step for step, record in records.items() if record["skipped"]] == [11, 12]
    assert all(records[step]["loss"] == whole[step] for step in range(1, 11))
    assert all(records[step]["loss"] is not None for step in range(13, STEPS + 1))
    assert _steps(shell, "nan") == [16, 20, 24]  # 12 was no step to save


def test_too_long_a_burst_stops_all(shell):
    fewer = "--config.training.max_nonfinite_steps=2"
    processes = shell.start("burst", 2, FSDP, fewer, fault="nan,11,0")
    for err in _ended(processes, 1):
        assert "the last checkpoint is of step 8" in err


def test_sigterm_to_all(shell, whole):
    processes = shell.start("preempted", 2, FSDP)
    shell.wait_for_step(processes, "preempted", 5)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    (out, _) = finish(processes, status=128 + signal.SIGTERM)
    last = max(shell.losses("preempted"))
    assert f"SIGTERM: stopped after step {last}, which is saved" in out
    assert _steps(shell, "preempted")[-1] == last
    shell.run("preempted", 2, FSDP)
    assert shell.losses("preempted") == whole


def _status_of(process, others, seconds=60):
    """Returns with which status a process ends whom the others keep waiting; ends them."""
    try:
        return process.wait(timeout=seconds), process.communicate()[1]
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_an_error_that_one_process_has_ends_it_at_once(shell, whole):
    # Amid the save of step 12, which it must not wait for.
    processes = shell.start("stumbled", 2, FSDP, fault="raise,13,1")
    status, err = _status_of(processes[1], processes[:1], seconds=200)
    assert status == 1 and "RuntimeError: nobody has thought of this" in err
    shell.run("stumbled", 2, FSDP)
    assert shell.losses("stumbled") == whole


def test_sigterm_to_one_before_the_first_step_ends_it_at_once(shell):
    processes = shell.start("early", 2, FSDP)
    assert any(line.startswith("data ") for line in iter(processes[0].stdout.readline, ""))
    processes[1].send_signal(signal.SIGTERM)
    assert _status_of(processes[1], processes[:1])[0] == -signal.SIGTERM


@pytest.mark.parametrize("name", ["data.source", "training.init_from"])
def test_what_one_process_alone_can_not_find(shell, whole, name):
    here = {"data.source": "text", "training.init_from": "whole"}[name]

    def own(process):
        return (f"--config.{name}={shell.folder / (here if process == 0 else 'nowhere')}",)

    for err in _ended(shell.start("lacking", 2, FSDP, own=own), 2):
        assert err.startswith("On process 1: ") and f"{shell.folder / 'nowhere'}'" in err
        assert err.count("\n") == 1
    assert not (shell.folder / "lacking").exists()


def test_shards_vanish_before_the_eyes_of_one_process(shell):
    name = "vanished"
    mine = write_folder(shell.folder / "shards", train=300, per_shard=2)
    theirs = shutil.copytree(mine, shell.folder / "copy")
    flags = (
        *(FSDP, "--config.data.batch_size=4", "--config.data.packing=split"),
        *("--config.training.steps=150", "--config.training.checkpoint_every=1000"),
    )

    def own(number):
        return (f"--config.data.path={theirs if number else mine}",)

    processes = shell.start(name, 2, *flags, own=own)
    shell.wait_for_step(processes, name, 2)
    for shard in theirs.glob("train-*"):
        shard.unlink()
    errors = _ended(processes, 2)
    last = max(shell.losses(name))
    for err in errors:
        assert f"{theirs}/train-" in err
        assert f"Training stopped after step {last}, which is saved." in err
    assert _steps(shell, name) == [last] and 2 < last < 150
    before = shell.losses(name)
    path = f"--config.data.path={mine}"
    shell.run(name, 2, *flags, path)
    shell.run("seen", 2, *flags, path)
    assert shell.losses(name) == shell.losses("seen")
    assert before.items() <= shell.losses(name).items()


def test_going_on_with_more_processes_on_another_mesh(shell, whole):
    name = "resharded"
    folder = shutil.copytree(shell.folder / "whole", shell.folder / name)
    for step in (20, 24):
        shutil.rmtree(folder / "checkpoints" / str(step))
    (out, *_) = shell.run(name, 4, "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    assert "resuming after step 16" in out
    found = shell.losses(name)
    assert found.keys() == whole.keys()
    assert max(abs(found[step] / whole[step] - 1) for step in whole) < 1e-5


def test_only_one_process_prints_an_evaluation(shell, whole):
    first, second = shell.run("whole", 2, "--mode=eval")
    assert "validation loss" in first and said(second) == []
    first, second = shell.run("whole", 2, "--mode=eval", "--contexts=8,16")
    assert "Written to" in first and said(second) == []


@pytest.mark.parametrize("mode", ["sample", "inspect"])
def test_modes_of_one_process(shell, mode):
    for err in _ended(shell.start("whole", 2, f"--mode={mode}"), 2):
        assert f"but --mode={mode} is one process; leave it out." in err
