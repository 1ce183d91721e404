"""Several processes on one machine that train as one: killed, stopped, gone on with."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import tiny

ROOT = Path(__file__).parents[2]
STEPS = 24
pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Shell:
    """Starts train.py as several processes with one cache for data and compiled functions.

    With `gpus` each process has the GPU of its number, and not simulated devices.
    """

    folder: Path
    gpus: bool = False

    def start(
        self, name, count, *overrides, devices=2, fault=None, own=lambda number: (), slurm=False
    ):
        """Starts processes.

        `fault` is for `faulty_program`, `own` gives each its own flags. With `slurm` no flag says
        that there are several, but variables do.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"LAZYATTN_CACHE": str(self.folder / "cache")}
        if not self.gpus:
            environment |= {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
                f"--xla_force_host_platform_device_count={devices}",
            }
        command = [
            sys.executable,
            *(("-m", "tests.training.faulty_program") if fault else ("train.py",)),
            f"--config={ROOT / 'tests/training/tiny.py'}:{self.folder / 'text'}",
            f"--workdir={self.folder / name}",
            f"--config.training.steps={STEPS}",
            "--config.data.batch_size=8",
            *overrides,
        ]
        if fault:
            environment["FAULT"] = fault
        if slurm:
            environment |= {
                "JAX_COORDINATOR_PORT": str(port),
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
            }
        elif count > 1:
            command += [f"--coordinator=localhost:{port}", f"--process_count={count}"]
        names = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ()
        names += ("CUDA_VISIBLE_DEVICES",) if self.gpus else ()
        numbered = count > 1 and not slurm
        return [
            subprocess.Popen(
                [*command, *own(number), *([f"--process_id={number}"] if numbered else [])],
                cwd=ROOT,
                env=environment | dict.fromkeys(names, str(number)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def run(self, name, count, *overrides, devices=2, slurm=False):
        """Returns what each process printed, having made sure that all went well."""
        return finish(self.start(name, count, *overrides, devices=devices, slurm=slurm))

    def losses(self, name):
        path = self.folder / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
        return {record["step"]: record["loss"] for record in records}

    def wait_for_step(self, processes, name, step):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if max(self.losses(name), default=0) >= step:
                return
            for process in processes:
                assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        raise AssertionError(f"step {step} never came")


def finish(processes, status=0):
    """Returns what each printed, all of which must end with this status."""
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == status, (process.returncode, err[-3000:])
    return [out for out, _ in outputs]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_text(folder / "text")
    return Shell(folder)


@pytest.fixture(scope="module")
def whole(shell):
    """What every process of an uninterrupted run of two printed."""
    return shell.run("whole", 2, "--config.mesh.fsdp=2")


def said(out):
    """Returns the lines that are ours: gloo prints some by itself."""
    return [line for line in out.splitlines() if not line.startswith("[Gloo]")]


def test_only_one_process_writes(shell, whole):
    assert any("step 24/24" in line for line in said(whole[0]))
    assert said(whole[1]) == []
    assert list(shell.losses("whole")) == list(range(1, STEPS + 1))


def test_one_process_kills_all_and_all_go_on_exactly(shell, whole):
    processes = shell.start("killed", 2, "--config.mesh.fsdp=2")
    shell.wait_for_step(processes, "killed", 9)
    processes[1].kill()
    # What is left can't go on: it ends by itself, or is ended as a scheduler would.
    try:
        processes[0].wait(timeout=60)
    except subprocess.TimeoutExpired:
        processes[0].kill()
    assert processes[0].wait() != 0
    for process in processes:
        process.communicate()
    before = shell.losses("killed")
    assert 9 <= max(before) < STEPS
    (out, _) = shell.run("killed", 2, "--config.mesh.fsdp=2")
    assert "resuming after step" in out
    assert shell.losses("killed") == shell.losses("whole")


@pytest.mark.parametrize("mesh", ["fsdp:2", "tensor:2", "sequence:2"])
def test_the_program_that_kills_on_gpus_does_so_on_simulated_devices(shell, mesh):
    from tests.training.killed_program import killed_and_resumed

    found = killed_and_resumed(shell, mesh, 2, every=8, seconds=300, overrides=[])
    assert found["same"] and found["resumed_after"] >= 8
    assert found["compared"] == found["killed_after"] - found["resumed_after"] >= 1


def test_a_signal_to_one_process_stops_and_saves_all(shell, whole):
    processes = shell.start("stopped", 2, "--config.mesh.fsdp=2")
    shell.wait_for_step(processes, "stopped", 5)
    processes[1].send_signal(signal.SIGTERM)
    (out, _) = finish(processes, status=128 + signal.SIGTERM)
    assert "SIGTERM: stopped after step" in out
    last = max(shell.losses("stopped"))
    assert 5 <= last < STEPS
    assert (shell.folder / "stopped" / "checkpoints" / str(last)).is_dir()
    shell.run("stopped", 2, "--config.mesh.fsdp=2")
    assert shell.losses("stopped") == shell.losses("whole")


def test_a_check_of_four_processes_that_slurm_started(shell):
    first, *rest = shell.run("checked", 4, "--mode=check", "--config.mesh.fsdp=2", slurm=True)
    lines = said(first)
    for number in range(4):
        (line,) = [line for line in lines if f"process {number}: " in line]
        assert line.startswith("host     ")
        assert line.endswith(f"2 devices cpu, reads 2 rows of a batch (part {number + 1} of 4)")
    assert any(line.startswith("step 1/1  loss") for line in lines)
    assert "--mode=train would start; nothing of this is kept" in lines[-1]
    assert [said(out) for out in rest] == [[], [], []]
    assert not (shell.folder / "checked").exists()


def test_a_folder_that_not_all_processes_see(shell):
    def own(number):
        return (f"--workdir={shell.folder / f'own{number}'}",)

    for process in shell.start("own", 2, "--config.mesh.fsdp=2", own=own):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2 and "step " not in out
        assert "but process 1 on " in err and "does not see what process 0 writes there" in err
    assert not (shell.folder / "own0").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_training_in_the_folder_is_refused(shell, count):
    """Several processes are one training, and all of a second one are told."""
    first = shell.start("taken", 2, "--config.mesh.fsdp=2", "--config.training.steps=100000")
    try:
        shell.wait_for_step(first, "taken", 2)
        for process in shell.start("taken", count, "--config.mesh.fsdp=2"):
            out, err = process.communicate(timeout=300)
            assert process.returncode == 2 and "step " not in out
            assert "--workdir is " in err and "another training is at work there" in err
        assert all(process.poll() is None for process in first)
    finally:
        for process in first:
            process.kill()
            process.communicate()
        shutil.rmtree(shell.folder / "taken")


@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        (1, ()),
        (4, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
        # Two processes share each row, four share all rows.
        (4, ("--config.mesh.tensor=2", "--config.mesh.sequence=2")),
        (4, ("--config.mesh.sequence=8",)),
    ],
    ids=["one", "four", "four_in_pairs", "four_on_one_row"],
)
def test_any_number_of_processes_takes_the_same_steps(shell, whole, count, overrides):
    name = f"{count}_" + "_".join(x.split(".")[-1].replace("=", "") for x in overrides)
    shell.run(name, count, *overrides)
    found, expected = shell.losses(name), shell.losses("whole")
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst < 1e-5


def test_processes_with_caches_of_their_own_read_programs_together(shell, whole, tmp_path):
    def folder(number):
        return tmp_path / str(number)

    def run(name):
        own = {"own": lambda number: (f"--compile_cache_dir={folder(number)}",)}
        finish(shell.start(name, 2, "--config.mesh.fsdp=2", **own))
        assert shell.losses(name) == shell.losses("whole")
        return [{path.name: path for path in folder(i).rglob("jit_step-*-cache")} for i in (0, 1)]

    first, second = run("compiled")
    assert len(first) == len(second) == 1
    second[next(iter(second))].unlink()
    again = run("one_lacks_it")
    assert [set(found) for found in again] == [set(first), set(second)]
