"""Processes, here threads, that agree on whether a checkpoint was written."""

import errno
import os
import threading

import pytest

from lazyattn.checkpoint import save_agreement
from lazyattn.checkpoint.save_agreement import SaveAgreement, brief

COUNT = 3


class _Coordinator:
    """Keeps what processes tell, and lets them wait for one another."""

    def __init__(self):
        self.kept, self.barriers, self.lock = {}, {}, threading.Lock()

    def key_value_set(self, key, value):
        self.kept[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.kept.items() if key.startswith(prefix)]

    def wait_at_barrier(self, key, timeout_ms):
        with self.lock:
            barrier = self.barriers.setdefault(key, threading.Barrier(COUNT))
        barrier.wait(timeout=20)


@pytest.fixture
def save(monkeypatch):
    """Runs a save as Orbax does, in one thread a process; returns what each made of it."""
    here = threading.local()
    monkeypatch.setattr(save_agreement.jax, "process_index", lambda: here.process)
    coordinator = _Coordinator()

    def one(process, agreement, fails, results, committed):
        here.process = process

        def wait(key):
            agreement(key=key, timeout_ms=1000)

        def attempt(stage):
            if (process, stage) in fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        error = None
        try:
            for key in ("set_value_start", "set_value_end"):
                wait(key)
            try:
                attempt("write")
                wait("async_write_complete.8")
                if process == 0:
                    attempt("commit")
                    committed.append(process)
                wait("async_commit_complete.8")
                attempt("clean up")
            finally:
                for key in ("set_value_start", "set_value_end"):
                    wait(key)
        except OSError as caught:
            error = caught
        results[process] = agreement.end(error)

    def run(*fails):
        agreements = [SaveAgreement() for _ in range(COUNT)]
        results, committed = [..., ..., ...], []
        for agreement in agreements:
            agreement._client = coordinator
            agreement.begin()
        for agreement in agreements:  # in one process here, so that the count is of threads
            agreement._key = agreements[0]._key
        threads = [
            threading.Thread(target=one, args=(process, agreement, fails, results, committed))
            for process, agreement in enumerate(agreements)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        return results, committed

    return run


def test_all_is_well(save):
    assert save() == ([None] * COUNT, [0])


@pytest.mark.parametrize("process", range(COUNT))
def test_one_can_not_write(save, process):
    results, committed = save((process, "write"))
    assert results == [f"process {process}: {os.strerror(errno.ENOSPC)}"] * COUNT
    assert committed == []


def test_none_can_write(save):
    results, committed = save(*((process, "write") for process in range(COUNT)))
    assert len(set(results)) == 1 and "No space left" in results[0]
    assert committed == []


def test_the_name_can_not_be_given(save):
    results, committed = save((0, "commit"))
    assert results == ["process 0: No space left on device"] * COUNT
    assert committed == []


def test_what_is_old_can_not_be_removed(save):
    results, committed = save((1, "clean up"))
    assert results == ["process 1: No space left on device"] * COUNT
    assert committed == [0]


def test_one_process_needs_nobody():
    agreement = SaveAgreement()
    agreement.begin()
    agreement(key="async_write_complete", timeout_ms=1)
    assert agreement.end(None) is None
    assert agreement.end(ValueError("first\nsecond")) == "ValueError: first"


def test_a_full_disk_is_called_so():
    deep = f"RESOURCE_EXHAUSTED: writing ... {os.strerror(errno.ENOSPC)} [source locations=...]"
    assert brief(ValueError(deep)) == "No space left on device"
