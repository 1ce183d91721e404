"""The Hopper kernels on a GPU: `make test-gpu`."""

import jax
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import support
from tests.pallas_kernels.problems import problem

_REASON = support.unsupported(problem(), 1)
if _REASON is not None:
    pytest.skip(f"no Hopper kernels here: {_REASON}", allow_module_level=True)

from lazyattn import attention, lazy_attention  # noqa: E402
from tests import oracle  # noqa: E402
from tests.pallas_kernels import kernel_suite as suite  # noqa: E402

pytestmark = pytest.mark.gpu

HEAD_SIZES = suite.HEAD_SIZES
LONG = [
    *suite.LONG,
    # Past its table the bias is 0, not its first entry.
    oracle.Case("long_no_tail", (1, 1100, 4, 2, 64), 200, "bumpy"),
    # A table that leaves dK's kernel no room for the bias's gradient.
    oracle.Case("long_table", (1, 1700, 2, 1, 128), 1600, "alibi", True),
    oracle.Case("long_96", (1, 1500, 4, 2, 96), 512, "alibi", True, documents=(900, 77)),
    oracle.Case("packed_softmax", (1, 1500, 4, 2, 64), 512, tau=None, documents=(900, 77)),
    oracle.Case("wide_softmax", (1, 1500, 2, 2, 128), 512, "alibi", True, None),
    oracle.Case("long_256", (1, 1500, 4, 2, 256), 512, "alibi", True, documents=(900, 77)),
    oracle.Case("softmax_256", (1, 1100, 2, 2, 200), 512, "alibi", True, None),
    # Scores too large for sums without a running maximum.
    oracle.Case("long_sharp", (1, 600, 2, 2, 64), 256, "alibi", score_scale=4.0),
    oracle.Case(
        "window_sharp", (1, 600, 2, 2, 64), 256, "alibi", score_scale=4.0,
        settings=(("window", 200),),
    ),
    # A table that leaves dK's kernel no room for the bias's gradient.
    oracle.Case(
        "window_of_a_long_table", (1, 1700, 2, 1, 128), 1600, "alibi", True,
        settings=(("window", 500),),
    ),
    oracle.Case(
        "window_256", (1, 1100, 4, 2, 256), 256, "alibi", True, settings=(("window", 400),)
    ),
]  # fmt: skip


def _long(*names):
    by_name = {case.name: case for case in LONG}
    return [by_name[name] for name in names]


_HALF = _long("long", "long_dense", "long_softmax", "long_window")
_SAME_BITS = _long("long", "long_softmax", "long_table", "long_packed", "long_256", "long_window")


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Kernels as users get them, unlike other tests."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("case", suite.HALF_PRECISION_CASES + HEAD_SIZES + LONG, ids=str)
def test_bfloat16(case):
    factor = 3.0 if case.score_scale > 1 else 1.2
    oracle.check_half_precision("mosaic_gpu", case, "bfloat16", factor=factor)


@pytest.mark.parametrize("case", suite.CASES[:3] + HEAD_SIZES[1:] + _HALF, ids=str)
def test_float16(case):
    oracle.check_half_precision("mosaic_gpu", case, "float16")


@pytest.mark.parametrize("case", [suite.SPARSE, *_SAME_BITS], ids=str)
def test_same_bits_every_time(case):
    suite.check_same_bits_every_time(case, "bfloat16", "mosaic_gpu")


@pytest.mark.parametrize("width", [1024, 4096])
@pytest.mark.parametrize("offset", [None, (-1.0,)])
def test_same_bits_many_times_on_a_full_device(width, offset):
    # Tables of 4,096 have a kernel of their own for the gradient of the bias.
    suite.check_same_bits_many_times((4, 4096, 16, 16, 64), width, offset, "mosaic_gpu")


@pytest.mark.parametrize("case", [suite.SPARSE, *_long("long", "long_window")], ids=str)
def test_dead_tiles_do_not_matter(case):
    suite.check_dead_tiles_do_not_matter(case, "bfloat16", 2**-8, "mosaic_gpu")


def test_vmap_scan_and_remat():
    suite.check_transformations("bfloat16", 2**-7, implementation="mosaic_gpu")


def test_shard_map():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, len(devices)), ("batch", "heads"))
    suite.check_sharded(mesh, "bfloat16", 2**-7, "mosaic_gpu")


def test_not_a_number_comes_through():
    suite.check_not_a_number_comes_through("bfloat16", "mosaic_gpu", tile=128)
    suite.check_a_far_key_that_is_none_comes_through("bfloat16", "mosaic_gpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_blind_rows(dtype):
    suite.check_gradients_of_blind_rows(dtype, 0.02, "mosaic_gpu", head_dim=64)


def test_gradient_of_an_offset_of_zero():
    oracle.check_gradient_of_an_offset_of_zero(
        "mosaic_gpu", dtype="bfloat16", tolerance=0.02, head_dim=64
    )


def test_is_the_default(monkeypatch):
    names = []
    choose = attention.choose
    monkeypatch.setattr(attention, "choose", lambda *args: names.append(choose(*args)) or names[-1])
    args = oracle.inputs(suite.CASES[0])
    for name in ("query", "key", "value"):
        args[name] = jax.numpy.asarray(args[name], "bfloat16")
    lazy_attention(**args)
    assert names[0].name == "mosaic_gpu"
