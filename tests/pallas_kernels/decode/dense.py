"""What products of a few tokens, with norm, gates and residual, must be."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode import triton_dense

EPSILON = 1e-5
# Tokens, their size, columns of matrices; whether normed, gated, added to.
CASES = [
    (5, 96, (64, 32, 32), True, False, False),
    (16, 300, (128,), True, True, False),
    (33, 80, (64,), False, False, True),
]


def _true(x, weights, norm, gated, residual):
    if norm is not None:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * norm
    out = np.concatenate([x @ weight for weight in weights], axis=-1)
    if gated:
        gate, other = np.split(out, 2, axis=-1)
        out = gate / (1 + np.exp(-gate)) * other
    return out if residual is None else out + residual


def check(case, dtype, unit):
    """Holds a case to float64; `unit` is the least share of the largest number that counts."""
    tokens, inner, columns, normed, gated, added = case
    rng = np.random.default_rng(0)
    shapes = [(tokens, inner), (tokens, sum(columns)), *((inner, n) for n in columns)]
    x, residual, *weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    given = {
        "norm": jnp.asarray(rng.standard_normal(inner), jnp.float32) if normed else None,
        "residual": residual if added else None,
    }

    @jax.jit
    def call(x, weights, given):
        return triton_dense.dense(x, *weights, epsilon=EPSILON, gated=gated, **given)

    wide = jax.tree.map(np.float64, (x, weights, given["norm"], given["residual"]))
    true = _true(*wide[:3], gated, wide[3])
    out = call(x, weights, given)
    np.testing.assert_allclose(np.float64(out), true, atol=unit * np.abs(true).max())
