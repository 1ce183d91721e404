import jax
import numpy as np
import pytest

from lazyattn.sharding.balance import imbalance, visited_tiles
from pallas_kernels.visit import TileSizes, visit_ranges
from tests.model.tiny import dealt_slopes


def _alibi(heads, kv_heads, length):
    return -dealt_slopes(heads, kv_heads)[:, None] * np.arange(length)


def _visited(bias, bound=8.0, skip_mass=1e-6, tile=128):
    nothing = np.zeros(len(bias), bool)
    return visited_tiles(bias, nothing, score_bound=bound, skip_mass=skip_mass, tile=tile)


@pytest.mark.parametrize("kind", ["alibi", "bumpy", "flat"])
def test_tiles_are_those_that_a_call_with_such_queries_visits(kind):
    length, heads, bound = 1000, 4, 5.0
    x = np.arange(length)
    bias = {
        "alibi": 20 * _alibi(heads, heads, length) / 8,
        "bumpy": 10 * np.sin(x / 90 + np.arange(heads)[:, None]) - x / 20,
        "flat": np.zeros((heads, length)),
    }[kind]
    # Queries and keys at right angles: their scores are 0, and their norms the bound.
    query, key = np.zeros((2, 1, length, heads, 2), np.float32)
    query[..., 0] = key[..., 1] = bound**0.5

    @jax.jit
    def visited():
        return visit_ranges(
            query,
            key,
            bias.astype(np.float32),
            None,
            np.zeros((1, length), np.int32),
            scale=1.0,
            skip_mass=1e-6,
            tiles=TileSizes(64, 64),
        ).visited

    np.testing.assert_array_equal(_visited(bias, bound, tile=64), visited()[0])


def test_heads_that_skip_nothing():
    bias = _alibi(4, 4, 1024)
    causal = np.tile(np.arange(1, 9), (4, 1))
    np.testing.assert_array_equal(_visited(bias, skip_mass=0.0), causal)
    positive = np.array([True, False, False, True])
    some = visited_tiles(bias, positive, score_bound=8.0, skip_mass=1e-6, tile=128)
    np.testing.assert_array_equal(some[[0, 3]], causal[[0, 3]])
    assert (some[1:3] < causal[1:3]).any()


def test_heads_with_a_window_visit_no_more_than_it():
    flat = np.zeros((3, 1000))
    for tile in (64, 100):
        tiles = -(-1000 // tile)
        position = np.arange(1000)
        for window in (1, 2, tile, tile + 1, 5 * tile, 5000):
            first = np.maximum(position - (window - 1), 0)
            expected = [i + 1 - first[i * tile] // tile for i in range(tiles)]
            for skip_mass, positive in ((1e-6, False), (1e-6, True), (0.0, False)):
                found = visited_tiles(
                    flat,
                    np.array([positive] * 3),
                    score_bound=8.0,
                    skip_mass=skip_mass,
                    tile=tile,
                    windows=(window, None, window),
                )
                np.testing.assert_array_equal(found[[0, 2]], [expected] * 2)
                np.testing.assert_array_equal(found[1], np.arange(1, tiles + 1))


def test_an_early_and_a_late_chunk_are_even_where_all_is_visited():
    causal = np.tile(np.arange(1, 33), (4, 1))
    found = imbalance(causal, head_shards=2, sequence_shards=4)
    assert found.heads == found.sequence == 0
    assert found.contiguous > 0.6


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (32, 8), (64, 8)])
@pytest.mark.parametrize("length", [4096, 16384])
def test_dealt_slopes_and_chunks_are_about_even(heads, kv_heads, length):
    for shares in (2, 4, 8):
        if heads // shares < 4:
            continue
        slopes = dealt_slopes(heads, kv_heads, shares)
        visited = _visited(-slopes[:, None] * np.arange(length))
        found = imbalance(visited, head_shards=shares, sequence_shards=shares)
        unsorted = imbalance(
            _visited(np.sort(_alibi(heads, kv_heads, length), axis=0)),
            head_shards=shares,
            sequence_shards=shares,
        )
        # The longer rows are, the more the few longest spans weigh: they can't be split.
        assert found.heads < (0.1 if length == 4096 else unsorted.heads / 2)
        assert found.sequence <= found.contiguous
        assert found.sequence < 0.15
