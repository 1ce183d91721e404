"""The TPU kernels on a TPU: `make test-tpu-device`."""

import jax
import numpy as np
import pytest

if jax.default_backend() != "tpu":
    pytest.skip("no TPU here", allow_module_level=True)

from tests import oracle
from tests.pallas_kernels import kernel_suite as suite


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Kernels as users get them, unlike other tests."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def truth_from_the_cpu(monkeypatch):
    """TPUs have no float64."""
    run = oracle.out_and_gradients

    def on_cpu(args, implementation, d_out):
        if implementation != "xla":
            return run(args, implementation, d_out)
        with jax.default_device(jax.devices("cpu")[0]):
            return run(args, implementation, d_out)

    monkeypatch.setattr(oracle, "out_and_gradients", on_cpu)


@pytest.mark.parametrize("case", suite.CASES + suite.HEAD_SIZES + suite.LONG, ids=str)
def test_bfloat16(case):
    factor = suite.HALF_PRECISION_FACTOR.get(case.name, 1.2)
    oracle.check_half_precision("tpu", case, "bfloat16", factor=factor)


@pytest.mark.parametrize("case", [*suite.CASES, *suite.HEAD_SIZES, *suite.LONG], ids=str)
def test_float32(case):
    # How well a TPU's own exponentials do is not known here; its products are as good as float32.
    oracle.check("tpu", case, tolerance=1e-4)


def test_vmap_scan_and_remat():
    suite.check_transformations("bfloat16", 2**-7, implementation="tpu")


def test_shard_map():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, len(devices)), ("batch", "heads"))
    suite.check_sharded(mesh, "bfloat16", 2**-7, "tpu")


def test_gradients_of_blind_rows():
    suite.check_gradients_of_blind_rows("bfloat16", 0.02, "tpu")


def test_not_a_number_comes_through():
    suite.check_not_a_number_comes_through("bfloat16", "tpu")
