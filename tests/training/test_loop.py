import dataclasses
import json
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.errors import InputError
from lazyattn.experiment.training import TrainingConfig
from lazyattn.sharding import MeshConfig, make_mesh
from lazyattn.training.log import RunLog
from lazyattn.training.loop import NonFiniteError, Run, fit
from lazyattn.training.profile import StepProfile
from tests.training import toy

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def toy_step():
    return toy.make(MESH)


def _train(workdir, toy_step, poison=(), stop_after=None, profile=None, **settings):
    """Trains in `workdir`, going on from its checkpoint; returns (state, record)."""
    factory, step_fn = toy_step
    config = TrainingConfig(**(dict(steps=12, log_every=4, checkpoint_every=5) | settings))
    batches = toy.Batches(poison)
    stop = SimpleNamespace(received=None)

    def step_and_stop(state, batch):
        if stop_after is not None and batches.index == stop_after:
            stop.received = signal.SIGTERM
        return step_fn(state, batch)

    with Checkpoints(
        workdir,
        keep=config.keep,
        keep_every=config.keep_every,
        max_failed=config.max_failed_saves,
    ) as checkpoints:
        restored = checkpoints.restore(factory.abstract)
        if restored is not None:
            batches.set_state(restored.data)
        state = factory.create() if restored is None else restored.state
        log = RunLog(
            workdir,
            step=int(state.step),
            steps=config.steps,
            log_every=config.log_every,
            flops_per_token=1.0,
        )
        with log, StepProfile(workdir, profile) as steps:
            run = Run(
                config=config,
                experiment={"training": {"steps": config.steps}},
                mesh=MESH,
                step_fn=step_and_stop,
                batches=batches,
                checkpoints=checkpoints,
                log=log,
                validate=lambda params: {"validation_loss": float(params["final_norm"][0])},
                stop=stop,
                profile=steps,
            )
            return fit(run, state)


def _records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _steps(workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.steps()


def test_every_step_has_a_line_and_the_last_a_checkpoint(tmp_path, toy_step, capsys):
    state, record = _train(tmp_path, toy_step, eval_every=6)
    records = _records(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records if "validation_loss" in r] == [6, 12]
    assert [r["step"] for r in records if "tokens_per_second" in r] == [4, 8, 12]
    assert all(r["seconds"] >= 0 and r["tokens"] > 0 for r in records)
    assert record["step"] == 12 and record["validation_loss"] == records[-1]["validation_loss"]
    assert _steps(tmp_path) == [12, 10, 5]
    assert int(state.step) == 12
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    printed = capsys.readouterr().out
    assert "step  8/12" in printed and "validation: loss" in printed and "\r" not in printed


def test_a_resumed_run_takes_the_same_steps(tmp_path, toy_step):
    whole, _ = _train(tmp_path / "whole", toy_step)
    _train(tmp_path / "parts", toy_step, steps=7)
    # As if killed just after step 9, whose line is torn, with no checkpoint since 7.
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 9.9}\n{"step": 9, "los')
    parts, _ = _train(tmp_path / "parts", toy_step)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    losses = [[(r["step"], r["loss"]) for r in _records(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_finished_run_takes_no_step(tmp_path, toy_step):
    _train(tmp_path, toy_step, steps=3)
    state, record = _train(tmp_path, toy_step, steps=3)
    assert int(state.step) == 3 and record == {}
    assert len(_records(tmp_path)) == 3


def test_a_stop_signal_saves_the_step_under_way_without_validating(tmp_path, toy_step):
    state, record = _train(tmp_path, toy_step, stop_after=8)
    assert int(state.step) == 8
    assert _steps(tmp_path)[0] == 8
    assert "validation_loss" not in record
    resumed, _ = _train(tmp_path, toy_step)
    assert [r["step"] for r in _records(tmp_path)] == list(range(1, 13))
    whole, _ = _train(tmp_path / "whole", toy_step)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_few_non_finite_steps_are_skipped(tmp_path, toy_step):
    state, _ = _train(tmp_path, toy_step, poison=[3, 4, 7], max_nonfinite_steps=3)
    records = _records(tmp_path)
    assert [r["step"] for r in records if r["skipped"]] == [4, 5, 8]
    assert [r["loss"] for r in records if r["skipped"]] == [None] * 3
    assert int(state.nonfinite_total) == 3
    # None while steps were being skipped (5), so that 10 is the first.
    assert _steps(tmp_path) == [12, 10]


def test_too_many_non_finite_steps_stop_the_run_and_keep_the_last_good_checkpoint(
    tmp_path, toy_step
):
    poison = range(7, 100)
    with pytest.raises(NonFiniteError) as caught:
        _train(tmp_path, toy_step, poison=poison, steps=40, max_nonfinite_steps=6)
    message = str(caught.value)
    for part in ("step 13", "6 steps in a row", "those of step 7", "last checkpoint is of step 5"):
        assert part in message
    assert "\n" not in message
    assert _steps(tmp_path) == [5]
    assert [r["step"] for r in _records(tmp_path)] == list(range(1, 14))
    # With the trouble gone the run goes on from there.
    state, _ = _train(tmp_path, toy_step)
    whole, _ = _train(tmp_path / "whole", toy_step)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_the_step_before_is_fetched_after_the_next_is_dispatched(tmp_path, toy_step, monkeypatch):
    factory, step_fn = toy_step
    events = []

    def dispatch(state, batch):
        events.append("dispatch")
        return step_fn(state, batch)

    write = RunLog.write
    monkeypatch.setattr(
        RunLog, "write", lambda log, record: (events.append(record["step"]), write(log, record))
    )
    _train(tmp_path, (factory, dispatch), steps=4)
    assert events == ["dispatch", "dispatch", 1, "dispatch", 2, "dispatch", 3, 4]


def test_a_saved_step_is_in_the_log_already(tmp_path, toy_step, monkeypatch):
    save = Checkpoints.save

    def check_then_save(checkpoints, step, *rest):
        assert _records(tmp_path)[-1]["step"] == step
        save(checkpoints, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", check_then_save)
    _train(tmp_path, toy_step, checkpoint_every=1, steps=3)
    assert _steps(tmp_path) == [3, 2, 1]


def _validated(tmp_path, toy_step, losses, **settings):
    """Trains 12 steps with a checkpoint and a validation every 2, of these losses."""
    factory, step_fn = toy_step
    config = TrainingConfig(steps=12, log_every=4, checkpoint_every=2, eval_every=2, **settings)
    left = iter(losses)
    with (
        Checkpoints(tmp_path, keep=config.keep) as checkpoints,
        RunLog(tmp_path, step=0, steps=12, log_every=4, flops_per_token=1.0) as log,
    ):
        run = Run(
            config=config,
            experiment={},
            mesh=MESH,
            step_fn=step_fn,
            batches=toy.Batches(),
            checkpoints=checkpoints,
            log=log,
            validate=lambda _: {"validation_loss": next(left)},
            stop=SimpleNamespace(received=None),
            profile=StepProfile(tmp_path),
        )
        fit(run, factory.create())


def test_the_best_checkpoint_by_validation_is_kept_whatever_keep_says(tmp_path, toy_step):
    _validated(tmp_path, toy_step, [5.0, 3.0, float("nan"), 3.5, 4.0, 4.5], keep=2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [12, 10, 4]
        assert checkpoints.best() == (4, 3.0)
        assert checkpoints.choose("best") == 4 and checkpoints.choose(None) is None
        assert checkpoints.choose(10) == 10
        with pytest.raises(InputError, match=r"--step is 7, but .* are of steps 4, 10, 12\."):
            checkpoints.choose(7)
        # A later session knows of it too, and lets go of it for a better one only.
        state = checkpoints.restore(toy_step[0].abstract).state
        for step, loss in ((14, None), (16, 3.0)):
            later = dataclasses.replace(state, step=state.step - 12 + step)
            checkpoints.save(step, later, {"index": step}, {}, loss)
            checkpoints.wait()
            assert checkpoints.steps() == ([14, 4] if step == 14 else [16])


def test_a_torn_loss_is_none(tmp_path, toy_step):
    _validated(tmp_path, toy_step, [5.0, 3.0, 3.2, 3.5, 4.0, 4.5], keep=9)
    path = tmp_path / "checkpoints" / "4" / "data" / "metadata"
    path.write_text(path.read_text()[:-9])
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best() == (6, 3.2)
        with pytest.raises(InputError, match=r"the checkpoint of step 4 in .* can't be read"):
            checkpoints.restore(toy_step[0].abstract, 4)
        assert int(checkpoints.restore(toy_step[0].abstract, 8).state.step) == 8


def test_no_checkpoint_is_the_best_without_a_validation(tmp_path, toy_step):
    _train(tmp_path, toy_step, stop_after=6)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best() is None
        with pytest.raises(InputError, match=r"--step is 'best', but no checkpoint .* validated"):
            checkpoints.choose("best")


def test_rates_leave_the_first_step_out(tmp_path, toy_step, capsys):
    _train(tmp_path, toy_step, steps=3, log_every=1)
    records = _records(tmp_path)
    assert ["tokens_per_second" in r for r in records] == [False, True, True]
    assert "first step after" in capsys.readouterr().out
