"""Decoding on NVIDIA GPUs: two sweeps over the cache where weights may be 0, one where not.

The pages of a row are dealt out to `splits` programs in turn, so that a page that matters has
neighbours in other programs, and a batch of one fills the chip. All query heads of a group, and
all new queries, share what is loaded.

With Elastic-Softmax, `decode_scores` reads the keys of the pages that are not negligible, keeps
the scores, and notes each page's highest; `decode_values` then knows the log-sum-exp and reads
the values of pages with a weight above 0. Softmax has no zeros: `decode_softmax` reads keys and
values at once. `decode_combine` adds up what the splits found.

Scores are in units of log2. Tiles of scores are [keys, rows]: products of tensor cores want
64 rows or more of the first factor, and 8 columns of the second are enough.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from pallas_kernels.decode import pages as rule
from pallas_kernels.decode import types
from pallas_kernels.decode.types import Inputs, Settings
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block, padded_head_dim, power_of_two
from pallas_kernels.triton.tile import LOWEST, MASKED, PRECISION, gather, thresholds

PAGE = tl.constexpr(types.PAGE)
LOG2_E = tl.constexpr(math.log2(math.e))

# Programs that a launch has at least, where there are pages for them: some for each
# multiprocessor of a large GPU.
PROGRAMS = 1024
# Of splits of a row, since each reads what all have found; of pages that a program looks
# after, since it takes notes of each; of rows of queries in a program.
MAX_SPLITS = 256
MAX_TURNS = 64
MAX_ROWS = 32
# Bytes of a tile of keys.
TILE_BYTES = 16384
WARPS = 4
STAGES = 3
# Splits that `decode_combine` reads at a time.
COMBINED = 32


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernels are compiled for; they take it as one constant.

    Attributes:
      batch, new, heads, kv_heads, head_dim, slots: sizes, see `types.Inputs`.
      splits: programs that share a row.
      turns: pages a program looks after, a power of two.
      tile_rows: rows of queries of a program, a power of two; a row is one query of one head.
      keys: of a tile, a divisor of the page.
      width: of the bias table; 0: no bias.
      has_slope, has_offset: whether there are such arrays.
      window: keys a query sees; 0: all.
      offset_scale: what tau is multiplied by; 0: 1 / n.
      scale: factor of the scores.
      skip_mass: what pages may be left out for; 0: none is.
      quantized: the cache is of int8 numbers.
      renormalize, ring: see `types.Settings`.
    """

    batch: int
    new: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    splits: int
    turns: int
    tile_rows: int
    keys: int
    width: int
    has_slope: bool
    has_offset: bool
    window: int
    offset_scale: float
    scale: float
    skip_mass: float
    quantized: bool
    renormalize: bool
    ring: bool

    @property
    def group(self) -> int:
        """Returns how many query heads read one head of the cache."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Returns how many rows of queries read one head of the cache."""
        return self.new * self.group

    @property
    def row_tiles(self) -> int:
        """Returns how many programs share these."""
        return -(-self.rows // self.tile_rows)

    @property
    def pages(self) -> int:
        """Returns how many pages a row of the cache has."""
        return -(-self.slots // types.PAGE)

    @property
    def tiles_a_page(self) -> int:
        """Returns how many tiles of keys a page has."""
        return types.PAGE // self.keys

    @property
    def padded_slots(self) -> int:
        """Returns the slots of whole pages."""
        return self.pages * types.PAGE

    @property
    def padded_splits(self) -> int:
        """Returns the splits, rounded up to a power of two."""
        return power_of_two(self.splits)

    @property
    def padded_dim(self) -> int:
        """Returns the head size of a tile."""
        return padded_head_dim(self.head_dim)

    @property
    def key_stride(self) -> int:
        """Returns the numbers from one slot to the next."""
        return self.kv_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """Returns the factor of scores in units of log2."""
        return self.scale * math.log2(math.e)

    @property
    def bound_scale(self) -> float:
        """Returns the same without its sign."""
        return abs(self.score_scale)

    @property
    def slack(self) -> float:
        """Returns what is added to bounds of scores, in units of log2."""
        return rule.SLACK * math.log2(math.e)

    @property
    def most(self) -> float:
        """Returns the softmax mass that no key of a negligible page exceeds."""
        return self.skip_mass / (self.pages * types.PAGE)


@triton.jit
def _rows_of(pair, row_tile, static: tl.constexpr):
    """Returns each row's number, query, head, and whether there is such a row."""
    number = row_tile * static.tile_rows + tl.arange(0, static.tile_rows)
    real = number < static.rows
    head = pair % static.kv_heads * static.group + number % static.group
    return number, number // static.group, tl.where(real, head, 0), real


@triton.jit
def _load_queries(query_ptr, row, place, static: tl.constexpr):
    """Returns the queries of a program's rows, [rows, head_dim]."""
    _, turn, head, real = place
    dim = tl.arange(0, static.padded_dim)
    at = ((row * static.new + turn) * static.heads + head) * static.head_dim
    mask = real[:, None] & (dim < static.head_dim)[None, :]
    return tl.load(query_ptr + at[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _load_slots(base, slot, mask, query, static: tl.constexpr):
    """Returns keys or values of slots [n, head_dim] in the dtype of `query`, 0 where not `mask`."""
    dim = tl.arange(0, static.padded_dim)
    mask = mask[:, None]
    if static.head_dim != static.padded_dim:
        mask = mask & (dim < static.head_dim)[None, :]
    found = tl.load(base + (slot * static.key_stride)[:, None] + dim[None, :], mask=mask, other=0)
    if static.quantized:
        found = found.to(tl.float32).to(query.dtype)
    return found


@triton.jit
def _bias(table, slope, end, distance, static: tl.constexpr):
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
def _back(slot, length, static: tl.constexpr):
    """Returns how far before the newest position the key of a slot lies."""
    back = (length - 1) % static.slots - slot
    return tl.where(back < 0, back + static.slots, back)


@triton.jit
def _visible(slot, turn, length, static: tl.constexpr):
    """Returns the distance of each row's query from each slot's key, and whether it sees it."""
    back = _back(slot, length, static)
    distance = back[:, None] - (static.new - 1 - turn)[None, :]
    visible = (distance >= 0) & (back < length)[:, None]
    if static.padded_slots != static.slots:
        visible = visible & (slot < static.slots)[:, None]
    if static.window > 0:
        visible = visible & (distance < static.window)
    return distance, visible


@triton.jit
def _highest_bias(table_ptr, slope_ptr, head, start, nearest, length, static: tl.constexpr):
    """Returns a bound on the bias of each page's keys, for queries of one head."""
    table = table_ptr + head * static.width
    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    end = tl.load(table + static.width - 1)
    slot = start[:, None] + tl.arange(0, PAGE)[None, :]
    bias = _bias(table, slope, end, _back(slot, length, static), static)
    highest = tl.max(tl.where(slot < static.slots, bias, MASKED), 1)
    if static.new > 1:
        # Queries before the newest are nearer to the keys.
        nearer = 1 + tl.arange(0, 8)[None, :]
        distance = nearest[:, None] - nearer
        bias = _bias(table, slope, end, distance, static)
        bias = tl.where((distance >= 0) & (nearer < static.new), bias, MASKED)
        highest = tl.maximum(highest, tl.max(bias, 1))
    return highest


@triton.jit
def _to_read(query, arrays, row, split, length, at_pages, place, static: tl.constexpr):
    """Returns the range of turns that holds all pages a program must read; see `pages.py`.

    Page `turn * splits + split` is the program's at each turn.
    """
    key, table_ptr, slope_ptr, offset_ptr, norms_ptr, scales_ptr = arrays
    turns = tl.arange(0, static.turns)
    page = turns * static.splits + split
    start = page * PAGE
    last_slot = (length - 1) % static.slots
    end = tl.minimum(start + PAGE, static.slots) - 1
    nearest = tl.where(start <= last_slot, 0, last_slot - end + static.slots)
    nearest = tl.where(end <= last_slot, last_slot - end, nearest)
    read = (page < static.pages) & (nearest < length)
    if static.window > 0:
        read = read & (nearest - (static.new - 1) < static.window)
    if static.skip_mass > 0:
        _, turn, head, real = place
        position = length - static.new + turn
        exists = real & (position >= 0)
        slot = tl.where(exists, position % static.slots, 0)
        wide = query.to(tl.float32)
        own = _load_slots(key, slot, exists, query, static).to(tl.float32)
        own_score = tl.sum(wide * own, 1) * static.score_scale
        if static.quantized:
            own_score *= tl.load(scales_ptr + at_pages + slot // PAGE)
        if static.width > 0:
            own_score += tl.load(table_ptr + head * static.width) * LOG2_E
        if static.has_offset:
            # Where tau > 0 nothing is negligible.
            own_score = tl.where(tl.load(offset_ptr + head) > 0, MASKED, own_score)
        bound = tl.sqrt(tl.sum(wide * wide, 1)) * static.bound_scale
        norm = tl.load(norms_ptr + at_pages + page, mask=page < static.pages, other=0.0)
        bound = bound[None, :] * norm[:, None] + (static.slack - own_score)[None, :]
        needed = tl.full((static.turns,), 0, tl.int32)
        if static.width > 0:
            for member in tl.range(0, static.group):
                mine = tl.max(tl.where(real, head, 0), 0) // static.group * static.group + member
                highest = _highest_bias(table_ptr, slope_ptr, mine, start, nearest, length, static)
                small = tl.exp2(bound + highest[:, None]) <= static.most
                small = small | ~(exists & (head == mine))[None, :]
                needed = tl.maximum(needed, tl.max(tl.where(small, 0, 1), 1))
        else:
            small = (tl.exp2(bound) <= static.most) | ~exists[None, :]
            needed = tl.max(tl.where(small, 0, 1), 1)
        read = read & (needed > 0)
    first = tl.min(tl.where(read, turns, static.turns), 0)
    stop = tl.max(tl.where(read, turns + 1, 0), 0)
    return first, tl.maximum(stop, first)


@triton.jit
def _scores(keys, query, distance, visible, bias, static: tl.constexpr):
    """Returns a tile of scores [keys, rows], -inf where a query does not see a key."""
    factor, table, slope, end = bias
    scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION) * factor
    if static.width > 0:
        scores += _bias(table, slope, end, distance, static)
    return tl.where(visible, scores, MASKED)


@triton.jit
def _row_bias(table_ptr, slope_ptr, head, static: tl.constexpr):
    """Returns where each row's bias stands, its slope and its table's end; each [1, rows]."""
    table = table_ptr + (head * static.width)[None, :]
    slope = tl.full((1, static.tile_rows), 0, tl.float32)
    end = slope
    if static.has_slope:
        slope = tl.load(slope_ptr + head)[None, :]
        end = tl.load(table + static.width - 1)
    return table, slope, end


@triton.jit
def decode_scores(
    query_ptr,
    key_ptr,
    length_ptr,
    layer_ptr,
    table_ptr,
    slope_ptr,
    offset_ptr,
    norms_ptr,
    scales_ptr,
    scores_ptr,
    page_ptr,
    maximum_ptr,
    total_ptr,
    static: tl.constexpr,
):
    """Scores of a program's pages; grid (batch * kv_heads * row tiles, splits)."""
    at = tl.program_id(0)
    split = tl.program_id(1)
    pair = at // static.row_tiles
    row = pair // static.kv_heads
    head = pair % static.kv_heads
    place = _rows_of(pair, at % static.row_tiles, static)
    number, turn, query_head, real = place
    length = tl.load(length_ptr + row)
    at_row = tl.load(layer_ptr).to(tl.int64) * static.batch + row
    key = key_ptr + at_row * (static.slots * static.key_stride) + head * static.head_dim
    at_pages = (at_row * static.kv_heads + head) * static.pages
    query = _load_queries(query_ptr, row, place, static)
    arrays = (key, table_ptr, slope_ptr, offset_ptr, norms_ptr, scales_ptr)
    first, stop = _to_read(query, arrays, row, split, length, at_pages, place, static)
    table, slope, end = _row_bias(table_ptr, slope_ptr, query_head, static)

    turns = tl.arange(0, static.turns)
    at_score = (pair.to(tl.int64) * static.rows + number) * static.padded_slots
    highest = tl.full((static.turns, static.tile_rows), MASKED, tl.float32)
    maximum = tl.full((static.tile_rows,), LOWEST, tl.float32)
    total = tl.full((static.tile_rows,), 0, tl.float32)
    for step in tl.range(0, (stop - first) * static.tiles_a_page):
        mine = first + step // static.tiles_a_page
        page = mine * static.splits + split
        slot = page * PAGE + step % static.tiles_a_page * static.keys + tl.arange(0, static.keys)
        keys = _load_slots(key, slot, slot < static.slots, query, static)
        factor = static.score_scale
        if static.quantized:
            factor *= tl.load(scales_ptr + at_pages + page)
        distance, visible = _visible(slot, turn, length, static)
        bias = (factor, table, slope, end)
        scores = _scores(keys, query, distance, visible, bias, static)
        tl.store(scores_ptr + at_score[None, :] + slot[:, None], scores, mask=real[None, :])
        # A page that was read has a highest score, be it that none is seen there.
        page_maximum = tl.maximum(tl.max(scores, 0), LOWEST)
        new_maximum = tl.maximum(maximum, page_maximum)
        exponentials = tl.exp2(scores - new_maximum[None, :])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(exponentials, 0)
        maximum = new_maximum
        page_maximum = tl.where((turns == mine)[:, None], page_maximum[None, :], MASKED)
        highest = tl.maximum(highest, page_maximum)

    at_split = pair * static.splits + split
    tl.store(maximum_ptr + at_split * static.rows + number, maximum, mask=real)
    tl.store(total_ptr + at_split * static.rows + number, total, mask=real)
    at_page = (at_split * static.turns + turns)[:, None] * static.rows + number[None, :]
    tl.store(page_ptr + at_page, highest, mask=real[None, :])


@triton.jit
def _thresholds(offset_ptr, head, turn, real, length, static: tl.constexpr):
    """Returns what a weight must exceed, of each row."""
    scale = static.offset_scale
    if static.offset_scale == 0:
        seen = tl.maximum(length - static.new + turn + 1, 1)
        if static.window > 0:
            seen = tl.minimum(seen, static.window)
        scale = 1.0 / seen.to(tl.float32)
    return thresholds(tl.load(offset_ptr + head, mask=real, other=0.0), scale)


@triton.jit
def decode_values(
    query_ptr,
    value_ptr,
    length_ptr,
    layer_ptr,
    offset_ptr,
    scales_ptr,
    scores_ptr,
    page_ptr,
    maximum_ptr,
    total_ptr,
    out_ptr,
    weight_ptr,
    static: tl.constexpr,
):
    """Weighted values of a program's pages that have a weight; grid as `decode_scores`."""
    tiles: tl.constexpr = static.tiles_a_page
    at = tl.program_id(0)
    split = tl.program_id(1)
    pair = at // static.row_tiles
    row = pair // static.kv_heads
    head = pair % static.kv_heads
    number, turn, query_head, real = _rows_of(pair, at % static.row_tiles, static)
    at_split = pair * static.splits + split
    length = tl.load(length_ptr + row)
    turns = tl.arange(0, static.turns)
    at_page = (at_split * static.turns + turns)[:, None] * static.rows + number[None, :]
    highest = tl.load(page_ptr + at_page, mask=real[None, :], other=MASKED)
    splits = tl.arange(0, static.padded_splits)
    at_found = (pair * static.splits + splits)[:, None] * static.rows + number[None, :]
    found = (splits < static.splits)[:, None] & real[None, :]
    maxima = tl.load(maximum_ptr + at_found, mask=found, other=LOWEST)
    totals = tl.load(total_ptr + at_found, mask=found, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(totals * tl.exp2(maxima - maximum[None, :]), 0)
    log_total = maximum + tl.log2(total)
    threshold = _thresholds(offset_ptr, query_head, turn, real, length, static)

    # What is no number is not below anything; a page that was not read has no weights.
    dead = tl.exp2(highest - log_total[None, :]) <= threshold[None, :]
    dead = dead | (highest < LOWEST) | ~real[None, :]
    live = tl.max(tl.where(dead, 0, 1), 1)
    first = tl.min(tl.where(live > 0, turns, static.turns), 0)
    stop = tl.max(tl.where(live > 0, turns + 1, 0), 0)

    at_row = tl.load(layer_ptr).to(tl.int64) * static.batch + row
    value = value_ptr + at_row * (static.slots * static.key_stride) + head * static.head_dim
    at_pages = (at_row * static.kv_heads + head) * static.pages
    at_score = (pair.to(tl.int64) * static.rows + number) * static.padded_slots
    out = tl.full((static.tile_rows, static.padded_dim), 0, tl.float32)
    weight = tl.full((static.tile_rows,), 0, tl.float32)
    like = tl.full((1,), 0, query_ptr.dtype.element_ty)
    for mine in tl.range(first, tl.maximum(stop, first)):
        if tl.max(tl.where(turns == mine, live, 0), 0) > 0:
            page = mine * static.splits + split
            for part in tl.static_range(0, tiles):
                slot = page * PAGE + part * static.keys + tl.arange(0, static.keys)
                _, visible = _visible(slot, turn, length, static)
                visible = visible & real[None, :]
                scores = tl.load(
                    scores_ptr + at_score[None, :] + slot[:, None], mask=visible, other=MASKED
                )
                # What no query sees may be no number.
                seen = tl.max(tl.where(visible, 1, 0), 1) > 0
                values = _load_slots(value, slot, seen, like, static)
                weights = tl.exp2(scores - log_total[None, :]) - threshold[None, :]
                weights = tl.where((weights <= 0) | ~visible, 0.0, weights)
                weight += tl.sum(weights, 0)
                if static.quantized:
                    weights *= tl.load(scales_ptr + at_pages + page)
                weights = tl.trans(weights.to(values.dtype))
                out = tl.dot(weights, values, out, input_precision=PRECISION)

    dim = tl.arange(0, static.padded_dim)
    at_out = (at_split * static.rows + number) * static.head_dim
    inside = real[:, None] & (dim < static.head_dim)[None, :]
    tl.store(out_ptr + at_out[:, None] + dim[None, :], out, mask=inside)
    tl.store(weight_ptr + at_split * static.rows + number, weight, mask=real)


@triton.jit
def decode_softmax(
    query_ptr,
    key_ptr,
    value_ptr,
    length_ptr,
    layer_ptr,
    table_ptr,
    slope_ptr,
    norms_ptr,
    key_scales_ptr,
    value_scales_ptr,
    out_ptr,
    maximum_ptr,
    total_ptr,
    static: tl.constexpr,
):
    """Softmax attention to a program's pages, up to a factor; grid as `decode_scores`."""
    at = tl.program_id(0)
    split = tl.program_id(1)
    pair = at // static.row_tiles
    row = pair // static.kv_heads
    head = pair % static.kv_heads
    place = _rows_of(pair, at % static.row_tiles, static)
    number, turn, query_head, real = place
    length = tl.load(length_ptr + row)
    at_row = tl.load(layer_ptr).to(tl.int64) * static.batch + row
    at_head = at_row * (static.slots * static.key_stride) + head * static.head_dim
    key, value = key_ptr + at_head, value_ptr + at_head
    at_pages = (at_row * static.kv_heads + head) * static.pages
    query = _load_queries(query_ptr, row, place, static)
    arrays = (key, table_ptr, slope_ptr, table_ptr, norms_ptr, key_scales_ptr)
    first, stop = _to_read(query, arrays, row, split, length, at_pages, place, static)
    table, slope, end = _row_bias(table_ptr, slope_ptr, query_head, static)

    maximum = tl.full((static.tile_rows,), LOWEST, tl.float32)
    total = tl.full((static.tile_rows,), 0, tl.float32)
    out = tl.full((static.tile_rows, static.padded_dim), 0, tl.float32)
    for step in tl.range(0, (stop - first) * static.tiles_a_page):
        page = (first + step // static.tiles_a_page) * static.splits + split
        slot = page * PAGE + step % static.tiles_a_page * static.keys + tl.arange(0, static.keys)
        # What is not held may be no number.
        held = (slot < static.slots) & (_back(slot, length, static) < length)
        keys = _load_slots(key, slot, held, query, static)
        values = _load_slots(value, slot, held, query, static)
        factor = static.score_scale
        if static.quantized:
            factor *= tl.load(key_scales_ptr + at_pages + page)
        distance, visible = _visible(slot, turn, length, static)
        bias = (factor, table, slope, end)
        scores = _scores(keys, query, distance, visible, bias, static)
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        weights = tl.exp2(scores - new_maximum[None, :])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 0)
        maximum = new_maximum
        if static.quantized:
            weights *= tl.load(value_scales_ptr + at_pages + page)
        weights = tl.trans(weights.to(values.dtype))
        out = tl.dot(weights, values, out * shrink[:, None], input_precision=PRECISION)

    at_split = pair * static.splits + split
    tl.store(maximum_ptr + at_split * static.rows + number, maximum, mask=real)
    tl.store(total_ptr + at_split * static.rows + number, total, mask=real)
    dim = tl.arange(0, static.padded_dim)
    at_out = (at_split * static.rows + number) * static.head_dim
    inside = real[:, None] & (dim < static.head_dim)[None, :]
    tl.store(out_ptr + at_out[:, None] + dim[None, :], out, mask=inside)


@triton.jit
def decode_combine(
    query_ptr,
    length_ptr,
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
    splits = tl.arange(0, static.padded_splits)
    inside = splits < static.splits
    at_found = (pair * static.splits + splits) * static.rows + number
    maxima = tl.load(maximum_ptr + at_found, mask=inside, other=LOWEST)
    totals = tl.load(total_ptr + at_found, mask=inside, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(totals * tl.exp2(maxima - maximum), 0)
    dim = tl.arange(0, static.padded_dim)
    out = tl.full((static.padded_dim,), 0, tl.float32)
    for start in tl.range(0, static.splits, COMBINED_SPLITS):
        split = start + tl.arange(0, COMBINED_SPLITS)
        at_split = (pair * static.splits + split) * static.rows + number
        mask = (split < static.splits)[:, None] & (dim < static.head_dim)[None, :]
        at_part = part_ptr + at_split[:, None] * static.head_dim + dim[None, :]
        part = tl.load(at_part, mask=mask, other=0.0)
        if not static.has_offset:
            own = tl.load(maximum_ptr + at_split, mask=split < static.splits, other=LOWEST)
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
        none = none | (length > static.slots)
    out = tl.where(none, float("nan"), out)
    out = tl.where(length - static.new + turn >= 0, out, 0.0)
    at_out = ((row * static.new + turn) * static.heads + head) * static.head_dim
    tl.store(out_ptr + at_out + dim, out.to(query_ptr.dtype.element_ty), mask=dim < static.head_dim)


COMBINED_SPLITS = tl.constexpr(COMBINED)


def make_static(inputs: Inputs, settings: Settings) -> Static:
    """Returns what the kernels are compiled for."""
    batch, new, heads, head_dim = inputs.query.shape
    rows = new * inputs.group
    tile_rows = min(MAX_ROWS, max(8, power_of_two(rows)))
    programs = batch * inputs.kv_heads * -(-rows // tile_rows)
    splits = max(1, min(inputs.pages, MAX_SPLITS, -(-PROGRAMS // programs)))
    turns = power_of_two(-(-inputs.pages // splits))
    turns = min(turns, MAX_TURNS)
    splits = -(-inputs.pages // turns)
    keys = TILE_BYTES // (padded_head_dim(head_dim) * inputs.query.dtype.itemsize)
    return Static(
        batch=batch,
        new=new,
        heads=heads,
        kv_heads=inputs.kv_heads,
        head_dim=head_dim,
        slots=inputs.slots,
        splits=splits,
        turns=turns,
        tile_rows=tile_rows,
        keys=max(16, min(types.PAGE, keys)),
        width=0 if inputs.distance_bias is None else inputs.distance_bias.shape[1],
        has_slope=inputs.distance_slope is not None,
        has_offset=inputs.offset is not None,
        window=settings.window or 0,
        offset_scale=settings.offset_scale or 0.0,
        scale=settings.scale,
        skip_mass=0.0 if inputs.key_norms is None else settings.skip_mass,
        quantized=inputs.key_scales is not None,
        renormalize=settings.renormalize,
        ring=settings.ring,
    )


@traced_by_own_settings(narrow=True)
def attention(inputs: Inputs, settings: Settings) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output; arguments as in `op.attention`."""
    static = make_static(inputs, settings)
    nothing = jnp.zeros(1, jnp.float32)

    def number(x: Array | None) -> Array:
        return nothing if x is None else x.astype(jnp.float32)

    query, lengths, layer = inputs.query, inputs.lengths, inputs.layer.reshape(1)
    table, slope = number(inputs.distance_bias), number(inputs.distance_slope)
    offset, norms = number(inputs.offset), number(inputs.key_norms)
    key_scales, value_scales = number(inputs.key_scales), number(inputs.value_scales)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    pairs = static.batch * static.kv_heads
    found = floats(pairs, static.splits, static.rows)
    parts = floats(pairs, static.splits, static.rows, static.head_dim)
    grid = (pairs * static.row_tiles, static.splits)
    block = Block(static.tile_rows, static.keys, WARPS, STAGES)
    if static.has_offset:
        scores, highest, maximum, total = launch(
            decode_scores,
            (query, inputs.key, lengths, layer, table, slope, offset, norms, key_scales),
            (
                floats(pairs, static.rows, static.padded_slots),
                floats(pairs, static.splits, static.turns, static.rows),
                found,
                found,
            ),
            grid,
            block,
            static,
        )
        part, weight = launch(
            decode_values,
            (
                *(query, inputs.value, lengths, layer, offset, value_scales),
                *(scores, highest, maximum, total),
            ),
            (parts, found),
            grid,
            dataclasses.replace(block, stages=1),
            static,
        )
    else:
        part, maximum, total = launch(
            decode_softmax,
            (
                *(query, inputs.key, inputs.value, lengths, layer),
                *(table, slope, norms, key_scales, value_scales),
            ),
            (parts, found, found),
            grid,
            block,
            static,
        )
        weight = nothing
    (out,) = launch(
        decode_combine,
        (query, lengths, part, maximum, total, weight),
        (jax.ShapeDtypeStruct(query.shape, query.dtype),),
        (pairs * static.rows,),
        dataclasses.replace(block, stages=1),
        static,
    )
    return out
