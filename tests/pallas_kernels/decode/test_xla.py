"""Decoding in plain JAX."""

import pytest

from tests.pallas_kernels.decode import suite

BACKENDS = ["xla", "xla_chunked"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", suite.marked(suite.EVERY), ids=str)
def test_output(backend, decode):
    suite.check(backend, decode)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "check",
    [
        lambda backend: suite.check_half(backend, suite.SPARSE[1], "bfloat16", 2**-8),
        lambda backend: suite.check_int8(backend, suite.SPARSE[1]),
        lambda backend: suite.check_int8(backend, suite.RINGS[2]),
        lambda backend: suite.check_layers(backend, suite.SPARSE[1]),
        suite.check_rows_that_do_not_exist,
        suite.check_not_a_number_comes_through,
        suite.check_blind,
    ],
    ids=["half", "int8", "int8_ring", "layers", "rows", "not_a_number", "blind"],
)
def test_as_every_backend(backend, check):
    check(backend)


@pytest.mark.parametrize("decode", suite.SPARSE[:2], ids=str)
def test_unread_pages_do_not_matter(decode):
    suite.check_unread_pages_do_not_matter("xla_chunked", decode, pages=4, rows_together=True)
