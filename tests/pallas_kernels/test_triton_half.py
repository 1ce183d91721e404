"""The Triton kernels in Triton's interpreter: half precision, head sizes, transformations."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import jax
import numpy as np
import pytest

from tests import oracle, test_attention
from tests.pallas_kernels import kernel_suite as suite

BLOCKS = interpreter.blocks(64, 64, (64, 32))
NAMED = {case.name: case for case in suite.CASES}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["paper", "no_offset", "documents_grouped", "sharp_scores"])
def test_half_precision(name, dtype):
    with interpreter.interpreted(BLOCKS):
        suite.check_half_precision(NAMED[name], dtype)


@pytest.mark.parametrize("divisor", ["visible", 1.0])
def test_sums_of_values_do_not_overflow_float16(divisor):
    with interpreter.interpreted(BLOCKS):
        test_attention.check_large_values("triton", divisor, length=200)


@pytest.mark.parametrize("case", suite.HEAD_SIZES, ids=str)
def test_head_sizes(case):
    with interpreter.interpreted(BLOCKS):
        oracle.check("triton", case)


def test_vmap_scan_and_remat():
    with interpreter.interpreted(BLOCKS):
        suite.check_transformations("float32", 1e-5)


def test_strict_settings_and_64_bits():
    with interpreter.interpreted(BLOCKS):
        suite.check_settings("bfloat16", "triton")


def test_shard_map():
    # Callbacks of several CPU devices at once crash XLA; the types are those of any mesh.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    with interpreter.interpreted(BLOCKS):
        suite.check_sharded(mesh, "float32", 1e-5)
