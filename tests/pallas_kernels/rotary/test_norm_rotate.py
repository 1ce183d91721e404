"""Norm and RoPE in Triton, interpreted, against XLA in float32; on a GPU: `test_on_gpu`."""

from tests.pallas_kernels import triton_interpreter  # isort: skip  (before Triton)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.rotary import norm_rotate

BASE, EPSILON = 100.0, 0.1


def _arrays(shape, dtype="float32"):
    random = np.random.default_rng(0)
    batch, length, _, head_dim = shape
    positions = random.integers(0, 4000, (batch, length)).astype(np.int32)
    x, cotangent = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(2))
    return x, jnp.asarray(random.normal(size=head_dim), jnp.float32), positions, cotangent


def _value_and_gradients(implementation, x, scale, positions, cotangent):
    def run(x, scale):
        return norm_rotate(x, scale, positions, BASE, EPSILON, implementation)

    @jax.jit
    def both(x, scale, cotangent):
        out, back = jax.vjp(run, x, scale)
        return out, *back(cotangent)

    return both(x, scale, cotangent)


def _compare(found, exact, tolerance):
    for one, other in zip(found, exact, strict=True):
        size = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance * size
        )


@pytest.fixture
def interpreted():
    with triton_interpreter.interpreted(triton_interpreter.blocks(16, 16)):
        yield


@pytest.mark.parametrize(
    "shape", [(2, 9, 3, 16), (1, 70, 1, 12), (3, 5, 32, 64)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_output_and_gradients(interpreted, shape, dtype, tolerance):
    arrays = _arrays(shape, dtype)
    wide = (arrays[0].astype("float32"), *arrays[1:3], arrays[3].astype("float32"))
    found = _value_and_gradients("triton", *arrays)
    assert [x.dtype for x in found] == [dtype, dtype, "float32"]
    _compare(found, _value_and_gradients("xla", *wide), tolerance)


def test_under_vmap(interpreted):
    x, scale, positions, cotangent = _arrays((4, 6, 2, 8))
    scales = jnp.stack([scale, 2 * scale])
    x, cotangent = (y.reshape(2, 2, 6, 2, 8) for y in (x, cotangent))
    for axes in ((0, None, None, 0), (0, 0, None, 0)):
        mapped = scales if axes[1] == 0 else scale
        found, exact = (
            jax.vmap(functools.partial(_value_and_gradients, name), axes)(
                x, mapped, positions[:2], cotangent
            )
            for name in ("triton", "xla")
        )
        _compare(found, exact, 1e-5)


def test_on_a_mesh_the_scales_gradient_is_summed(interpreted):
    x, scale, positions, cotangent = _arrays((2, 6, 2, 8))
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("rows"), jax.P()

    def run(name, x, scale):
        share = functools.partial(norm_rotate, base=BASE, epsilon=EPSILON, implementation=name)
        return jax.shard_map(share, in_specs=(rows, whole, rows), out_specs=rows)(
            x, scale, positions
        )

    with jax.set_mesh(mesh):
        found, exact = (
            jax.jit(lambda *x, name=name: jax.vjp(functools.partial(run, name), *x)[1](cotangent))(
                x, scale
            )
            for name in ("triton", "xla")
        )
    _compare(found, exact, 1e-5)
