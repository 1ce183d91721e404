"""Triton kernel: the gradients of the parameters, from what the Hopper kernels leave."""

import triton
import triton.language as tl

from pallas_kernels.mosaic_gpu.planning.static import ROWS

_ROWS = tl.constexpr(ROWS)
# Parts that are added at once.
_PARTS = tl.constexpr(32)


@triton.jit
def _straight(sums_ptr, head, batch0, x, static: tl.constexpr):
    """Returns the sums of dS over distances x, from parts that have them as such."""
    size = static.filled * static.block
    parts = static.rows * static.parts
    total = tl.zeros((_PARTS, x.shape[0]), tl.float32)
    for first in tl.range(0, parts, _PARTS):
        part = first + tl.arange(0, _PARTS)
        row = (batch0 * static.parts + part).to(tl.int64) * static.heads + head
        place = sums_ptr + row[:, None] * size + x[None, :]
        exists = (part < parts)[:, None] & ((x < static.length) & (x < size))[None, :]
        total += tl.load(place, mask=exists, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _askew(sums_ptr, head, batch0, x, static: tl.constexpr):
    """Returns the sums of dS over distances x, from the diagonals of tiles."""
    tile = x // static.block
    beyond = x % static.block
    at = tile * (2 * static.block) + static.block - 1 + beyond
    exists = (x < static.length) & (tile < static.distances)
    # Those in the lower left half of one tile are in the upper right half of the next.
    in_next = (x < static.length) & (beyond > 0) & (tile + 1 < static.distances)
    total = tl.zeros(x.shape, tl.float32)
    for part in tl.range(0, static.rows * static.parts, loop_unroll_factor=4):
        row = (batch0 * static.parts + part).to(tl.int64) * static.heads + head
        place = sums_ptr + row * (static.filled * 2 * static.block) + at
        total += tl.load(place, mask=exists, other=0.0)
        total += tl.load(place + static.block, mask=in_next, other=0.0)
    return total


@triton.jit
def _near(sums_ptr, head, batch0, x, static: tl.constexpr):
    """Returns the sums of dS over distances x, from what all parts have."""
    if static.straight:
        found = _straight(sums_ptr, head, batch0, x, static)
    else:
        found = _askew(sums_ptr, head, batch0, x, static)
    return found


@triton.jit
def _total(numbers_ptr, head, batch0, kind, kinds: tl.constexpr, static: tl.constexpr):
    """Returns the sum of one kind of numbers [batch, heads, blocks, kinds, 64] of a head."""
    size = static.blocks * static.block
    total = tl.zeros((_ROWS,), tl.float32)
    for n in tl.range(0, static.rows * static.row_runs, loop_unroll_factor=4):
        batch = (batch0 + n // static.row_runs).to(tl.int64)
        x = n % static.row_runs * _ROWS + tl.arange(0, _ROWS)
        at = (x // static.block * kinds + kind) * static.block + x % static.block
        start = (batch * static.heads + head) * (size * kinds)
        total += tl.load(numbers_ptr + start + at, mask=x < size, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def lazy_gradients(
    of_offset_ptr, sums_ptr, tail_sums_ptr,
    d_bias_ptr, d_slope_ptr, d_offset_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's parameters; grid (heads, groups of the batch, parts of them).

    The first part is the offset's, the others are of the table, the last one also the slope's.
    """
    head = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    batch0 = group * static.rows
    row = group * static.heads + head
    if part == 0:
        if static.has_offset:
            tl.store(d_offset_ptr + row, _total(of_offset_ptr, head, batch0, 0, 1, static))
    else:
        x = (part - 1) * static.at_once + tl.arange(0, static.at_once)
        d_bias = _near(sums_ptr, head, batch0, x, static)
        if static.has_slope:  # noqa: SIM102, the first is decided when it is compiled
            if part * static.at_once >= static.width:
                # Tiles with a distance inside the table have some past it.
                past = static.width + tl.arange(0, 2 * static.block)
                of_past = _near(sums_ptr, head, batch0, past, static)
                beyond = tl.sum(of_past, 0)
                moment = tl.sum(of_past * (past - (static.width - 1)).to(tl.float32), 0)
                if static.has_tail_sums:
                    beyond += _total(tail_sums_ptr, head, batch0, 0, 2, static)
                    moment += _total(tail_sums_ptr, head, batch0, 1, 2, static)
                tl.store(d_slope_ptr + row, -moment)
                d_bias += tl.where(x == static.width - 1, beyond, 0.0)
        tl.store(d_bias_ptr + row * static.width + x, d_bias, mask=x < static.width)
