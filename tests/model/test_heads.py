import numpy as np
import pytest

from lazyattn.model.config import AttentionConfig
from lazyattn.model.heads import alibi_slopes, global_heads

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


def test_groups_that_differ_by_key_are_global_as_a_whole():
    config = AttentionConfig(num_heads=24, num_kv_heads=8, global_share=0.25, global_rope=False)
    by_group = global_heads(config).reshape(8, 3)
    np.testing.assert_array_equal(by_group.all(axis=1), [0, 0, 0, 1, 0, 0, 0, 1])
    assert by_group.sum() == 6
