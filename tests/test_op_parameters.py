"""Helpers for the op's learned arguments, against formulas written down once more."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import InputError, alibi_slopes, init_offset, lazy_attention, t5_buckets_to_table


def test_alibi_slopes():
    np.testing.assert_array_equal(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    slopes = alibi_slopes(6)
    assert slopes.shape == (6,) and slopes.dtype == np.float32
    np.testing.assert_allclose(slopes[1:] / slopes[:-1], 2 ** (-8 / 6), rtol=1e-6)
    np.testing.assert_allclose(slopes[-1], 2**-8)


def _bucket(distance, buckets, max_distance):
    """Returns T5's bucket of one distance, in a decoder."""
    single = buckets // 2
    if distance < single:
        return distance
    share = math.log(distance / single) / math.log(max_distance / single)
    return min(buckets - 1, single + int(share * (buckets - single) + 1e-9))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (8, 20), (7, 30)])
def test_t5_buckets(buckets, max_distance):
    embedding = np.random.default_rng(0).standard_normal((buckets, 3)).astype(np.float32)
    table = t5_buckets_to_table(embedding, max_distance)
    assert table.shape == (3, max_distance + 1) and table.dtype == jnp.float32
    found = [_bucket(x, buckets, max_distance) for x in range(max_distance + 1)]
    assert found[-1] == buckets - 1 and len(set(found)) > buckets - 3
    np.testing.assert_array_equal(table, embedding[np.array(found)].T)
    gradient = jax.grad(lambda e: t5_buckets_to_table(e, max_distance)[0].sum())(embedding)
    np.testing.assert_array_equal(gradient[:, 0], np.bincount(found, minlength=buckets))
    assert not gradient[:, 1:].any()


def test_t5_attention_goes_on_with_the_last_bucket():
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((8, 2)).astype(np.float32)
    query, key, value = (rng.standard_normal((1, 40, 2, 4)).astype(np.float32) for _ in range(3))
    distance = np.maximum(np.arange(40)[:, None] - np.arange(40), 0)
    bias = embedding[np.vectorize(_bucket)(distance, 8, 20)].transpose(2, 0, 1)[None]
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, scale=1.0)
    true = jax.jit(theirs)(query, key, value, bias)

    @jax.jit
    def ours(query, key, value, embedding):
        return lazy_attention(
            *(query, key, value),
            distance_bias=t5_buckets_to_table(embedding, 20),
            distance_slope=jnp.zeros(2),
            scale=1.0,
        )

    out = ours(query, key, value, embedding)
    np.testing.assert_allclose(out, true, atol=3e-6)


def test_offset():
    offset = init_offset(3)
    assert offset.shape == (3,) and offset.dtype == jnp.float32
    np.testing.assert_array_equal(offset, -0.5)
    np.testing.assert_array_equal(init_offset(2, -1), -1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alibi_slopes(0), "heads is 0, but it must be an integer of at least 1."),
        (lambda: alibi_slopes(2.0), "heads is 2.0, but it must be an integer"),
        (lambda: init_offset(2, float("nan")), "tau is nan, but it must be a finite number."),
        (lambda: t5_buckets_to_table(np.ones(3, np.float32)), "embedding.shape is \\(3,\\), but"),
        (lambda: t5_buckets_to_table(np.ones((4, 2), int)), "embedding.dtype is 'int"),
        (
            lambda: t5_buckets_to_table(np.ones((32, 2), np.float32), 16),
            "max_distance is 16, but it must be more than 16",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
