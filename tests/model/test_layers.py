import jax
import jax.numpy as jnp
import numpy as np

from lazyattn.model.config import ModelConfig
from lazyattn.model.layers import RMSNorm, SwiGLU, matrix_init, residual_variance


def test_rms_norm():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * 7
    scale = jnp.array([1.0, 2.0, -1.0, 0.0])
    out = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
    expected = np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True)) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_zeros_is_zero_and_keeps_bfloat16():
    params = {"params": {"scale": jnp.ones(4)}}
    out = RMSNorm(1e-6).apply(params, jnp.zeros((2, 4), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, 0)


def test_rms_norm_squares_in_float32():
    # 1e20 squared does not fit float32's range, 1e15 does; bfloat16 loses neither.
    x = jnp.full((1, 4), 1e15, jnp.bfloat16)
    out = RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(4)}}, x)
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, rtol=1e-2)


def test_swiglu():
    config = ModelConfig(width=32, mlp_width=5)
    rng = np.random.default_rng(0)
    params = {
        "gate": rng.normal(size=(32, 5)),
        "up": rng.normal(size=(32, 5)),
        "down": rng.normal(size=(5, 32)),
    }
    params = {name: array.astype(np.float32) for name, array in params.items()}
    x = rng.normal(size=(2, 3, 32)).astype(np.float32)
    gate = x @ params["gate"]
    expected = (gate / (1 + np.exp(-gate)) * (x @ params["up"])) @ params["down"]
    out = SwiGLU(config).apply({"params": params}, x)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_matrices_keep_the_scale_of_activations():
    key = jax.random.key(0)
    matrix = matrix_init(0, (1, 2))(key, (400, 10, 20), jnp.float32)
    np.testing.assert_allclose(matrix.std(), 400**-0.5, rtol=0.02)
    back = matrix_init((0, 1), 2, residual_variance(ModelConfig(num_layers=8)))
    matrix = back(key, (10, 20, 400), jnp.float32)
    np.testing.assert_allclose(matrix.std(), (200 * 16) ** -0.5, rtol=0.02)
