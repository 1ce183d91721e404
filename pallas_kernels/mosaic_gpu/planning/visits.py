"""Triton kernels: which tiles are visited; the rule is that of pallas_kernels/visit.py."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# Added to score bounds, as there.
_SLACK = tl.constexpr(1e-3)


@triton.jit
def _or_infinite(x):
    """Returns x with infinity for NaN, which maxima on a GPU leave out: its tiles are visited."""
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _rows(ptr, block, batch, heads: tl.constexpr, head, static: tl.constexpr):
    """Loads a block of one head of queries or keys."""
    rows = block * static.block + tl.arange(0, static.block)
    columns = tl.arange(0, static.head_dim_padded)
    inside = ((rows >= 0) & (rows < static.length))[:, None]
    if static.head_dim < static.head_dim_padded:
        inside = inside & (columns < static.head_dim)[None, :]
    at = (batch * static.length + rows)[:, None] * heads + head
    return tl.load(ptr + at * static.head_dim + columns, mask=inside, other=0.0)


@triton.jit
def _near_means(query, key, means_ptr, first, block, before: tl.constexpr, static: tl.constexpr):
    """Mean scores of queries with groups of keys of their own block or the one `before`; -inf for
    a group that does not count.

    first: first key that each query sees.
    """
    groups: tl.constexpr = static.block // static.near_keys
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * static.scale
    scores = tl.reshape(scores, (static.block, groups, static.near_keys))
    means = tl.sum(scores, 2) / static.near_keys
    start = tl.arange(0, groups)[None, :] * static.near_keys - before * static.block
    rows = tl.arange(0, static.block)[:, None]
    nearest = rows - start - (static.near_keys - 1)
    seen = (nearest > 0) & (block * static.block + start >= tl.maximum(first, 0)[:, None])
    if static.width > 0:
        means += tl.load(means_ptr + nearest, mask=seen, other=0.0)
    return tl.where(seen, means, float("-inf"))


@triton.jit
def _add_exp(total, means, largest, static: tl.constexpr):
    return total + static.near_keys * tl.sum(tl.exp(means - largest[:, None]), 1)


@triton.jit
def lazy_norms(
    query_ptr, key_ptr, visible_ptr, bias_ptr, maxima_ptr, norms_ptr, static: tl.constexpr
):
    """Norms of one block of one head, and the least of what is known of its log-sum-exps.

    Grid (blocks * heads, batch); norms: [batch, 3, heads, blocks].
    """
    block = tl.program_id(0) // static.heads
    head = tl.program_id(0) % static.heads
    batch = tl.program_id(1).to(tl.int64)
    kv_heads: tl.constexpr = static.heads // static.group
    query = _rows(query_ptr, block, batch, static.heads, head, static)
    key = _rows(key_ptr, block, batch, kv_heads, head // static.group, static)
    query32 = query.to(tl.float32)
    key32 = key.to(tl.float32)
    query_norm = tl.max(_or_infinite(tl.sum(query32 * query32, 1)), 0)
    key_norm = tl.max(_or_infinite(tl.sum(key32 * key32, 1)), 0)
    place = norms_ptr + (batch * 3 * static.heads + head) * static.blocks + block
    tl.store(place, tl.sqrt(query_norm) * static.size_of_scale)
    tl.store(place + static.heads * static.blocks, tl.sqrt(key_norm))
    if static.skip_mass > 0:
        rows = block * static.block + tl.arange(0, static.block)
        own = tl.sum(query32 * key32, 1) * static.scale
        if static.width > 0:
            own += tl.load(bias_ptr + head * static.width)
        first = tl.zeros_like(rows)
        if static.packed:
            rows = tl.minimum(rows, static.length - 1)
            first = tl.load(visible_ptr + batch * static.length + rows)
        means_ptr = maxima_ptr + head * static.maxima_row + static.blocks
        near = _near_means(query, key, means_ptr, first, block, 0, static)
        key = _rows(key_ptr, block - 1, batch, kv_heads, head // static.group, static)
        before = _near_means(query, key, means_ptr, first, block, 1, static)
        largest = tl.maximum(own, tl.maximum(tl.max(near, 1), tl.max(before, 1)))
        # Without any score that is more than -inf the sum stays 0.
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = _add_exp(tl.exp(own - largest), near, largest, static)
        log_sum = largest + tl.log(_add_exp(total, before, largest, static))
        log_sum = -_or_infinite(-log_sum)
        log_sum = tl.where(
            block * static.block + tl.arange(0, static.block) < static.length, log_sum, float("inf")
        )
        tl.store(place + 2 * static.heads * static.blocks, tl.min(log_sum, 0))


@triton.jit
def lazy_visits(
    norms_ptr, visible_ptr, bias_ptr, maxima_ptr, offset_ptr,
    first_ptr, no_overflow_ptr, work_ptr,
    static: tl.constexpr,
):  # fmt: skip
    """First block of keys that some blocks of queries visit; grid (programs, heads, batch).

    The rule is that of pallas_kernels/visit.py.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2)
    blocks = tl.program_id(0) * static.at_once + tl.arange(0, static.at_once)
    tiles = tl.arange(0, triton.next_power_of_2(static.blocks))
    inside = blocks < static.blocks
    norms_ptr += (batch * 3 * static.heads + head) * static.blocks
    of_kind: tl.constexpr = static.heads * static.blocks
    key_norm = tl.load(norms_ptr + of_kind + tiles, mask=tiles < static.blocks, other=0.0)
    first = tl.zeros_like(blocks)
    if static.packed:
        rows = blocks[:, None] * static.block + tl.arange(0, static.block)[None, :]
        rows = tl.minimum(rows, static.length - 1)
        first = tl.min(tl.load(visible_ptr + batch * static.length + rows), 1) // static.block
    if static.skip_mass > 0:
        bound = tl.load(norms_ptr + blocks, mask=inside, other=0.0)[:, None] * key_norm[None, :]
        lowest = tl.load(norms_ptr + 2 * of_kind + blocks, mask=inside, other=0.0)
        bound = bound - lowest[:, None] + _SLACK
        tile_distance = blocks[:, None] - tiles[None, :]
        before = tile_distance > 0
        if static.width > 0:
            seen = (tile_distance >= 0) & inside[:, None]
            at = maxima_ptr + head * static.maxima_row + tile_distance
            bound += tl.load(at, mask=seen, other=0.0)
        # The minimum only guards exp against overflow.
        mass = static.block * tl.exp(tl.minimum(bound, 20.0))
        mass = tl.where(tiles[None, :] >= first[:, None], mass, 0.0)
        negligible = (tl.cumsum(mass, 1) <= static.skip_mass) & before
        skipped = tl.sum(negligible.to(tl.int32), 1)
        if static.has_offset:
            skipped = tl.where(tl.load(offset_ptr + head) >= 0, 0, skipped)
        first = tl.maximum(first, skipped)
    row = batch * static.heads + head
    tl.store(first_ptr + row * static.blocks + blocks, first, mask=inside)
    work = tl.sum(tl.where(inside, blocks - first + 1, 0), 0)
    tl.store(work_ptr + row * tl.num_programs(0) + tl.program_id(0), work)
    if tl.program_id(0) == 0:
        exists = tiles < static.blocks
        largest = tl.max(tl.load(norms_ptr + tiles, mask=exists, other=0.0), 0)
        largest *= tl.max(key_norm, 0)
        if static.width > 0:
            maxima = tl.load(
                maxima_ptr + head * static.maxima_row + tiles, mask=exists, other=float("-inf")
            )
            own = tl.load(bias_ptr + head * static.width)
            # Without a score of its own a row's sum has no lower bound.
            more = tl.where(own == float("-inf"), float("inf"), tl.max(maxima, 0) - own)
            largest += more
        tl.store(no_overflow_ptr + row, (largest * _LOG2_E <= static.exponent_limit).to(tl.int32))
