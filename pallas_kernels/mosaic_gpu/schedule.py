"""In which order pieces of work are handed out.

Heads differ tenfold in what they visit, and pieces of one head as much again; whoever gets a
long piece last works on alone. So heads come in the order of their work, most first, and what
is left for the end are short pieces of short heads.

Within that order heads are cut into sections whose keys and values fit into the L2 cache,
which all heads together would not, and each section starts with its longest pieces: late
queries, which see more keys, or early keys, which more queries see.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# Keys and values of a section, half of an H100's L2 cache.
_SECTION_BYTES = 24 * 2**20


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of (batch, head, tile), but for how heads rank by their work.

    Attributes:
      pairs: how many (batch, head) there are.
      heads: of each row of the batch.
      members: heads that share a rank, those of one key head.
      tiles: pieces of each head.
      section: how many (batch, head) a section has, a multiple of `members`; the last one
        maybe fewer.
      descending: a section's last tiles first; else its first.
    """

    pairs: int
    heads: int
    members: int
    tiles: int
    section: int
    descending: bool

    @classmethod
    def of_queries(
        cls, batch: int, heads: int, group: int, length: int, queries: int, head_dim: int
    ) -> "Order":
        """Returns the order for blocks of queries, with 16-bit keys and values."""
        section = _section(batch * heads // group, 4 * length * head_dim) * group
        return cls(batch * heads, heads, group, -(-length // queries), section, True)

    @classmethod
    def of_keys(
        cls, batch: int, kv_heads: int, group: int, length: int, keys: int, head_dim: int
    ) -> "Order":
        """Returns the order for blocks of keys, which read queries and d_out."""
        section = _section(batch * kv_heads, 4 * length * head_dim * group)
        return cls(batch * kv_heads, kv_heads, 1, -(-length // keys), section, False)

    @classmethod
    def by_head(cls, batch: int, heads: int, group: int, tiles: int) -> "Order":
        """Returns the order in which each head's pieces lie side by side."""
        return cls(batch * heads, heads, group, tiles, 1, False)

    @property
    def pieces(self) -> int:
        """How many there are in all."""
        return self.pairs * self.tiles

    def item(self, number: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Returns batch, head and tile of a piece by its number, as in `numbers`."""
        pair = lax.div(number, jnp.int32(self.tiles))
        batch = lax.div(pair, jnp.int32(self.heads))
        return batch, pair - batch * self.heads, number - pair * self.tiles

    def numbers(self, rank: Int[Array, " kv_pairs"]) -> Int[Array, " pieces+1"]:
        """Returns the numbers of the pieces as they are handed out, and a 0 to count them by.

        Args:
          rank: of each (batch, key head), 0 for the one with most work.
        """
        member = jnp.arange(self.members, dtype=jnp.int32)
        place = (rank[:, None] * self.members + member).reshape(-1, 1)
        section = place // self.section
        size = jnp.minimum(self.section, self.pairs - section * self.section)
        tile = jnp.arange(self.tiles, dtype=jnp.int32)
        turn = self.tiles - 1 - tile if self.descending else tile
        start = section * self.section
        turn = start * self.tiles + turn * size + place - start
        number = jnp.arange(self.pieces, dtype=jnp.int32)
        return jnp.zeros(self.pieces + 1, jnp.int32).at[turn.reshape(-1)].set(number)


def _section(pairs: int, one: int) -> int:
    """Returns how many of so many (batch, head), each of `one` bytes, a section has."""
    sections = -(-pairs // max(1, _SECTION_BYTES // one))
    return -(-pairs // sections)
