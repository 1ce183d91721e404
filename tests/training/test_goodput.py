"""Where a run's time went."""

import gc
import json
import re
import time
from types import SimpleNamespace

import pytest

from lazyattn.training import goodput
from lazyattn.training.goodput import Goodput, device_memory
from tests.training import toy
from tests.training.test_loop import MESH, _train


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now.seconds)
    return now


def test_all_time_is_told(clock, monkeypatch):
    monkeypatch.setattr(goodput, "device_memory", dict)
    log = Goodput(100.0)
    log.lose("start", 10.0)
    log.step(9.0, skipped=False, timed=False)
    for number in range(20):
        log.step(1.0 if number < 18 else 3.0, skipped=number == 0, timed=True)
    log.wait(0.5)
    log.step(1.0, skipped=False, timed=True)
    log.lose("checkpoints", 4.0)
    clock.seconds = 150.0
    numbers = log.numbers()
    lost = {name: x for name, x in numbers.items() if name.startswith("lost")}
    assert lost == pytest.approx(
        {
            "lost_to_start": 0.2,
            "lost_to_data": 0.01,
            "lost_to_skipped_steps": 0.02,
            "lost_to_checkpoints": 0.08,
        }
    )
    assert numbers["goodput"] == pytest.approx((9 + 17 + 6 + 0.5) / 50)
    assert (numbers["step_seconds_p50"], numbers["step_seconds_p95"]) == (1.0, 3.0)
    spread, shares = log.lines()
    assert (
        spread
        == "step time                  1.00 s median, 3.00 s at the 95th percentile of"
        + (" 21 steps")
    )
    assert shares == (
        "goodput                    65.0% of 50 s in steps; start 20.0%, data 1.0%,"
        " skipped steps 2.0%, checkpoints 8.0%, other 4.0%"
    )


def test_a_run_that_goes_on_counts_from_its_first_start(clock, monkeypatch):
    monkeypatch.setattr(goodput, "device_memory", dict)
    monkeypatch.setattr(goodput.time, "time", lambda: 1000.0 + clock.seconds)
    first = Goodput(90.0)
    first.step(5.0, skipped=False, timed=True)
    kept = first.totals()
    assert kept == {"run_began": 1090.0, "useful_seconds": 5.0}
    assert first.numbers()["goodput_of_all_starts"] == first.numbers()["goodput"] == 0.5
    assert len(first.lines()) == 2
    first.step(3.0, skipped=False, timed=True)  # and was killed
    clock.seconds = 150.0
    second = Goodput(140.0, earlier=kept)
    second.step(4.0, skipped=False, timed=True)
    clock.seconds = 190.0
    assert second.numbers()["goodput_of_all_starts"] == pytest.approx((5 + 4) / 100)
    assert second.lines()[-1] == "goodput of all starts      9.0% of 100 s since the first"


def test_memory_of_the_fullest_device():
    stats = [
        {"peak_bytes_in_use": 5, "bytes_limit": 9},
        {"peak_bytes_in_use": 7, "bytes_limit": 8},
        None,
    ]
    devices = [SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    assert device_memory(devices) == {"memory_peak_bytes": 7, "memory_limit_bytes": 8}
    assert device_memory(devices[2:]) == {}


class _Slow(toy.Batches):
    """Batches that keep the device waiting."""

    def __next__(self):
        time.sleep(0.05)
        return super().__next__()


def test_a_run_that_waits_for_data_says_so(tmp_path, monkeypatch):
    step = toy.make(MESH)
    monkeypatch.setattr(toy, "Batches", _Slow)
    _train(tmp_path, step, steps=12)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "goodput" in record]
    assert [record["step"] for record in logged] == [4, 8, 12]
    assert all(0.05 <= r["step_seconds_p50"] <= r["step_seconds_p95"] for r in logged)
    # Eleven timed steps of 50 ms and more, nearly all of it waiting.
    assert all(record["goodput"] < 0.5 for record in logged)


def test_the_shares_add_up_to_all(tmp_path, monkeypatch):
    said = []
    gc.collect()  # those of other tests
    lines = Goodput.lines
    monkeypatch.setattr(Goodput, "__del__", lambda log: said.append(lines(log)), raising=False)
    step = toy.make(MESH)
    _train(tmp_path, step, steps=6, eval_every=2, poison=[3])
    (found,) = [line for one in said for line in one if line.startswith("goodput")]
    shares = {name: float(n) for name, n in re.findall(r"([a-z ]+) (-?\d+\.\d)%", found)}
    assert min(shares.values()) >= 0
    assert {" start", " validation", " checkpoints", " skipped steps"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
