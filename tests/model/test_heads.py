import itertools

import numpy as np
import pytest

from lazyattn.model.config import AttentionConfig
from lazyattn.model.heads import global_heads, head_windows, initial_slopes
from lazyattn.sharding.balance import imbalance, visited_tiles
from tests.model.tiny import dealt_slopes

SOME = {8, 12, 15, 16, 28, 32}
# All with 8 to 64 heads and 1 to 16 key heads; some of them are in the default suite.
LAYOUTS = [
    pytest.param(heads, kv_heads, marks=[] if heads in SOME else pytest.mark.slow)
    for heads, kv_heads in itertools.product(range(8, 65), range(1, 17))
    if heads % kv_heads == 0
]


def _ranks(slopes):
    return np.argsort(np.argsort(-slopes))


def _shares(kv_heads):
    """Returns over how many devices the heads can be shared out."""
    return [n for n in range(1, 9) if kv_heads % n == 0]


def _imbalance(slopes, shares):
    """Returns what a run with rows of 4,096 tokens and heads of 64 prints before it starts."""
    visited = visited_tiles(
        -slopes[:, None].astype(np.float64) * np.arange(4096),
        np.zeros(len(slopes), bool),
        score_bound=8.0,
        skip_mass=1e-6,
        tile=128,
    )
    return imbalance(visited, head_shards=shares, sequence_shards=1).heads


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (6, 2), (14, 2), *LAYOUTS])
def test_slopes_are_those_of_the_formula(heads, kv_heads):
    expected = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    for slope_shards in _shares(kv_heads):
        slopes = dealt_slopes(heads, kv_heads, slope_shards)
        assert slopes.shape == (heads,) and slopes.dtype == np.float32
        np.testing.assert_allclose(np.sort(slopes)[::-1], expected, rtol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_heads_of_a_group_are_neighbors(heads, kv_heads):
    for slope_shards in _shares(kv_heads):
        slopes = dealt_slopes(heads, kv_heads, slope_shards)
        # By their ranks among the heads of their shard, which for one shard are all.
        for shard in slopes.reshape(slope_shards, kv_heads // slope_shards, -1):
            ranks = np.sort(_ranks(shard.ravel()).reshape(shard.shape), axis=1)
            np.testing.assert_array_equal(np.diff(ranks, axis=1), 1)


@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_whole_groups_give_every_device_equal_work_where_it_has_three(heads, kv_heads):
    slopes = dealt_slopes(heads, kv_heads)
    for shares in _shares(kv_heads):
        groups = kv_heads // shares
        # Two and one a device can't be even: the flattest have a fourth of all work, or more.
        bound = {1: 1.42, 2: 0.36, 3: 0.05}.get(groups, 0.045)
        assert _imbalance(slopes, shares) <= bound, shares


@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_heads_dealt_to_so_many_devices_give_each_equal_work(heads, kv_heads):
    for shares in _shares(kv_heads):
        found = _imbalance(dealt_slopes(heads, kv_heads, shares), shares)
        assert found <= {1: 1.19, 2: 0.29, 3: 0.105}.get(heads // shares, 0.05), shares


@pytest.mark.parametrize(
    "heads", [40, 128, *(pytest.param(n, marks=pytest.mark.slow) for n in (48, 64, 96))]
)
def test_many_groups_are_even_and_found_quickly(heads):
    slopes = dealt_slopes(heads, heads)
    for shares in (2, 4, 8):
        assert _imbalance(slopes, shares) < 0.04


def test_a_cache_keeps_least_where_groups_are_neighbors():
    def kept(slope_shards):
        # What a group keeps of 32,768 keys: those until its longest head has fallen by 22.
        span = np.minimum(22 / dealt_slopes(32, 8, slope_shards), 32_768)
        return span.reshape(8, -1).max(axis=1).mean() / 32_768

    found = [kept(shards) for shards in (1, 2, 4, 8)]
    assert found == sorted(found)
    np.testing.assert_allclose(found, [0.043, 0.053, 0.072, 0.101], atol=0.001)


def _global(heads, kv_heads, number, **settings):
    config = AttentionConfig(
        num_heads=heads, num_kv_heads=kv_heads, global_share=number / heads, **settings
    )
    found = global_heads(config)
    assert found.sum() == number
    np.testing.assert_array_equal(initial_slopes(config) == 0, found)
    return found.reshape(kv_heads, -1).sum(axis=1).tolist()


def test_global_heads_are_whole_groups_where_they_can_be():
    assert _global(24, 8, 6) == [0, 0, 0, 3, 0, 0, 0, 3]
    assert _global(24, 8, 6, global_rope=False) == [0, 0, 0, 3, 0, 0, 0, 3]
    assert _global(8, 8, 2) == [0, 0, 0, 1, 0, 0, 0, 1]
    assert _global(8, 8, 6) == [0, 1, 1, 1, 0, 1, 1, 1]
    assert _global(8, 8, 3) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert _global(12, 6, 8, window=7) == [0, 2, 2, 0, 2, 2]
    assert _global(32, 8, 4) == [0, 0, 0, 0, 0, 0, 0, 4]
    assert _global(32, 8, 2) == [0, 0, 0, 0, 0, 0, 0, 2]
    assert _global(16, 4, 16) == [4, 4, 4, 4]


def test_global_heads_fall_evenly_to_the_devices_that_slopes_are_dealt_to():
    assert _global(32, 8, 4, slope_shards=4) == [0, 1] * 4
    assert _global(32, 8, 8, slope_shards=2) == [0, 0, 0, 4, 0, 0, 0, 4]
    assert _global(32, 8, 6, slope_shards=4) == [0, 1, 0, 2, 0, 1, 0, 2]
    # Not where that would split a group whose heads see other keys.
    assert _global(32, 8, 4, slope_shards=4, window=9) == [0] * 7 + [4]


@pytest.mark.parametrize("slope_shards", [1, 2, 4])
def test_slopes_of_the_others_are_those_of_so_many_heads(slope_shards):
    config = AttentionConfig(
        num_heads=32, num_kv_heads=8, global_share=0.125, slope_shards=slope_shards
    )
    slopes = initial_slopes(config)
    local = np.sort(slopes[slopes > 0])[::-1]
    np.testing.assert_allclose(local, 2 ** (-8 * np.arange(1, 29) / 28), rtol=1e-6)
    # A group that holds global heads, of which a cache keeps all, has the flattest others.
    for shard in slopes.reshape(slope_shards, -1, 4):
        mixed = shard[(shard == 0).any(axis=1)]
        mixed, rest = mixed[mixed > 0], shard[(shard > 0).all(axis=1)]
        assert mixed.size == 0 or mixed.max() < rest.min()


def test_windows_are_those_of_local_heads():
    config = AttentionConfig(num_heads=4, global_share=0.5, window=7)
    assert head_windows(config) == (7, None, 7, None)
    assert head_windows(AttentionConfig(num_heads=2, window=7)) == (7, 7)
    assert head_windows(AttentionConfig(num_heads=2)) == (None, None)
