"""The Triton decode kernels; `triton.py` launches them and says what they do.

A launch serves several caches, each program one of them (`owns`).
"""

import triton
import triton.language as tl

from pallas_kernels.decode.triton_tile import (
    PAGE,
    begin,
    head_of,
    load_slots,
    owns,
    place_found,
    place_of,
    row_at,
    row_thresholds,
    score_tile,
    slots_back,
    store_part,
    tile_at,
    visible_slots,
)
from pallas_kernels.triton.tile import LOWEST, MASKED, PRECISION

# Splits that `decode_combine` reads at a time.
COMBINED_SPLITS = tl.constexpr(32)


@triton.jit
def _keep_scores(
    key_ptr, norms_ptr, scales_ptr, shared, found, static: tl.constexpr, part: tl.constexpr
):
    """Does a program of `decode_scores`."""
    scores_ptr, page_ptr, maximum_ptr, total_ptr = found
    place, at, query, to_read, bias = begin(key_ptr, norms_ptr, scales_ptr, shared, static, part)
    row, own, split, pair, number, turn, _, real = place
    length, _, key, at_pages = at
    first, stop = to_read

    turns = tl.arange(0, part.turns)
    at_score = (row * part.heads + own).to(tl.int64) * static.rows + number
    at_score = part.first_score + at_score * part.padded_slots
    highest = tl.full((part.turns, static.tile_rows), MASKED, tl.float32)
    maximum = tl.full((static.tile_rows,), LOWEST, tl.float32)
    total = tl.full((static.tile_rows,), 0, tl.float32)
    for step in tl.range(0, (stop - first) * static.tiles_a_page):
        mine = first + step // static.tiles_a_page
        page, slot = tile_at(mine, step, split, static, part)
        keys = load_slots(key, slot, slot < part.slots, query, static, part)
        rows = (turn, length)
        scales = scales_ptr + at_pages
        scores = score_tile(keys, query, slot, page, rows, bias, scales, static, part)
        tl.store(scores_ptr + at_score[None, :] + slot[:, None], scores, mask=real[None, :])
        # A page that was read has a highest score, be it that none is seen there.
        page_maximum = tl.maximum(tl.max(scores, 0), LOWEST)
        new_maximum = tl.maximum(maximum, page_maximum)
        exponentials = tl.exp2(scores - new_maximum[None, :])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(exponentials, 0)
        maximum = new_maximum
        page_maximum = tl.where((turns == mine)[:, None], page_maximum[None, :], MASKED)
        highest = tl.maximum(highest, page_maximum)

    at_found = place_found(pair, split, number, static)
    tl.store(maximum_ptr + at_found, maximum, mask=real)
    tl.store(total_ptr + at_found, total, mask=real)
    at_split = (row * part.heads + own) * part.splits + split
    at_page = part.first_page + (at_split * part.turns + turns) * static.rows
    tl.store(page_ptr + at_page[:, None] + number[None, :], highest, mask=real[None, :])


@triton.jit
def decode_scores(
    query_ptr,
    length_ptr,
    layer_ptr,
    table_ptr,
    slope_ptr,
    offset_ptr,
    heads_ptr,
    key0_ptr,
    norms0_ptr,
    scales0_ptr,
    key1_ptr,
    norms1_ptr,
    scales1_ptr,
    key2_ptr,
    norms2_ptr,
    scales2_ptr,
    key3_ptr,
    norms3_ptr,
    scales3_ptr,
    key4_ptr,
    norms4_ptr,
    scales4_ptr,
    scores_ptr,
    page_ptr,
    maximum_ptr,
    total_ptr,
    static: tl.constexpr,
):
    """Scores of a program's pages; a program for each row, head, tile of rows and split."""
    shared = (query_ptr, length_ptr, layer_ptr, table_ptr, slope_ptr, offset_ptr, heads_ptr)
    found = (scores_ptr, page_ptr, maximum_ptr, total_ptr)
    keys = (key0_ptr, key1_ptr, key2_ptr, key3_ptr, key4_ptr)
    norms = (norms0_ptr, norms1_ptr, norms2_ptr, norms3_ptr, norms4_ptr)
    scales = (scales0_ptr, scales1_ptr, scales2_ptr, scales3_ptr, scales4_ptr)
    number: tl.constexpr = static.number
    for n in tl.static_range(number):
        if owns(tl.program_id(0), static.each[n]):
            _keep_scores(keys[n], norms[n], scales[n], shared, found, static, static.each[n])


@triton.jit
def _add_values(value_ptr, scales_ptr, shared, found, static: tl.constexpr, part: tl.constexpr):
    """Does a program of `decode_values`."""
    tiles: tl.constexpr = static.tiles_a_page
    query_ptr, length_ptr, layer_ptr, offset_ptr, heads_ptr = shared
    scores_ptr, page_ptr, maximum_ptr, total_ptr, part_ptr, weight_ptr = found
    place = place_of(tl.program_id(0), heads_ptr, static, part)
    row, own, split, pair, number, turn, query_head, real = place
    length = tl.load(length_ptr + row)
    turns = tl.arange(0, part.turns)
    at_split = (row * part.heads + own) * part.splits + split
    at_page = part.first_page + (at_split * part.turns + turns) * static.rows
    highest = tl.load(
        page_ptr + at_page[:, None] + number[None, :], mask=real[None, :], other=MASKED
    )
    splits = tl.arange(0, part.padded_splits)
    at_found = (pair * static.splits + splits)[:, None] * static.rows + number[None, :]
    mask = (splits < part.splits)[:, None] & real[None, :]
    maxima = tl.load(maximum_ptr + at_found, mask=mask, other=LOWEST)
    totals = tl.load(total_ptr + at_found, mask=mask, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(totals * tl.exp2(maxima - maximum[None, :]), 0)
    log_total = maximum + tl.log2(total)
    threshold = row_thresholds(offset_ptr, query_head, turn, real, length, static, part)

    # What is no number is not below anything; a page that was not read has no weights.
    dead = tl.exp2(highest - log_total[None, :]) <= threshold[None, :]
    dead = dead | (highest < LOWEST) | ~real[None, :]
    live = tl.max(tl.where(dead, 0, 1), 1)
    first = tl.min(tl.where(live > 0, turns, part.turns), 0)
    stop = tl.max(tl.where(live > 0, turns + 1, 0), 0)

    at_row = row_at(layer_ptr, row, static)
    value = head_of(value_ptr, at_row, own, static, part)
    at_pages = (at_row * part.heads + own) * part.pages
    at_score = (row * part.heads + own).to(tl.int64) * static.rows + number
    at_score = part.first_score + at_score * part.padded_slots
    out = tl.full((static.tile_rows, static.padded_dim), 0, tl.float32)
    weight = tl.full((static.tile_rows,), 0, tl.float32)
    like = tl.full((1,), 0, query_ptr.dtype.element_ty)
    for mine in tl.range(first, tl.maximum(stop, first)):
        if tl.max(tl.where(turns == mine, live, 0), 0) > 0:
            page = mine * part.splits + split
            for tile in tl.static_range(0, tiles):
                slot = page * PAGE + tile * static.keys + tl.arange(0, static.keys)
                _, visible = visible_slots(slot, turn, length, static, part)
                visible = visible & real[None, :]
                scores = tl.load(
                    scores_ptr + at_score[None, :] + slot[:, None], mask=visible, other=MASKED
                )
                # What no query sees may be no number.
                seen = tl.max(tl.where(visible, 1, 0), 1) > 0
                values = load_slots(value, slot, seen, like, static, part)
                weights = tl.exp2(scores - log_total[None, :]) - threshold[None, :]
                weights = tl.where((weights <= 0) | ~visible, 0.0, weights)
                weight += tl.sum(weights, 0)
                if static.quantized:
                    weights *= tl.load(scales_ptr + at_pages + page)
                weights = tl.trans(weights.to(values.dtype))
                out = tl.dot(weights, values, out, input_precision=PRECISION)

    store_part(part_ptr, out, pair, split, number, real, static)
    tl.store(weight_ptr + place_found(pair, split, number, static), weight, mask=real)


@triton.jit
def decode_values(
    query_ptr,
    length_ptr,
    layer_ptr,
    offset_ptr,
    heads_ptr,
    value0_ptr,
    scales0_ptr,
    value1_ptr,
    scales1_ptr,
    value2_ptr,
    scales2_ptr,
    value3_ptr,
    scales3_ptr,
    value4_ptr,
    scales4_ptr,
    scores_ptr,
    page_ptr,
    maximum_ptr,
    total_ptr,
    part_ptr,
    weight_ptr,
    static: tl.constexpr,
):
    """Weighted values of a program's pages that have a weight; programs as `decode_scores`."""
    shared = (query_ptr, length_ptr, layer_ptr, offset_ptr, heads_ptr)
    found = (scores_ptr, page_ptr, maximum_ptr, total_ptr, part_ptr, weight_ptr)
    values = (value0_ptr, value1_ptr, value2_ptr, value3_ptr, value4_ptr)
    scales = (scales0_ptr, scales1_ptr, scales2_ptr, scales3_ptr, scales4_ptr)
    number: tl.constexpr = static.number
    for n in tl.static_range(number):
        if owns(tl.program_id(0), static.each[n]):
            _add_values(values[n], scales[n], shared, found, static, static.each[n])


@triton.jit
def _add_softmax(arrays, shared, found, static: tl.constexpr, part: tl.constexpr):
    """Does a program of `decode_softmax`."""
    key_ptr, value_ptr, norms_ptr, key_scales_ptr, value_scales_ptr = arrays
    out_ptr, maximum_ptr, total_ptr = found
    place, at, query, to_read, bias = begin(
        key_ptr, norms_ptr, key_scales_ptr, shared, static, part
    )
    _, own, split, pair, number, turn, _, real = place
    length, at_row, key, at_pages = at
    value = head_of(value_ptr, at_row, own, static, part)
    first, stop = to_read

    maximum = tl.full((static.tile_rows,), LOWEST, tl.float32)
    total = tl.full((static.tile_rows,), 0, tl.float32)
    out = tl.full((static.tile_rows, static.padded_dim), 0, tl.float32)
    for step in tl.range(0, (stop - first) * static.tiles_a_page):
        mine = first + step // static.tiles_a_page
        page, slot = tile_at(mine, step, split, static, part)
        # What is not held may be no number.
        held = (slot < part.slots) & (slots_back(slot, length, part) < length)
        keys = load_slots(key, slot, held, query, static, part)
        values = load_slots(value, slot, held, query, static, part)
        rows = (turn, length)
        scales = key_scales_ptr + at_pages
        scores = score_tile(keys, query, slot, page, rows, bias, scales, static, part)
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        weights = tl.exp2(scores - new_maximum[None, :])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 0)
        maximum = new_maximum
        if static.quantized:
            weights *= tl.load(value_scales_ptr + at_pages + page)
        weights = tl.trans(weights.to(values.dtype))
        out = tl.dot(weights, values, out * shrink[:, None], input_precision=PRECISION)

    at_found = place_found(pair, split, number, static)
    tl.store(maximum_ptr + at_found, maximum, mask=real)
    tl.store(total_ptr + at_found, total, mask=real)
    store_part(out_ptr, out, pair, split, number, real, static)


@triton.jit
def decode_softmax(
    query_ptr,
    length_ptr,
    layer_ptr,
    table_ptr,
    slope_ptr,
    heads_ptr,
    key0_ptr,
    value0_ptr,
    norms0_ptr,
    key_scales0_ptr,
    value_scales0_ptr,
    key1_ptr,
    value1_ptr,
    norms1_ptr,
    key_scales1_ptr,
    value_scales1_ptr,
    key2_ptr,
    value2_ptr,
    norms2_ptr,
    key_scales2_ptr,
    value_scales2_ptr,
    key3_ptr,
    value3_ptr,
    norms3_ptr,
    key_scales3_ptr,
    value_scales3_ptr,
    key4_ptr,
    value4_ptr,
    norms4_ptr,
    key_scales4_ptr,
    value_scales4_ptr,
    out_ptr,
    maximum_ptr,
    total_ptr,
    static: tl.constexpr,
):
    """Softmax attention to a program's pages, up to a factor; programs as `decode_scores`."""
    # There is no offset, which is not read.
    shared = (query_ptr, length_ptr, layer_ptr, table_ptr, slope_ptr, table_ptr, heads_ptr)
    found = (out_ptr, maximum_ptr, total_ptr)
    keys = (key0_ptr, key1_ptr, key2_ptr, key3_ptr, key4_ptr)
    values = (value0_ptr, value1_ptr, value2_ptr, value3_ptr, value4_ptr)
    norms = (norms0_ptr, norms1_ptr, norms2_ptr, norms3_ptr, norms4_ptr)
    key_scales = (
        key_scales0_ptr,
        key_scales1_ptr,
        key_scales2_ptr,
        key_scales3_ptr,
        key_scales4_ptr,
    )
    value_scales = (
        value_scales0_ptr,
        value_scales1_ptr,
        value_scales2_ptr,
        value_scales3_ptr,
        value_scales4_ptr,
    )
    number: tl.constexpr = static.number
    for n in tl.static_range(number):
        if owns(tl.program_id(0), static.each[n]):
            arrays = (keys[n], values[n], norms[n], key_scales[n], value_scales[n])
            _add_softmax(arrays, shared, found, static, static.each[n])


@triton.jit
def decode_combine(
    length_ptr,
    sizes_ptr,
    part_ptr,
    maximum_ptr,
    total_ptr,
    weight_ptr,
    out_ptr,
    static: tl.constexpr,
):
    """One query of one head, from what the splits found; grid (batch * kv_heads * rows,)."""
    at = tl.program_id(0)
    pair = at // static.rows
    number = at % static.rows
    row = pair // static.kv_heads
    head = pair % static.kv_heads * static.group + number % static.group
    turn = number // static.group
    length = tl.load(length_ptr + row)
    # Splits and slots of the head.
    used = static.first_splits
    slots = static.first_slots
    if static.number > 1:
        used = tl.load(sizes_ptr + pair % static.kv_heads * 2)
        slots = tl.load(sizes_ptr + pair % static.kv_heads * 2 + 1)
    splits = tl.arange(0, static.padded_splits)
    inside = splits < used
    at_found = (pair * static.splits + splits) * static.rows + number
    maxima = tl.load(maximum_ptr + at_found, mask=inside, other=LOWEST)
    totals = tl.load(total_ptr + at_found, mask=inside, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(totals * tl.exp2(maxima - maximum), 0)
    dim = tl.arange(0, static.padded_dim)
    out = tl.full((static.padded_dim,), 0, tl.float32)
    for turn_start in tl.range(0, tl.cdiv(used, COMBINED_SPLITS)):
        split = turn_start * COMBINED_SPLITS + tl.arange(0, COMBINED_SPLITS)
        at_split = (pair * static.splits + split) * static.rows + number
        mask = (split < used)[:, None] & (dim < static.head_dim)[None, :]
        at_part = part_ptr + at_split[:, None] * static.head_dim + dim[None, :]
        part = tl.load(at_part, mask=mask, other=0.0)
        if not static.has_offset:
            own = tl.load(maximum_ptr + at_split, mask=split < used, other=LOWEST)
            part *= tl.exp2(own - maximum)[:, None]
        out += tl.sum(part, 0)
    if static.renormalize:
        weight = tl.sum(tl.load(weight_ptr + at_found, mask=inside, other=0.0), 0)
        out = out / tl.where(weight == 0, 1.0, weight)
    if not static.has_offset:
        out = out / total
    # No mass at all, or what is no number.
    none = ~(total > 0)
    if not static.ring:
        none = none | (length > slots)
    out = tl.where(none, float("nan"), out)
    out = tl.where(length - static.new + turn >= 0, out, 0.0)
    at_out = ((row * static.new + turn) * static.heads + head) * static.head_dim
    tl.store(out_ptr + at_out + dim, out.to(out_ptr.dtype.element_ty), mask=dim < static.head_dim)
