import numpy as np
import pytest

from benchmarks import cases


def test_shape_reads_what_it_writes():
    for text in ("4x16x4096x64", "1x8x100x128x2"):
        assert str(cases.Shape.parse(text)) == text
    shape = cases.Shape.parse("2x4x10x16x1")
    query, key, value, d_out = cases.tensors(shape, "bfloat16", seed=0)
    assert query.shape == d_out.shape == (2, 10, 4, 16)
    assert key.shape == value.shape == (2, 10, 1, 16)


def test_flops_are_those_of_the_causal_half():
    shape = cases.Shape.parse("1x1x8x4")
    # Two products of 8 x 8 x 4 multiplications and additions, halved; seven for training.
    assert shape.flops(backward=False) == 2 * (2 * 8 * 8 * 4) / 2
    assert shape.flops(backward=True) == 7 * (2 * 8 * 8 * 4) / 2


@pytest.mark.parametrize("case", ["dense", "alibi"])
def test_cases_have_the_right_shapes(case):
    found = cases.parameters(case, cases.Shape.parse("1x4x100x16"), 32)
    assert found["distance_bias"].shape == (4, 32)
    assert ("distance_slope" in found) == (case == "alibi")
    np.testing.assert_array_equal(found["offset"], -1)


def test_biased_softmax_has_no_offset():
    found = cases.parameters("biased_softmax", cases.Shape.parse("1x4x100x16"), 32)
    assert found.keys() == {"distance_bias"}


def test_learned_takes_heads_from_all_layers(tmp_path):
    path = tmp_path / "learned.npz"
    tau = np.arange(8.0).reshape(4, 2)
    np.savez(path, bias=tau[..., None] * np.ones(50), tau=tau)
    found = cases.parameters("learned", cases.Shape.parse("1x4x100x16"), 32, path)
    np.testing.assert_array_equal(found["offset"], [0, 2, 4, 6])
    np.testing.assert_array_equal(found["distance_bias"][:, 7], [0, 2, 4, 6])
