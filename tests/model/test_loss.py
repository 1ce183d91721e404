import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyattn.errors import InputError
from lazyattn.model import loss
from lazyattn.model.loss import LossSums, cross_entropy

BATCH, LENGTH, WIDTH, VOCAB = 3, 14, 8, 29


def _inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(2 * rng.normal(size=(BATCH, LENGTH, WIDTH)), dtype)
    embedding = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(VOCAB, size=(BATCH, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 1.0, 0.5], size=(BATCH, LENGTH)), jnp.float32)
    return hidden, embedding, targets, weights


def _reference(hidden, embedding, targets, weights, z_loss):
    logits = jnp.einsum("blw,vw->blv", hidden, embedding, precision="highest")
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    squared = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    objective = jnp.sum(weights * (nll + z_loss * squared))
    return objective, (jnp.sum(weights * nll), jnp.sum(weights * squared), weights.sum())


def _ours(hidden, embedding, targets, weights, z_loss, chunk):
    sums = cross_entropy(hidden, embedding, targets, weights, chunk=chunk, z_loss=z_loss)
    return sums.objective, (sums.nll, sums.log_z_squared, sums.count)


# One position a chunk, chunks that do not divide the length, all at once.
@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.0), (12, 0.03), (10_000, 0.03)])
def test_value_and_gradients_are_optax_s(chunk, z_loss):
    inputs = _inputs()
    grad = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    expected, expected_grads = jax.jit(grad(_reference))(*inputs, z_loss)
    found, found_grads = jax.jit(grad(_ours), static_argnums=(4, 5))(*inputs, z_loss, chunk)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(found_grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_value_is_the_same():
    inputs = _inputs()
    expected, _ = _reference(*inputs, 0.1)
    found, _ = jax.jit(_ours, static_argnums=(4, 5))(*inputs, 0.1, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_only_the_objective_has_gradients_and_they_scale():
    hidden, *rest = _inputs()
    _, pull = jax.vjp(lambda h: cross_entropy(h, *rest, chunk=12), hidden)
    zero, one, three = (jnp.asarray(x) for x in (0.0, 1.0, 3.0))
    np.testing.assert_array_equal(pull(LossSums(zero, one, one, one))[0], 0)
    (single,), (triple,) = (pull(LossSums(x, zero, one, zero)) for x in (one, three))
    assert np.any(single != 0)
    np.testing.assert_allclose(triple, 3 * single, rtol=1e-6)


def test_large_logits_stay_finite():
    hidden, embedding, targets, weights = _inputs()
    value, grad = jax.value_and_grad(
        lambda h: cross_entropy(h, embedding, targets, weights, chunk=12).objective
    )(1e4 * hidden)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e5])
def test_one_pass_finds_what_two_find(scale):
    logits = scale * jax.random.normal(jax.random.key(0), (2, 3, 1000))
    logits = logits.at[0, 0].add(-1e30)
    expected, found = loss._maximum_and_sum(logits), loss._maximum_and_sum_at_once(logits)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    broken = loss._maximum_and_sum_at_once(logits.at[0, 1, 7].set(jnp.nan))
    assert all(np.isnan(x[0, 1, 0]) and np.isfinite(x[0, 0, 0]) for x in broken)


def test_positions_of_weight_zero_may_hold_any_target():
    hidden, embedding, targets, weights = _inputs()
    wild = jnp.where(weights == 0, -7, targets)
    loss = functools.partial(cross_entropy, chunk=12)
    expected = loss(hidden, embedding, targets, weights)
    assert loss(hidden, embedding, wild, weights) == expected


def test_bfloat16_inputs_give_float32_sums_and_gradients():
    hidden, embedding, targets, weights = _inputs(jnp.bfloat16)

    def loss(h, e):
        return cross_entropy(h, e, targets, weights, chunk=12).objective

    value, (d_hidden, d_embedding) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding)
    assert (value.dtype, d_hidden.dtype, d_embedding.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    exact = (hidden.astype(jnp.float32), embedding.astype(jnp.bfloat16).astype(jnp.float32))
    expected, _ = _reference(*exact, targets, weights, 0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    grads = jax.grad(lambda *a: _reference(*a, targets, weights, 0.0)[0], argnums=(0, 1))(*exact)
    for a, b in zip((d_hidden, d_embedding), grads, strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


@pytest.mark.parametrize("differentiate", [False, True])
def test_all_logits_never_exist_at_once(differentiate):
    rows, length, width, vocab, chunk = 4, 512, 16, 4096, 64
    full = rows * length * vocab * 4

    def loss(h, e, targets, weights):
        return cross_entropy(h, e, targets, weights, chunk=chunk, z_loss=1e-4).objective

    def naive(h, e, targets, weights):
        return _reference(h, e, targets, weights, 1e-4)[0]

    def temporary(f):
        f = jax.value_and_grad(f, argnums=(0, 1)) if differentiate else f
        shapes = [(rows, length, width), (vocab, width), (rows, length), (rows, length)]
        dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
        arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
        return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(naive) > full
    assert temporary(loss) < full / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk is 0, but it must be at least 1"),
        ({"hidden": jnp.zeros((3, 8))}, r"hidden's shape is \(3, 8\), .* \[batch, length, width\]"),
        ({"embedding": jnp.zeros((8, 29))}, r"embedding's shape is \(8, 29\), .* \[vocab, 8\]"),
        ({"targets": jnp.zeros((3, 2), int)}, r"targets' shape is \(3, 2\), .* \(3, 14\)"),
        ({"weights": jnp.zeros((3, 1))}, r"weights' shape is \(3, 1\), .* \(3, 14\)"),
    ],
)
def test_bad_inputs(change, message):
    names = ("hidden", "embedding", "targets", "weights")
    arguments = {**dict(zip(names, _inputs(), strict=True)), "chunk": 12, **change}
    with pytest.raises(InputError, match=message):
        cross_entropy(**arguments)
