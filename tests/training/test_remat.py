"""Which remat is chosen, and that the step is the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lazyattn import sharding
from lazyattn.checkpoint.state import make_state_factory
from lazyattn.experiment import from_config_dict
from lazyattn.sharding import MeshConfig
from lazyattn.training import remat
from lazyattn.training.optimizer import make_optimizer
from lazyattn.training.remat import Need
from tests.training import tiny

GIB = 2**30
CLONE = '  %custom-call.7.remat2 = (bf16[8]{0}) custom-call(%a), custom_call_target="mosaic"\n'


def _choose(needs, available=100, estimates=(1, 1, 1, 1), clones=(), **settings):
    """Chooses among needs in GiB; returns the choice and what was compiled."""
    compiled = []

    def need(policy):
        compiled.append(policy)
        text = CLONE if policy in clones else CLONE.replace(".remat2", "")
        return Need(needs[policy] * GIB, policy, lambda: text)

    by_formula = {name: size * GIB for name, size in zip(remat.POLICIES, estimates, strict=True)}
    available = None if available is None else available * GIB
    choice = remat.choose(need, available=available, estimates=by_formula, **settings)
    return choice, compiled


NEEDS = {"none": 200, "dots": 95, "attention": 60, "full": 40}


@pytest.mark.parametrize(
    ("available", "policy"),
    [(250, "none"), (210, "dots"), (105, "dots"), (100, "attention"), (50, "full")],
)
def test_the_fastest_that_fits_with_a_margin(available, policy):
    choice, compiled = _choose(NEEDS, available)
    assert choice.policy == choice.result == policy
    assert compiled == list(remat.POLICIES[: remat.POLICIES.index(policy) + 1])
    assert f"needs {NEEDS[policy]:.2f} GiB of {available:.2f} GiB a device" in choice.why


def test_what_is_far_too_large_by_formula_is_not_compiled():
    choice, compiled = _choose(NEEDS, 100, estimates=(93, 92, 40, 40))
    assert compiled == ["dots", "attention"] and choice.policy == "attention"
    assert "none would need at least 93.00 GiB; dots needs 95.00 GiB" in choice.why


def test_kernels_that_run_twice_do_not_fit():
    choice, _ = _choose(NEEDS, 300, clones=("none",))
    assert choice.policy == "dots" and "with kernels run twice" in choice.why
    # Far from the limit XLA has no reason to, and the program is not read.
    assert _choose(NEEDS, 400, clones=("none",))[0].policy == "none"


def test_none_fits():
    choice, _ = _choose({**NEEDS, "full": 99}, 50, estimates=(500, 500, 500, 500))
    assert choice.policy == "full" and "more than the margin leaves" in choice.why


def test_unknown_memory_compiles_nothing():
    choice, compiled = _choose(NEEDS, None)
    assert (choice.policy, choice.result, compiled) == ("none", None, [])
    assert "do not say how much memory" in choice.why


def test_one_process_on_which_it_does_not_fit_decides_for_all():
    choice, _ = _choose(NEEDS, 250, agree=lambda policy, fits: fits and policy != "none")
    assert choice.policy == "dots"


def test_clones_of_custom_calls_are_found_and_others_are_not():
    assert remat._CLONE.search(f"ENTRY m {{\n{CLONE}}}")
    assert not remat._CLONE.search(CLONE.replace(".remat2", ""))
    assert not remat._CLONE.search(CLONE.replace("custom-call(%a)", "fusion(%custom-call.remat)"))


def _experiment(text, policy, **training):
    config = tiny.get_config(text)
    config.model.num_layers = 2
    config.model.mlp_width = 256
    config.model.loss_chunk = 16
    config.model.remat = policy
    config.data.sequence_length = 32
    config.training.update(training)
    experiment = from_config_dict(config)
    return dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=1))


@pytest.mark.slow
def test_the_compiler_decides_and_the_step_is_the_same(text, monkeypatch):
    found = {}
    real = remat._need

    def need(step, *arguments):
        policy = remat.POLICIES[len(found)]
        found[policy] = real(step, *arguments)
        return dataclasses.replace(found[policy], bytes=2.0 if policy == "none" else 0.5)

    monkeypatch.setattr(remat, "_need", need)
    monkeypatch.setattr(remat, "estimates", lambda *_: dict.fromkeys(remat.POLICIES, 0.0))
    monkeypatch.setattr(remat, "available_bytes", lambda mesh: 1.0)
    experiment = _experiment(text, "auto")
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    factory = make_state_factory(experiment, mesh, optimizer)
    parts = mesh, optimizer, factory.shardings, factory.abstract
    step, said = remat.make_step(experiment, *parts)
    assert list(found) == ["none", "dots"] and step is found["dots"].result
    assert said[0].startswith("remat    dots, chosen by auto: ")
    assert found["none"].bytes > found["dots"].bytes > 0

    tokens = np.random.default_rng(0).integers(280, size=(4, 33), dtype=np.int32)
    rows = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((4, 32), np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)),
    }
    metrics = {}
    for policy, each in found.items():
        state = factory.create()
        for _ in range(2):
            state, metrics[policy] = each.result(state, sharding.shard_batch(rows, mesh))
    for name, value in metrics["none"].items():
        np.testing.assert_allclose(metrics["dots"][name], value, rtol=1e-5)


@pytest.mark.slow
def test_a_run_says_what_it_chose_and_keeps_what_was_asked(text, tmp_path, capsys):
    experiment = _experiment(text, "auto", steps=1)
    assert tiny.train(experiment, tmp_path / "run", tmp_path / "cache", summary=False) == 0
    said = capsys.readouterr().out
    assert "remat    none, chosen by auto: these devices do not say how much memory" in said
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["model"]["remat"] == "auto"
