import os
import signal

import pytest

from lazyattn.training.interrupt import StopSignal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_armed_stop_waits(number, status):
    with StopSignal() as stop:
        stop.arm()
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert stop.exit_status == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_it_is_armed_it_ends_the_program(number, status, capfd):
    with StopSignal(), pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == status
    assert capfd.readouterr().err == f"{number.name}: stopped before a step was taken\n"


def test_a_second_ctrl_c_interrupts_at_once():
    with StopSignal() as stop:
        stop.arm()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
