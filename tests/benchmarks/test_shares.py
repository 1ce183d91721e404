import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, shares
from lazyattn import lazy_attention


@pytest.mark.slow
def test_live_tiles_are_those_with_a_weight():
    shape = cases.Shape.parse("2x4x300x16x2")
    query, key, value, _ = cases.tensors(shape, "float32", seed=0)
    parameters = cases.parameters("alibi", shape, 32)
    _, weights = lazy_attention(
        query, key, value, **parameters, implementation="xla", return_weights=True
    )
    weights = np.pad(np.asarray(weights), ((0, 0), (0, 0), (0, 84), (0, 20)))
    live = (weights.reshape(2, 4, 3, 128, 5, 64) > 0).any((3, 5)).sum()
    causal = 2 * 4 * (2 + 4 + 5)
    visited, share, visited_near, live_near = shares.by_definition(
        query, key, parameters, skip_mass=0.0
    )
    assert float(visited) == 1
    assert round(float(share) * causal) == live
    # A tile is inside the table of 32 if its last key is nearer than that to its first query.
    assert round(float(visited_near) * causal) == 2 * 4 * (2 + 3 + 2)
    assert live_near <= visited_near
    # What is skipped is dead.
    visited, share, *_ = shares.by_definition(query, key, parameters, skip_mass=1e-6)
    assert live <= round(float(visited) * causal)
    assert round(float(share) * causal) == live


@pytest.mark.slow
def test_a_window_counts_what_it_sees():
    shape = cases.Shape.parse("1x2x520x16")
    query, key, value, _ = cases.tensors(shape, "float32", seed=0)
    parameters = cases.parameters("dense", shape, 32)
    _, weights = lazy_attention(
        query, key, value, **parameters, window=100, implementation="xla", return_weights=True
    )
    weights = np.pad(np.asarray(weights), ((0, 0), (0, 0), (0, 120), (0, 56)))
    live = (weights.reshape(1, 2, 5, 128, 9, 64) > 0).any((3, 5)).sum()
    visited, share, *_ = shares.by_definition(query, key, parameters, skip_mass=0.0, window=100)
    # Tiles of 128 x 64: a tile of queries sees 227 keys, the last one 8 and 99 more.
    causal, seen = 2 * (2 + 4 + 6 + 8 + 9), 2 * (2 + 4 + 4 + 4 + 3)
    assert round(float(visited) * causal) == seen
    assert round(float(share) * causal) == live <= seen


def test_everything_is_live_without_an_offset():
    shape = cases.Shape.parse("1x2x200x16")
    query, key, _, _ = cases.tensors(shape, "float32", seed=0)
    assert float(shares.by_definition(query, key, {}, skip_mass=1e-6)[1]) == 1


def test_products_where_all_is_live():
    every = shares.Shares(*jnp.ones(2), *jnp.full(2, 0.5))
    # Forward S, S, P V and the values' sum; dQ 3, dK and dV 4, the table's gradient S and dP.
    triton = shares.Design()
    assert every.products("forward", True, triton) == 3
    assert every.products("training", True, triton) == 4 + 3 + 4 + 1
    assert every.products("forward", False, triton) == 2
    assert every.products("training", False, triton) == 2 + 3 + 4 + 1
    dead = shares.Shares(*map(jnp.float32, (1, 0, 0.5, 0)))
    assert dead.products("training", True, triton) == 1 + 2 + 2 + 0.5
    # dK's kernel has S and dP at hand; the forward pass has P K instead of the values' sum.
    hopper = shares.Design(mean_key=True, bias_apart=False)
    assert every.products("training", True, hopper) == 4 + 3 + 4
    assert every.products("training", False, hopper) == 2 + 3 + 4
    assert dead.products("training", True, hopper) == 2 + 2
    widest = shares.Design(mean_key=True, value_apart=True)
    assert every.products("training", True, widest) == 4 + 3 + 5 + 1
