import numpy as np

from benchmarks import cases, shares
from lazyattn import lazy_attention


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
    visited, share = shares.by_definition(query, key, parameters, skip_mass=0.0)
    assert float(visited) == 1
    assert round(float(share) * causal) == live
    # What is skipped is dead.
    visited, share = shares.by_definition(query, key, parameters, skip_mass=1e-6)
    assert live <= round(float(visited) * causal)
    assert round(float(share) * causal) == live


def test_everything_is_live_without_an_offset():
    shape = cases.Shape.parse("1x2x200x16")
    query, key, _, _ = cases.tensors(shape, "float32", seed=0)
    assert float(shares.by_definition(query, key, {}, skip_mass=1e-6)[1]) == 1
