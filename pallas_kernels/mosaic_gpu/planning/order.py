"""Triton kernel: the order in which work tiles are handed out; see `scheduler.py`."""

import triton
import triton.language as tl


@triton.jit
def rank(work_ptr, kv_pair, static: tl.constexpr):
    """Returns how many (batch, key head) come before one: those with more work, first ones first.

    work: [kv_pairs, work_parts].
    """
    parts = tl.arange(0, triton.next_power_of_2(static.work_parts))
    of_parts = parts < static.work_parts
    own = tl.sum(tl.load(work_ptr + kv_pair * static.work_parts + parts, mask=of_parts, other=0), 0)
    before = tl.zeros((64,), tl.int32)
    for start in range(0, static.kv_pairs, 64):
        pairs = start + tl.arange(0, 64)
        inside = pairs < static.kv_pairs
        at = pairs[:, None] * static.work_parts + parts[None, :]
        work = tl.load(work_ptr + at, mask=inside[:, None] & of_parts[None, :], other=0)
        work = tl.sum(work, 1)
        before += (inside & ((work > own) | ((work == own) & (pairs < kv_pair)))).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit
def store_tile_order(tile_order_ptr, kv_pair, rank, static: tl.constexpr, WHICH: tl.constexpr):
    """Stores the numbers of one key head's work tiles in their turn, of one of the orders."""
    order: tl.constexpr = static.orders[WHICH]
    for member in range(0, order.members):
        place = rank * order.members + member
        start = place // order.section * order.section
        size = tl.minimum(order.pairs - start, order.section)
        for tile0 in range(0, order.tiles, 64):
            tile = tile0 + tl.arange(0, 64)
            turn = order.tiles - 1 - tile if order.descending else tile
            at = start * order.tiles + turn * size + place - start
            number = (kv_pair * order.members + member) * order.tiles + tile
            tl.store(tile_order_ptr + at, number, mask=tile < order.tiles)
    if kv_pair == 0:
        tl.store(tile_order_ptr + order.pairs * order.tiles, 0)


@triton.jit
def lazy_tile_order(work_ptr, tile_order_ptr, static: tl.constexpr):
    """The order of the forward pass's work tiles; grid (batch * key heads,)."""
    kv_pair = tl.program_id(0)
    store_tile_order(tile_order_ptr, kv_pair, rank(work_ptr, kv_pair, static), static, 0)
