"""Muon, averages of the parameters and small moments: what they compute, and how they resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyattn.checkpoint.load import load_trained
from lazyattn.checkpoint.manager import Checkpoints
from lazyattn.checkpoint.state import StateFactory
from lazyattn.errors import InputError
from lazyattn.experiment import from_config_dict, resumption_changes
from lazyattn.experiment.training import OptimizerConfig
from lazyattn.sharding import MeshConfig, make_mesh, spec
from lazyattn.training import main as run
from lazyattn.training.muon import is_muon
from lazyattn.training.optimizer import make_optimizer, make_schedule
from lazyattn.training.step import make_train_step
from tests.training import tiny, toy
from tests.training.test_loop import _train

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
PLAIN = dict(
    learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0
)


def _update(config, params, gradients):
    optimizer = make_optimizer(config, 10)
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return updates, state


def _random(shapes, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


SHAPES = {
    "embedding": (9, 12),
    "blocks": {
        "attention": {"query": (2, 12, 3, 4), "output": (2, 3, 4, 12), "offset": (2, 3)},
        "mlp": {"gate": (2, 12, 20), "down": (2, 20, 12)},
        "mlp_norm": {"scale": (2, 12)},
    },
}


@pytest.mark.parametrize(("consistent_rms", "seen"), [(0.2, 0.2), (0.0, None)])
def test_muon_is_that_of_optax_for_each_layers_matrices(consistent_rms, seen):
    params, gradients = _random(SHAPES), _random(SHAPES, 1)
    config = OptimizerConfig(name="muon", consistent_rms=consistent_rms, **PLAIN)
    found, _ = _update(config, params, gradients)
    theirs = optax.contrib.muon(1.0, consistent_rms=seen)
    update = jax.jit(lambda gradient: theirs.update(gradient, theirs.init(gradient), gradient)[0])
    for path, shape in {
        ("attention", "query"): (12, 12),
        ("attention", "output"): (12, 12),
        ("mlp", "gate"): (12, 20),
        ("mlp", "down"): (20, 12),
    }.items():
        for layer in range(2):
            gradient = gradients["blocks"][path[0]][path[1]][layer].reshape(shape)
            expected = update(gradient)
            own = found["blocks"][path[0]][path[1]][layer].reshape(shape)
            np.testing.assert_allclose(own, expected, rtol=2e-4, atol=2e-5)
            # Newton-Schulz brings singular values near 1, not to 1.
            values = np.linalg.svd(own, compute_uv=False)
            assert values.max() / values.min() < 3


def test_what_is_no_matrix_of_a_block_has_adam():
    params, gradients = _random(SHAPES), _random(SHAPES, 1)
    muon, _ = _update(OptimizerConfig(name="muon", **PLAIN), params, gradients)
    adam, _ = _update(OptimizerConfig(**PLAIN), params, gradients)
    mask = is_muon(params)
    assert [mask["blocks"]["mlp"]["gate"], mask["embedding"]] == [True, False]
    for theirs, own, by_muon in zip(*map(jax.tree.leaves, (adam, muon, mask)), strict=True):
        assert np.array_equal(theirs, own) != by_muon


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16(name):
    params, gradients = _random(SHAPES), _random(SHAPES, 1)
    small = dict(mu_dtype="bfloat16", nu_dtype="bfloat16")
    updates = {}
    for key, settings in {"float32": {}, "bfloat16": small}.items():
        optimizer = make_optimizer(OptimizerConfig(name=name, **settings, **PLAIN), 10)
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for _ in range(3):
            updates[key], state = update(gradients, state, params)
        moments = [x for x in jax.tree.leaves(state) if x.ndim > 1]
        assert {str(x.dtype) for x in moments} == {key}
    for x, y in zip(*map(jax.tree.leaves, updates.values()), strict=True):
        np.testing.assert_allclose(x, y, atol=0.02 * float(jnp.abs(x).max()))


SETTINGS = {
    "muon": dict(name="muon", ema_decay=0.9, mu_dtype="bfloat16", nu_dtype="bfloat16"),
    "adamw": dict(ema_decay=0.5, mu_dtype="bfloat16"),
}


def _toy_step(settings):
    """Returns a toy with a matrix that Muon takes."""
    config = dataclasses.replace(toy.OPTIMIZER, **settings)
    optimizer = make_optimizer(config, 20)

    def init_params(key):
        return {"gate": jax.random.normal(key, (toy.WIDTH, toy.WIDTH)), **toy.init_params(key)}

    def loss_fn(params, batch):
        turned = params["embedding"] @ params["gate"]
        return toy.loss_fn(params | {"embedding": turned}, batch)

    specs = {"gate": spec("embed", "mlp"), **toy.SPECS}
    factory = StateFactory(init_params, specs, optimizer, MESH, 0, keep_ema=True)
    step = make_train_step(
        loss_fn,
        optimizer,
        make_schedule(config, 20),
        mesh=MESH,
        shardings=factory.shardings,
        ema_decay=config.ema_decay,
    )
    return factory, step


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_takes_the_same_steps(tmp_path, name):
    step = _toy_step(SETTINGS[name])
    whole, _ = _train(tmp_path / "whole", step)
    _train(tmp_path / "parts", step, steps=7)
    parts, _ = _train(tmp_path / "parts", step)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert float(jnp.abs(whole.ema["gate"] - whole.params["gate"]).max()) > 0


def test_a_resumed_run_may_keep_its_moments_in_another_dtype(tmp_path):
    _train(tmp_path, _toy_step(dict(ema_decay=0.5)), steps=2)
    state, _ = _train(tmp_path, _toy_step(SETTINGS["adamw"]), steps=4)
    assert state.opt_state[1].mu["gate"].dtype == jnp.bfloat16
    assert int(state.step) == 4 and float(jnp.abs(state.opt_state[1].mu["gate"]).max()) > 0


def test_the_average_follows_the_parameters_and_skips_what_they_skip():
    factory, step = _toy_step(dict(ema_decay=0.3))
    state = factory.create()
    expected = jax.device_get(state.params)
    updates = 0
    for index in range(4):
        data = toy.batch(index)
        state, _ = step(state, toy.poisoned(data) if index == 1 else data)
        if index != 1:
            kept = min(0.3, (1 + updates) / (10 + updates))
            expected = jax.tree.map(
                lambda old, new, kept=kept: kept * old + (1 - kept) * new,
                expected,
                jax.device_get(state.params),
            )
            updates += 1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.ema, expected)
    assert state.evaluated(True) is state.ema and state.evaluated(False) is state.params


@pytest.mark.slow
def test_a_run_validates_the_average_and_its_readers_take_it(tmp_path):
    config = tiny.get_config(tiny.write_text(tmp_path / "text"))
    config.optimizer.update(SETTINGS["muon"])
    config.training.update({"steps": 3, "eval_batches": 1})
    experiment = from_config_dict(config)
    folder = tmp_path / "run"
    assert tiny.train(experiment, folder, tmp_path / "cache", summary=False) == 0
    averaged = load_trained(folder)
    training = dataclasses.replace(experiment.training, use_ema=False)
    raw = load_trained(folder, dataclasses.replace(experiment, training=training))
    with Checkpoints(folder, read_only=True) as checkpoints:
        optimizer = make_optimizer(experiment.optimizer, 3)
        mesh = make_mesh(experiment.mesh)
        state = checkpoints.restore(
            run.make_state_factory(experiment, mesh, optimizer).abstract
        ).state
    jax.tree.map(np.testing.assert_array_equal, averaged.params, state.ema)
    jax.tree.map(np.testing.assert_array_equal, raw.params, state.params)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, averaged.params, raw.params)


@pytest.mark.parametrize(("name", "value"), [("name", "muon"), ("ema_decay", 0.99)])
def test_a_resumed_run_keeps_the_kind_of_its_state(name, value):
    experiment = from_config_dict(tiny.get_config())
    saved = experiment.to_dict()
    changed = dataclasses.replace(
        experiment, optimizer=dataclasses.replace(experiment.optimizer, **{name: value})
    )
    with pytest.raises(InputError, match=f"^config.optimizer.{name} is {value!r}, but the check"):
        resumption_changes(saved, changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion"}, "optimizer.name is 'lion', but it must be adamw or muon"),
        ({"mu_dtype": "int8"}, "optimizer.mu_dtype is 'int8', but it must be float32 or bfloat16"),
        ({"ema_decay": 1.0}, "optimizer.ema_decay is 1.0, but it must be from 0 to below 1"),
        ({"ns_steps": 0}, "optimizer.ns_steps is 0, but it must be at least 1"),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(InputError) as error:
        OptimizerConfig(**settings)
    assert str(error.value).startswith(message)
