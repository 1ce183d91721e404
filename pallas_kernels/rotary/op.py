"""RMS norm and RoPE in one pass, differentiable."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batching import over_batch
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.rotary import kernels
from pallas_kernels.varying import vary_alike

Halves = Float[Array, "batch length half"]


@traced_by_own_settings(narrow=True)
def norm_rotate(
    x: Float[Array, "batch length heads head_dim"],
    scale: Float[Array, " head_dim"],
    cos: Halves,
    sin: Halves,
    epsilon: float,
) -> Float[Array, "batch length heads head_dim"]:
    """Returns x / rms(x) * scale, turned; float32 inside, x's dtype outside.

    Args:
      x: queries or keys: bfloat16, float16 or float32, head_dim even.
      scale: of the norm, float32.
      cos, sin: of each token's angles, float32; no gradient.
      epsilon: added to the mean square.
    """
    return _jitted(*vary_alike(x, scale, cos, sin), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _norm_rotate(x: Array, scale: Array, cos: Array, sin: Array, epsilon: float) -> Array:
    def run(_: int, rows: tuple[Array, ...], scale: Array) -> Array:
        x, *angles = rows
        return kernels.forward(epsilon, x, scale, *angles)

    return over_batch(run, (x, cos, sin), scale)


def _forward(x: Array, scale: Array, cos: Array, sin: Array, epsilon: float) -> tuple[Array, Any]:
    # Or XLA runs the kernel again for each write of its result into a scan's stack.
    out = jax.lax.optimization_barrier(_norm_rotate(x, scale, cos, sin, epsilon))
    return out, (x, scale, cos, sin)


@traced_by_own_settings(narrow=True)
def _backward(epsilon: float, kept: Any, d_out: Array) -> tuple[Array | None, ...]:
    x, scale, *angles = kept

    def run(_: int, rows: tuple[Array, ...], scale: Array) -> tuple[Array, Array]:
        x, *rest = rows
        return kernels.backward(epsilon, x, scale, *rest)

    d_x, d_scale = over_batch(run, (x, *angles, d_out), scale)
    return d_x, jnp.sum(d_scale, axis=0), None, None


_norm_rotate.defvjp(_forward, _backward)

# Compiled, so that the layers of a model share one lowering.
_jitted = jax.jit(_norm_rotate, static_argnums=4)
