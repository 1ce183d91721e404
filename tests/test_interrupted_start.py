"""Ctrl-C before training begins: it is never lost."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lazyattn import main


def test_an_interrupt_that_a_callback_swallowed_comes_again():
    with pytest.raises(KeyboardInterrupt):
        main._interrupt_again(SimpleNamespace(exc_value=KeyboardInterrupt()))
        time.sleep(10)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5, 2.5])
def test_an_interrupt_while_the_program_starts(tmp_path, seconds):
    command = [sys.executable, "train.py", "--config=quickstart", f"--workdir={tmp_path / 'run'}"]
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    time.sleep(seconds)
    program.send_signal(signal.SIGINT)
    _, error = program.communicate(timeout=60)
    assert program.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in error
