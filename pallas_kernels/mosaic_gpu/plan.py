"""What all launches of one call share: static facts, and arrays in the kernels' form."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.mosaic_gpu import config
from pallas_kernels.mosaic_gpu.config import Tunings
from pallas_kernels.problem import Problem

LOG2_E = math.log2(math.e)
# A running maximum below any other, finite so that differences stay numbers.
LOWEST = -1.0e30
# A masked score. Where a row has no other, its sum is 0 and its weights are no numbers.
MASKED = -math.inf
# What the log-sum-exp of such a row is for the backward pass: then it has no weights.
UNREACHABLE = 1.0e30
# Queries and keys that visit ranges and live ranges are counted in.
BLOCK = 64
# A tile counts as dead only if it is so by this share: more than the rounding of exponentials.
DEAD_SLACK = 1e-3
# Exponents of two that sums of exponentials may reach without a running maximum.
EXPONENT_LIMIT = 100.0

_LANES = 128
# Entries before b(0) in the table, and after the last: enough for tiles of 64 x 128.
LEAD = 128
_TRAIL = 256


class RowStat:
    """What the backward pass knows of each query: the kinds of [batch, heads, blocks, kinds, 64].

    Attributes:
      LSE: log2-sum-exp2 of its scores less b(0).
      DELTA: the sum over keys of P m dP.
      THRESHOLD: what a softmax weight must exceed to live.
      SEGMENT_START: the first key it sees.
    """

    LSE = 0
    DELTA = 1
    THRESHOLD = 2
    SEGMENT_START = 3


def threshold(offset: Float[Array, ""], offset_scale: Float[Array, "*rows"]) -> Array:
    """Returns what a softmax weight must exceed to live.

    A weight of 1, as a document's first token has, comes out of the kernels as 1 but for
    rounding; thresholds that only such a weight reaches are put out of reach.
    """
    limit = -offset * offset_scale
    return jnp.where(limit > 1 - 2.0**-12, 2.0, limit)


def reachable(lse: Float[Array, "*rows"]) -> Array:
    """Returns the log-sum-exp of rows, `UNREACHABLE` where they have no mass."""
    return jnp.where(lse == -jnp.inf, UNREACHABLE, lse)


def reference(distance_bias: Float[Array, "heads width"]) -> Float[Array, " heads"]:
    """Returns what tables hold their entries less of: b(0), or 0 where that is -inf."""
    first = distance_bias[:, 0]
    return jnp.where(first == -jnp.inf, 0, first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Problem):
    """A call, and how it is done.

    Attributes:
      tunings: of every kernel.
      by_triton: plan the call by Triton kernels.
      fetch_by_warpgroup: all of a warpgroup fetches rather than one warp of it. Interpret
        mode knows no warps, and nor does Pallas inside a `shard_map` that checks what
        varies.
    """

    tunings: Tunings
    by_triton: bool = False
    fetch_by_warpgroup: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Rows, and numbers a head, by which the kernels want queries, keys and values longer.

        TMA clips what lies past the end, but wants whole groups of 8 rows; interpret mode wants
        whole tiles.
        """
        rows = -self.length % (8 if self.interpret is None else 128)
        return rows, config.padded_head_dim(self.head_dim) - self.head_dim

    @property
    def reach(self) -> int:
        """Distances from here on are the tail's: a tile wholly there reads no table."""
        return max(self.width, 1)

    @property
    def near_blocks(self) -> int:
        """Tiles of 64 x 64 this many blocks from the diagonal, or more, lie past the table."""
        return -(-(self.reach + BLOCK - 1) // BLOCK)

    def has_tail(self, length: int) -> bool:
        """Returns whether some distance of a row of this length is past the table, and counts."""
        return self.has_slope and length > self.width

    def distances(self, blocks: int) -> int:
        """Returns how many distances of tiles, of a row of so many, the bias table reaches."""
        return min(config.distances(self.width), blocks)

    @property
    def near(self) -> int:
        """Entries of the table before the ramp that follows it."""
        return -(-self.reach // _LANES) * _LANES + LEAD + _TRAIL

    @property
    def table_rows(self) -> int:
        """Rows of `table`'s second axis: two copies of table and ramp."""
        return 2 * (self.near + _TRAIL) // _LANES

    def table(
        self,
        distance_bias: Float[Array, "heads width"] | None,
        distance_slope: Float[Array, " heads"] | None,
    ) -> tuple[
        Float[Array, "heads rows 128"], Float[Array, "heads rows 128"], Float[Array, "heads 2"]
    ]:
        """Returns the bias in the kernels' form, in units of log2 and less b(0).

        A row of scores may be shifted by a constant; less b(0), scores stay small. (If b(0) is
        -inf, less nothing; then they don't count as small.)

        Returns:
          For each head, twice, the second time without the first entry: `MASKED` for
          distances below 0, so that it masks; the table; the tail for as far as a tile
          that begins within the table can reach; then the tail again, for tiles wholly past
          the table, and if it has a slope relative to where it begins. First in the order of
          falling distances, for tiles whose rows are queries; then of rising ones, for tiles whose
          rows are keys.
          And for each head the tail's value at distance `reach` - 1 and its slope; without one,
          its value and 0.
        """
        heads = self.heads
        if distance_bias is None:
            values = jnp.zeros((heads, self.near - LEAD), jnp.float32)
            slope = end = jnp.zeros(heads, jnp.float32)
        else:
            values = bias_lib.expand(distance_bias, distance_slope, self.near - LEAD)
            values = LOG2_E * (values - reference(distance_bias)[:, None])
            if distance_slope is None:
                slope, end = jnp.zeros(heads, jnp.float32), values[:, -1]
            else:
                slope = LOG2_E * distance_slope
                end = values[:, self.reach - 1]
        if self.has_slope:
            ramp = -slope[:, None] * jnp.arange(_TRAIL, dtype=jnp.float32)
        else:
            ramp = jnp.broadcast_to(values[:, -1:], (heads, _TRAIL))
        rising = jnp.concatenate(
            [jnp.full((heads, LEAD), MASKED, jnp.float32), values, ramp], axis=1
        )
        # What was at n is now at the length less n.
        falling = jnp.roll(rising[:, ::-1], 1, axis=1)

        def twice(x: Float[Array, "heads entries"]) -> Float[Array, "heads rows 128"]:
            shifted = jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
            return jnp.stack([x, shifted], axis=1).reshape(heads, -1, _LANES)

        return twice(falling), twice(rising), jnp.stack([end, slope], axis=1)

    @property
    def exponent_scale(self) -> float:
        """Turns products of queries and keys into exponents of two."""
        return self.scale * LOG2_E

    def bias_of_tile(
        self,
        tile_distance: Int[Array, ""],
        keys: int,
        tail: tuple[Float[Array, ""], Float[Array, ""]],
        *,
        rows_are_keys: bool,
    ) -> tuple[Int[Array, ""], Float[Array, ""] | float]:
        """Returns where a tile's bias begins in the table, and what it lacks: 0 without a slope.

        Args:
          tile_distance: first query less first key, a multiple of 64.
          keys: of the tile.
          tail: value and slope, as in `table`.
          rows_are_keys: of the tile, rather than queries.
        """
        past = tile_distance - keys - (self.reach - 1)
        in_tail = past >= 0
        start = lax.select(in_tail, jnp.int32(self.near + keys), tile_distance + LEAD)
        if not rows_are_keys:
            start = self.near + _TRAIL - start
        if not self.has_slope:
            return start, 0.0
        value, slope = tail
        rest = lax.select(in_tail, value - slope * past.astype(jnp.float32), jnp.float32(0.0))
        return start, rest
