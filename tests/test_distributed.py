import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from lazyattn import distributed
from lazyattn.errors import InputError


def _flags(*arguments):
    values = flags.FlagValues()
    distributed.define(values)
    values(["program", *arguments])
    return values


def test_without_flags_there_is_one_process():
    distributed.initialize(_flags())
    assert distributed.StopAgreement()(True, 1)
    assert not distributed.StopAgreement()(False, 1)
    distributed.wait_for_all("nobody else")


_SLURM = dict.fromkeys(("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"), "1")


@pytest.mark.parametrize(
    ("variables", "arguments", "joins"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", **_SLURM}, (), True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", **_SLURM}, (), False),
        # The script of a batch job, which is no task.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, (), False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", **_SLURM}, ("--coordinator=none",), False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (), False),
    ],
)
def test_what_the_environment_says(monkeypatch, variables, arguments, joins):
    joined = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a, **_: joined.append(a))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    values = _flags(*arguments)
    distributed.initialize(values, automatic=False)
    assert joined == []
    distributed.initialize(values)
    assert joined == ([(None, None, None, None)] if joins else [])


@pytest.mark.parametrize(
    ("visible", "tasks", "devices"),
    [
        ("0,1,2,3", "4(x2)", None),  # a process for each GPU, by its number
        ("0,1,2,3", "1(x2)", [0, 1, 2, 3]),
        ("2,3", "1", [0, 1]),
        ("3", "4(x2)", [0]),  # --gpus-per-task=1
        ("", "4(x2)", None),
    ],
)
def test_which_gpus_a_task_of_slurm_has(monkeypatch, visible, tasks, devices):
    assert distributed._devices_of_slurm() is None
    variables = {"SLURM_NTASKS": "8", "SLURM_PROCID": "1", **_SLURM}
    variables |= {"CUDA_VISIBLE_DEVICES": visible, "SLURM_STEP_TASKS_PER_NODE": tasks}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._devices_of_slurm() == devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--process_id=1",), "--process_id is 1, but --coordinator, which it needs, is not given"),
        (("--process_count=2",), "--process_count is 2, but --coordinator, which it needs"),
        (
            ("--coordinator=here",),
            "--coordinator is 'here', but it must be HOST:PORT, auto or none",
        ),
        (("--coordinator=h:1", "--process_count=0"), "--process_count is 0, .* at least 1"),
        (
            ("--coordinator=h:1", "--process_id=2", "--process_count=2"),
            "--process_id is 2, .* below --process_count = 2",
        ),
    ],
)
def test_flags_that_do_not_go_together(arguments, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(_flags(*arguments))


class _Coordinator:
    """Keeps what processes tell one another."""

    def __init__(self):
        self.kept = {}

    def key_value_set(self, key, value):
        assert key not in self.kept
        self.kept[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.kept.items() if key.startswith(prefix)]


def test_processes_stop_after_the_same_step(monkeypatch):
    coordinator, processes = _Coordinator(), []
    for _ in range(3):
        agreement = distributed.StopAgreement()
        agreement._client = coordinator
        processes.append(agreement)

    def stops(process, step, asked=False):
        monkeypatch.setattr(distributed.jax, "process_index", lambda: process)
        return processes[process](asked, step)

    # Process 0 is a step ahead of the others, as it may be.
    assert not stops(0, 6)
    assert not stops(1, 5, asked=True)
    assert not stops(2, 5)
    assert stops(0, 7)
    assert not stops(1, 6, asked=True)
    assert not stops(2, 6, asked=True)  # too late to change anything
    assert [stops(process, 7) for process in (1, 2)] == [True, True]


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        (["", ""], None),
        (["", "data.path is gone."], "On process 1: data.path is gone."),
        (["data.path is gone.", ""], "On process 0: data.path is gone."),
        (["data.path is gone."] * 2, "data.path is gone."),
    ],
)
def test_what_one_process_can_not_do_all_refuse(monkeypatch, told, problem):
    for mine in told:

        def call(mine=mine):
            if mine:
                raise InputError(mine)
            return 7

        def tell_all(what, text, mine=mine):
            assert text == mine
            return told

        monkeypatch.setattr(distributed, "tell_all", tell_all)
        if problem is None:
            assert distributed.together("data", call) == 7
            continue
        with pytest.raises(InputError) as caught:
            distributed.together("data", call)
        assert str(caught.value) == problem


def test_rows_of_a_share_are_taken_once(monkeypatch):
    def everyone(rows):
        return np.stack([rows + 10 * process for process in range(4)])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", everyone)
    rows = np.array([[1], [2]], np.int32)
    found = distributed.gather_rows(rows, [1, 1, 0, 0])
    np.testing.assert_array_equal(found[:, 0], [21, 22, 1, 2])


_ASKED_TO_END = """
import os, signal, sys, time
from absl import flags
from lazyattn import distributed

distributed.define(flags.FLAGS)
flags.FLAGS(sys.argv)
distributed.initialize()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""


def test_sigterm_ends_a_process_that_has_joined_others():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    joining = (f"--coordinator=localhost:{port}", "--process_id=0", "--process_count=1")
    ended = subprocess.run([sys.executable, "-c", _ASKED_TO_END, *joining], timeout=120)
    assert ended.returncode == -signal.SIGTERM


_NOT_FOR_LONG = """
import sys
from absl import flags
from lazyattn import distributed, patience

patience.NOTICE, distributed._ALL_COME = 1, 2
distributed.define(flags.FLAGS)
flags.FLAGS(sys.argv)
distributed.initialize()
"""


@pytest.mark.parametrize(
    ("process", "missing"),
    [
        (0, "1 other process to come to localhost:{port}"),
        (1, "process 0 at localhost:{port}, which does not answer process 1 (Connection refused)"),
    ],
)
def test_a_process_whose_peer_is_missing_says_so_and_ends(process, missing):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    joining = (f"--coordinator=localhost:{port}", "--process_count=2", f"--process_id={process}")
    ended = subprocess.run(
        [sys.executable, "-c", _NOT_FOR_LONG, *joining], timeout=60, capture_output=True, text=True
    )
    missing = missing.format(port=port)
    assert f"\nWaiting for {missing}: " in f"\n{ended.stderr}"
    assert f"\nGave up waiting for {missing}, after 2 s. " in ended.stderr
    assert ended.returncode == 1


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("", 0)) as server:
        at = f"localhost:{server.getsockname()[1]}"
        for where in (at, "localhost:99999"):
            joining = (f"--coordinator={where}", "--process_count=2", "--process_id=0")
            with pytest.raises(InputError, match=f"is '{where}', .* where process 0 can listen"):
                distributed.initialize(_flags(*joining))
