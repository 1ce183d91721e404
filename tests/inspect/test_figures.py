import base64

import numpy as np

from lazyattn.inspect.figures import _image, default_heads, head_matrices
from lazyattn.inspect.measure import Measured

EMPTY = np.zeros((1, 2))


def _measured(distance):
    """Returns what was measured of two heads with so much weight at each distance."""
    distance = np.asarray([distance], np.float64)
    ones = np.full((1, 2), 10.0)
    names = ("pairs", "queries", "later", "zeros", "attending", "mass", "mass_later", "first")
    sums = {name: ones for name in (*names, "entropy", "entropy_softmax")} | {"distance": distance}
    tiles = {
        f"{what}_{size}": ones / number
        for size in (64, 128)
        for what, number in (("causal", 1), ("visited", 2), ("live", 4))
    }
    return Measured(sums, tiles, {}, EMPTY, EMPTY, EMPTY)


def test_span_reach_and_cost():
    found = head_matrices(_measured([[90, 4, 2, 4, 0], [0, 0, 0, 0, 0]]), has_offset=True)
    # 94% within 1, 96% within 2.
    assert found["span"].tolist() == [[2, 0]]
    assert found["reach"].tolist() == [[3, 0]]
    np.testing.assert_allclose(found["mean_distance"], [[0.2, 0]])
    np.testing.assert_allclose(found["training_64"], (4 * 0.5 + 5 * 0.25) / 7)
    np.testing.assert_allclose(
        head_matrices(_measured([[1, 0], [1, 0]]), has_offset=False)["training_128"], 0.5
    )


def test_which_heads_are_drawn():
    assert default_heads(np.zeros((2, 3))) == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    distance = np.random.default_rng(0).permuted(np.tile(np.arange(16.0), (24, 1)), axis=1)
    found = default_heads(distance)
    assert [layer for layer, _ in found] == [0] * 4 + [12] * 4 + [23] * 4
    # From the nearest-sighted to the farthest-sighted.
    assert [distance[where] for where in found] == [0, 5, 10, 15] * 3


def test_images_tell_nothing_from_little():
    image = _image(np.array([[0, 1e-12], [0.25, 1]]), 1.0)
    assert list(base64.b64decode(image)) == [0, 1, 128, 255]
