"""Products of activations and matrices in float8, forward and backward, for training.

Activations and matrices are rounded to e4m3, gradients of outputs to e5m2, as Micikevicius et al.
do (arXiv 2209.05433). Each array is first divided by a power of two, so that its largest entry
lies a little below the largest of the type. That is "current scaling": the power follows from the
array itself, so nothing is carried from step to step, and dividing rounds nothing.

A product is written as XLA wants it for a product in float8 on a GPU (`__cublas$lt$matmul$f8`): a
`dot_general` of the rounded arrays themselves, then times one number. Rounding to float8 and back
before a bfloat16 product would not do: XLA may take both away.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lazyattn.errors import require

VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
# What the power of two in an array's largest entry becomes: half of a type's largest one.
_TOP = {VALUES: 2.0**7, GRADIENTS: 2.0**14}
# Below it an array counts as zero; scales and their products stay normal numbers.
_LEAST = 2.0**-100
_EXPONENT = 0x7F800000  # of a float32's bits
# NVIDIA's first with such products: Ada.
_CAPABILITY = 8.9


def check_devices(quantization: str, mesh: jax.sharding.Mesh) -> None:
    """Checks that a mesh's devices have the products that a training asks for.

    Args:
      quantization: `training.quantization`.
      mesh: the devices; CPUs have no such products, and compute the same numbers slowly.

    Raises:
      InputError: if they don't.
    """
    device = mesh.devices.flat[0]
    try:
        able = float(getattr(device, "compute_capability", "")) >= _CAPABILITY
    except ValueError:  # no NVIDIA GPU
        able = False
    require(
        quantization == "none" or device.platform == "cpu" or able,
        "training.quantization",
        quantization,
        f"'none' on {device.device_kind}: products in float8 need an NVIDIA GPU of compute"
        f" capability {_CAPABILITY} or more",
    )


def rounded(x: Float[Array, "..."], dtype: Any) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Returns an array in a float8 type, and what its entries are to be multiplied by.

    Args:
      x: float32 or bfloat16.
      dtype: `VALUES` or `GRADIENTS`.

    Returns:
      The rounded array, and a float32 power of two; infinite if an entry is not finite, so that
      no product with the array is.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), _LEAST)
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(_EXPONENT)
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return (x * (_TOP[dtype] / power).astype(x.dtype)).astype(dtype), power / _TOP[dtype]


def _dot(left: Any, right: Any, axes: Any, dtype: Any, precision: Any = None) -> Array:
    """Returns the sums over pairs of axes of two arrays of `rounded`."""
    (x, x_scale), (y, y_scale) = left, right
    sums = jax.lax.dot_general(
        x, y, (axes, ((), ())), precision=precision, preferred_element_type=dtype
    )
    # Right behind the product: XLA hands the number to it.
    return sums * (x_scale * y_scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "..."], matrix: Float[Array, "..."], inputs: int = 1
) -> Float[Array, "..."]:
    """Returns `jnp.tensordot(x, matrix, inputs)` in float8, accumulated in float32.

    The gradients of both are products in float8, too.

    Args:
      x: activations; their last `inputs` axes are summed over.
      matrix: its first `inputs` axes are those.
      inputs: how many.

    Returns:
      The product in `x`'s dtype.
    """
    over = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return _dot(rounded(x, VALUES), rounded(matrix, VALUES), over, x.dtype)


def _forward(x: Array, matrix: Array, inputs: int) -> tuple[Array, tuple[Array, Array]]:
    # What is kept is what a product in bfloat16 keeps: the activations of several products with
    # the same ones are one array.
    return product(x, matrix, inputs), (x, matrix)


def _backward(inputs: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, matrix = kept
    rows = tuple(range(x.ndim - inputs))
    outputs = tuple(range(len(rows), gradient.ndim)), tuple(range(inputs, matrix.ndim))
    by_output = rounded(gradient, GRADIENTS)
    # On Hopper the default adds up with fewer bits, which is enough on the way forward alone.
    dot = functools.partial(_dot, dtype=x.dtype, precision=jax.lax.Precision.HIGHEST)
    by_x = dot(by_output, rounded(matrix, VALUES), outputs)
    by_matrix = dot(rounded(x, VALUES), by_output, (rows, rows))
    return by_x, by_matrix.astype(matrix.dtype)


product.defvjp(_forward, _backward)
