"""How far heads fetch: never less than what their mass needs, and no more than a step further."""

import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.model import fetch
from lazyattn.model.config import AttentionConfig
from lazyattn.model.fetch import Group
from lazyattn.model.heads import HeadBlocks, initial_slopes

LENGTH, MASS = 600, 1e-4


def chosen(table, slope, offset, *, score, reaches, heads=((0,),), shards=1):
    """Returns the reach that each group takes."""
    groups = [Group(tuple(group), (*reaches, None)) for group in heads]
    bound = fetch.Bound(jnp.float32(score), np.ones(len(table), np.float32))
    arrays = (None if x is None else jnp.asarray(x, jnp.float32) for x in (table, slope, offset))
    found = fetch.choices(groups, bound, *arrays, length=LENGTH, skip_mass=MASS, head_shards=shards)
    return [(*reaches, None)[choice] for choice in np.asarray(found).tolist()]


def mass_beyond(table, slope, reach, score):
    """Returns the bound by its definition, in float64."""
    bias = table[:LENGTH].astype(np.float64)
    past = np.arange(1, LENGTH - len(bias) + 1)
    tail = np.zeros(len(past)) if slope is None else bias[-1] - np.float64(slope) * past
    bias = np.concatenate([bias, tail])
    return np.exp(2 * score) * np.exp(bias[reach + 1 :]).sum() / np.exp(bias[: reach + 1]).sum()


@pytest.mark.parametrize("slope", [None, 0.0, 0.5, 0.06, 0.001, -0.01])
@pytest.mark.parametrize("width", [1, 20, 700])
def test_the_nearest_reach_that_is_enough_is_taken(slope, width):
    rng = np.random.default_rng(0)
    table = (rng.normal(size=width) - 0.06 * np.arange(width)).astype(np.float32)
    slopes = None if slope is None else [slope]
    reaches = (5, 19, 20, 80, 240, 400)
    for score in (0.0, 1.0, 5.0):
        enough = [mass_beyond(table, slope, reach, score) <= MASS for reach in reaches]
        expected = next((n for n, yes in zip(reaches, enough, strict=True) if yes), None)
        found = chosen(table[None], slopes, [-0.5], score=score, reaches=reaches)
        assert found == [expected]


def test_a_group_fetches_what_the_farthest_head_of_all_devices_needs():
    slopes = np.array([9.0, 0.1, 9.0, 9.0, 9.0, 9.0, 0.5, 9.0], np.float32)  # two devices, 2 x 2
    find = lambda offset: chosen(  # noqa: E731
        np.zeros((8, 1)), slopes, offset, score=0.0, reaches=(9, 40, 200), heads=((0,), (1,)),
        shards=2,
    )  # fmt: skip
    assert find(None) == find(np.full(8, -1.0)) == [200, 40]
    # Every key counts where tau is 0 or above; and NaN must not look like a short reach.
    for offset in (0.0, 0.1, np.nan):
        assert find(np.where(np.arange(8) == 7, offset, -1.0)) == [200, None]


@pytest.mark.parametrize("where", ["table", "slope", "score"])
def test_what_is_not_a_number_fetches_all(where):
    table, slope, score = np.zeros((1, 3)), [1.0], 0.0
    if where == "table":
        table[0, 2] = np.nan
    slope = [np.nan] if where == "slope" else slope
    score = np.nan if where == "score" else score
    assert chosen(table, slope, None, score=score, reaches=(100,)) == [None]


def test_heads_of_like_slopes_are_a_group():
    slopes = initial_slopes(AttentionConfig(num_heads=16)).reshape(1, 16, 1)
    groups = fetch.by_slope(slopes, 65_536, 8)
    assert [len(group.heads) for group in groups] == [8, 4, 2, 2]
    order = [slopes[0, head, 0] for group in groups for head in group.heads]
    assert order == sorted(order, reverse=True)
    assert groups[0].reaches == (256, 1024, *range(4096, 28_673, 4096), None)
    # A head that sees everything on some device has no choice on any.
    slopes = np.array([[1, 0, 2, 3], [1, 1, 2, 3]], np.float32).reshape(2, 4, 1)
    everything, *rest = fetch.by_slope(slopes, 48, 2)
    assert everything == Group((1,))
    assert [group.heads for group in rest] == [(3, 2), (0,)]


def test_windows_say_how_far_heads_see():
    assert fetch.by_window(4, None, None, 100) == (Group((0, 1, 2, 3)),)
    assert fetch.by_window(4, 51, None, 100) == (Group((0, 1, 2, 3), (50,)),)
    # Beyond half of the row a gather sends less.
    assert fetch.by_window(4, 52, None, 100) == (Group((0, 1, 2, 3)),)
    both = fetch.by_window(4, 9, HeadBlocks(2, 2, 1), 100)
    assert both == (Group((0, 2), (8,)), Group((1, 3)))
