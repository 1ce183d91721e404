import numpy as np
import pytest

from lazyattn.data import read_ahead
from lazyattn.data.read_ahead import ReadAhead, agree_on, read_together
from lazyattn.errors import InputError


class _Numbers:
    """Batches 0, 1, ... until one can't be read."""

    def __init__(self, until):
        self.next, self.until = 0, until

    def __next__(self):
        if self.next == self.until:
            raise InputError("shard 3 is gone.")
        self.next += 1
        return {"inputs": np.full((1, 1), self.next - 1)}

    def position(self):
        return self.next

    def state_at(self, position):
        return {"step": position}


def _number(rows):
    return int(rows["inputs"][0, 0])


def test_the_state_is_of_the_batch_given_out():
    batches = ReadAhead(_Numbers(None), 100)
    for number in range(5):
        assert batches.get_state() == {"step": number}
        assert _number(next(batches)) == number
    assert batches.error is None


def test_after_an_error_there_is_enough_to_stop_together():
    batches = ReadAhead(_Numbers(10), 100)
    given = 0
    while batches.error is None:
        next(batches)
        given += 1
    # A stop asked for now comes after this many steps more.
    for number in range(given, given + read_ahead.StopAgreement.STEPS_TO_SPREAD):
        assert _number(next(batches)) == number
    assert batches.get_state() == {"step": given + read_ahead.StopAgreement.STEPS_TO_SPREAD}


def test_what_is_not_asked_for_need_not_be_readable():
    batches = ReadAhead(_Numbers(3), 3)
    assert [_number(next(batches)) for _ in range(3)] == [0, 1, 2]
    assert batches.error is None


def test_the_first_batches_must_be_readable():
    with pytest.raises(InputError, match=r"shard 3 is gone\."):
        ReadAhead(_Numbers(2), 100)


def test_one_process_reads_on_its_own():
    assert list(read_together(iter([{}, {}]), "validation")) == [{}, {}]
    with pytest.raises(InputError, match="gone"):
        list(read_together(_rows_that_end(), "validation"))


def _rows_that_end():
    yield {}
    raise InputError("gone.")


def test_an_error_elsewhere_is_an_error_here(monkeypatch):
    monkeypatch.setattr(read_ahead.jax, "process_count", lambda: 3)
    monkeypatch.setattr(read_ahead, "tell_all", lambda what, text: ["", "no such shard.", text])
    with pytest.raises(InputError, match=r"^no such shard\.$"):
        agree_on(None, "first batches")
    monkeypatch.setattr(read_ahead, "tell_all", lambda what, text: ["", "", text])
    agree_on(None, "first batches")
