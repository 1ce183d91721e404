"""What the Triton decode kernels are compiled for: how a call's work is dealt out."""

import dataclasses
import math
from typing import Any

from pallas_kernels.decode import pages as rule
from pallas_kernels.decode import types
from pallas_kernels.decode.types import Call
from pallas_kernels.triton.config import padded_head_dim, power_of_two
from pallas_kernels.triton.tile import constant

# Programs that a launch has at most, where none would look after too many pages: what an H200
# runs at once, so that none waits for another to end.
PROGRAMS = 640
# Programs of softmax at least: they run long, and several rounds of them end more evenly.
SOFTMAX_PROGRAMS = 1024
# Pages that a program looks after at most, since it takes notes of each, unless a row had more
# splits than MAX_SPLITS, which all read what all have found.
MAX_TURNS = 32
MAX_SPLITS = 256
# Rows of queries of a program at most.
MAX_ROWS = 32
# Bytes of a tile of keys.
TILE_BYTES = 16384


@dataclasses.dataclass(frozen=True)
class CachePart:
    """The sizes of one cache.

    Attributes:
      heads: key/value heads of the cache.
      slots: keys of a row.
      first_head: where its heads begin in the list of heads.
    """

    heads: int
    slots: int
    first_head: int

    @property
    def pages(self) -> int:
        """Returns how many pages a row of the cache has."""
        return -(-self.slots // types.PAGE)


@dataclasses.dataclass(frozen=True)
class Caches:
    """What kernels of several caches are compiled for; they take it as one constant.

    Attributes:
      head_dim: head size.
      parts: of each cache.
    """

    head_dim: int
    parts: tuple[Any, ...]

    @property
    def number(self) -> int:
        """Returns how many caches there are."""
        return len(self.parts)

    @property
    def each(self) -> tuple[Any, ...]:
        """Returns the parts in the form in which a kernel can pass them on."""
        return tuple(constant(part) for part in self.parts)

    @property
    def padded_dim(self) -> int:
        """Returns the head size of a tile."""
        return padded_head_dim(self.head_dim)


@dataclasses.dataclass(frozen=True)
class Part(CachePart):
    """What the kernels are compiled for of one cache.

    Attributes:
      window: keys a query sees; 0: all.
      splits: programs that share a row.
      turns: pages a program looks after, a power of two.
      start, stop: which programs of a launch are its own.
      first_score, first_page: where its scores begin, and the notes of its pages.
      most: softmax mass that no key of a negligible page exceeds; 0: none is negligible.
    """

    window: int
    splits: int
    turns: int
    start: int
    stop: int
    first_score: int
    first_page: int
    most: float

    @property
    def padded_slots(self) -> int:
        """Returns the slots of whole pages."""
        return self.pages * types.PAGE

    @property
    def padded_splits(self) -> int:
        """Returns the splits, rounded up to a power of two."""
        return power_of_two(self.splits)


@dataclasses.dataclass(frozen=True)
class Static(Caches):
    """What the kernels are compiled for; they take it as one constant.

    Attributes:
      batch, new, heads, kv_heads: sizes, see `types.Call`.
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


def make_static(call: Call) -> Static:
    """Returns what the kernels are compiled for."""
    batch, new, heads, head_dim = call.query.shape
    rows = new * call.group
    tile_rows = min(MAX_ROWS, max(8, power_of_two(rows)))
    programs = batch * -(-rows // tile_rows)
    pages = [-(-cache.slots // types.PAGE) for cache in call.caches]
    work = sum(len(cache.heads) * n for cache, n in zip(call.caches, pages, strict=True))
    if call.offset is None:
        # The power of two below what leaves so many of them.
        turns = power_of_two(max(1, programs * work // SOFTMAX_PROGRAMS) + 1) // 2
    else:
        turns = power_of_two(-(-programs * work // PROGRAMS))
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
