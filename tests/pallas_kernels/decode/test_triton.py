"""The Triton decode kernels in Triton's interpreter, on the CPU."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import pytest

from pallas_kernels.decode import triton
from tests.pallas_kernels.decode import suite


@pytest.fixture(params=[1024, 1], ids=["many_programs", "few_programs"])
def interpreted(request, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", request.param)
    monkeypatch.setattr(triton, "MAX_TURNS", 4)
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        yield


@pytest.mark.parametrize("decode", suite.marked(suite.EVERY), ids=str)
def test_output(decode, interpreted):
    suite.check("triton", decode)


@pytest.mark.parametrize("check", suite.CHECKS)
def test_as_every_backend(check, interpreted):
    suite.CHECKS[check]("triton")


@pytest.mark.parametrize("decode", suite.SPARSE[:2], ids=str)
def test_unread_pages_do_not_matter(decode, interpreted):
    suite.check_unread_pages_do_not_matter("triton", decode, pages=1, rows_together=False)
