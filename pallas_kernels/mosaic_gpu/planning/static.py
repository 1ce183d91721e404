"""What the Triton kernels of `by_triton` are compiled for."""

import dataclasses

from pallas_kernels.mosaic_gpu.scheduler import TileOrder
from pallas_kernels.visit import NEAR

# Numbers that are added up side by side.
ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Static:
    """What one kernel is compiled for; kernels take it as one constant.

    Attributes:
      length, heads, group: of queries, and query heads a key head.
      head_dim, head_dim_padded: head size, and rounded up to a power of two.
      block: queries, and keys, of a tile.
      blocks: tiles of a row.
      near_keys: keys of a group whose mean score counts, as in pallas_kernels/visit.py.
      at_once: blocks that a program takes, a power of two.
      width: length of the bias table as given; 0: no bias.
      reach, near, entries, lead: of the table in the kernels' form: first distance that is
        the tail's; entries before the ramp; all entries; entries before b(0).
      maxima_row: numbers of a head that `lazy_table` leaves for the visits.
      has_slope, has_offset, packed: as in `Plan`.
      scale, size_of_scale: factor of scores, and that without its sign.
      skip_mass, exponent_limit: mass that a row may lose; scores within it do not overflow.
      distances, filled, parts: as in `by_xla.key_ranges`.
      straight: parts have sums over distances rather than over the diagonals of tiles.
      part: blocks of queries of each of the parts.
      rows: of the batch in a group.
      row_runs: runs of `ROWS` queries that cover a row.
      has_tail_sums: some tiles lie past the table.
      kv_pairs, work_parts: (batch, key head) that are ranked, and numbers of work of each.
      orders: of work tiles.
    """

    length: int = 0
    heads: int = 0
    group: int = 1
    head_dim: int = 0
    head_dim_padded: int = 0
    block: int = 64
    blocks: int = 0
    near_keys: int = NEAR
    at_once: int = 1
    width: int = 0
    reach: int = 0
    near: int = 0
    entries: int = 0
    lead: int = 0
    maxima_row: int = 0
    has_slope: bool = False
    has_offset: bool = False
    packed: bool = False
    scale: float = 1.0
    size_of_scale: float = 1.0
    skip_mass: float = 0.0
    exponent_limit: float = 0.0
    distances: int = 0
    filled: int = 0
    parts: int = 0
    part: int = 0
    straight: bool = False
    rows: int = 0
    row_runs: int = 0
    has_tail_sums: bool = False
    kv_pairs: int = 0
    work_parts: int = 0
    orders: tuple[TileOrder, ...] = ()
