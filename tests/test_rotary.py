import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn import rotary
from lazyattn.errors import InputError

rotate = jax.jit(rotary.rotate)


def _heads(shape=(2, 5, 3, 8), dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def _positions(batch=2, length=5):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def test_pairs_half_a_head_apart_turn_by_their_frequency():
    x = jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, 1].set(1.0)
    out = rotate(x, jnp.array([[3]]), 100.0)[0, 0, 0]
    angle = 3 * 100 ** (-2 / 4)
    np.testing.assert_allclose(out, [0, np.cos(angle), 0, np.sin(angle)], atol=1e-6)


def test_slow_pairs_turn_slower_and_fast_ones_do_not():
    """Of 16 tokens' turns: 2.5 (fast), 0.8 (between), 0.25 and 0.08 (slow)."""
    scaling = rotary.RopeScaling(8.0, 16, low=0.5, high=2.0)
    x = jnp.zeros((1, 1, 1, 8)).at[..., :4].set(1.0)
    plain = 100 ** (-np.arange(4) / 4)
    kept = (16 * plain[1] / (2 * np.pi) - 0.5) / 1.5
    assert 0 < kept < 1
    between = plain[1] * (kept + (1 - kept) / 8)
    expected = np.array([plain[0], between, plain[2] / 8, plain[3] / 8])
    out = rotary.rotate(x, jnp.array([[5]]), 100.0, scaling)[0, 0, 0]
    np.testing.assert_allclose(out[:4], np.cos(5 * expected), atol=1e-6)
    np.testing.assert_allclose(out[4:], np.sin(5 * expected), atol=1e-6)
    both = rotary.norm_rotate(x, jnp.ones(8), jnp.array([[5]]), 100.0, 1e-6, scaling=scaling)
    np.testing.assert_allclose(both[0, 0, 0], out * np.sqrt(2), rtol=1e-5, atol=1e-6)


def test_linear_scaling_is_a_smaller_position():
    x = _heads()
    scaled = rotary.rotate(x, 4 * _positions(), 50.0, rotary.RopeScaling(4.0))
    np.testing.assert_allclose(scaled, rotate(x, _positions(), 50.0), rtol=1e-5, atol=1e-5)


def test_norms_stay_and_position_zero_is_the_identity():
    x = _heads()
    out = rotate(x, _positions(), 10_000.0)
    np.testing.assert_allclose(
        jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6
    )
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    assert not np.allclose(out[:, 1], x[:, 1])


def test_products_depend_on_the_difference_of_positions():
    x, y = _heads(), _heads()[::-1]
    here = jnp.sum(rotate(x, _positions(), 50.0) * rotate(y, _positions() + 2, 50.0), -1)
    there = jnp.sum(rotate(x, _positions() + 9, 50.0) * rotate(y, _positions() + 11, 50.0), -1)
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_dtype_is_kept_and_angles_are_float32():
    x = _heads(dtype=jnp.bfloat16)
    late = _positions() + 4001  # bfloat16 holds no odd number this large
    out = rotate(x, late, 10_000.0)
    assert out.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), late, 10_000.0)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.01, atol=1e-6)


def test_norm_and_rotation_are_one_after_the_other():
    x, scale = 3 * _heads(), jnp.arange(1.0, 9.0)
    out = rotary.norm_rotate(x, scale, _positions(), 50.0, 0.5)
    normal = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(out, rotate(normal, _positions(), 50.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", 'implementation is \'cuda\', but it must be "triton", "xla" or None.'),
        ("triton", "it needs an NVIDIA GPU"),
    ],
)
def test_an_implementation_that_is_not_there_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        rotary.norm_rotate(_heads(), jnp.ones(8), _positions(), 50.0, 1e-6, name)
