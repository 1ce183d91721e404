"""Norm and RoPE in Triton on a GPU: `make test-gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.rotary import norm_rotate
from pallas_kernels.triton import support

_REASON = support.refusal(64, 64, "bfloat16")
if _REASON is not None:
    pytest.skip(f"no Triton here: {_REASON}", allow_module_level=True)

import triton  # noqa: E402

from pallas_kernels.rotary import kernels  # noqa: E402

if not isinstance(kernels.norm_rotate_forward, triton.JITFunction):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(2, 100, 3, 64), (1, 70, 1, 96), (2, 333, 16, 128)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_output_and_gradients(shape, dtype):
    random = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(2))
    scale = jnp.asarray(random.normal(size=shape[3]), jnp.float32)
    positions = jnp.asarray(random.integers(0, 100_000, shape[:2]), jnp.int32)

    def run(name, x, cotangent):
        def call(x, scale):
            return norm_rotate(x, scale, positions, 1e4, 1e-6, name)

        out, back = jax.vjp(call, x, scale)
        return out, *back(cotangent)

    found = jax.jit(lambda *a: run("triton", *a))(x, cotangent)
    wide = (y.astype(jnp.float32) for y in (x, cotangent))
    exact = jax.jit(lambda *a: run("xla", *a))(*wide)
    for one, other in zip(found, exact, strict=True):
        size = float(jnp.abs(other).max())
        error = float(jnp.abs(one.astype(jnp.float32) - other).max())
        assert error <= {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype] * size
