"""A trace of chosen steps."""

import gzip
import json

import jax
import pytest

from lazyattn import paths
from lazyattn.errors import InputError
from lazyattn.training.profile import StepProfile, parse
from tests.bucket_fake import URL, bucket
from tests.training.test_loop import MESH, _train, toy  # one loop for both

__all__ = ["bucket"]


@pytest.fixture(scope="module")
def toy_step():
    return toy.make(MESH)


def _traced(workdir):
    """Returns the steps that each trace has, as its viewers read them."""
    found = []
    for path in sorted(workdir.rglob("*.trace.json.gz")):
        assert path.parents[2].relative_to(workdir).as_posix() == "profile/plugins"
        assert list(path.parent.glob("*.xplane.pb"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
        found.append(sorted(map(int, steps)))
    return found


def test_the_chosen_steps_are_traced_and_change_nothing(tmp_path, toy_step, capsys):
    plain, _ = _train(tmp_path / "plain", toy_step, steps=8)
    traced, _ = _train(tmp_path / "run", toy_step, steps=8, profile=(4, 6))
    assert _traced(tmp_path / "run") == [[4, 5, 6]] and _traced(tmp_path / "plain") == []
    assert f"profile written to {tmp_path / 'run' / 'profile'} " in capsys.readouterr().out
    jax.tree.map(lambda a, b: None if (a == b).all() else pytest.fail("differs"), plain, traced)


def test_a_resumed_run_traces_what_is_left(tmp_path, toy_step):
    _train(tmp_path, toy_step, steps=5)
    _train(tmp_path, toy_step, steps=8, profile=(3, 7))
    assert _traced(tmp_path) == [[6, 7]]
    _train(tmp_path, toy_step, steps=9, profile=(3, 7))  # they are behind
    assert _traced(tmp_path) == [[6, 7]]


def test_a_run_that_is_stopped_writes_its_trace(tmp_path, toy_step):
    _train(tmp_path, toy_step, steps=9, profile=(3, 8), stop_after=5)
    assert _traced(tmp_path) == [[3, 4, 5]]


def test_a_trace_in_a_bucket(bucket, monkeypatch):
    def start(folder):
        monkeypatch.setattr(
            jax.profiler, "stop_trace", lambda: (folder / "a.xplane.pb").write_text("trace")
        )

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    with StepProfile(paths.folder("--workdir", f"{URL}/run"), (1, 2)) as profile:
        profile.before(1, None)
        profile.after(1, None)
        assert bucket.store == {}
        profile.after(2, None)
    assert list(bucket.store) == ["bucket/run/profile/a.xplane.pb"]


def test_a_trace_that_can_not_be_written_ends_nothing(tmp_path, monkeypatch, caplog):
    def full():
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    with StepProfile(tmp_path, (1, 1)) as profile:
        profile.before(1, None)
        profile.after(1, None)
    assert "can't be written (No space left on device)" in caplog.text


@pytest.mark.parametrize("text", ["", "5", "a:b", "0:3", "7:6", "1:2:3", "-1:4", "3-5"])
def test_what_are_no_steps_is_refused(text):
    with pytest.raises(InputError, match=r"--profile is .* first and the last step to trace"):
        parse(text, 10)


def test_steps_past_the_end_are_refused():
    assert parse(None, 10) is None and parse("10:10", 10) == (10, 10)
    with pytest.raises(InputError, match=r"--profile is '9:11', but the run has 10 steps"):
        parse("9:11", 10)
