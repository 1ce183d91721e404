"""Products of a few tokens in Triton's interpreter."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import pytest

from pallas_kernels.decode import triton_dense
from tests.pallas_kernels.decode import dense


@pytest.mark.parametrize("case", dense.CASES)
def test_product(case):
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        dense.check(case, "float32", 2e-5)


def test_what_it_can_do():
    assert triton_dense.unsupported(8, (1024, 64)) is None
    assert "65 tokens" in triton_dense.unsupported(65, (64,))
    assert "48" in triton_dense.unsupported(8, (48,))
