"""Ramps of offsets and slopes, and what is trained while a model is taught."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyattn.experiment import TeachingConfig
from lazyattn.model.config import AttentionConfig
from lazyattn.model.distance_bias import bias_arguments, bias_parameters
from lazyattn.model.heads import initial_slopes
from lazyattn.training.initialize import converted_bias
from lazyattn.training.teaching import lines, with_ramps

SOFTMAX = AttentionConfig(num_heads=4, variant="softmax")
KINDS = {
    "decay": {},
    "global": {"global_share": 0.25},
    "table": {"bias_kind": "table"},
    "no tail": {"bias_kind": "table", "bias_tail": False},
}
STEPS = 8


def _attention(kind):
    return AttentionConfig(num_heads=4, bias_width=6, offset_init=-0.75, **KINDS[kind])


def _start(config):
    """Returns a layer's parameters as they are when a softmax model is taken over."""
    layer = {"output": jnp.ones((2, 4, 2, 8))}
    return converted_bias(layer, SOFTMAX, config)[0] | {"offset": jnp.zeros((2, 4))}


def _taken(layer, optimizer, updates):
    """Returns the layer after updates with gradients of 0."""
    params = {"blocks": {"attention": layer}}
    state = optimizer.init(params)
    for _ in range(updates):
        moved, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, moved)
    return params["blocks"]["attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_ramp_ends_where_a_fresh_model_starts(kind):
    config, start = _attention(kind), _start(_attention(kind))
    ramped = with_ramps(optax.sgd(0.1), config, TeachingConfig(STEPS, STEPS + 2))
    at_half, at_end, later = (_taken(start, ramped, n) for n in (STEPS // 2, STEPS + 2, STEPS + 9))
    np.testing.assert_allclose(at_half["offset"], -0.75 / 2, rtol=1e-6)
    np.testing.assert_allclose(at_end["offset"], -0.75, rtol=1e-6)
    fresh = {
        name: jnp.broadcast_to(one.init(None, one.shape, jnp.float32), (2, *one.shape))
        for name, one in bias_parameters(config).items()
    }
    for found in (at_end, later):
        for name, value in bias_arguments(found, config).items():
            expected = bias_arguments(fresh, config)[name]
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7)
    half = bias_arguments(_taken(start, ramped, (STEPS + 2) // 2), config)
    expected = np.broadcast_to(-initial_slopes(config) / 2, (2, 4))
    np.testing.assert_allclose(half["distance_bias"][..., 1], expected, rtol=2e-5, atol=1e-7)
    if "distance_slope" in half:
        np.testing.assert_allclose(half["distance_slope"], -expected, rtol=2e-5, atol=1e-7)


def test_a_ramp_comes_on_top_of_what_is_learned():
    config = _attention("decay")
    ramped = with_ramps(optax.sgd(0.1), config, TeachingConfig(offset_steps=STEPS))
    params = {"offset": jnp.zeros(4), "distance_log_slope": jnp.zeros(4)}
    state = ramped.init(params)
    moved, _ = ramped.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(moved["offset"], -0.75 / STEPS - 0.1, rtol=1e-6)
    np.testing.assert_allclose(moved["distance_log_slope"], -0.1, rtol=1e-6)


def test_no_ramp_is_the_optimizer_itself():
    inner = optax.sgd(0.1)
    assert with_ramps(inner, _attention("decay"), TeachingConfig()) is inner
    assert with_ramps(inner, SOFTMAX, TeachingConfig(STEPS, STEPS)) is inner
    # A table of random entries has no slopes to go to.
    paper = dataclasses.replace(_attention("no tail"), bias_init="normal")
    assert list(lines(paper, TeachingConfig(STEPS, STEPS))) == ["offset"]
