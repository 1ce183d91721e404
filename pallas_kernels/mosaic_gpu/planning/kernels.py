"""The Triton kernels of `by_triton`: what each program does."""

import dataclasses

import triton
import triton.language as tl

# Numbers that are added up side by side.
ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Static:
    """What one kernel is compiled for; kernels take it as one constant.

    Attributes:
      length, heads, group, head_dim: of queries, and query heads a key head.
      unit: queries, and keys, of a tile.
      units: tiles of a row.
      block: units that a program takes at once, a power of two.
      width: length of the bias table as given; 0: no bias.
      reach, near, entries, lead: of the table in the kernels' form: first distance that is
        the tail's; entries before the ramp; all entries; entries before b(0).
      has_slope, has_offset, packed: as in `Plan`.
      scale, skip_mass, exponent_limit: factor of scores; mass that a row may lose; scores
        within it are small.
      distances, filled, parts: as in `by_xla.key_ranges`.
      rows: of the batch in a group.
      has_far: some tiles lie past the table.
      kv_pairs, work_parts: (batch, key head) that are ranked, and numbers of work of each.
      tiles_*, section_*, members_*, descending_*: of up to three `Order`s, a, b and c.
    """

    length: int = 0
    heads: int = 0
    group: int = 1
    head_dim: int = 0
    unit: int = 64
    units: int = 0
    block: int = 1
    width: int = 0
    reach: int = 0
    near: int = 0
    entries: int = 0
    lead: int = 0
    has_slope: bool = False
    has_offset: bool = False
    packed: bool = False
    scale: float = 1.0
    skip_mass: float = 0.0
    exponent_limit: float = 0.0
    distances: int = 0
    filled: int = 0
    parts: int = 0
    rows: int = 0
    has_far: bool = False
    kv_pairs: int = 0
    work_parts: int = 0
    tiles_a: int = 0
    section_a: int = 0
    members_a: int = 0
    descending_a: bool = False
    tiles_b: int = 0
    section_b: int = 0
    members_b: int = 0
    descending_b: bool = False
    tiles_c: int = 0
    section_c: int = 0
    members_c: int = 0
    descending_c: bool = False

    @property
    def work_parts_padded(self) -> int:
        """Returns `work_parts`, rounded up to a power of two."""
        return power_of_two(self.work_parts)

    @property
    def size_of_scale(self) -> float:
        """Returns the scale, without its sign."""
        return abs(self.scale)

    @property
    def units_padded(self) -> int:
        """Returns the units, rounded up to a power of two."""
        return power_of_two(self.units)

    @property
    def row_blocks(self) -> int:
        """Returns how many blocks of `ROWS` queries cover a row."""
        return -(-self.units * self.unit // ROWS)

    @property
    def filled_padded(self) -> int:
        """Returns `filled`, rounded up to a power of two."""
        return power_of_two(self.filled)

    @property
    def part(self) -> int:
        """Returns the units of queries of one part."""
        return -(-self.units // max(self.parts, 1))

    @property
    def part_padded(self) -> int:
        """Returns the same, rounded up to a power of two."""
        return power_of_two(self.part)


def power_of_two(n: int) -> int:
    """Returns the least power of two that isn't below n."""
    return 1 << (n - 1).bit_length()


_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e30)
# Tiles of score bounds as in pallas_kernels/visit.py.
_SLACK = tl.constexpr(1e-3)
_ROWS = tl.constexpr(ROWS)


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
def _rising(bias_ptr, slope, n, static: tl.constexpr):
    """Returns entry n of the table of distances rising."""
    first = tl.load(bias_ptr)
    values = (_bias(bias_ptr, slope, n - static.lead, static) - first) * _LOG2_E
    ramp = (static.near - n).to(tl.float32) * slope * _LOG2_E
    return tl.where(n < static.lead, _LOWEST, tl.where(n < static.near, values, ramp))


@triton.jit
def lazy_table(
    bias_ptr, slope_ptr, falling_ptr, rising_ptr, tail_ptr, maxima_ptr, static: tl.constexpr
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
        rising = tl.where(exists, _rising(bias_ptr, slope, n, static), 0.0)
        tl.store(rising_ptr + at + place, rising, mask=inside)
        back = tl.where(n == 0, 0, static.entries - n)
        falling = tl.where(exists, _rising(bias_ptr, slope, back, static), 0.0)
        tl.store(falling_ptr + at + place, falling, mask=inside)
    if copy == 0:
        first = tl.load(bias_ptr)
        end = first * -_LOG2_E
        if static.has_slope:
            end += tl.load(bias_ptr + static.reach - 1) * _LOG2_E
        tl.store(tail_ptr + 2 * head, end)
        tl.store(tail_ptr + 2 * head + 1, slope * _LOG2_E)
    else:
        # A tile's distances begin one unit before, and end one after.
        for unit0 in range(0, static.units, 16):
            units = unit0 + tl.arange(0, 16)
            x = (units[:, None] - 1) * static.unit + tl.arange(0, 2 * static.unit)[None, :]
            exists = (x >= 0) & (x < static.length)
            found = tl.where(exists, _bias(bias_ptr, slope, x, static), float("-inf"))
            place = maxima_ptr + head * static.units + units
            tl.store(place, tl.max(found, 1), mask=units < static.units)


@triton.jit
def lazy_norms(query_ptr, key_ptr, norms_ptr, static: tl.constexpr):
    """Norms of one unit of one head, and the least score with itself; grid (units * heads, batch).

    norms: [batch, 3, heads, units].
    """
    unit = tl.program_id(0) // static.heads
    head = tl.program_id(0) % static.heads
    batch = tl.program_id(1).to(tl.int64)
    rows = unit * static.unit + tl.arange(0, static.unit)
    columns = tl.arange(0, static.head_dim)
    inside = (rows < static.length)[:, None]
    kv_heads: tl.constexpr = static.heads // static.group
    at_query = (batch * static.length + rows)[:, None] * static.heads + head
    at_key = (batch * static.length + rows)[:, None] * kv_heads + head // static.group
    query = tl.load(query_ptr + at_query * static.head_dim + columns, mask=inside, other=0.0)
    key = tl.load(key_ptr + at_key * static.head_dim + columns, mask=inside, other=0.0)
    query = query.to(tl.float32)
    key = key.to(tl.float32)
    query_norm = tl.sqrt(tl.max(tl.sum(query * query, 1), 0)) * static.size_of_scale
    key_norm = tl.sqrt(tl.max(tl.sum(key * key, 1), 0))
    own = tl.where(rows < static.length, tl.sum(query * key, 1) * static.scale, float("inf"))
    place = norms_ptr + (batch * 3 * static.heads + head) * static.units + unit
    tl.store(place, query_norm)
    tl.store(place + static.heads * static.units, key_norm)
    tl.store(place + 2 * static.heads * static.units, tl.min(own, 0))


@triton.jit
def lazy_visits(
    norms_ptr,
    visible_ptr,
    bias_ptr,
    maxima_ptr,
    offset_ptr,
    first_ptr,
    small_ptr,
    work_ptr,
    static: tl.constexpr,
):
    """First unit of keys that some units of queries visit; grid (blocks, heads, batch).

    The rule is that of pallas_kernels/visit.py.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2)
    units = tl.program_id(0) * static.block + tl.arange(0, static.block)
    tiles = tl.arange(0, static.units_padded)
    inside = units < static.units
    norms_ptr += (batch * 3 * static.heads + head) * static.units
    of_kind: tl.constexpr = static.heads * static.units
    key_norm = tl.load(norms_ptr + of_kind + tiles, mask=tiles < static.units, other=0.0)
    first = tl.zeros_like(units)
    if static.packed:
        rows = tl.minimum(units * static.unit, static.length - 1)
        first = tl.load(visible_ptr + batch * static.length + rows) // static.unit
    if static.skip_mass > 0:
        bound = tl.load(norms_ptr + units, mask=inside, other=0.0)[:, None] * key_norm[None, :]
        lowest = tl.load(norms_ptr + 2 * of_kind + units, mask=inside, other=0.0)
        bound = bound - lowest[:, None] + _SLACK
        apart = units[:, None] - tiles[None, :]
        before = apart > 0
        if static.width > 0:
            seen = (apart >= 0) & inside[:, None]
            at = maxima_ptr + head * static.units + apart
            bound += tl.load(at, mask=seen, other=0.0) - tl.load(bias_ptr + head * static.width)
        # The minimum only guards exp against overflow.
        mass = static.unit * tl.exp(tl.minimum(bound, 20.0))
        mass = tl.where(tiles[None, :] >= first[:, None], mass, 0.0)
        negligible = (tl.cumsum(mass, 1) <= static.skip_mass) & before
        skipped = tl.sum(negligible.to(tl.int32), 1)
        if static.has_offset:
            skipped = tl.where(tl.load(offset_ptr + head) > 0, 0, skipped)
        first = tl.maximum(first, skipped)
    row = batch * static.heads + head
    tl.store(first_ptr + row * static.units + units, first, mask=inside)
    work = tl.sum(tl.where(inside, units - first + 1, 0), 0)
    tl.store(work_ptr + row * tl.num_programs(0) + tl.program_id(0), work)
    if tl.program_id(0) == 0:
        exists = tiles < static.units
        largest = tl.max(tl.load(norms_ptr + tiles, mask=exists, other=0.0), 0)
        largest *= tl.max(key_norm, 0)
        if static.width > 0:
            maxima = tl.load(
                maxima_ptr + head * static.units + tiles, mask=exists, other=float("-inf")
            )
            largest += tl.max(maxima, 0) - tl.load(bias_ptr + head * static.width)
        tl.store(small_ptr + row, (largest * _LOG2_E <= static.exponent_limit).to(tl.int32))


@triton.jit
def _rank(work_ptr, kv_pair, static: tl.constexpr):
    """Returns how many (batch, key head) come before one: those with more work, first ones first.

    work: [kv_pairs, work_parts].
    """
    parts = tl.arange(0, static.work_parts_padded)
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
def _store_numbers(
    numbers_ptr,
    kv_pair,
    rank,
    pairs,
    TILES: tl.constexpr,
    SECTION: tl.constexpr,
    MEMBERS: tl.constexpr,
    DESCENDING: tl.constexpr,
):
    """Stores the numbers of one key head's pieces where they come; see `Order.numbers`."""
    for member in range(0, MEMBERS):
        place = rank * MEMBERS + member
        start = place // SECTION * SECTION
        size = tl.minimum(pairs - start, SECTION)
        for tile0 in range(0, TILES, 64):
            tile = tile0 + tl.arange(0, 64)
            turn = TILES - 1 - tile if DESCENDING else tile
            at = start * TILES + turn * size + place - start
            number = (kv_pair * MEMBERS + member) * TILES + tile
            tl.store(numbers_ptr + at, number, mask=tile < TILES)
    if kv_pair == 0:
        tl.store(numbers_ptr + pairs * TILES, 0)


@triton.jit
def lazy_numbers(work_ptr, numbers_ptr, static: tl.constexpr):
    """The order of the forward pass's pieces; grid (batch * key heads,)."""
    kv_pair = tl.program_id(0)
    pairs = static.kv_pairs * static.members_a
    rank = _rank(work_ptr, kv_pair, static)
    _store_numbers(
        numbers_ptr, kv_pair, rank, pairs,
        static.tiles_a, static.section_a, static.members_a, static.descending_a,
    )  # fmt: skip


@triton.jit
def _last(first, queries, keys):
    """Returns the last of the queries, from the diagonal on, that sees each of the keys."""
    seen = (first[:, None] <= keys[None, :]) & (keys[None, :] <= queries[:, None])
    return tl.max(tl.where(seen, queries[:, None], 0), 0)


@triton.jit
def lazy_key_ranges(
    first_ptr,
    live_ptr,
    work_ptr,
    last_ptr,
    last_live_ptr,
    distances_ptr,
    of_queries_ptr,
    of_keys_ptr,
    of_bias_ptr,
    static: tl.constexpr,
):
    """See `by_xla.key_ranges`; grid (blocks of keys or parts, heads, batch)."""
    number = tl.program_id(0)
    if (number == 0) & (tl.program_id(1) % static.group == 0):
        kv_heads = static.heads // static.group
        kv_pair = tl.program_id(2) * kv_heads + tl.program_id(1) // static.group
        rank = _rank(work_ptr, kv_pair, static)
        _store_numbers(
            of_queries_ptr, kv_pair, rank, static.kv_pairs * static.members_a,
            static.tiles_a, static.section_a, static.members_a, static.descending_a,
        )  # fmt: skip
        _store_numbers(
            of_keys_ptr, kv_pair, rank, static.kv_pairs * static.members_b,
            static.tiles_b, static.section_b, static.members_b, static.descending_b,
        )  # fmt: skip
        if static.parts > 0:
            _store_numbers(
                of_bias_ptr, kv_pair, rank, static.kv_pairs * static.members_c,
                static.tiles_c, static.section_c, static.members_c, static.descending_c,
            )  # fmt: skip
    row = tl.program_id(2) * static.heads + tl.program_id(1)
    first_ptr += row * static.units
    live_ptr += row * static.units
    if number * static.block < static.units:
        keys = number * static.block + tl.arange(0, static.block)
        queries = tl.arange(0, static.units_padded)
        exists = queries < static.units
        first = tl.load(first_ptr + queries, mask=exists, other=static.units)
        live = tl.load(live_ptr + queries, mask=exists, other=static.units)
        at = row * static.units + keys
        inside = keys < static.units
        # Queries that aren't there see nothing: their first key is past the last.
        tl.store(last_ptr + at, _last(first, queries, keys), mask=inside)
        tl.store(last_live_ptr + at, _last(live, queries, keys), mask=inside)
    if number < static.parts:
        queries = number * static.part + tl.arange(0, static.part_padded)
        exists = (queries < static.units) & (queries < (number + 1) * static.part)
        first = tl.load(first_ptr + queries, mask=exists, other=static.units)
        live = tl.load(live_ptr + queries, mask=exists, other=static.units)
        distances = tl.arange(0, static.filled_padded)
        keys = queries[:, None] - distances[None, :]
        exists = exists[:, None] & (keys >= 0) & (distances < static.distances)[None, :]
        visited = exists & (first[:, None] <= keys)
        alive = exists & (live[:, None] <= keys)
        start = tl.min(tl.where(visited, queries[:, None], static.units), 0)
        start_live = tl.min(tl.where(alive, queries[:, None], static.units), 0)
        stop = tl.max(tl.where(visited, queries[:, None] + 1, 0), 0)
        at = distances_ptr + ((row * static.parts + number) * static.filled + distances) * 3
        inside = distances < static.filled
        tl.store(at, start, mask=inside)
        tl.store(at + 1, start_live, mask=inside)
        tl.store(at + 2, stop, mask=inside)


@triton.jit
def _near(sums_ptr, head, batch0, x, static: tl.constexpr):
    """Returns the sums of dS over distances x, from the diagonals of tiles and their parts."""
    tile = x // static.unit
    beyond = x % static.unit
    at = tile * (2 * static.unit) + static.unit - 1 + beyond
    exists = (x < static.length) & (tile < static.distances)
    # Those in the lower left half of one tile are in the upper right half of the next.
    in_next = (x < static.length) & (beyond > 0) & (tile + 1 < static.distances)
    total = tl.zeros(x.shape, tl.float32)
    for part in tl.range(0, static.rows * static.parts, loop_unroll_factor=4):
        row = (batch0 * static.parts + part).to(tl.int64) * static.heads + head
        place = sums_ptr + row * (static.filled * 2 * static.unit) + at
        total += tl.load(place, mask=exists, other=0.0)
        total += tl.load(place + static.unit, mask=in_next, other=0.0)
    return total


@triton.jit
def _total(numbers_ptr, head, batch0, kind, kinds: tl.constexpr, static: tl.constexpr):
    """Returns the sum of one kind of numbers [batch, heads, units, kinds, 64] of a head."""
    size = static.units * static.unit
    total = tl.zeros((_ROWS,), tl.float32)
    for n in tl.range(0, static.rows * static.row_blocks, loop_unroll_factor=4):
        batch = (batch0 + n // static.row_blocks).to(tl.int64)
        x = n % static.row_blocks * _ROWS + tl.arange(0, _ROWS)
        at = (x // static.unit * kinds + kind) * static.unit + x % static.unit
        start = (batch * static.heads + head) * (size * kinds)
        total += tl.load(numbers_ptr + start + at, mask=x < size, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def lazy_gradients(
    of_mean_ptr,
    sums_ptr,
    far_ptr,
    d_bias_ptr,
    d_slope_ptr,
    d_offset_ptr,
    static: tl.constexpr,
):
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
            tl.store(d_offset_ptr + row, _total(of_mean_ptr, head, batch0, 0, 1, static))
    else:
        x = (part - 1) * static.block + tl.arange(0, static.block)
        d_bias = _near(sums_ptr, head, batch0, x, static)
        if static.has_slope:  # noqa: SIM102, the first is decided when it is compiled
            if part * static.block >= static.width:
                # Tiles with a distance inside the table have some past it.
                past = static.width + tl.arange(0, 2 * static.unit)
                of_past = _near(sums_ptr, head, batch0, past, static)
                beyond = tl.sum(of_past, 0)
                moment = tl.sum(of_past * (past - (static.width - 1)).to(tl.float32), 0)
                if static.has_far:
                    beyond += _total(far_ptr, head, batch0, 0, 2, static)
                    moment += _total(far_ptr, head, batch0, 1, 2, static)
                tl.store(d_slope_ptr + row, -moment)
                d_bias += tl.where(x == static.width - 1, beyond, 0.0)
        tl.store(d_bias_ptr + row * static.width + x, d_bias, mask=x < static.width)
