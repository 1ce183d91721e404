import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.model.config import RECIPES, AttentionConfig
from lazyattn.model.distance_bias import (
    LOG_SLOPE_RANGE,
    NAMES,
    bias_arguments,
    bias_parameters,
)
from lazyattn.model.heads import global_heads
from pallas_kernels.bias import expand
from tests.model.tiny import dealt_slopes


def _initial(config):
    """Returns a layer's bias parameters at the start, and what the op gets of them."""
    found = {
        name: bias.init(jax.random.key(0), bias.shape, jnp.float32)
        for name, bias in bias_parameters(config).items()
    }
    return found, jax.jit(lambda p: bias_arguments(p, config))(found)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_alibi_table_and_tail_are_one_line(kv_heads):
    config = AttentionConfig(num_heads=6, num_kv_heads=kv_heads, bias_width=5, bias_kind="table")
    found, given = _initial(config)
    table, slope = found["distance_bias"], found["distance_slope"]
    np.testing.assert_array_equal(slope, dealt_slopes(6, config.kv_heads))
    for head, x in itertools.product(range(6), range(5)):
        np.testing.assert_allclose(table[head, x], -slope[head] * x, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, given, found)


def test_normal_table_and_flat_tail():
    config = AttentionConfig(
        num_heads=4, bias_width=1000, bias_kind="table", bias_init="normal", bias_std=0.02
    )
    found, _ = _initial(config)
    np.testing.assert_allclose(found["distance_bias"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(found["distance_bias"].mean(), 0, atol=0.002)
    np.testing.assert_array_equal(found["distance_slope"], 0)


@pytest.mark.parametrize("kv_heads", [None, 4])
def test_a_decay_starts_as_the_table_does(kv_heads):
    heads = {"num_heads": 16, "num_kv_heads": kv_heads}
    decay = AttentionConfig(**heads, **RECIPES["sharp"])
    table = AttentionConfig(**heads, **RECIPES["sharp_table"])
    found, given = _initial(decay)
    assert set(found) == {"distance_log_slope", "distance_delta"}
    assert all(array.dtype == jnp.float32 for array in [*found.values(), *given.values()])
    np.testing.assert_array_equal(found["distance_delta"], 0)
    _, expected = _initial(table)
    # The logarithm of a slope, at most 5.6, is rounded to 2.4e-7.
    for name in ("distance_bias", "distance_slope"):
        np.testing.assert_allclose(given[name], expected[name], rtol=5e-7)


def test_a_decay_is_its_formula():
    config = AttentionConfig(num_heads=3, bias_width=7)
    rng = np.random.default_rng(0)
    theta, delta = rng.normal(size=(2, 3)), rng.normal(size=(2, 3, 7))
    found = bias_arguments({"distance_log_slope": theta, "distance_delta": delta}, config)
    for layer in range(2):
        bias = expand(found["distance_bias"][layer], found["distance_slope"][layer], 20)
        for head, x in itertools.product(range(3), range(20)):
            expected = -np.exp(theta[layer, head]) * x + delta[layer, head, min(x, 6)]
            np.testing.assert_allclose(bias[head, x], expected, rtol=1e-5, atol=1e-6)


EXTREMES = [-3.4e38, -1e6, -104.0, -88.0, -30.0, -5.5, 0.0, 3.0, 10.0, 88.8, 1e6, 3.4e38]


def _decay(theta, delta):
    config = AttentionConfig(num_heads=len(theta), bias_width=delta.shape[1])
    parameters = {
        "distance_log_slope": jnp.asarray(theta, jnp.float32),
        "distance_delta": jnp.asarray(delta, jnp.float32),
    }
    return jax.jit(lambda p: bias_arguments(p, config))(parameters)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, 1e30])
def test_the_tail_falls_whatever_the_parameters_are(size):
    rng = np.random.default_rng(0)
    theta = np.concatenate([EXTREMES, rng.normal(scale=[[1], [10], [1e3]], size=(3, 40)).ravel()])
    given = _decay(theta, size * rng.normal(size=(len(theta), 16)))
    slope = np.asarray(given["distance_slope"])
    assert (slope > 0).all() and np.isfinite(slope).all()
    assert np.isfinite(given["distance_bias"]).all()
    bias = np.asarray(expand(given["distance_bias"], given["distance_slope"], 2**17))
    assert np.isfinite(bias).all() and (np.diff(bias[:, 15:], axis=1) <= 0).all()
    # It does fall, where float32 has the digits to say so.
    seen = slope * 2**17 > 1e-6 * np.abs(bias[:, 15])
    assert (bias[seen, -1] < bias[seen, 15]).all()


def test_theta_has_a_gradient_everywhere():
    config = AttentionConfig(num_heads=len(EXTREMES), bias_width=4)
    delta = np.zeros((len(EXTREMES), 4), np.float32)

    def total(theta):
        given = bias_arguments({"distance_log_slope": theta, "distance_delta": delta}, config)
        return given["distance_slope"].sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(EXTREMES, jnp.float32)))
    expected = np.exp(np.clip(EXTREMES, *LOG_SLOPE_RANGE))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["decay", "table"])
def test_global_heads_have_no_slope_and_nothing_past_the_table(kind):
    config = AttentionConfig(num_heads=8, num_kv_heads=4, bias_width=6, bias_kind=kind)
    config = dataclasses.replace(config, global_share=0.25)
    rng = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
        for name, bias in bias_parameters(config).items()
    }
    given = bias_arguments(parameters, config)
    bias = np.asarray(expand(given["distance_bias"], given["distance_slope"], 20))
    everywhere = global_heads(config)
    assert everywhere.sum() == 2
    table = parameters[NAMES[kind][0]]
    np.testing.assert_array_equal(bias[everywhere, :5], table[everywhere, :5])
    np.testing.assert_array_equal(bias[everywhere, 5:], 0)
    assert (given["distance_slope"][~everywhere] != 0).all()
    start, given = _initial(config)
    np.testing.assert_array_equal(np.asarray(given["distance_bias"])[everywhere], 0)
    assert all(np.isfinite(array).all() for array in start.values())
    local = np.sort(given["distance_slope"][~everywhere])[::-1]
    np.testing.assert_allclose(local, 2 ** (-8 * np.arange(1, 7) / 6), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["decay", "table"])
def test_all_heads_or_none_are_global(kind, share):
    config = AttentionConfig(num_heads=4, bias_width=6, bias_kind=kind, global_share=share)
    np.testing.assert_array_equal(global_heads(config), share == 1)
    _, given = _initial(config)
    np.testing.assert_array_equal(given["distance_slope"] == 0, share == 1)


def test_parameters_of_two_kinds_or_the_wrong_one_are_refused():
    config = AttentionConfig(num_heads=2, bias_width=3)
    new = {"distance_log_slope": np.zeros(2), "distance_delta": np.zeros((2, 3))}
    old = {"distance_bias": np.zeros((2, 3)), "distance_slope": np.zeros(2)}
    for given, said in ((new | old, "distance_bias, distance_delta, distance_l"), (old, "dist")):
        with pytest.raises(InputError, match=f"distance bias are {said}.* 'decay' has") as caught:
            bias_arguments(given, config)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"are missing, but a layer with .* 'table' has"):
        bias_arguments({"offset": 1}, dataclasses.replace(config, bias_kind="table"))
