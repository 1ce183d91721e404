import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.sharding import MeshConfig, make_mesh, shard_batch
from lazyattn.training.step import accumulate_gradients, split_microbatches
from tests.training import toy


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def toy_step(mesh):
    return toy.make(mesh)


def _same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_loss_falls(mesh, toy_step):
    factory, step = toy_step
    state, losses = factory.create(), []
    for seed in range(20):
        state, metrics = step(state, shard_batch(toy.batch(seed), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(toy.VOCAB), rel=1e-5)  # unembedding starts at zero
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 20


def test_the_state_given_to_a_step_is_consumed(mesh, toy_step):
    factory, step = toy_step
    state = factory.create()
    step(state, shard_batch(toy.batch(0), mesh))
    assert state.params["embedding"].is_deleted()


def test_metrics(mesh, toy_step):
    factory, step = toy_step
    batch = toy.batch(3)
    _, metrics = step(factory.create(), shard_batch(batch, mesh))
    assert metrics["tokens"] == np.sum(batch["segment_ids"] > 0)
    assert metrics["learning_rate"] == pytest.approx(0.05 / 2)
    assert metrics["skipped"] == metrics["nonfinite_in_row"] == metrics["nonfinite_total"] == 0
    assert metrics["z"] == pytest.approx(np.log(toy.VOCAB) ** 2, rel=1e-5)
    assert metrics["gradient_norm"] > 0


def test_microbatches_give_the_gradient_of_the_whole_batch(mesh):
    z_loss = 0.3
    loss_fn = functools.partial(toy.loss_fn, z_loss=z_loss)
    params = toy.init_params(jax.random.PRNGKey(1))
    params["unembedding"] = jax.random.normal(jax.random.PRNGKey(2), (toy.WIDTH, toy.VOCAB))
    batch = toy.batch(5, rows=12)
    # Uneven parts: means of means would be wrong here.
    counts = [int(np.sum(part)) for part in split_microbatches(batch, 4)["segment_ids"]]
    assert len(set(counts)) > 1

    @jax.jit
    def whole(params):
        def objective(params):
            return toy.loss_fn(params, batch, z_loss).objective / np.sum(batch["segment_ids"])

        return jax.value_and_grad(objective)(params)

    loss, expected = whole(params)
    for microbatches in (1, 4):
        accumulated = jax.jit(
            lambda params, parts=microbatches: accumulate_gradients(
                loss_fn, params, batch, microbatches=parts
            )
        )
        with jax.set_mesh(mesh):
            means, gradients = accumulated(params)
        np.testing.assert_allclose(means.objective, loss, rtol=1e-6)
        np.testing.assert_allclose(means.nll + z_loss * means.log_z_squared, loss, rtol=1e-6)
        np.testing.assert_allclose(means.count, 1, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), gradients, expected
        )


def test_every_row_is_in_one_microbatch():
    batch = {"inputs": np.arange(12).reshape(6, 2)}
    parts = split_microbatches(batch, 3)["inputs"]
    assert parts.shape == (3, 2, 2)
    np.testing.assert_array_equal(np.sort(parts.ravel()), np.arange(12))


def test_a_batch_of_padding_only_has_no_loss_and_no_gradient():
    batch = toy.batch(0)
    batch["segment_ids"] = np.zeros_like(batch["segment_ids"])
    accumulated = jax.jit(
        lambda params: accumulate_gradients(toy.loss_fn, params, batch, microbatches=1)
    )
    means, gradients = accumulated(toy.init_params(jax.random.PRNGKey(0)))
    assert means.nll == 0
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_non_finite_steps_change_nothing_and_are_counted(mesh, toy_step):
    factory, step = toy_step
    state, _ = step(factory.create(), shard_batch(toy.batch(0), mesh))
    before = jax.device_get((state.params, state.opt_state))
    bad = shard_batch(toy.poisoned(toy.batch(1)), mesh)
    for expected in (1, 2):
        state, metrics = step(state, bad)
        assert np.isnan(metrics["loss"])
        assert metrics["skipped"] == 1
        assert metrics["nonfinite_in_row"] == expected
        _same(jax.device_get((state.params, state.opt_state)), before)
    state, metrics = step(state, shard_batch(toy.batch(2), mesh))
    assert metrics["skipped"] == metrics["nonfinite_in_row"] == 0
    assert metrics["nonfinite_total"] == 2
    assert int(state.step) == 4
    # The schedule counts the updates made, not the steps skipped: this was the second.
    assert metrics["learning_rate"] == pytest.approx(0.05)
    assert any(
        np.any(new != old)
        for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(before[0]), strict=True)
    )


def test_a_finite_loss_with_a_non_finite_gradient_is_skipped_too(mesh):
    def steep(params, batch):
        sums = toy.loss_fn(params, batch)
        # sqrt(0) is finite, its derivative is not.
        cliff = jnp.sqrt(jnp.sum(jnp.abs(params["unembedding"])))
        return dataclasses.replace(sums, objective=sums.objective + cliff)

    factory, step = toy.make(mesh, loss_fn=steep)
    state = factory.create()
    before = jax.device_get(state.params)
    state, metrics = step(state, shard_batch(toy.batch(0), mesh))
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    _same(jax.device_get(state.params), before)
