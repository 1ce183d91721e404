"""Slots of a cache against lists of what they should hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.generation import rings

HEADS, DIM, LENGTH = 2, 8, 700
RNG = np.random.default_rng(0)
KEYS, VALUES = RNG.normal(size=(2, 3, LENGTH, HEADS, DIM)).astype(np.float32)
# Some much larger than those before, so that scales must grow.
KEYS[:, 150:] *= 3
KEYS[:, 300:310] *= 4

append = jax.jit(rings.append)
extend = jax.jit(rings.extend)
place = jax.jit(rings.place, static_argnums=(3, 4))


def _check(cache, lengths, dtype, keys=KEYS, values=VALUES):
    """Checks what slots hold, norms and, of int8, how far numbers are from the true ones."""
    slots = cache.keys.shape[1]
    found = jax.device_get(rings.unpack(cache, jnp.float32))
    for row, length in enumerate(lengths):
        held = range(max(0, length - slots), length)
        index = [p % slots for p in held]
        for own, true, scales in zip(
            found, (keys, values), (cache.key_scales, cache.value_scales), strict=True
        ):
            error = np.abs(own[row, index] - true[row, list(held)])
            if dtype == "float32":
                assert error.max(initial=0) == 0
                continue
            by_slot = np.repeat(np.asarray(scales[row]), 128, axis=1)[:, index].T
            assert (error.max(axis=-1) <= rings.ROUNDINGS / 2 * by_slot * (1 + 1e-5)).all()
        norms = np.linalg.norm(found[0][row, index], axis=-1)
        by_slot = np.repeat(np.asarray(cache.key_norms[row]), 128, axis=1)[:, index].T
        assert (norms <= by_slot * (1 + 1e-6)).all()
        if held:
            assert norms.max() > 0.3 * by_slot.max()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("slots", [LENGTH, 200])
def test_rows_placed_extended_and_appended_to(slots, dtype):
    lengths = np.array([500, 1, 130])
    cache = place(KEYS[:, :500], VALUES[:, :500], lengths, slots, dtype)
    assert cache.keys.dtype == dtype
    _check(cache, lengths, dtype)
    more = np.array([0, 37, 4])
    new = lengths[:, None] + np.arange(40)
    rows = np.arange(3)[:, None]
    cache = extend(cache, KEYS[rows, new], VALUES[rows, new], lengths, lengths + more)
    lengths += more
    _check(cache, lengths, dtype)
    for _ in range(40):
        new = lengths[:, None] + np.arange(3)
        real = np.arange(3) < np.array([[3], [2], [0]])
        cache = append(cache, KEYS[rows, new], VALUES[rows, new], lengths, real)
        lengths += real.sum(axis=1)
    _check(cache, lengths, dtype)


def test_a_page_is_fresh_for_the_next_row():
    cache = place(100 * KEYS[:, :5], 100 * VALUES[:, :5], np.full(3, 5), 200, "int8")
    for at in range(3):
        cache = append(
            cache,
            KEYS[:, at, None],
            VALUES[:, at, None],
            np.full(3, at),
            np.ones((3, 1), bool),
        )
    _check(cache, [3] * 3, "int8")
    assert np.asarray(cache.key_scales)[:, :, 0].max() < np.abs(KEYS[:, :3]).max() * 1.5 / 127


@pytest.mark.parametrize("start", [0, 60, 333])
def test_keys_in_the_order_of_positions(start):
    cache = place(KEYS[:, :400], VALUES[:, :400], np.full(3, start), 200, "float32")
    keys, values = rings.in_order(cache, jnp.full(3, start), jnp.float32)
    held = range(max(0, start - 200), start)
    for found, true in ((keys, KEYS), (values, VALUES)):
        np.testing.assert_array_equal(found[:, 200 - len(held) :], true[:, list(held)])


def test_rows_are_replaced():
    old = place(KEYS[:, :300], VALUES[:, :300], np.full(3, 300), 200, "int8")
    new = place(KEYS[:2, :100], VALUES[:2, :100], np.full(2, 100), 200, "int8")
    cache = rings.put_rows(old, jnp.asarray([2, 0]), new)
    order = [1, None, 0]
    for a, b, c in zip(*map(jax.tree.leaves, (cache, old, new)), strict=True):
        for row, own in enumerate(order):
            np.testing.assert_array_equal(a[row], b[row] if own is None else c[own])
