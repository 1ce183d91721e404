"""The Triton kernels on a GPU: `make test-gpu`."""

import jax
import pytest

from pallas_kernels.triton import support

_REASON = support.refusal(64, 64, "bfloat16")
if _REASON is not None:
    pytest.skip(f"no Triton here: {_REASON}", allow_module_level=True)

import numpy as np  # noqa: E402
import triton  # noqa: E402

from lazyattn import attention, lazy_attention  # noqa: E402
from pallas_kernels.triton.forward import lazy_forward  # noqa: E402
from tests import oracle  # noqa: E402
from tests.pallas_kernels import kernel_suite as suite  # noqa: E402

if not isinstance(lazy_forward, triton.JITFunction):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Kernels as users get them, unlike other tests."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    "case", suite.HALF_PRECISION_CASES + suite.HEAD_SIZES + suite.LONG, ids=str
)
def test_bfloat16(case):
    suite.check_half_precision(case, "bfloat16")


@pytest.mark.parametrize(
    "case", suite.CASES[:3] + suite.CASES[14:18] + suite.HEAD_SIZES + suite.LONG[:1], ids=str
)
def test_float16(case):
    suite.check_half_precision(case, "float16")


@pytest.mark.parametrize(
    "case", [*suite.CASES[:3], *oracle.WINDOWED[:3], suite.SPARSE, *suite.HEAD_SIZES[1:4]], ids=str
)
def test_float32(case):
    oracle.check("triton", case)


@pytest.mark.parametrize("case", [suite.SPARSE, *suite.LONG[::2]], ids=str)
def test_same_bits_every_time(case):
    suite.check_same_bits_every_time(case, "bfloat16")


@pytest.mark.parametrize("case", [suite.SPARSE, *suite.LONG[:1]], ids=str)
def test_dead_tiles_do_not_matter(case):
    suite.check_dead_tiles_do_not_matter(case, "bfloat16", 2**-8)


def test_vmap_scan_and_remat():
    suite.check_transformations("bfloat16", 2**-7)


def test_shard_map():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, len(devices)), ("batch", "heads"))
    suite.check_sharded(mesh, "bfloat16", 2**-7)


def test_not_a_number_comes_through():
    suite.check_not_a_number_comes_through("bfloat16")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 5e-5), ("bfloat16", 0.02), ("float16", 0.02)]
)
def test_gradients_of_blind_rows(dtype, tolerance):
    suite.check_gradients_of_blind_rows(dtype, tolerance)


def test_gradient_of_an_offset_of_zero():
    oracle.check_gradient_of_an_offset_of_zero("triton", tolerance=1e-3)


def test_is_the_default(monkeypatch):
    names = []
    choose = attention.choose
    monkeypatch.setattr(attention, "choose", lambda *args: names.append(choose(*args)) or names[-1])
    args = oracle.inputs(suite.CASES[0])
    lazy_attention(**args)
    assert names[0].name == "triton"
