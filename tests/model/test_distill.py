"""The divergence from a teacher against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.model.config import AttentionConfig, ModelConfig
from lazyattn.model.distill import divergence
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.taken_over import softmax_twin, twin_params
from lazyattn.model.transformer import Transformer, logits, output_embedding
from tests.model.tiny import make_params
from tests.training import toy

VOCAB, WIDTH = 11, 6


def _arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = [(2, 7, WIDTH), (VOCAB, WIDTH), (2, 7, WIDTH), (VOCAB, WIDTH)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    return [*arrays, (jax.random.uniform(keys[4], (2, 7)) > 0.3).astype(jnp.float32)]


def _expected(hidden, table, teacher_hidden, teacher_table, weights):
    ours = jax.nn.log_softmax(hidden @ table.T)
    theirs = jax.nn.log_softmax(teacher_hidden @ teacher_table.T)
    return jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


@pytest.mark.parametrize("chunk", [1, 6, 100])
def test_it_is_its_definition(chunk):
    arrays = _arrays()
    (found, gradients), (expected, wanted) = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(*arrays)
        for function in (functools.partial(divergence, chunk=chunk), _expected)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_is_lost_where_both_are_the_same():
    hidden, table, _, _, weights = _arrays()
    found = divergence(hidden, table, hidden, table, weights, chunk=4)
    np.testing.assert_allclose(found, 0, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(config, params, inputs, rest):
    hidden = Transformer(config).apply({"params": params}, inputs, **rest)
    return jax.nn.log_softmax(logits(hidden, output_embedding(params, config)))


def test_the_objective_is_a_mixture():
    attention = AttentionConfig(num_heads=2, bias_width=4)
    config = ModelConfig(
        vocab_size=toy.VOCAB,
        width=8,
        num_layers=1,
        mlp_width=8,
        compute_dtype="float32",
        attention=attention,
    )
    params, other = (make_params(config, seed) for seed in (0, 1))
    batch, twin = toy.batch(0), softmax_twin(config)
    assert twin == dataclasses.replace(
        config, attention=dataclasses.replace(attention, variant="softmax")
    )
    plain = jax.jit(make_loss_fn(config))(params, batch)
    for teacher in (None, twin_params(other)):
        found = jax.jit(make_loss_fn(config, distill=0.25))(params, batch, teacher=teacher)
        np.testing.assert_allclose(found.nll, plain.nll, rtol=1e-6)
        theirs = twin_params(params) if teacher is None else teacher
        rest = {name: batch[name] for name in ("segment_ids", "positions")}
        ours, follow = (
            _log_probabilities(c, p, batch["inputs"], rest)
            for c, p in ((config, params), (twin, theirs))
        )
        apart = jnp.sum(jnp.exp(follow) * (follow - ours), axis=-1)
        apart = jnp.sum(apart * (batch["segment_ids"] > 0))
        np.testing.assert_allclose(
            found.objective, 0.75 * plain.objective + 0.25 * apart, rtol=1e-5
        )
