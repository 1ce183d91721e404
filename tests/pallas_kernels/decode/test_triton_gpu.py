"""The Triton decode kernels on a GPU: `make test-gpu`."""

import jax
import pytest

from pallas_kernels.triton import support

_REASON = support.refusal(64, 64, "bfloat16")
if _REASON is not None:
    pytest.skip(f"no Triton here: {_REASON}", allow_module_level=True)

import triton  # noqa: E402

from pallas_kernels.decode.triton_kernels import decode_scores  # noqa: E402
from tests import oracle  # noqa: E402
from tests.pallas_kernels.decode import append, suite  # noqa: E402

if not isinstance(decode_scores, triton.JITFunction):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

pytestmark = pytest.mark.gpu

STEEP = {"bias": "alibi", "slope": True}
# As long as to have many splits, several tiles a page, and all kinds of pages.
LONG = [
    suite.Decode(oracle.Case("gpu", (2, 5000, 4, 4, 64), 512, tau=(-1.0, -0.5), **STEEP), 1, 900),
    suite.Decode(oracle.Case("gpu_grouped", (2, 3000, 8, 2, 128), 512, **STEEP), 8, 700),
    suite.Decode(oracle.Case("gpu_softmax", (2, 4000, 4, 2, 64), 0, tau=None), 1, 1000),
    suite.Decode(oracle.Case("gpu_bias", (2, 4000, 4, 1, 64), 512, tau=None, **STEEP), 3, 1000),
    suite.Decode(oracle.Case("gpu_256", (1, 1500, 2, 2, 256), 512, tau=(-0.7,)), 2, 0),
    suite.Decode(oracle.Case("gpu_96", (1, 1500, 2, 1, 96), 512, tau=(-0.7,), **STEEP), 1, 0),
    suite.Decode(oracle.Case("gpu_ring", (2, 5000, 4, 2, 64), 512, **STEEP), 2, 700, 1024),
]


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Kernels as users get them, unlike other tests."""
    jax.config.update("jax_disable_most_optimizations", False)


# Each is compiled, which takes seconds.
QUICK = [decode for decode in suite.EVERY if decode.case.name in suite.QUICK]
HALF = [("bfloat16", decode) for decode in (*suite.RINGS[1:3], *suite.SPARSE[:4], *LONG)]
HALF += [("float16", decode) for decode in LONG[:3]]


@pytest.mark.parametrize("decode", [*QUICK, *LONG[:3]], ids=str)
def test_float32(decode):
    suite.check("triton", decode)


@pytest.mark.parametrize("dtype, decode", HALF, ids=str)
def test_half(dtype, decode):
    unit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    suite.check_half("triton", decode, dtype, 2 * unit)


@pytest.mark.parametrize("check", suite.CHECKS)
def test_as_every_backend(check):
    suite.CHECKS[check]("triton")


@pytest.mark.parametrize("decode", [suite.SPARSE[1], LONG[0]], ids=str)
def test_unread_pages_do_not_matter(decode):
    suite.check_unread_pages_do_not_matter("triton", decode, pages=1, rows_together=False)


def test_is_the_default():
    args, _ = suite.arrays(LONG[0])
    assert (suite.run(args, None) == suite.run(args, "triton")).all()


@pytest.mark.skipif(
    support.refuses_in_place() is not None, reason="jax-triton can't write to inputs"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_append(dtype):
    append.check(dtype)
