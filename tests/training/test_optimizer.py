import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyattn.experiment.training import OptimizerConfig
from lazyattn.training.optimizer import decay_mask, is_decayed, make_optimizer, make_schedule

DECAYED = [
    ("embedding",),
    ("unembedding",),
    ("blocks", "attention", "query", "kernel"),
    ("blocks", "attention", "output"),
    ("blocks", "attention", "output_gate"),
    ("blocks", "mlp", "gate"),
]
EXEMPT = [
    ("final_norm", "scale"),
    ("blocks", "attention_norm"),
    ("blocks", "attention", "query_norm", "scale"),
    ("blocks", "attention", "distance_bias"),
    ("blocks", "attention", "distance_slope"),
    ("blocks", "attention", "distance_delta"),
    ("blocks", "attention", "distance_log_slope"),
    ("blocks", "attention", "offset"),
    ("blocks", "attention", "query_bias"),
    ("blocks", "attention", "value_bias"),
]


def _rates(steps, **settings):
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **settings), steps)
    return np.asarray(schedule(np.arange(steps + 5)))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_starts_above_zero(kind):
    rates = _rates(40, schedule=kind, warmup_steps=8)
    np.testing.assert_allclose(rates[:8], 2.0 * np.arange(1, 9) / 8, rtol=1e-6)


def test_cosine_falls_from_the_peak_to_the_final_fraction_and_stays():
    rates = _rates(40, warmup_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(rates[9], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[24], 1.1, rtol=1e-6)  # halfway: the mean of both ends
    np.testing.assert_allclose(rates[39:], 0.2, rtol=1e-5)
    assert np.all(np.diff(rates[9:40]) < 0)


def test_wsd_stays_at_the_peak_then_falls_linearly():
    rates = _rates(50, schedule="wsd", warmup_steps=5, decay_fraction=0.2, final_fraction=0.0)
    np.testing.assert_allclose(rates[4:40], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[39:50], np.linspace(2.0, 0.0, 11), atol=1e-6)


def test_wsd_decay_never_reaches_into_the_warm_up():
    rates = _rates(10, schedule="wsd", warmup_steps=8, decay_fraction=1.0)
    np.testing.assert_allclose(rates[7], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[9], 0.2, rtol=1e-5)


def test_constant_and_no_warm_up():
    np.testing.assert_allclose(_rates(6, schedule="constant", warmup_steps=0), 2.0)


def test_a_run_shorter_than_its_warm_up_ends_inside_it():
    assert _rates(4, warmup_steps=1000)[3] == pytest.approx(2.0 * 4 / 1000)


def test_decay_groups():
    assert all(is_decayed(path) for path in DECAYED)
    assert not any(is_decayed(path) for path in EXEMPT)


@pytest.mark.parametrize("path", [("blocks", "gadget"), ("attention_norm", "query")])
def test_a_parameter_in_no_group_or_in_both_is_refused(path):
    with pytest.raises(ValueError, match="decay group"):
        is_decayed(path)


def test_mask_has_the_structure_of_the_parameters():
    params = {"embedding": 1.0, "blocks": {"attention": {"offset": 1.0, "key": {"kernel": 1.0}}}}
    assert decay_mask(params) == {
        "embedding": True,
        "blocks": {"attention": {"offset": False, "key": {"kernel": True}}},
    }


def test_only_matrices_shrink_without_a_gradient():
    params = {"embedding": jnp.ones(3), "final_norm": jnp.ones(3), "offset": jnp.ones(3)}
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5
    )
    optimizer = make_optimizer(config, 10)
    gradients = {name: jnp.zeros(3) for name in params}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["embedding"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(new["final_norm"], 1)
    np.testing.assert_array_equal(new["offset"], 1)


def test_clipping_uses_the_global_norm():
    # With b1 = b2 = 0 and a large eps Adam's step is g / eps, so the clipping shows.
    settings = dict(learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0)
    settings |= dict(b1=0.0, b2=0.0, eps=1e6)
    gradients = {"query": jnp.asarray([3.0]), "key": jnp.asarray([4.0])}

    def step(clip_norm):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm, **settings), 10)
        updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
        return -1e6 * np.asarray([updates["query"][0], updates["key"][0]])

    np.testing.assert_allclose(step(1.0), [0.6, 0.8], rtol=1e-4)
    np.testing.assert_allclose(step(10.0), [3.0, 4.0], rtol=1e-4)
    np.testing.assert_allclose(step(0.0), [3.0, 4.0], rtol=1e-4)


@pytest.mark.parametrize("factor", [30.0, 1.0, 0.0])
def test_the_logarithm_of_a_slope_has_a_rate_of_its_own(factor):
    names = ("query", "offset", "distance_delta", "distance_log_slope")
    params = {"blocks": {"attention": {name: jnp.ones(3) for name in names}}}
    config = OptimizerConfig(
        learning_rate=0.1,
        log_slope_factor=factor,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.5,
    )
    optimizer = make_optimizer(config, 10)
    gradients = jax.tree.map(lambda x: 0.01 * x, params)
    state = optimizer.init(params)
    for _ in range(2):  # the first moments don't know of the factor, nor does the clipping
        updates, state = optimizer.update(gradients, state, params)
        moved = {k: x[0] for k, x in updates["blocks"]["attention"].items()}
        np.testing.assert_allclose(moved["offset"], -0.1, rtol=1e-4)
        np.testing.assert_allclose(moved["distance_delta"], -0.1, rtol=1e-4)
        np.testing.assert_allclose(moved["query"], -0.1 - 0.1 * 0.5, rtol=1e-4)
        np.testing.assert_allclose(moved["distance_log_slope"], -0.1 * factor, rtol=1e-4)


def test_state_is_that_of_the_plain_chain():
    """So that checkpoints from before `log_slope_factor` are read."""
    params = {"distance_log_slope": jnp.ones(3), "query": jnp.ones(3)}
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=decay_mask),
        optax.scale_by_learning_rate(lambda count: 0.1),
    )
    found = make_optimizer(OptimizerConfig(), 10).init(params)
    assert jax.tree.structure(found) == jax.tree.structure(plain.init(params))


def test_state_has_one_structure_for_all_settings():
    params = {"embedding": jnp.ones(3), "distance_log_slope": jnp.ones(3)}
    structures = {
        jax.tree.structure(make_optimizer(config, steps).init(params))
        for config, steps in [
            (OptimizerConfig(), 10),
            (OptimizerConfig(log_slope_factor=0.0), 10),
            (OptimizerConfig(clip_norm=0.0, weight_decay=0.0, schedule="wsd"), 20),
        ]
    }
    assert len(structures) == 1
