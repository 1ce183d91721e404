"""Decoding on NVIDIA GPUs: two sweeps over the cache where weights may be 0, one where not.

The pages of a row are dealt out to `splits` programs in turn, so that a page that matters has
neighbours in other programs, and a batch of one fills the chip. All query heads of a group, and
all new queries, share what is loaded.

With Elastic-Softmax, `decode_scores` reads the keys of the pages that are not negligible, keeps
the scores, and notes each page's highest; `decode_values` then knows the log-sum-exp and reads
the values of pages with a weight above 0. Softmax has no zeros: `decode_softmax` reads keys and
values at once. `decode_combine` adds up what the splits found.

A call has one launch of each kernel, whatever the number of caches: programs of one cache follow
those of the other, each compiled for its own sizes.

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
from pallas_kernels.decode.types import MAX_CACHES, Call, Inputs, Settings
from pallas_kernels.own_settings import traced_by_own_settings
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.config import Block, padded_head_dim, power_of_two
from pallas_kernels.triton.tile import LOWEST, MASKED, PRECISION, constant, gather, thresholds

PAGE = tl.constexpr(types.PAGE)
LOG2_E = tl.constexpr(math.log2(math.e))

# Programs that a launch has at least, where there are pages for them: four for each
# multiprocessor of a large GPU.
PROGRAMS = 512
# Pages that a program looks after at most, since it takes notes of each, unless a row had more
# splits than MAX_SPLITS, which all read what all have found.
MAX_TURNS = 32
MAX_SPLITS = 256
# Rows of queries of a program at most.
MAX_ROWS = 32
# Bytes of a tile of keys.
TILE_BYTES = 16384
WARPS = 4
STAGES = 3
# Splits that `decode_combine` reads at a time.
COMBINED = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """What the kernels are compiled for of one cache.

    Attributes:
      heads: key/value heads of the cache.
      slots: keys of a row.
      window: keys a query sees; 0: all.
      splits: programs that share a row.
      turns: pages a program looks after, a power of two.
      start, stop: which programs of a launch are its own.
      first_head: where its heads begin in the list of heads.
      first_score, first_page: where its scores begin, and the notes of its pages.
      most: softmax mass that no key of a negligible page exceeds; 0: none is negligible.
    """

    heads: int
    slots: int
    window: int
    splits: int
    turns: int
    start: int
    stop: int
    first_head: int
    first_score: int
    first_page: int
    most: float

    @property
    def pages(self) -> int:
        """Returns how many pages a row of the cache has."""
        return -(-self.slots // types.PAGE)

    @property
    def padded_slots(self) -> int:
        """Returns the slots of whole pages."""
        return self.pages * types.PAGE

    @property
    def padded_splits(self) -> int:
        """Returns the splits, rounded up to a power of two."""
        return power_of_two(self.splits)


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernels are compiled for; they take it as one constant.

    Attributes:
      batch, new, heads, kv_heads, head_dim: sizes, see `types.Call`.
      parts: of each cache.
      tile_rows: rows of queries of a program, a power of two; a row is one query of one head.
      keys: of a tile, a divisor of the page.
      width: of the bias table; 0: no bias.
      has_slope, has_offset: whether there are such arrays.
      offset_scale: what tau is multiplied by; 0: 1 / n.
      scale: factor of the scores.
      quantized: the caches are of int8 numbers.
      renormalize, ring: see `types.Settings`.
    """

    batch: int
    new: int
    heads: int
    kv_heads: int
    head_dim: int
    parts: tuple[Part, ...]
    tile_rows: int
    keys: int
    width: int
    has_slope: bool
    has_offset: bool
    offset_scale: float
    scale: float
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
    def number(self) -> int:
        """Returns how many caches there are."""
        return len(self.parts)

    @property
    def part0(self) -> Part:
        """Returns the sizes of the first cache."""
        return constant(self.parts[0])

    @property
    def part1(self) -> Part:
        """Returns those of the second."""
        return constant(self.parts[1])

    @property
    def part2(self) -> Part:
        """Returns those of the third."""
        return constant(self.parts[2])

    @property
    def part3(self) -> Part:
        """Returns those of the fourth."""
        return constant(self.parts[3])

    @property
    def part4(self) -> Part:
        """Returns those of the fifth."""
        return constant(self.parts[4])

    @property
    def first_splits(self) -> int:
        """Returns how many programs share a row of the first cache."""
        return self.parts[0].splits

    @property
    def first_slots(self) -> int:
        """Returns the keys of a row of the first cache."""
        return self.parts[0].slots

    @property
    def splits(self) -> int:
        """Returns the most splits of any cache, for which there is room in the notes."""
        return max(part.splits for part in self.parts)

    @property
    def padded_splits(self) -> int:
        """Returns these, rounded up to a power of two."""
        return power_of_two(self.splits)

    @property
    def tiles_a_page(self) -> int:
        """Returns how many tiles of keys a page has."""
        return types.PAGE // self.keys

    @property
    def padded_dim(self) -> int:
        """Returns the head size of a tile."""
        return padded_head_dim(self.head_dim)

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


@triton.jit
def _owns(program, part: tl.constexpr):
    """Returns whether a program is one of the cache's."""
    return (program >= part.start) & (program < part.stop)


@triton.jit
def _place_of(program, heads_ptr, static: tl.constexpr, part: tl.constexpr):
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
def _load_queries(query_ptr, row, turn, head, real, static: tl.constexpr):
    """Returns the queries of a program's rows, [rows, head_dim]."""
    dim = tl.arange(0, static.padded_dim)
    at = ((row * static.new + turn) * static.heads + head) * static.head_dim
    mask = real[:, None] & (dim < static.head_dim)[None, :]
    return tl.load(query_ptr + at[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _load_slots(base, slot, mask, query, static: tl.constexpr, part: tl.constexpr):
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
def _back(slot, length, part: tl.constexpr):
    """Returns how far before the newest position the key of a slot lies."""
    back = (length - 1) % part.slots - slot
    return tl.where(back < 0, back + part.slots, back)


@triton.jit
def _visible(slot, turn, length, static: tl.constexpr, part: tl.constexpr):
    """Returns the distance of each row's query from each slot's key, and whether it sees it."""
    back = _back(slot, length, part)
    distance = back[:, None] - (static.new - 1 - turn)[None, :]
    visible = (distance >= 0) & (back < length)[:, None]
    if part.padded_slots != part.slots:
        visible = visible & (slot < part.slots)[:, None]
    if part.window > 0:
        visible = visible & (distance < part.window)
    return distance, visible


@triton.jit
def _highest_bias(
    table_ptr, slope_ptr, head, start, nearest, length, static: tl.constexpr, part: tl.constexpr
):
    """Returns a bound on the bias of each page's keys, for queries of one head."""
    table = table_ptr + head * static.width
    slope = 0.0
    if static.has_slope:
        slope = tl.load(slope_ptr + head)
    end = tl.load(table + static.width - 1)
    slot = start[:, None] + tl.arange(0, PAGE)[None, :]
    bias = _bias(table, slope, end, _back(slot, length, part), static)
    highest = tl.max(tl.where(slot < part.slots, bias, MASKED), 1)
    if static.new > 1:
        # Queries before the newest are nearer to the keys.
        nearer = 1 + tl.arange(0, 8)[None, :]
        distance = nearest[:, None] - nearer
        bias = _bias(table, slope, end, distance, static)
        bias = tl.where((distance >= 0) & (nearer < static.new), bias, MASKED)
        highest = tl.maximum(highest, tl.max(bias, 1))
    return highest


@triton.jit
def _to_read(query, place, arrays, length, at_pages, static: tl.constexpr, part: tl.constexpr):
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
        own = _load_slots(key, slot, exists, query, static, part).to(tl.float32)
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
            highest = _highest_bias(
                table_ptr, slope_ptr, mine, start, nearest, length, static, part
            )
            small = tl.exp2(bound + highest[:, None]) <= part.most
            small = small | ~(exists & (head == mine))[None, :]
            needed = tl.maximum(needed, tl.max(tl.where(small, 0, 1), 1))
        read = read & (needed > 0)
    first = tl.min(tl.where(read, turns, part.turns), 0)
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
def _keep_scores(
    key_ptr, norms_ptr, scales_ptr, shared, found, static: tl.constexpr, part: tl.constexpr
):
    """Does a program of `decode_scores`."""
    query_ptr, length_ptr, layer_ptr, table_ptr, slope_ptr, offset_ptr, heads_ptr = shared
    scores_ptr, page_ptr, maximum_ptr, total_ptr = found
    program = tl.program_id(0)
    place = _place_of(program, heads_ptr, static, part)
    row, own, split, pair, number, turn, query_head, real = place
    length = tl.load(length_ptr + row)
    at_row = tl.load(layer_ptr).to(tl.int64) * static.batch + row
    stride: tl.constexpr = part.heads * static.head_dim
    key = key_ptr + at_row * (part.slots * stride) + own * static.head_dim
    at_pages = (at_row * part.heads + own) * part.pages
    query = _load_queries(query_ptr, row, turn, query_head, real, static)
    rows = (split, turn, query_head, real)
    arrays = (key, table_ptr, slope_ptr, offset_ptr, norms_ptr, scales_ptr)
    first, stop = _to_read(query, rows, arrays, length, at_pages, static, part)
    table, slope, end = _row_bias(table_ptr, slope_ptr, query_head, static)

    turns = tl.arange(0, part.turns)
    at_score = (row * part.heads + own).to(tl.int64) * static.rows + number
    at_score = part.first_score + at_score * part.padded_slots
    highest = tl.full((part.turns, static.tile_rows), MASKED, tl.float32)
    maximum = tl.full((static.tile_rows,), LOWEST, tl.float32)
    total = tl.full((static.tile_rows,), 0, tl.float32)
    for step in tl.range(0, (stop - first) * static.tiles_a_page):
        mine = first + step // static.tiles_a_page
        page = mine * part.splits + split
        slot = page * PAGE + step % static.tiles_a_page * static.keys + tl.arange(0, static.keys)
        keys = _load_slots(key, slot, slot < part.slots, query, static, part)
        factor = static.score_scale
        if static.quantized:
            factor *= tl.load(scales_ptr + at_pages + page)
        distance, visible = _visible(slot, turn, length, static, part)
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

    at_found = (pair * static.splits + split) * static.rows + number
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
    program = tl.program_id(0)
    if _owns(program, static.part0):
        _keep_scores(key0_ptr, norms0_ptr, scales0_ptr, shared, found, static, static.part0)
    if static.number > 1:  # noqa: SIM102
        if _owns(program, static.part1):
            _keep_scores(key1_ptr, norms1_ptr, scales1_ptr, shared, found, static, static.part1)
    if static.number > 2:  # noqa: SIM102
        if _owns(program, static.part2):
            _keep_scores(key2_ptr, norms2_ptr, scales2_ptr, shared, found, static, static.part2)
    if static.number > 3:  # noqa: SIM102
        if _owns(program, static.part3):
            _keep_scores(key3_ptr, norms3_ptr, scales3_ptr, shared, found, static, static.part3)
    if static.number > 4:  # noqa: SIM102
        if _owns(program, static.part4):
            _keep_scores(key4_ptr, norms4_ptr, scales4_ptr, shared, found, static, static.part4)


@triton.jit
def _thresholds(offset_ptr, head, turn, real, length, static: tl.constexpr, part: tl.constexpr):
    """Returns what a weight must exceed, of each row."""
    scale = static.offset_scale
    if static.offset_scale == 0:
        seen = tl.maximum(length - static.new + turn + 1, 1)
        if part.window > 0:
            seen = tl.minimum(seen, part.window)
        scale = 1.0 / seen.to(tl.float32)
    return thresholds(tl.load(offset_ptr + head, mask=real, other=0.0), scale)


@triton.jit
def _add_values(value_ptr, scales_ptr, shared, found, static: tl.constexpr, part: tl.constexpr):
    """Does a program of `decode_values`."""
    tiles: tl.constexpr = static.tiles_a_page
    query_ptr, length_ptr, layer_ptr, offset_ptr, heads_ptr = shared
    scores_ptr, page_ptr, maximum_ptr, total_ptr, out_ptr, weight_ptr = found
    program = tl.program_id(0)
    place = _place_of(program, heads_ptr, static, part)
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
    threshold = _thresholds(offset_ptr, query_head, turn, real, length, static, part)

    # What is no number is not below anything; a page that was not read has no weights.
    dead = tl.exp2(highest - log_total[None, :]) <= threshold[None, :]
    dead = dead | (highest < LOWEST) | ~real[None, :]
    live = tl.max(tl.where(dead, 0, 1), 1)
    first = tl.min(tl.where(live > 0, turns, part.turns), 0)
    stop = tl.max(tl.where(live > 0, turns + 1, 0), 0)

    at_row = tl.load(layer_ptr).to(tl.int64) * static.batch + row
    stride: tl.constexpr = part.heads * static.head_dim
    value = value_ptr + at_row * (part.slots * stride) + own * static.head_dim
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
                _, visible = _visible(slot, turn, length, static, part)
                visible = visible & real[None, :]
                scores = tl.load(
                    scores_ptr + at_score[None, :] + slot[:, None], mask=visible, other=MASKED
                )
                # What no query sees may be no number.
                seen = tl.max(tl.where(visible, 1, 0), 1) > 0
                values = _load_slots(value, slot, seen, like, static, part)
                weights = tl.exp2(scores - log_total[None, :]) - threshold[None, :]
                weights = tl.where((weights <= 0) | ~visible, 0.0, weights)
                weight += tl.sum(weights, 0)
                if static.quantized:
                    weights *= tl.load(scales_ptr + at_pages + page)
                weights = tl.trans(weights.to(values.dtype))
                out = tl.dot(weights, values, out, input_precision=PRECISION)

    dim = tl.arange(0, static.padded_dim)
    at_own = (pair * static.splits + split) * static.rows + number
    inside = real[:, None] & (dim < static.head_dim)[None, :]
    at_out = (at_own * static.head_dim)[:, None] + dim[None, :]
    tl.store(out_ptr + at_out, out, mask=inside)
    tl.store(weight_ptr + at_own, weight, mask=real)


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
    out_ptr,
    weight_ptr,
    static: tl.constexpr,
):
    """Weighted values of a program's pages that have a weight; programs as `decode_scores`."""
    shared = (query_ptr, length_ptr, layer_ptr, offset_ptr, heads_ptr)
    found = (scores_ptr, page_ptr, maximum_ptr, total_ptr, out_ptr, weight_ptr)
    program = tl.program_id(0)
    if _owns(program, static.part0):
        _add_values(value0_ptr, scales0_ptr, shared, found, static, static.part0)
    if static.number > 1:  # noqa: SIM102
        if _owns(program, static.part1):
            _add_values(value1_ptr, scales1_ptr, shared, found, static, static.part1)
    if static.number > 2:  # noqa: SIM102
        if _owns(program, static.part2):
            _add_values(value2_ptr, scales2_ptr, shared, found, static, static.part2)
    if static.number > 3:  # noqa: SIM102
        if _owns(program, static.part3):
            _add_values(value3_ptr, scales3_ptr, shared, found, static, static.part3)
    if static.number > 4:  # noqa: SIM102
        if _owns(program, static.part4):
            _add_values(value4_ptr, scales4_ptr, shared, found, static, static.part4)


@triton.jit
def _add_softmax(
    key_ptr,
    value_ptr,
    norms_ptr,
    key_scales_ptr,
    value_scales_ptr,
    shared,
    found,
    static: tl.constexpr,
    part: tl.constexpr,
):
    """Does a program of `decode_softmax`."""
    query_ptr, length_ptr, layer_ptr, table_ptr, slope_ptr, heads_ptr = shared
    out_ptr, maximum_ptr, total_ptr = found
    program = tl.program_id(0)
    place = _place_of(program, heads_ptr, static, part)
    row, own, split, pair, number, turn, query_head, real = place
    length = tl.load(length_ptr + row)
    at_row = tl.load(layer_ptr).to(tl.int64) * static.batch + row
    stride: tl.constexpr = part.heads * static.head_dim
    at_head = at_row * (part.slots * stride) + own * static.head_dim
    key, value = key_ptr + at_head, value_ptr + at_head
    at_pages = (at_row * part.heads + own) * part.pages
    query = _load_queries(query_ptr, row, turn, query_head, real, static)
    rows = (split, turn, query_head, real)
    arrays = (key, table_ptr, slope_ptr, table_ptr, norms_ptr, key_scales_ptr)
    first, stop = _to_read(query, rows, arrays, length, at_pages, static, part)
    table, slope, end = _row_bias(table_ptr, slope_ptr, query_head, static)

    maximum = tl.full((static.tile_rows,), LOWEST, tl.float32)
    total = tl.full((static.tile_rows,), 0, tl.float32)
    out = tl.full((static.tile_rows, static.padded_dim), 0, tl.float32)
    for step in tl.range(0, (stop - first) * static.tiles_a_page):
        page = (first + step // static.tiles_a_page) * part.splits + split
        slot = page * PAGE + step % static.tiles_a_page * static.keys + tl.arange(0, static.keys)
        # What is not held may be no number.
        held = (slot < part.slots) & (_back(slot, length, part) < length)
        keys = _load_slots(key, slot, held, query, static, part)
        values = _load_slots(value, slot, held, query, static, part)
        factor = static.score_scale
        if static.quantized:
            factor *= tl.load(key_scales_ptr + at_pages + page)
        distance, visible = _visible(slot, turn, length, static, part)
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

    at_own = (pair * static.splits + split) * static.rows + number
    tl.store(maximum_ptr + at_own, maximum, mask=real)
    tl.store(total_ptr + at_own, total, mask=real)
    dim = tl.arange(0, static.padded_dim)
    inside = real[:, None] & (dim < static.head_dim)[None, :]
    at_out = (at_own * static.head_dim)[:, None] + dim[None, :]
    tl.store(out_ptr + at_out, out, mask=inside)


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
    shared = (query_ptr, length_ptr, layer_ptr, table_ptr, slope_ptr, heads_ptr)
    found = (out_ptr, maximum_ptr, total_ptr)
    program = tl.program_id(0)
    if _owns(program, static.part0):
        _add_softmax(
            key0_ptr,
            value0_ptr,
            norms0_ptr,
            key_scales0_ptr,
            value_scales0_ptr,
            shared,
            found,
            static,
            static.part0,
        )
    if static.number > 1:  # noqa: SIM102
        if _owns(program, static.part1):
            _add_softmax(
                key1_ptr,
                value1_ptr,
                norms1_ptr,
                key_scales1_ptr,
                value_scales1_ptr,
                shared,
                found,
                static,
                static.part1,
            )
    if static.number > 2:  # noqa: SIM102
        if _owns(program, static.part2):
            _add_softmax(
                key2_ptr,
                value2_ptr,
                norms2_ptr,
                key_scales2_ptr,
                value_scales2_ptr,
                shared,
                found,
                static,
                static.part2,
            )
    if static.number > 3:  # noqa: SIM102
        if _owns(program, static.part3):
            _add_softmax(
                key3_ptr,
                value3_ptr,
                norms3_ptr,
                key_scales3_ptr,
                value_scales3_ptr,
                shared,
                found,
                static,
                static.part3,
            )
    if static.number > 4:  # noqa: SIM102
        if _owns(program, static.part4):
            _add_softmax(
                key4_ptr,
                value4_ptr,
                norms4_ptr,
                key_scales4_ptr,
                value_scales4_ptr,
                shared,
                found,
                static,
                static.part4,
            )


@triton.jit
def decode_combine(
    query_ptr,
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
    tl.store(out_ptr + at_out + dim, out.to(query_ptr.dtype.element_ty), mask=dim < static.head_dim)


COMBINED_SPLITS = tl.constexpr(COMBINED)


def make_static(call: Call) -> Static:
    """Returns what the kernels are compiled for."""
    batch, new, heads, head_dim = call.query.shape
    rows = new * call.group
    tile_rows = min(MAX_ROWS, max(8, power_of_two(rows)))
    programs = batch * -(-rows // tile_rows)
    pages = [-(-cache.slots // types.PAGE) for cache in call.caches]
    work = sum(len(cache.heads) * n for cache, n in zip(call.caches, pages, strict=True))
    # The power of two below what leaves PROGRAMS of them.
    turns = power_of_two(max(1, programs * work // PROGRAMS) + 1) // 2
    # Without a bias far keys count as much as near ones.
    skip = call.settings.skip_mass > 0 and call.distance_bias is not None
    skip = skip and all(cache.key_norms is not None for cache in call.caches)
    parts: list[Part] = []
    start = first_head = first_score = first_page = 0
    for cache, count in zip(call.caches, pages, strict=True):
        own_turns = max(min(turns, MAX_TURNS), power_of_two(-(-count // MAX_SPLITS)))
        own_turns = min(own_turns, power_of_two(count))
        splits = -(-count // own_turns)
        part = Part(
            heads=len(cache.heads),
            slots=cache.slots,
            window=cache.window or 0,
            splits=splits,
            turns=own_turns,
            start=start,
            stop=start + programs * len(cache.heads) * splits,
            first_head=first_head,
            first_score=first_score,
            first_page=first_page,
            most=call.settings.skip_mass / (count * types.PAGE) if skip else 0.0,
        )
        parts.append(part)
        start, first_head = part.stop, first_head + part.heads
        first_score += batch * part.heads * rows * part.padded_slots
        first_page += batch * part.heads * splits * own_turns * rows
    keys = TILE_BYTES // (padded_head_dim(head_dim) * call.query.dtype.itemsize)
    return Static(
        batch=batch,
        new=new,
        heads=heads,
        kv_heads=call.kv_heads,
        head_dim=head_dim,
        parts=tuple(parts),
        tile_rows=tile_rows,
        keys=max(16, min(types.PAGE, keys)),
        width=0 if call.distance_bias is None else call.distance_bias.shape[1],
        has_slope=call.distance_slope is not None,
        has_offset=call.offset is not None,
        offset_scale=call.settings.offset_scale or 0.0,
        scale=call.settings.scale,
        quantized=call.caches[0].key_scales is not None,
        renormalize=call.settings.renormalize,
        ring=call.settings.ring,
    )


@traced_by_own_settings(narrow=True)
def attention(call: Call) -> Float[Array, "batch new heads head_dim"]:
    """Returns the output of a call of at most `MAX_CACHES` caches; of more, one by one."""
    if len(call.caches) > MAX_CACHES:
        return types.one_by_one(_of_one, call)
    # Those with the most pages first: what is left for the end is short.
    caches = sorted(call.caches, key=lambda cache: -cache.slots)
    return _attention(dataclasses.replace(call, caches=tuple(caches)))


def _of_one(inputs: Inputs, settings: Settings) -> Array:
    cache = types.Cache(
        tuple(range(inputs.kv_heads)),
        settings.window,
        inputs.key,
        inputs.value,
        inputs.key_norms,
        inputs.key_scales,
        inputs.value_scales,
    )
    names = ("query", "lengths", "distance_bias", "distance_slope", "offset", "layer")
    shared = {name: getattr(inputs, name) for name in names}
    return _attention(Call(**shared, caches=(cache,), settings=settings))


def _attention(call: Call) -> Float[Array, "batch new heads head_dim"]:
    static = make_static(call)
    nothing = jnp.zeros(1, jnp.float32)

    def number(x: Array | None) -> Array:
        return nothing if x is None else x.astype(jnp.float32)

    query, lengths, layer = call.query, call.lengths, call.layer.reshape(1)
    table, slope = number(call.distance_bias), number(call.distance_slope)
    offset = number(call.offset)
    heads = [head for cache in call.caches for head in cache.heads]
    sizes = {
        head: (part.splits, part.slots)
        for cache, part in zip(call.caches, static.parts, strict=True)
        for head in cache.heads
    }
    listed = jnp.asarray(heads, jnp.int32)
    head_sizes = jnp.asarray([sizes[head] for head in range(call.kv_heads)], jnp.int32)

    def cached(*names: str) -> list[Array]:
        arrays: list[Array] = []
        for n in range(MAX_CACHES):
            for name in names:
                # What there is no cache for is not read.
                x = getattr(call.caches[n], name) if n < len(call.caches) else None
                arrays.append(x if name in ("key", "value") and x is not None else number(x))
        return arrays

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    pairs = static.batch * static.kv_heads
    found = floats(pairs, static.splits, static.rows)
    parts = floats(pairs, static.splits, static.rows, static.head_dim)
    grid = (static.parts[-1].stop,)
    block = Block(static.tile_rows, static.keys, WARPS, STAGES)
    if static.has_offset:
        last = static.parts[-1]
        own = static.batch * last.heads * static.rows
        scores, highest, maximum, total = launch(
            decode_scores,
            (
                *(query, lengths, layer, table, slope, offset, listed),
                *cached("key", "key_norms", "key_scales"),
            ),
            (
                floats(last.first_score + own * last.padded_slots),
                floats(last.first_page + own * last.splits * last.turns),
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
                *(query, lengths, layer, offset, listed),
                *cached("value", "value_scales"),
                *(scores, highest, maximum, total),
            ),
            (parts, found),
            grid,
            dataclasses.replace(block, stages=1),
            static,
        )
    else:
        names = ("key", "value", "key_norms", "key_scales", "value_scales")
        part, maximum, total = launch(
            decode_softmax,
            (query, lengths, layer, table, slope, listed, *cached(*names)),
            (parts, found, found),
            grid,
            block,
            static,
        )
        weight = nothing
    (out,) = launch(
        decode_combine,
        (query, lengths, head_sizes, part, maximum, total, weight),
        (jax.ShapeDtypeStruct(query.shape, query.dtype),),
        (pairs * static.rows,),
        dataclasses.replace(block, stages=1),
        static,
    )
    return out
