import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.experiment import defaults, from_config_dict, resumption_changes
from lazyattn.model import fp8
from lazyattn.model.objective import make_loss_fn
from lazyattn.model.parameters import unstack_blocks
from tests.model.tiny import make_batch, make_config, make_params

# Half of what separates neighbors, over the smaller of them.
_UNIT = {fp8.VALUES: 2.0**-4, fp8.GRADIENTS: 2.0**-3}
_ROUNDED = jax.jit(fp8.rounded, static_argnums=1)
_PRODUCT = jax.jit(fp8.product, static_argnums=2)


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _read(x, dtype):
    """Returns what a product multiplies with, in float64."""
    values, scale = _ROUNDED(x, dtype)
    assert values.dtype == dtype
    return np.asarray(values, np.float64) * float(scale)


@pytest.mark.parametrize("dtype", [fp8.VALUES, fp8.GRADIENTS])
@pytest.mark.parametrize("size", [1e-20, 3e-3, 1.0, 448.0, 1e30])
def test_rounding_is_as_good_as_the_type_at_any_size(dtype, size):
    x = size * _normal(0, 4096)
    values, scale = _ROUNDED(x, dtype)
    assert np.frexp(scale)[0] == 0.5  # a power of two
    largest = float(np.abs(np.asarray(values, np.float64)).max())
    assert float(jnp.finfo(dtype).max) / 4 <= largest <= float(jnp.finfo(dtype).max)
    error = np.abs(_read(x, dtype) - np.asarray(x, np.float64))
    smallest = float(jnp.finfo(dtype).smallest_subnormal) * float(scale)
    np.testing.assert_array_less(error, _UNIT[dtype] * np.abs(x) + 0.51 * smallest)
    assert np.median(error / np.abs(x)) > _UNIT[dtype] / 8  # it is rounded


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inputs", [1, 2])
def test_product_and_gradients(dtype, inputs):
    x = _normal(1, 2, 5, *(6, 8)[2 - inputs :], dtype=dtype)
    matrix = _normal(2, *(6, 8)[2 - inputs :], 2, 7)
    weight = 1e-5 * _normal(3, 2, 5, 2, 7, dtype=dtype)

    @jax.jit
    def results(x, matrix):
        out, back = jax.vjp(lambda x, matrix: fp8.product(x, matrix, inputs), x, matrix)
        return out, *back(weight)

    found = results(x, matrix)
    assert [leaf.dtype for leaf in found] == [dtype, dtype, jnp.float32]
    x8, matrix8 = _read(x, fp8.VALUES), _read(matrix, fp8.VALUES)
    weight8 = _read(weight, fp8.GRADIENTS)
    outputs = [2, 3]
    expected = (
        np.tensordot(x8, matrix8, inputs),
        np.tensordot(weight8, matrix8, (outputs, list(range(inputs, inputs + 2)))),
        np.tensordot(x8, weight8, ([0, 1], [0, 1])),
    )
    for one, exact in zip(found, expected, strict=True):
        # Sums of exact products, in float32, rounded to the dtype.
        error = np.abs(np.asarray(one, np.float64) - exact)
        unit = 1e-5 if dtype == jnp.float32 else 2.0**-7
        assert error.max() <= unit * np.abs(exact).max()


def test_a_product_is_near_that_in_bfloat16_and_not_it():
    x, matrix = _normal(4, 64, 256, dtype=jnp.bfloat16), _normal(5, 256, 48)
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    found = np.asarray(_PRODUCT(x, matrix, 1), np.float64)
    error = np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact)))
    # Both roundings are off by 2^-4 of an entry at most.
    assert 0.02 < error < 0.05


def test_sizes_that_are_powers_of_two_change_nothing():
    x, matrix = _normal(6, 9, 16), _normal(7, 16, 5)
    expected = _PRODUCT(x, matrix, 1)
    np.testing.assert_array_equal(_PRODUCT(x * 2.0**-40, matrix * 2.0**30, 1), expected * 2.0**-10)


def test_zeros_give_zeros():
    found = jax.jit(jax.grad(lambda x, w: fp8.product(x, w).sum(), (0, 1)))
    for leaf in (
        _PRODUCT(jnp.zeros((3, 4)), _normal(8, 4, 2), 1),
        *found(*2 * [jnp.zeros((4, 4))]),
    ):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_all_of_the_product_so(bad):
    x = _normal(9, 3, 4).at[1, 2].set(bad)
    assert not np.isfinite(_PRODUCT(x, _normal(10, 4, 2), 1)).any()


def test_xla_is_given_products_of_float8():
    x, matrix = jnp.zeros((32, 64), jnp.bfloat16), jnp.zeros((64, 48))
    gradient = jax.jit(jax.grad(lambda x, w: fp8.product(x, w).astype(jnp.float32).sum(), (0, 1)))
    text = gradient.lower(x, matrix).as_text()
    text += _PRODUCT.lower(x, matrix, 1).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    types = sorted(re.findall(r"f8E\w+", line.split(" : (")[1]) for line in products)
    assert types == [["f8E4M3FN", "f8E4M3FN"], ["f8E4M3FN", "f8E5M2"], ["f8E5M2", "f8E4M3FN"]]


def _gradient(config, quantization, params, batch):
    loss_fn = make_loss_fn(config, quantization=quantization)
    objective = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch).objective))
    loss, gradient = objective(params)
    return float(loss), gradient


def _apart(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.slow
def test_a_model_near_its_own_in_float32_scanned_or_not_recomputed_or_not():
    config = make_config(remat="full")
    params, batch = make_params(config), make_batch()
    batch["positions"] = None
    exact = _gradient(config, "none", params, batch)
    loss, gradient = _gradient(config, "fp8", params, batch)
    assert abs(loss / exact[0] - 1) < 0.03 and loss != exact[0]
    assert 0.05 < _apart(gradient, exact[1]) < 0.4

    unrolled = make_config(scan_layers=False)
    other = _gradient(unrolled, "fp8", unstack_blocks(params), batch)
    assert loss == pytest.approx(other[0], rel=1e-5)
    assert _apart(other[1], unstack_blocks(gradient)) < 0.02


def _device(platform, kind, **more):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, **more)
    return types.SimpleNamespace(devices=np.array([device], object))


def test_devices_without_such_products_are_refused():
    a100 = _device("gpu", "NVIDIA A100-SXM4-80GB", compute_capability="8.0")
    message = (
        r"^training.quantization is 'fp8', but it must be 'none' on NVIDIA A100-SXM4-80GB:"
        r" products in float8 need an NVIDIA GPU of compute capability 8.9 or more\.$"
    )
    with pytest.raises(InputError, match=message):
        fp8.check_devices("fp8", a100)
    fp8.check_devices("none", a100)
    for other in (_device("tpu", "TPU v5p"), _device("gpu", "MI300X", compute_capability="gfx942")):
        with pytest.raises(InputError, match="'none' on"):
            fp8.check_devices("fp8", other)
    fp8.check_devices("fp8", _device("cpu", "cpu"))
    for capability in ("8.9", "9.0", "10.0", "12.1"):
        fp8.check_devices("fp8", _device("gpu", "NVIDIA", compute_capability=capability))


def test_it_may_change_when_a_run_resumes():
    config = defaults()
    saved = from_config_dict(config).to_dict()
    config.training.quantization = "fp8"
    changes = resumption_changes(saved, from_config_dict(config))
    assert changes == {"training.quantization": ("none", "fp8")}
