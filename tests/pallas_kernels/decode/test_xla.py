"""Decoding in plain JAX."""

import pytest

from tests.pallas_kernels.decode import suite

BACKENDS = ["xla"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", suite.marked(suite.EVERY), ids=str)
def test_output(backend, decode):
    suite.check(backend, decode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rest(backend):
    suite.check_half(backend, suite.SPARSE[1], "bfloat16", 2**-8)
    suite.check_int8(backend, suite.SPARSE[1])
    suite.check_int8(backend, suite.RINGS[2])
    suite.check_layers(backend, suite.SPARSE[1])
    suite.check_rows_that_do_not_exist(backend)
    suite.check_not_a_number_comes_through(backend)
    suite.check_blind(backend)
