"""Triton kernel: what the backward pass wants to know of its tiles."""

import triton
import triton.language as tl

from pallas_kernels.mosaic_gpu.planning.order import rank, store_tile_order


@triton.jit
def _last(first, queries, keys):
    """Returns the last of the queries, from the diagonal on, that sees each of the keys."""
    seen = (first[:, None] <= keys[None, :]) & (keys[None, :] <= queries[:, None])
    return tl.max(tl.where(seen, queries[:, None], 0), 0)


@triton.jit
def lazy_key_ranges(
    first_ptr, live_ptr, work_ptr,
    last_ptr, last_live_ptr, distances_ptr, of_queries_ptr, of_keys_ptr, of_bias_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """See `by_xla.key_ranges`; grid (programs or parts, heads, batch)."""
    number = tl.program_id(0)
    if (number == 0) & (tl.program_id(1) % static.group == 0):
        kv_heads = static.heads // static.group
        kv_pair = tl.program_id(2) * kv_heads + tl.program_id(1) // static.group
        place = rank(work_ptr, kv_pair, static)
        store_tile_order(of_queries_ptr, kv_pair, place, static, 0)
        store_tile_order(of_keys_ptr, kv_pair, place, static, 1)
        if static.parts > 0:
            store_tile_order(of_bias_ptr, kv_pair, place, static, 2)
    row = tl.program_id(2) * static.heads + tl.program_id(1)
    first_ptr += row * static.blocks
    live_ptr += row * static.blocks
    if number * static.at_once < static.blocks:
        keys = number * static.at_once + tl.arange(0, static.at_once)
        queries = tl.arange(0, triton.next_power_of_2(static.blocks))
        exists = queries < static.blocks
        first = tl.load(first_ptr + queries, mask=exists, other=static.blocks)
        live = tl.load(live_ptr + queries, mask=exists, other=static.blocks)
        at = row * static.blocks + keys
        inside = keys < static.blocks
        # Queries that aren't there see nothing: their first key is past the last.
        tl.store(last_ptr + at, _last(first, queries, keys), mask=inside)
        tl.store(last_live_ptr + at, _last(live, queries, keys), mask=inside)
    if number < static.parts:
        queries = number * static.part + tl.arange(0, triton.next_power_of_2(static.part))
        exists = (queries < static.blocks) & (queries < (number + 1) * static.part)
        first = tl.load(first_ptr + queries, mask=exists, other=static.blocks)
        live = tl.load(live_ptr + queries, mask=exists, other=static.blocks)
        distances = tl.arange(0, triton.next_power_of_2(static.filled))
        keys = queries[:, None] - distances[None, :]
        exists = exists[:, None] & (keys >= 0) & (distances < static.distances)[None, :]
        visited = exists & (first[:, None] <= keys)
        alive = exists & (live[:, None] <= keys)
        start = tl.min(tl.where(visited, queries[:, None], static.blocks), 0)
        start_live = tl.min(tl.where(alive, queries[:, None], static.blocks), 0)
        stop = tl.max(tl.where(visited, queries[:, None] + 1, 0), 0)
        at = distances_ptr + ((row * static.parts + number) * static.filled + distances) * 3
        inside = distances < static.filled
        tl.store(at, start, mask=inside)
        tl.store(at + 1, start_live, mask=inside)
        tl.store(at + 2, stop, mask=inside)
