"""What the Triton decode kernels do to pages and tiles.

Scores are in units of log2. Tiles of scores are [keys, rows]: products of tensor cores want
64 rows or more of the first factor, and 8 columns of the second are enough.
"""

import math

import triton
import triton.language as tl

from pallas_kernels.decode import types
from pallas_kernels.triton.tile import MASKED, PRECISION, gather, thresholds

PAGE = tl.constexpr(types.PAGE)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def owns(program, part: tl.constexpr):
    """Returns whether a program is one of the cache's."""
    return (program >= part.start) & (program < part.stop)


@triton.jit
def place_of(program, heads_ptr, static: tl.constexpr, part: tl.constexpr):
    """Returns what a program works on.

    Row, head of the cache, split; the row's head among all, which is where the notes of its
    splits lie; and of each of its rows of queries the number, query, head, and whether there is
    such a row.
    """
    # Neighbors read the heads of the same slots, which lie side by side.
    own = (program - part.start) % part.heads
    at = (program - part.start) // part.heads
    row_tile = at % static.row_tiles
    split = at // static.row_tiles % part.splits
    row = at // static.row_tiles // part.splits
    head = own
    if static.number > 1:
        head = tl.load(heads_ptr + part.first_head + own)
    number = row_tile * static.tile_rows + tl.arange(0, static.tile_rows)
    real = number < static.rows
    query_head = tl.where(real, head * static.group + number % static.group, 0)
    pair = row * static.kv_heads + head
    return row, own, split, pair, number, number // static.group, query_head, real


@triton.jit
def load_queries(query_ptr, row, turn, head, real, static: tl.constexpr):
    """Returns the queries of a program's rows, [rows, head_dim]."""
    dim = tl.arange(0, static.padded_dim)
    at = ((row * static.new + turn) * static.heads + head) * static.head_dim
    mask = real[:, None] & (dim < static.head_dim)[None, :]
    return tl.load(query_ptr + at[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def load_slots(base, slot, mask, query, static: tl.constexpr, part: tl.constexpr):
    """Returns keys or values of slots [n, head_dim] in the dtype of `query`, 0 where not `mask`."""
    dim = tl.arange(0, static.padded_dim)
    mask = mask[:, None]
    if static.head_dim != static.padded_dim:
        mask = mask & (dim < static.head_dim)[None, :]
    found = tl.load(
        base + (slot * (part.heads * static.head_dim))[:, None] + dim[None, :], mask=mask, other=0
    )
    if static.quantized:
        found = found.to(tl.float32).to(query.dtype)
    return found


@triton.jit
def bias_at(table, slope, end, distance, static: tl.constexpr):
    """Returns b(x) in units of log2, anything where x is negative.

    `table` is where b(0) stands, `end` is b(width - 1).
    """
    bias = gather(table + tl.minimum(tl.maximum(distance, 0), static.width - 1))
    past = distance - (static.width - 1)
    if static.has_slope:
        bias = tl.where(past <= 0, bias, end - slope * past.to(tl.float32))
    else:
        bias = tl.where(past <= 0, bias, 0.0)
    return bias * LOG2_E


@triton.jit
def slots_back(slot, length, part: tl.constexpr):
    """Returns how far before the newest position the key of a slot lies."""
    back = (length - 1) % part.slots - slot
    return tl.where(back < 0, back + part.slots, back)


@triton.jit
def visible_slots(slot, turn, length, static: tl.constexpr, part: tl.constexpr):
    """Returns the distance of each row's query from each slot's key, and whether it sees it."""
    back = slots_back(slot, length, part)
    distance = back[:, None] - (static.new - 1 - turn)[None, :]
    visible = (distance >= 0) & (back < length)[:, None]
    if part.padded_slots != part.slots:
        visible = visible & (slot < part.slots)[:, None]
    if part.window > 0:
        visible = visible & (distance < part.window)
    return distance, visible


@triton.jit
def highest_bias(
    table_ptr, slope_ptr, head, start, nearest, length, static: tl.constexpr, part: tl.constexpr
):
    """Returns a bound on the bias of each page's keys, for queries of one head."""
    table = table_ptr + head * static.width
    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    end = tl.load(table + static.width - 1)
    slot = start[:, None] + tl.arange(0, PAGE)[None, :]
    bias = bias_at(table, slope, end, slots_back(slot, length, part), static)
    highest = tl.max(tl.where(slot < part.slots, bias, MASKED), 1)
    if static.new > 1:
        # Queries before the newest are nearer to the keys.
        nearer = 1 + tl.arange(0, 8)[None, :]
        distance = nearest[:, None] - nearer
        bias = bias_at(table, slope, end, distance, static)
        bias = tl.where((distance >= 0) & (nearer < static.new), bias, MASKED)
        highest = tl.maximum(highest, tl.max(bias, 1))
    return highest


@triton.jit
def to_read(query, place, arrays, length, at_pages, static: tl.constexpr, part: tl.constexpr):
    """Returns the range of turns that holds all pages a program must read; see `pages.py`.

    Page `turn * splits + split` is the program's at each turn.
    """
    split, turn, head, real = place
    key, table_ptr, slope_ptr, offset_ptr, norms_ptr, scales_ptr = arrays
    turns = tl.arange(0, part.turns)
    page = turns * part.splits + split
    start = page * PAGE
    last_slot = (length - 1) % part.slots
    end = tl.minimum(start + PAGE, part.slots) - 1
    nearest = tl.where(start <= last_slot, 0, last_slot - end + part.slots)
    nearest = tl.where(end <= last_slot, last_slot - end, nearest)
    read = (page < part.pages) & (nearest < length)
    if part.window > 0:
        read = read & (nearest - (static.new - 1) < part.window)
    if part.most > 0:
        position = length - static.new + turn
        exists = real & (position >= 0)
        slot = tl.where(exists, position % part.slots, 0)
        wide = query.to(tl.float32)
        own = load_slots(key, slot, exists, query, static, part).to(tl.float32)
        own_score = tl.sum(wide * own, 1) * static.score_scale
        if static.quantized:
            own_score *= tl.load(scales_ptr + at_pages + slot // PAGE)
        own_score += tl.load(table_ptr + head * static.width) * LOG2_E
        if static.has_offset:
            # Where tau > 0 nothing is negligible.
            own_score = tl.where(tl.load(offset_ptr + head) > 0, MASKED, own_score)
        bound = tl.sqrt(tl.sum(wide * wide, 1)) * static.bound_scale
        norm = tl.load(norms_ptr + at_pages + page, mask=page < part.pages, other=0.0)
        bound = bound[None, :] * norm[:, None] + (static.slack - own_score)[None, :]
        needed = tl.full((part.turns,), 0, tl.int32)
        first_head = tl.max(tl.where(real, head, 0), 0) // static.group * static.group
        for member in tl.range(0, static.group):
            mine = first_head + member
            highest = highest_bias(table_ptr, slope_ptr, mine, start, nearest, length, static, part)
            small = tl.exp2(bound + highest[:, None]) <= part.most
            small = small | ~(exists & (head == mine))[None, :]
            needed = tl.maximum(needed, tl.max(tl.where(small, 0, 1), 1))
        read = read & (needed > 0)
    first = tl.min(tl.where(read, turns, part.turns), 0)
    stop = tl.max(tl.where(read, turns + 1, 0), 0)
    return first, tl.maximum(stop, first)


@triton.jit
def row_bias(table_ptr, slope_ptr, head, static: tl.constexpr):
    """Returns where each row's bias stands, its slope and its table's end; each [1, rows]."""
    table = table_ptr + (head * static.width)[None, :]
    slope = tl.full((1, static.tile_rows), 0, tl.float32)
    end = slope
    if static.has_slope:
        slope = tl.load(slope_ptr + head)[None, :]
        end = tl.load(table + static.width - 1)
    return table, slope, end


@triton.jit
def score_tile(
    keys,
    query,
    slot,
    page,
    rows,
    bias,
    scales,
    static: tl.constexpr,
    part: tl.constexpr,
):
    """Returns a tile of scores [keys, rows], -inf where a query does not see a key."""
    turn, length = rows
    table, slope, end = bias
    factor = static.score_scale
    if static.quantized:
        factor *= tl.load(scales + page)
    distance, visible = visible_slots(slot, turn, length, static, part)
    scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION) * factor
    if static.width > 0:
        scores += bias_at(table, slope, end, distance, static)
    return tl.where(visible, scores, MASKED)


@triton.jit
def row_thresholds(offset_ptr, head, turn, real, length, static: tl.constexpr, part: tl.constexpr):
    """Returns what a weight must exceed, of each row."""
    scale = static.offset_scale
    if static.offset_scale == 0:
        seen = tl.maximum(length - static.new + turn + 1, 1)
        if part.window > 0:
            seen = tl.minimum(seen, part.window)
        scale = 1.0 / seen.to(tl.float32)
    return thresholds(tl.load(offset_ptr + head, mask=real, other=0.0), scale)


@triton.jit
def row_at(layer_ptr, row, static: tl.constexpr):
    """Returns the number of a row among those of all layers."""
    return tl.load(layer_ptr).to(tl.int64) * static.batch + row


@triton.jit
def head_of(base, at_row, own, static: tl.constexpr, part: tl.constexpr):
    """Returns where the keys or values of a row's head begin."""
    stride: tl.constexpr = part.heads * static.head_dim
    return base + at_row * (part.slots * stride) + own * static.head_dim


@triton.jit
def begin(key_ptr, norms_ptr, scales_ptr, shared, static: tl.constexpr, part: tl.constexpr):
    """Returns what a program that reads keys begins with.

    Its place; the row's length and number; where the head's keys and its numbers by page begin;
    the queries; the turns that it must read; and each row's bias.
    """
    query_ptr, length_ptr, layer_ptr, table_ptr, slope_ptr, offset_ptr, heads_ptr = shared
    place = place_of(tl.program_id(0), heads_ptr, static, part)
    row, own, split, _, _, turn, query_head, real = place
    length = tl.load(length_ptr + row)
    at_row = row_at(layer_ptr, row, static)
    key = head_of(key_ptr, at_row, own, static, part)
    at_pages = (at_row * part.heads + own) * part.pages
    query = load_queries(query_ptr, row, turn, query_head, real, static)
    rows = (split, turn, query_head, real)
    arrays = (key, table_ptr, slope_ptr, offset_ptr, norms_ptr, scales_ptr)
    turns = to_read(query, rows, arrays, length, at_pages, static, part)
    bias = row_bias(table_ptr, slope_ptr, query_head, static)
    return place, (length, at_row, key, at_pages), query, turns, bias


@triton.jit
def tile_at(turn, step, split, static: tl.constexpr, part: tl.constexpr):
    """Returns the page and the slots of a step of a program that reads keys."""
    page = turn * part.splits + split
    slot = page * PAGE + step % static.tiles_a_page * static.keys + tl.arange(0, static.keys)
    return page, slot


@triton.jit
def place_found(pair, split, number, static: tl.constexpr):
    """Returns where lies what a split has found for each row of queries."""
    return (pair * static.splits + split) * static.rows + number


@triton.jit
def store_part(out_ptr, out, pair, split, number, real, static: tl.constexpr):
    """Stores what a split adds to the output."""
    dim = tl.arange(0, static.padded_dim)
    at_found = place_found(pair, split, number, static)
    inside = real[:, None] & (dim < static.head_dim)[None, :]
    at_out = (at_found * static.head_dim)[:, None] + dim[None, :]
    tl.store(out_ptr + at_out, out, mask=inside)
