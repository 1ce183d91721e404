import dataclasses

import jax
import numpy as np
import pytest

from lazyattn import sharding
from lazyattn.model.parameters import unstack_blocks
from lazyattn.sharding.balance import Imbalance
from lazyattn.training import balance
from tests.model.tiny import make_config, make_params


def _heads(config, params):
    return balance._by_layer(config, sharding.make_mesh(sharding.MeshConfig()), params)


@pytest.fixture(scope="module")
def config():
    return make_config(attention={"num_heads": 8, "num_kv_heads": 8, "bias_width": 64})


def _abstract(**sizes):
    axes = sharding.MESH_AXES
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in axes), axes)


def test_steep_heads_together_are_seen(config):
    mesh = _abstract(tensor=2, sequence=2)
    table = -0.001 * np.arange(64.0) * np.ones((2, 8, 1))
    slope = np.full((2, 8), 0.001)
    even = balance.measure(config, mesh, 2048, {"distance_bias": table, "distance_slope": slope})
    assert even.heads == 0 and even.sequence == 0
    scale = np.where(np.arange(8) < 4, 1.0, 1000.0)
    uneven = {"distance_bias": table * scale[:, None], "distance_slope": slope * scale}
    assert balance.measure(config, mesh, 2048, uneven).heads > 0.5


def test_nothing_is_said_where_nothing_is_shared_out(config):
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    assert balance.describe(config, mesh, 256, {}) == []


@pytest.mark.parametrize("variant", ["lazy", "softmax"])
@pytest.mark.parametrize("scan", [True, False])
def test_what_heads_learned_is_read_by_layer(variant, scan):
    config = make_config(variant)
    params = make_params(config)
    if not scan:
        config, params = dataclasses.replace(config, scan_layers=False), unstack_blocks(params)
    heads = _heads(config, params)
    expected = {"distance_bias", "distance_slope", "offset"} if variant == "lazy" else set()
    assert set(heads) == expected
    assert all(len(array) == config.num_layers for array in heads.values())
    found = balance.measure(config, _abstract(tensor=2, sequence=2), 32, heads)
    assert found.heads >= 0 and found.sequence >= 0


def test_uneven_heads_are_said_with_what_would_help(config):
    heads = dataclasses.replace(config.attention, num_kv_heads=2)
    few = dataclasses.replace(config, attention=heads)
    found = Imbalance(heads=0.6, sequence=0.0, contiguous=0.0)
    assert "slope_shards=2" in balance._remedy(few, 2, found)
    even = dataclasses.replace(few, attention=dataclasses.replace(heads, slope_shards=2))
    assert balance._remedy(even, 2, found) == ""
    assert balance._remedy(few, 2, dataclasses.replace(found, heads=0.04)) == ""
