"""Walking a head's tiles diagonal by diagonal.

All tiles at the same distance from the main diagonal share one Toeplitz bias tile,
and are one batched matrix product: query tiles against key tiles moved by the
distance. A head walks from the main diagonal outwards as far as its span, no farther.

Queries may be fewer than keys: they are the last ones then, `ahead` tiles of keys
coming before the first of them.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from pallas_kernels import bias as bias_lib

# Large enough that a tile's matrix products outweigh the loop around them.
_TILE_SIZE = 128
# A diagonal has fewer tiles the farther out it lies, but array shapes are static:
# the walk is cut into parts, each with the rows its nearest diagonal has. Each part
# is compiled by itself, so short walks are not cut.
_MAX_PARTS = 4
_TILES_A_PART = 4


def tile_size(length: int) -> int:
    """Returns how many queries, and keys, a tile holds where there are `length` queries."""
    return min(_TILE_SIZE, length)


def _part_bounds(key_tiles: int) -> list[int]:
    parts = max(1, min(_MAX_PARTS, key_tiles // _TILES_A_PART))
    return [key_tiles * part // parts for part in range(parts + 1)]


def _lead(key_tiles: int) -> int:
    bounds = _part_bounds(key_tiles)
    return max(stop - start for start, stop in itertools.pairwise(bounds)) - 1


def pad_lead(x: Shaped[Array, "tiles ..."]) -> Shaped[Array, "lead+tiles ..."]:
    """Puts zero tiles before the first key tile.

    A far diagonal has no key tile for the first query tiles; with this lead its
    slice exists all the same, and `Diagonal.visible` masks it.
    """
    return jnp.pad(x, [(_lead(x.shape[0]), 0)] + [(0, 0)] * (x.ndim - 1))


def drop_lead(x: Shaped[Array, "lead+tiles ..."], tiles: int) -> Shaped[Array, "tiles ..."]:
    """Undoes `pad_lead`."""
    return x[_lead(tiles) :]


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The tiles of one head that lie `tile_distance` tiles from the main diagonal.

    Attributes:
      tile_distance: query tile minus key tile; traced.
      first_row: first query tile taken; static, at most `tile_distance`.
      tiles: number of query tiles in all.
      ahead: key tiles before the first query tile's own.
      size: queries and keys of a tile.
    """

    tile_distance: Int[Array, ""]
    first_row: int
    tiles: int
    ahead: int
    size: int

    def queries(self, x: Shaped[Array, "tiles ..."]) -> Shaped[Array, "rows ..."]:
        """Takes the query tiles."""
        return x[self.first_row :]

    def set_queries(
        self, total: Shaped[Array, "tiles ..."], x: Shaped[Array, "rows ..."]
    ) -> Shaped[Array, "tiles ..."]:
        """Replaces the query tiles."""
        # Not `total.at[0:].set(x)`: XLA crashes on that no-op scatter under shard_map.
        return jax.lax.dynamic_update_slice_in_dim(
            total, x.astype(total.dtype), self.first_row, axis=0
        )

    def add_to_queries(
        self, total: Shaped[Array, "tiles ..."], x: Shaped[Array, "rows ..."]
    ) -> Shaped[Array, "tiles ..."]:
        """Adds to the query tiles."""
        return self.set_queries(total, self.queries(total) + x)

    def keys(self, x: Shaped[Array, "lead+tiles ..."]) -> Shaped[Array, "rows ..."]:
        """Takes the key tile of each query tile."""
        return jax.lax.dynamic_slice_in_dim(x, self._start, self.tiles - self.first_row)

    def add_to_keys(
        self, total: Shaped[Array, "lead+tiles ..."], x: Shaped[Array, "rows ..."]
    ) -> Shaped[Array, "lead+tiles ..."]:
        """Adds each query tile's part to its key tile."""
        return jax.lax.dynamic_update_slice_in_dim(
            total, self.keys(total) + x.astype(total.dtype), self._start, axis=0
        )

    @property
    def _start(self) -> Int[Array, ""]:
        return _lead(self.tiles + self.ahead) + self.ahead + self.first_row - self.tile_distance

    def bias(self, values: Float[Array, " length"]) -> Float[Array, "size size"]:
        """Returns the Toeplitz tile, given b(x) of the distances 0 <= x < length."""
        # The main diagonal's tile has masked distances below 0, padding rows of the
        # last tile some past the end: any value does there.
        length = (self.tiles + self.ahead) * self.size
        padded = jnp.pad(values, (self.size - 1, length - values.shape[0]))
        near = jax.lax.dynamic_slice_in_dim(
            padded, self.tile_distance * self.size, 2 * self.size - 1
        )
        return bias_lib.toeplitz(near, self.size, self.size)

    def add_to_bias(
        self, total: Float[Array, " padded"], x: Float[Array, "size size"]
    ) -> Float[Array, " padded"]:
        """Adds the sums of a tile's diagonals to a gradient of b(x).

        `total` starts with `size - 1` entries for the masked distances below 0.
        """
        start = self.tile_distance * self.size
        near = jax.lax.dynamic_slice_in_dim(total, start, 2 * self.size - 1)
        near = near + bias_lib.sum_diagonals(x)
        return jax.lax.dynamic_update_slice_in_dim(total, near, start, axis=0)

    def visible(
        self, segment_start: Int[Array, "tiles batch size"]
    ) -> Bool[Array, "rows batch size size"]:
        """Returns which keys each query sees: causal, from `segment_start` on."""
        within = jnp.arange(self.size)
        key_tile = jnp.arange(self.first_row, self.tiles) + self.ahead - self.tile_distance
        key = key_tile[:, None] * self.size + within
        causal = self.tile_distance * self.size + within[:, None] - within >= 0
        # No key before the first tile is at or after a document's start.
        in_document = key[:, None, None, :] >= self.queries(segment_start)[..., None]
        return causal & in_document


def over_diagonals(
    span: Int[Array, ""],
    tiles: int,
    ahead: int,
    size: int,
    body: Callable[[Diagonal, PyTree], PyTree],
    state: PyTree,
) -> PyTree:
    """Runs `state = body(diagonal, state)` for offsets 0 to `span`, nearest first."""
    bounds = _part_bounds(tiles + ahead)
    for start, stop in itertools.pairwise(bounds):
        first_row = max(0, start - ahead)

        def step(tile_distance, state, first_row=first_row):
            return body(Diagonal(tile_distance, first_row, tiles, ahead, size), state)

        state = jax.lax.fori_loop(start, jnp.minimum(stop, span + 1), step, state)
    return state
