"""Decoding in plain JAX."""

import pytest

from tests.pallas_kernels.decode import suite

BACKENDS = ["xla", "xla_chunked"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", suite.marked(suite.EVERY), ids=str)
def test_output(backend, decode):
    suite.check(backend, decode)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", suite.checks())
def test_as_every_backend(backend, check):
    suite.CHECKS[check](backend)


@pytest.mark.parametrize("decode", suite.SPARSE[:2], ids=str)
def test_unread_pages_do_not_matter(decode):
    suite.check_unread_pages_do_not_matter("xla_chunked", decode, pages=4, rows_together=True)
