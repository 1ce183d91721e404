"""Writing into caches by Triton, in its interpreter: as plain JAX does it."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import jax.numpy as jnp
import pytest

from pallas_kernels.decode import append
from tests.pallas_kernels.decode import append as suite


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_append(dtype):
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        suite.check(dtype)


def test_rings_that_come_back_to_a_page_in_one_step_are_not_for_it():
    def held(slots):
        return [(jnp.zeros((1, slots, 1, 16)), jnp.zeros((1, slots, 1, 16)), None)]

    with interpreter.interpreted(interpreter.blocks(64, 64)):
        assert append.unsupported(held(133), 8) is not None
        assert append.unsupported(held(133), 1) is None
        assert append.unsupported(held(136), 8) is None
