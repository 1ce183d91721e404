import threading
import time

import pytest

from lazyattn import patience


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(patience, "NOTICE", 0.1)
    monkeypatch.setattr(patience, "AGAIN", 0.2)


def test_what_is_waited_for_is_said_now_and_then(soon, capfd):
    with patience.waiting(lambda: "rain", 9):
        time.sleep(0.4)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["Waiting for rain: 0 s so far, 9 s at most."] * 2


def test_what_does_not_take_long_is_not_said(soon, capfd):
    with patience.waiting(lambda: "rain"):
        time.sleep(0.02)
    with patience.waiting(lambda: ""):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_at_the_limit(soon):
    ended = []
    with patience.waiting(lambda: "rain", 0.15, ended.append):
        time.sleep(0.5)
    assert ended == ["rain"]


def test_what_has_an_answer():
    assert patience.within(9, lambda: "rain", lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        patience.within(9, lambda: "rain", lambda: {}["x"])


def test_what_has_no_answer(soon, capfd):
    with pytest.raises(TimeoutError, match=r"no answer in 0\.3 s"):
        patience.within(0.3, lambda: "rain", threading.Event().wait)
    assert capfd.readouterr().err == "Waiting for rain: 0 s so far, 0.3 s at most.\n"
