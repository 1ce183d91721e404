"""The Triton decode kernels in Triton's interpreter, on the CPU."""

from tests.pallas_kernels import triton_interpreter as interpreter  # isort: skip

import numpy as np
import pytest

from pallas_kernels.decode import triton_plan, types
from tests.pallas_kernels.decode import suite


@pytest.fixture
def interpreted(monkeypatch):
    """Returns a function that says about how many programs there are; few at first."""

    def set_programs(number):
        monkeypatch.setattr(triton_plan, "PROGRAMS", number)
        monkeypatch.setattr(triton_plan, "SOFTMAX_PROGRAMS", number)

    # A program of few looks after several pages, of which some are no one's.
    monkeypatch.setattr(triton_plan, "MAX_TURNS", 4)
    set_programs(1)
    with interpreter.interpreted(interpreter.blocks(64, 64)):
        yield set_programs


@pytest.mark.parametrize("decode", suite.marked(suite.EVERY), ids=str)
def test_output(decode, interpreted):
    if suite.EVERY.index(decode) % 2:
        interpreted(512)
    suite.check("triton", decode)


@pytest.mark.slow
@pytest.mark.parametrize("decode", suite.EVERY, ids=str)
def test_output_otherwise_shared_out(decode, interpreted):
    if not suite.EVERY.index(decode) % 2:
        interpreted(512)
    suite.check("triton", decode)


@pytest.mark.parametrize("check", suite.checks())
def test_as_every_backend(check, interpreted):
    suite.CHECKS[check]("triton")


@pytest.mark.parametrize(
    "decode", [suite.SPARSE[1], pytest.param(suite.SPARSE[0], marks=pytest.mark.slow)], ids=str
)
def test_unread_pages_do_not_matter(decode, interpreted):
    suite.check_unread_pages_do_not_matter("triton", decode, pages=1, rows_together=False)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("slots", [(100,), (4096,), (131_072,), (256, 1024, 4096, 16_384)])
def test_programs_cover_every_page_once(batch, slots, softmax):
    kv_heads = 4 * len(slots)
    caches = []
    for n, number in enumerate(slots):
        heads = tuple(range(4 * n, 4 * n + 4))
        key = np.broadcast_to(np.float32(0), (1, batch, number, 4, 64))
        caches.append(types.Cache(heads, None, key, key, None, None, None))
    call = types.Call(
        query=np.zeros((batch, 1, kv_heads, 64), np.float32),
        lengths=np.zeros(batch, np.int32),
        distance_bias=None,
        distance_slope=None,
        offset=None if softmax else np.zeros(kv_heads, np.float32),
        layer=np.int32(0),
        caches=tuple(caches),
        settings=types.Settings(0.125, 0.0, None, None, False, True),
    )
    static = triton_plan.make_static(call)
    start = 0
    for part in static.parts:
        assert part.start == start and part.turns & (part.turns - 1) == 0
        assert part.splits * part.turns >= part.pages > (part.splits - 1) * part.turns
        assert part.splits <= triton_plan.MAX_SPLITS or part.turns > triton_plan.MAX_TURNS
        assert part.stop == part.start + batch * part.heads * part.splits
        start = part.stop
    pages = batch * 4 * sum(part.pages for part in static.parts)
    if softmax:
        assert start >= min(triton_plan.SOFTMAX_PROGRAMS, pages) / 2
        return
    # A cache's last program may look after few pages.
    longest = max(part.turns for part in static.parts)
    rest = batch * kv_heads
    assert start <= triton_plan.PROGRAMS + rest or longest >= triton_plan.MAX_TURNS
    assert start >= min(triton_plan.PROGRAMS, pages) / 4
