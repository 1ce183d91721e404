"""Who does what when: CTAs that stay, one an SM, take work tile after work tile.

So the warp that fetches is already at the next work tile while the warpgroups that compute end
the one before, and what starts a CTA is paid for once. A counter in global memory deals work
tiles out, to whoever is free, in the order of `TileOrder`.

Heads differ tenfold in what they visit, and work tiles of one head as much again; whoever gets a
long one last works on alone. So heads come in the order of their work, most first, and what is
left for the end are short work tiles of short heads.

Within that order heads are cut into sections whose keys and values fit into the L2 cache,
which all heads together would not, and each section starts with its longest work tiles: late
queries, which see more keys, or early keys, which more queries see.
"""

import dataclasses
from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.mosaic_gpu import memory
from pallas_kernels.mosaic_gpu.kernel_types import Carry, Refs, Scalar, Scratch

# SMs of an H100 or H200 SXM. On a smaller one some CTAs start late and find nothing left.
_SMS = 132
_INTERPRETED = 2
# Work tiles whose number is kept: the one in work, the next, and those that a warpgroup may not
# have read yet: it has read the one before the last whose own operand was replaced.
_SLOTS = 4


def ctas(work_tiles: int, interpret: bool) -> int:
    """Returns how many CTAs to launch."""
    return min(work_tiles, _INTERPRETED if interpret else _SMS)


def scratch() -> Scratch:
    """Returns the types of the SMEM buffers and barriers that `PersistentTileScheduler` takes."""
    return {
        "persistent_smem": plgpu.SMEM((_SLOTS,), jnp.int32),
        "persistent_full": plgpu.Barrier(num_barriers=_SLOTS),
    }


@dataclasses.dataclass(frozen=True)
class PersistentTileScheduler:
    """The work tiles of one launch, as seen by all warpgroups of a CTA.

    Attributes:
      work_tiles: how many there are.
      ref: the kernel's refs, with what `scratch` describes, and their `tile_order`.
      cta: index of this CTA; the grid has `ctas(work_tiles, interpret)`.
      interpret: whether this is interpret mode, which has no counter: work tiles go round in turn.
    """

    work_tiles: int
    ref: Refs
    cta: Scalar
    interpret: bool

    def each(
        self, fetches: bool, body: Callable[[Scalar, Scalar, Carry], Carry], carry: Carry
    ) -> tuple[Scalar, Carry]:
        """Runs body(work tile, n, carry) -> carry for each work tile this CTA gets, n = 0, 1, ...

        Every warpgroup calls it, and gets the same work tiles. Returns how many, and the carry.

        Args:
          fetches: whether this is the warpgroup that fetches. Its first warp must, for each
            work tile, wait for the warpgroups that compute to give back something of the work tile
            before.
          body: what to do.
          carry: for the first call: a tree of scalars.
        """
        if self.interpret:
            count = ctas(self.work_tiles, self.interpret)
            mine = lax.div(jnp.int32(self.work_tiles - 1 + count) - self.cta, jnp.int32(count))
            return mine, lax.fori_loop(
                0, mine, lambda n, carry: body(self.cta + n * count, n, carry), carry
            )
        words, full = self.ref["persistent_smem"], self.ref["persistent_full"]

        def slot(n):
            return lax.rem(n, jnp.int32(_SLOTS))

        def next_work_tile(n):
            if fetches:
                # Not before all copies for the work tile before are under way: who takes early
                # holds a work tile back that another CTA could begin.
                takers = ctas(self.work_tiles, self.interpret)
                memory.take_number(self.ref["tile_order"], words, slot(n), takers)
                plgpu.barrier_arrive(full.at[slot(n)])
            plgpu.barrier_wait(full.at[slot(n)])
            return words[slot(n)]

        def step(state):
            work_tile, n, carry = state
            carry = body(work_tile, n, carry)
            return next_work_tile(n + 1), n + 1, carry

        first = jnp.int32(0)
        state = (next_work_tile(first), first, carry)
        return lax.while_loop(lambda state: state[0] < self.work_tiles, step, state)[1:]


# Keys and values of a section, half of an H100's L2 cache.
_SECTION_BYTES = 24 * 2**20


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """The order of (batch, head, tile), but for how heads rank by their work.

    Attributes:
      pairs: how many (batch, head) there are.
      heads: of each row of the batch.
      members: heads that share a rank, those of one key head.
      tiles: work tiles of each head.
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
    ) -> "TileOrder":
        """Returns the order for blocks of queries, with 16-bit keys and values."""
        section = _section(batch * heads // group, 4 * length * head_dim) * group
        return cls(batch * heads, heads, group, -(-length // queries), section, True)

    @classmethod
    def of_keys(
        cls, batch: int, kv_heads: int, group: int, length: int, keys: int, head_dim: int
    ) -> "TileOrder":
        """Returns the order for blocks of keys, which read queries and d_out."""
        section = _section(batch * kv_heads, 4 * length * head_dim * group)
        return cls(batch * kv_heads, kv_heads, 1, -(-length // keys), section, False)

    @classmethod
    def by_head(cls, batch: int, heads: int, group: int, tiles: int) -> "TileOrder":
        """Returns the order in which each head's work tiles lie side by side."""
        return cls(batch * heads, heads, group, tiles, 1, False)

    @property
    def work_tiles(self) -> int:
        """How many there are in all."""
        return self.pairs * self.tiles

    def item(self, number: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Returns batch, head and tile of a work tile by its number, as in `tile_order`."""
        pair = lax.div(number, jnp.int32(self.tiles))
        batch = lax.div(pair, jnp.int32(self.heads))
        return batch, pair - batch * self.heads, number - pair * self.tiles

    def tile_order(self, most_first: Int[Array, " kv_pairs"]) -> Int[Array, " work_tiles+1"]:
        """Returns the numbers of the work tiles as they are handed out, and a 0 to count them by.

        Args:
          most_first: each (batch, key head), the one with most work first.
        """
        turn = jnp.arange(self.work_tiles + 1, dtype=jnp.int32)
        start = turn // (self.section * self.tiles) * self.section
        size = jnp.minimum(self.section, self.pairs - start)
        within = turn - start * self.tiles
        # The last turn is none of a work tile; it gets a section of 0 heads.
        tile = within // jnp.maximum(size, 1)
        place = start + within - tile * size
        tile = self.tiles - 1 - tile if self.descending else tile
        pair = most_first[jnp.minimum(place, self.pairs - 1) // self.members] * self.members
        number = (pair + place % self.members) * self.tiles + tile
        return jnp.where(turn < self.work_tiles, number, 0)


def _section(pairs: int, one: int) -> int:
    """Returns how many of so many (batch, head), each of `one` bytes, a section has."""
    sections = -(-pairs // max(1, _SECTION_BYTES // one))
    return -(-pairs // sections)
