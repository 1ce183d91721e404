"""In which order pieces of work are handed out.

Longest first keeps all SMs busy to the end:
late queries see more keys. But heads taken together read more keys and values than the L2
cache holds, so the heads are cut into sections that fit, and each section starts its late
queries first. Only the last section's end is a real end; sections are of one size, so that
the longest pieces of the last one begin long before.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# Keys and values of a section, half of an H100's L2 cache.
_SECTION_BYTES = 24 * 2**20


@dataclasses.dataclass(frozen=True)
class Order:
    """A fixed order of (batch, head, tile).

    Attributes:
      batch: rows of the batch.
      heads: heads of each.
      tiles: tiles of each head.
      section: how many (batch, head) a section has, the last maybe fewer.
      descending: the last tile first; else the first.
    """

    batch: int
    heads: int
    tiles: int
    section: int
    descending: bool

    @classmethod
    def of_queries(
        cls, batch: int, heads: int, length: int, queries: int, head_dim: int, group: int
    ) -> "Order":
        """Returns the order for blocks of queries, 16-bit keys and values."""
        one = 4 * length * head_dim
        section = _section(batch * heads // group, one) * group
        return cls(batch, heads, -(-length // queries), section, True)

    @classmethod
    def of_keys(cls, batch: int, kv_heads: int, length: int, keys: int, head_dim: int) -> "Order":
        """Returns the order for blocks of keys: early keys are seen by more queries."""
        one = 4 * length * head_dim
        section = _section(batch * kv_heads, one)
        return cls(batch, kv_heads, -(-length // keys), section, False)

    @property
    def pieces(self) -> int:
        """How many there are in all."""
        return self.batch * self.heads * self.tiles

    def item(self, work: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Returns batch, head and tile of the n-th piece."""
        pairs = self.batch * self.heads
        whole = pairs // self.section
        rest = pairs - whole * self.section
        in_section = self.section * self.tiles
        section = lax.div(work, jnp.int32(in_section))
        within = work - section * in_section
        size = jnp.int32(self.section)
        if rest:
            size = lax.select(section < whole, size, jnp.int32(rest))
        tile = lax.div(within, size)
        pair = section * self.section + (within - tile * size)
        if self.descending:
            tile = self.tiles - 1 - tile
        batch = lax.div(pair, jnp.int32(self.heads))
        return batch, pair - batch * self.heads, tile


def _section(pairs: int, one: int) -> int:
    """Returns how many of so many (batch, head), each of `one` bytes, a section has."""
    sections = -(-pairs // max(1, _SECTION_BYTES // one))
    return -(-pairs // sections)
