"""Toeplitz tiles, the tail, and the reduction of diagonals."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bias
from tests.naive import naive_bias

SHAPES = [(4, 4), (3, 5), (8, 2), (1, 6), (6, 1), (1, 1)]


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_toeplitz_repeats_each_value_along_its_diagonal(rows, columns):
    values = np.random.default_rng(0).standard_normal((2, rows + columns - 1))
    tile = bias.toeplitz(jnp.asarray(values, jnp.float32), rows, columns)
    for r in range(rows):
        for c in range(columns):
            np.testing.assert_array_equal(tile[:, r, c], np.float32(values[:, r - c + columns - 1]))


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_sum_diagonals_is_the_adjoint(rows, columns):
    tile = np.random.default_rng(1).standard_normal((3, rows, columns)).astype(np.float32)
    sums = bias.sum_diagonals(jnp.asarray(tile))
    for x in range(rows + columns - 1):
        true = np.trace(tile, offset=columns - 1 - x, axis1=1, axis2=2)
        np.testing.assert_allclose(sums[:, x], true, atol=1e-5)


@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("length", [1, 5, 6, 20])
def test_expand_follows_the_table_then_the_tail(length, slope):
    rng = np.random.default_rng(2)
    table = rng.standard_normal((3, 6)).astype(np.float32)
    slopes = rng.standard_normal(3).astype(np.float32) if slope else None
    found = bias.expand(jnp.asarray(table), slopes, length)
    true = [[naive_bias(table[h], slopes, h, x) for x in range(length)] for h in range(3)]
    np.testing.assert_allclose(found, true, atol=1e-5)


@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("reached", [4, 6, 20])
def test_adjoint_of_expand(reached, slope):
    rng = np.random.default_rng(3)
    table, d_values = (rng.standard_normal((2, 3, n)).astype(np.float32) for n in (6, reached))
    slopes = rng.standard_normal((2, 3)).astype(np.float32) if slope else None
    d_table, d_slope = bias.adjoint(jnp.asarray(d_values), 6, has_slope=slope)
    for group in range(2):
        own = slopes[group] if slope else None
        values = bias.expand(jnp.asarray(table[group]), own, reached)
        backwards = np.sum(d_table[group] * table[group])
        if slope:
            backwards += np.sum(d_slope[group] * slopes[group])
        # <d, A p> = <A^T d, p>, A being linear.
        np.testing.assert_allclose(np.sum(d_values[group] * values), backwards, rtol=1e-4)


def test_adjoint_takes_what_lies_past_the_distances():
    d_values = np.random.default_rng(4).standard_normal((1, 2, 20)).astype(np.float32)
    whole = bias.adjoint(jnp.asarray(d_values), 6, has_slope=True)
    tail, beyond = d_values[:, :, 9:], np.arange(9, 20) - 5
    past = np.stack([tail.sum(-1), (tail * beyond).sum(-1)], axis=-1)
    parts = bias.adjoint(jnp.asarray(d_values[:, :, :9]), 6, has_slope=True, past=past)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
