import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.model.config import AttentionConfig
from lazyattn.model.distance_bias import alibi_slopes, slope_init, table_init

LAYOUTS = [(1, 1), (2, 1), (3, 3), (6, 2), (8, 8), (8, 2), (12, 4), (14, 2), (16, 4), (20, 5)]
LAYOUTS += [(24, 3), (32, 8), (32, 16), (48, 12)]


@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_slopes_are_those_of_the_formula(heads, kv_heads):
    slopes = alibi_slopes(heads, kv_heads)
    assert slopes.shape == (heads,) and slopes.dtype == np.float32
    expected = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    np.testing.assert_allclose(np.sort(slopes)[::-1], expected, rtol=1e-6)


def _shares(heads, kv_heads):
    """Returns the numbers of equal contiguous shares that must be balanced."""
    return [n for n in {2, 4, 8, kv_heads} if 1 < n < heads and heads % n == 0]


def _imbalance(values, shares):
    """Returns the largest share's sum over the mean share's, minus 1."""
    sums = values.reshape(shares, -1).sum(axis=1)
    return sums.max() / sums.mean() - 1


def _ranks(slopes):
    return np.argsort(np.argsort(-slopes)).astype(float)


@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_shares_have_about_equal_products_of_slopes(heads, kv_heads):
    # The mean rank says how steep a share is on the logarithmic scale of the slopes.
    ranks = _ranks(alibi_slopes(heads, kv_heads))
    for shares in _shares(heads, kv_heads):
        means = ranks.reshape(shares, -1).mean(axis=1)
        assert np.abs(means - ranks.mean()).max() <= heads / 10, (shares, means)


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 4), (16, 16), (32, 8), (32, 16), (48, 12)])
def test_even_nested_shares_have_equal_products_of_slopes(heads, kv_heads):
    ranks = _ranks(alibi_slopes(heads, kv_heads))
    for shares in _shares(heads, kv_heads):
        assert np.ptp(ranks.reshape(shares, -1).sum(axis=1)) == 0


@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_shares_have_about_equal_work(heads, kv_heads):
    # A head visits keys until its bias has fallen by 14, exp(-14) being about 1e-6,
    # and by the 36 that the scores may range over: |q||k| / sqrt(d) is about 18.
    slopes = alibi_slopes(heads, kv_heads)
    work = np.minimum(50 / slopes, 4096)
    for shares in _shares(heads, kv_heads):
        unbalanced = _imbalance(np.sort(work), shares)
        assert _imbalance(work, shares) < 0.35 * unbalanced, (shares, unbalanced)
        if heads // shares >= 3:
            assert _imbalance(work, shares) < 0.35


def test_steep_and_flat_heads_share_every_group():
    slopes = alibi_slopes(16, 4).reshape(4, 4)
    median = np.median(slopes)
    np.testing.assert_array_equal((slopes > median).sum(axis=1), 2)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_alibi_table_and_tail_are_one_line(kv_heads):
    config = AttentionConfig(num_heads=6, num_kv_heads=kv_heads, bias_width=5, bias_init="alibi")
    table = table_init(config)(jax.random.key(0), (6, 5), jnp.float32)
    slope = slope_init(config)(jax.random.key(0), (6,), jnp.float32)
    np.testing.assert_array_equal(slope, alibi_slopes(6, config.kv_heads))
    for head, x in itertools.product(range(6), range(5)):
        np.testing.assert_allclose(table[head, x], -slope[head] * x, rtol=1e-6)


def test_normal_table_and_flat_tail():
    config = AttentionConfig(num_heads=4, bias_width=1000, bias_init="normal", bias_std=0.02)
    table = table_init(config)(jax.random.key(0), (4, 1000), jnp.float32)
    np.testing.assert_allclose(table.std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(table.mean(), 0, atol=0.002)
    np.testing.assert_array_equal(slope_init(config)(jax.random.key(0), (4,), jnp.float32), 0)
