import numpy as np
import pytest

from lazyattn.inspect.statistics import layer_sums
from tests.inspect.models import model, tokens, weights_of

LENGTH = 150
SEGMENTS = np.asarray([[1] * LENGTH, [1] * 40 + [2] * 100 + [0] * 10], np.int32)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("lazy", {"num_kv_heads": 2, "qk_norm": True}),
        pytest.param("lazy_renormalized", {}, marks=pytest.mark.slow),
        pytest.param("lazy_length_offset", {"scan_layers": False}, marks=pytest.mark.slow),
    ],
)
def test_sums_over_blocks_are_those_of_the_weights(variant, settings):
    config, params = model(variant, **settings)
    inputs = np.stack([tokens(LENGTH, 0), tokens(LENGTH, 1)])
    found = layer_sums(params, inputs, SEGMENTS, config=config)
    weights = weights_of(config, params, inputs, SEGMENTS)
    real = SEGMENTS > 0
    start = np.where(SEGMENTS == 2, 40, 0)
    index = np.arange(LENGTH)
    visible = (index <= index[:, None]) & (index >= start[..., None])
    visible &= real[:, :, None] & real[:, None, :]
    weights = np.where(visible[None, :, None], weights, 0)
    mass = weights.sum(-1)
    later = (index > start) & real
    first = np.take_along_axis(weights, start[None, :, None, :, None], -1)[..., 0]
    share = weights / np.where(mass > 0, mass, 1)[..., None]
    expected = {
        "pairs": np.broadcast_to(visible.sum((1, 2))[None, :, None], mass.shape[:3]),
        "zeros": ((weights == 0) & visible[None, :, None]).sum((-2, -1)),
        "queries": np.broadcast_to(real.sum(1)[None, :, None], mass.shape[:3]),
        "later": np.broadcast_to(later.sum(1)[None, :, None], mass.shape[:3]),
        "attending": (mass > 0).sum(-1),
        "mass": mass.sum(-1),
        "mass_later": (mass * later[None, :, None]).sum(-1),
        "first": (first * later[None, :, None]).sum(-1),
        "entropy": -(share * np.log(np.where(share > 0, share, 1))).sum((-2, -1)),
        "received": weights.sum(-2),
        "own": np.diagonal(weights, axis1=-2, axis2=-1),
        "distance": np.stack(
            [np.trace(weights, -x, axis1=-2, axis2=-1) for x in range(LENGTH)], axis=-1
        ),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=2e-5, err_msg=name)
    assert 0.05 < np.mean(expected["zeros"] / expected["pairs"]) < 0.95
