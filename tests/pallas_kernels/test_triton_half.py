"""The Triton kernels in Triton's interpreter: half precision, head sizes, transformations."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import jax
import numpy as np
import pytest

from tests import oracle, test_attention
from tests.pallas_kernels import kernel_suite as suite

BLOCKS = interpreter.blocks(64, 64, (64, 32))
NAMED = {case.name: case for case in suite.CASES}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("documents_grouped", "bfloat16"),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name, dtype in (
                *(("documents_grouped", "float16"), ("paper", "float16"), ("paper", "bfloat16")),
                *(("no_offset", "bfloat16"), ("no_offset", "float16")),
                *(("sharp_scores", "bfloat16"), ("sharp_scores", "float16")),
            )
        ),
    ],
)
def test_half_precision(name, dtype):
    with interpreter.interpreted(BLOCKS):
        suite.check_half_precision(NAMED[name], dtype)


@pytest.mark.parametrize("divisor", ["visible", pytest.param(1.0, marks=pytest.mark.slow)])
def test_sums_of_values_do_not_overflow_float16(divisor):
    with interpreter.interpreted(BLOCKS):
        test_attention.check_large_values("triton", divisor, length=200)


@pytest.mark.parametrize(
    "case",
    [
        case if "96" in case.name else pytest.param(case, marks=pytest.mark.slow)
        for case in suite.HEAD_SIZES
    ],
    ids=str,
)
def test_head_sizes(case):
    with interpreter.interpreted(BLOCKS):
        oracle.check("triton", case)


@pytest.mark.slow
def test_vmap_scan_and_remat():
    with interpreter.interpreted(BLOCKS):
        suite.check_transformations("float32", 1e-5)


@pytest.mark.slow
def test_strict_settings_and_64_bits():
    with interpreter.interpreted(BLOCKS):
        suite.check_settings("bfloat16", "triton")


@pytest.mark.slow
def test_shard_map():
    # Callbacks of several CPU devices at once crash XLA; the types are those of any mesh.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    with interpreter.interpreted(BLOCKS):
        suite.check_sharded(mesh, "float32", 1e-5)
