"""What the Triton kernels of `by_triton` are compiled for."""

import dataclasses

from pallas_kernels.mosaic_gpu.scheduler import TileOrder
from pallas_kernels.triton.config import padded_head_dim
from pallas_kernels.visit import NEAR

# Numbers that are added up side by side.
ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Static:
    """What one kernel is compiled for; kernels take it as one constant.

    Attributes:
      length, heads, group, head_dim: of queries, and query heads a key head.
      block: queries, and keys, of a tile.
      blocks: tiles of a row.
      near_keys: keys of a group whose mean score counts, as in pallas_kernels/visit.py.
      at_once: blocks that a program takes, a power of two.
      width: length of the bias table as given; 0: no bias.
      reach, near, entries, lead: of the table in the kernels' form: first distance that is
        the tail's; entries before the ramp; all entries; entries before b(0).
      has_slope, has_offset, packed: as in `Plan`.
      scale, skip_mass, exponent_limit: factor of scores; mass that a row may lose; scores
        within it do not overflow.
      distances, filled, parts: as in `by_xla.key_ranges`.
      straight: parts have sums over distances rather than over the diagonals of tiles.
      rows: of the batch in a group.
      has_tail_sums: some tiles lie past the table.
      kv_pairs, work_parts: (batch, key head) that are ranked, and numbers of work of each.
      orders: of work tiles.
    """

    length: int = 0
    heads: int = 0
    group: int = 1
    head_dim: int = 0
    block: int = 64
    blocks: int = 0
    near_keys: int = NEAR
    at_once: int = 1
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
    straight: bool = False
    rows: int = 0
    has_tail_sums: bool = False
    kv_pairs: int = 0
    work_parts: int = 0
    orders: tuple[TileOrder, ...] = ()

    @property
    def maxima_row(self) -> int:
        """Returns the numbers of a head that `lazy_table` leaves for the visits."""
        return self.blocks + 2 * self.block

    @property
    def size_of_scale(self) -> float:
        """Returns the scale, without its sign."""
        return abs(self.scale)

    @property
    def head_dim_padded(self) -> int:
        """Returns the head size, rounded up to a power of two."""
        return padded_head_dim(self.head_dim)

    @property
    def row_runs(self) -> int:
        """Returns how many runs of `ROWS` queries cover a row."""
        return -(-self.blocks * self.block // ROWS)

    @property
    def part(self) -> int:
        """Returns the blocks of queries of one part."""
        return -(-self.blocks // max(self.parts, 1))
