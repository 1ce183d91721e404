import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.inspect.measure import ROLLOUT_CELLS, measure
from lazyattn.inspect.tiles import cost_over_softmax
from lazyattn.model.heads import head_windows
from lazyattn.model.transformer import Transformer
from tests.inspect.models import model, tokens, weights_of

LENGTH = 150


@pytest.fixture(scope="module")
def measured():
    config, params = model()
    rows = [tokens(LENGTH, 0), tokens(LENGTH, 1)]
    return measure(params, config, rows), weights_of(config, params, np.stack(rows))


def test_rows_are_added_up(measured):
    found, weights = measured
    np.testing.assert_allclose(found.sums["mass"], weights.sum((1, 3, 4)), rtol=1e-5)


def test_maps_hold_the_largest_weight_of_each_cell(measured):
    found, weights = measured
    cells = weights[:, 0].reshape(2, 4, 75, 2, 75, 2).max((3, 5))
    np.testing.assert_allclose(found.maps, cells, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [64, 128])
def test_live_tiles(measured, size):
    found, weights = measured
    missing = -LENGTH % size
    weights = np.pad(weights, [(0, 0)] * 3 + [(0, missing)] * 2)
    count = weights.shape[-1] // size
    live = (weights.reshape(2, 2, 4, count, size, count, size) > 0).any((4, 6)).sum((1, 3, 4))
    np.testing.assert_array_equal(found.tiles[f"live_{size}"], live)
    causal = 2 * count * (count + 1) / 2
    np.testing.assert_array_equal(found.tiles[f"causal_{size}"], causal)
    assert np.all(found.tiles[f"visited_{size}"] >= live)
    assert np.all(found.tiles[f"visited_{size}"] <= causal)


def test_rollout_is_the_product_of_the_layers(measured):
    found, weights = measured
    flow = np.eye(LENGTH)
    for layer in weights[:, 0].mean(1):
        total = layer + np.eye(LENGTH)
        flow = total / total.sum(-1, keepdims=True) @ flow
    cell = np.arange(LENGTH) * ROLLOUT_CELLS // LENGTH
    cells = np.stack([flow[:, cell == c].sum(-1) for c in range(ROLLOUT_CELLS)], axis=-1)
    np.testing.assert_allclose(found.rollout, cells, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.rollout_first[-1], flow[1:, 0].mean(), rtol=1e-4)


def test_states_are_the_models(measured):
    found, _ = measured
    config, params = model()
    # Without the last norm's effect: its scale is 1 at the start, so directions are equal.
    apply = jax.jit(lambda p, x: Transformer(config).apply({"params": p}, x))
    hidden = np.asarray(apply(params, jnp.asarray(tokens(LENGTH, 0)[None])), np.float64)[0]
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    cosines = unit @ unit.T
    expected = (cosines.sum() - LENGTH) / (LENGTH * (LENGTH - 1))
    assert found.states["cosine"].shape == (3,)
    np.testing.assert_allclose(found.states["cosine"][-1], expected, rtol=1e-3, atol=1e-5)
    assert np.all(found.states["top"][:, 0] >= found.states["top"][:, 2])
    assert np.all(found.states["top"][:, 2] > found.states["median"])


@pytest.mark.slow
@pytest.mark.parametrize("skip_mass", [1e-6, 0.0])
def test_heads_with_a_window(skip_mass):
    config, params = model(window=20, global_share=0.25, skip_mass=skip_mass)
    windows = head_windows(config.attention)
    assert windows == (20, 20, 20, None)
    row = tokens(LENGTH)
    found, (weights,) = measure(params, config, [row]), weights_of(config, params, row[None])[:1]
    index = np.arange(LENGTH)
    seen = np.stack([np.minimum(index + 1, LENGTH if w is None else w) for w in windows])
    np.testing.assert_array_equal(found.sums["pairs"], [seen.sum(axis=1)] * 2)
    np.testing.assert_allclose(found.sums["mass"][0], weights[0].sum((1, 2)), rtol=1e-5)
    visible = index - index[:, None]
    visible = (visible <= 0) & (visible > -np.asarray([20, 20, 20, LENGTH])[:, None, None])
    zeros = ((weights[0] == 0) & visible).sum((1, 2))
    np.testing.assert_array_equal(found.sums["zeros"][0], zeros)
    # Three tiles of queries: 1 + 2 + 2 tiles of keys, or all 6.
    visited = found.tiles["visited_64"]
    assert (visited <= [5, 5, 5, 6]).all() and (skip_mass > 0 or (visited == [5, 5, 5, 6]).all())
    assert (found.tiles["live_64"] <= visited).all()


def test_costs_are_those_of_the_specification():
    # Its table: nothing skipped, and two lengths with the ALiBi bias, two digits each.
    cost = cost_over_softmax(np.array([1, 0.63, 0.22]), np.array([1, 0.35, 0.06]), True)
    np.testing.assert_allclose(cost["forward"], [2, 0.83, 0.20], atol=0.015)
    np.testing.assert_allclose(cost["backward"], [1, 0.51, 0.15], atol=0.015)
    np.testing.assert_allclose(cost["training"], [9 / 7, 0.60, 0.17], atol=0.015)
    np.testing.assert_allclose(cost["inference"], [1.5, 0.665, 0.17], atol=0.001)
    assert cost_over_softmax(np.array(0.5), np.array(0.5), False)["training"] == 0.5
