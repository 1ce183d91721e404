"""Triton kernel: the distance bias in the Hopper kernels' form; see `Plan.table`."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_MASKED = tl.constexpr(float("-inf"))


@triton.jit
def _bias(bias_ptr, slope, x, static: tl.constexpr):
    """Returns b(x) for x >= 0."""
    near = tl.load(bias_ptr + x, mask=(x >= 0) & (x < static.width), other=0.0)
    tail = tl.zeros_like(near)
    if static.has_slope:
        end = tl.load(bias_ptr + static.width - 1)
        tail = end - slope * (x - (static.width - 1)).to(tl.float32)
    return tl.where(x < static.width, near, tail)


@triton.jit
def _reference(bias_ptr):
    """Returns what entries are less of: b(0), or 0 where that is -inf."""
    first = tl.load(bias_ptr)
    return tl.where(first == float("-inf"), 0.0, first)


@triton.jit
def _entry(bias_ptr, slope, n, static: tl.constexpr):
    """Returns entry n of the table of distances rising."""
    first = _reference(bias_ptr)
    values = (_bias(bias_ptr, slope, n - static.lead, static) - first) * _LOG2_E
    ramp = first * -_LOG2_E
    if static.has_slope:
        ramp = (static.near - n).to(tl.float32) * slope * _LOG2_E
    return tl.where(n < static.lead, _MASKED, tl.where(n < static.near, values, ramp))


@triton.jit
def lazy_table(
    bias_ptr, slope_ptr, for_queries_ptr, for_keys_ptr, tail_ptr, maxima_ptr, static: tl.constexpr
):
    """The bias in the kernels' form; grid (heads, 2 copies): each stores both its orders."""
    head = tl.program_id(0)
    copy = tl.program_id(1)
    bias_ptr += head * static.width
    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    at = (head * 2 + copy) * static.entries
    for n0 in range(0, static.entries, 1024):
        place = n0 + tl.arange(0, 1024)
        # The second copy lacks the first entry.
        n = place + copy
        exists = n < static.entries
        inside = place < static.entries
        for_keys = tl.where(exists, _entry(bias_ptr, slope, n, static), 0.0)
        tl.store(for_keys_ptr + at + place, for_keys, mask=inside)
        back = tl.where(n == 0, 0, static.entries - n)
        for_queries = tl.where(exists, _entry(bias_ptr, slope, back, static), 0.0)
        tl.store(for_queries_ptr + at + place, for_queries, mask=inside)
    if copy == 0:
        end = 0.0
        if static.has_slope:
            end = tl.load(bias_ptr + static.reach - 1)
        end = (end - _reference(bias_ptr)) * _LOG2_E
        tl.store(tail_ptr + 2 * head, end)
        tl.store(tail_ptr + 2 * head + 1, slope * _LOG2_E)
    else:
        # A tile's distances begin one block before, and end one after.
        for block0 in range(0, static.blocks, 16):
            blocks = block0 + tl.arange(0, 16)
            x = (blocks[:, None] - 1) * static.block + tl.arange(0, 2 * static.block)[None, :]
            exists = (x >= 0) & (x < static.length)
            found = _bias(bias_ptr, slope, x, static)
            # Maxima on a GPU leave NaN out; a tile that has one is visited.
            found = tl.where(found == found, found, float("inf"))
            found = tl.where(exists, found, float("-inf"))
            place = maxima_ptr + head * static.maxima_row + blocks
            tl.store(place, tl.max(found, 1), mask=blocks < static.blocks)
        # Mean biases of groups of near keys, by the distance of the nearest.
        for x0 in range(0, 2 * static.block, 64):
            x = x0 + tl.arange(0, 64)
            group = x[:, None] + tl.arange(0, static.near_keys)[None, :]
            mean = tl.sum(_bias(bias_ptr, slope, group, static), 1) / static.near_keys
            tl.store(maxima_ptr + head * static.maxima_row + static.blocks + x, mean)
