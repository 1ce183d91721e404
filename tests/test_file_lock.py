"""The lock between programs in one folder."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from lazyattn import file_lock
from lazyattn.file_lock import LockedError, locked

_HOLD = """
import sys, pathlib
from lazyattn.file_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock; it has it until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, tmp_path / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named(tmp_path, holder):
    with (
        pytest.raises(LockedError, match=rf"^process {holder.pid} on \S+, since \d{{4}}-") as found,
        locked(tmp_path / "lock"),
    ):
        pass
    assert "\n" not in str(found.value)


def test_it_goes_with_the_process(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock"):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_twice_in_one_process(tmp_path):
    mine = pytest.raises(LockedError, match=f"process {os.getpid()} on")
    with locked(tmp_path / "lock"), mine, locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):
        pass


def test_a_file_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Whoever opened the file before its owner removed it must not have a lock of nothing."""
    flock, calls = fcntl.flock, []

    def removed_first(file, how):
        if not calls:
            (tmp_path / "lock").unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(tmp_path / "lock"):
        assert len(calls) == 2 and (tmp_path / "lock").exists()
        with pytest.raises(LockedError), locked(tmp_path / "lock"):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    warnings = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(file_lock.logging, "warning", lambda text, *what: warnings.append(text))
    with locked(tmp_path / "lock"):
        pass
    assert len(warnings) == 1 and "can't be locked" in warnings[0]


def test_a_host_that_says_permission_denied_has_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "lock").write_text("process 1 on other, since then\n")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LockedError, match="process 1 on other"), locked(tmp_path / "lock"):
        pass
