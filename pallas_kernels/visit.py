"""Which tiles of queries x keys are visited: everything but the negligible ones.

Decided before any score is computed, once a call, for forward and backward and every
backend alike. In a tile no score exceeds

    max |q| max |k| scale + max b          (Cauchy-Schwarz; max over the tile)

and a row's log-sum-exp is at least that of a few near scores: its score with itself, and,
since exp is convex, NEAR exp(mean score) for each group of NEAR keys among the nearest. So the
softmax mass of the far tiles of a row is bounded by the sum of exp(score bound - near sum), and
far tiles are left out while that sum stays below `skip_mass`: leaving all of them out moves no
row's mass by more. Tiles before the first document of a row are never
visited, whatever `skip_mass`.

Where tau > 0 every visible key has weight of at least tau / n however little mass it has, and
where tau is 0 each counts in its gradient, so such a head visits all that its documents and its
window allow.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Added to score bounds, in nats: covers float32 rounding of norms and scores.
_SLACK = 1e-3

# Keys of a group whose mean score counts, and the queries whose groups are the same: all that
# begin in this run of keys and in the run before.
NEAR = 16
RUN = 64


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Queries and keys of a tile."""

    queries: int
    keys: int

    def count(self, length: int) -> tuple[int, int]:
        """Returns how many query tiles and key tiles cover `length`."""
        return -(-length // self.queries), -(-length // self.keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisitRanges:
    """The tiles that count, as one range of key tiles a query tile.

    Attributes:
      first: [batch, heads, query_tiles], first key tile visited.
      last: [query_tiles], last key tile visited: the one with the diagonal's end.
    """

    first: Int[Array, "batch heads query_tiles"]
    last: Int[Array, " query_tiles"]

    @property
    def visited(self) -> Int[Array, "batch heads query_tiles"]:
        """How many key tiles each query tile visits."""
        return self.last - self.first + 1


def visit_ranges(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    bias: Float[Array, "heads length"] | None,
    offset: Float[Array, " heads"] | None,
    segment_start: Int[Array, "batch length"],
    *,
    scale: float,
    skip_mass: float,
    tiles: TileSizes,
) -> VisitRanges:
    """Returns the range of key tiles that each query tile must visit.

    Args:
      query: rotated queries, any float dtype.
      key: rotated keys.
      bias: b(x) of every distance 0 <= x < length, any shape of curve; None: 0.
      offset: tau of each head; None: ordinary softmax.
      segment_start: first key each query sees, in its document and its window.
      scale: factor of the scores.
      skip_mass: bound on the softmax mass a row may lose in all; 0: visit all that
        documents and causality allow.
      tiles: tile sizes.

    Source: docs/lazy_attention.md, "Three kinds of tiles".
    """
    heads, norms = query.shape[2], None
    if skip_mass > 0:
        norms = tile_norms(query, key, bias, segment_start, scale, tiles)
    return ranges_by_norms(norms, heads, bias, offset, segment_start, skip_mass, tiles)


class TileNorms(NamedTuple):
    """What score bounds need of queries and keys.

    Attributes:
      query: largest norm of each tile of queries, times the scale's size.
      key: largest norm of each tile of keys, once a query head.
      log_sum: least of what is known of a row's log-sum-exp, of each tile of queries.
    """

    query: Float[Array, "batch heads query_tiles"]
    key: Float[Array, "batch heads key_tiles"]
    log_sum: Float[Array, "batch heads query_tiles"]


def tile_norms(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    bias: Float[Array, "heads length"] | None,
    segment_start: Int[Array, "batch length"],
    scale: float,
    tiles: TileSizes,
) -> TileNorms:
    """Returns what `ranges_by_norms` needs of queries and keys; arguments as in `visit_ranges`."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    query, key = query.astype(accumulate), key.astype(accumulate)
    query_norm = jnp.sqrt(jnp.sum(query**2, axis=-1)) * abs(scale)
    key_norm = jnp.sqrt(jnp.sum(key**2, axis=-1))
    if heads == kv_heads:
        # Shaped as the norms are, so that XLA can read the inputs once for all three.
        own_score = scale * jnp.sum(query * key, axis=-1)
    else:
        grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        own_score = scale * jnp.sum(grouped * key[:, :, :, None, :], axis=-1)
        own_score = own_score.reshape(batch, length, heads)
    if bias is not None:
        own_score += bias[:, 0]
    log_sum = jnp.logaddexp(own_score, _near_sum(query, key, bias, segment_start, scale))

    def tile_maximum(x, size):
        # Every tile has a row that is none of padding.
        padded = _pad(_or_infinite(x), 1, size, constant_values=-jnp.inf)
        return padded.reshape(batch, -1, size, x.shape[-1]).max(axis=2).transpose(0, 2, 1)

    of_queries = jnp.concatenate([query_norm, -log_sum], axis=2)
    if tiles.queries == tiles.keys:
        together = jnp.concatenate([of_queries, key_norm], axis=2)
        found = jnp.split(tile_maximum(together, tiles.keys), [heads, 2 * heads], axis=1)
    else:
        found = [
            *jnp.split(tile_maximum(of_queries, tiles.queries), 2, axis=1),
            tile_maximum(key_norm, tiles.keys),
        ]
    query_norm, log_sum, key_norm = found
    key_norm = jnp.repeat(key_norm, heads // kv_heads, axis=1)
    return TileNorms(query_norm, key_norm, -log_sum)


def _near_sum(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    bias: Float[Array, "heads length"] | None,
    segment_start: Int[Array, "batch length"],
    scale: float,
) -> Float[Array, "batch length heads"]:
    """Returns log of the sum of NEAR exp(mean score) over a row's groups of near keys.

    A group counts if the row sees all of it, and it ends before the row's own key; -inf: none
    does.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    groups = RUN // NEAR
    query, key = _pad(query, 1, RUN), _pad(key, 1, RUN)
    runs = query.shape[1] // RUN
    means = key.reshape(batch, runs, groups, NEAR, kv_heads, head_dim).mean(axis=3)
    before = jnp.pad(means, [(0, 0), (1, 0), *[(0, 0)] * 3])[:, :-1]
    means = jnp.concatenate([before, means], axis=2)
    query = query.reshape(batch, runs, RUN, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum(
        "brqkgd,brckd->brqkgc", query, means, precision=jax.lax.Precision.HIGHEST
    )
    scores = scores.reshape(batch, runs, RUN, heads, 2 * groups)
    start = NEAR * jnp.arange(2 * groups) - RUN
    nearest = jnp.arange(RUN)[:, None] - start - (NEAR - 1)
    if bias is not None:
        # Distances past the row's end are nobody's.
        bias = jnp.pad(bias, [(0, 0), (0, 2 * RUN)])
        distances = jnp.maximum(nearest, 0)[..., None] + jnp.arange(NEAR)
        scores += bias[:, distances].mean(axis=-1).transpose(1, 0, 2)
    seen = RUN * jnp.arange(runs)[:, None] + start
    visible = _pad(segment_start, 1, RUN, mode="edge").reshape(batch, runs, RUN, 1)
    counts = (nearest > 0) & (seen[:, None] >= jnp.maximum(visible, 0))
    scores = jnp.where(counts[..., None, :], scores, -jnp.inf)
    near = jax.nn.logsumexp(scores, axis=-1) + math.log(NEAR)
    return near.reshape(batch, -1, heads)[:, :length]


def ranges_by_norms(
    norms: TileNorms | None,
    heads: int,
    bias: Float[Array, "heads length"] | None,
    offset: Float[Array, " heads"] | None,
    segment_start: Int[Array, "batch length"],
    skip_mass: float,
    tiles: TileSizes,
) -> VisitRanges:
    """Returns what `visit_ranges` does, for a caller that uses the norms for more.

    Args:
      norms: see `tile_norms`; None if `skip_mass` is 0.
      heads: of the queries.
      bias, offset, segment_start, skip_mass, tiles: as in `visit_ranges`.
    """
    batch, length = segment_start.shape
    query_tiles, key_tiles = tiles.count(length)
    last = jnp.minimum((jnp.arange(query_tiles) + 1) * tiles.queries - 1, length - 1) // tiles.keys

    # A padding row sees what the last row sees.
    segment_start = _pad(segment_start, 1, tiles.queries, mode="edge")
    first_tile = segment_start.reshape(batch, 1, query_tiles, tiles.queries).min(-1) // tiles.keys
    first = jnp.broadcast_to(first_tile, (batch, heads, query_tiles))
    if norms is not None:
        bound = _score_bounds(norms, bias, tiles)
        tile = jnp.arange(key_tiles)
        bound = jnp.where(tile >= first_tile[..., None], bound, -jnp.inf)
        # Far tiles first. The minimum only guards exp against overflow: such a tile
        # is visited in any case.
        mass = jnp.cumsum(tiles.keys * jnp.exp(jnp.minimum(bound, 20.0)), axis=-1)
        negligible = (mass <= skip_mass) & (tile < last[:, None])
        skipped = jnp.sum(negligible, axis=-1)
        if offset is not None:
            skipped = jnp.where(offset[:, None] >= 0, 0, skipped)
        first = jnp.maximum(first, skipped)
    return VisitRanges(first=first.astype(jnp.int32), last=last.astype(jnp.int32))


def _score_bounds(
    norms: TileNorms, bias: Float[Array, "heads length"] | None, tiles: TileSizes
) -> Float[Array, "batch heads query_tiles key_tiles"]:
    """Returns, for each tile, a bound on score minus log-sum-exp over its entries."""
    bound = norms.query[..., None] * norms.key[..., None, :] - norms.log_sum[..., None] + _SLACK
    if bias is not None:
        bound = bound + bias_maxima(bias.astype(norms.query.dtype), tiles)
    return bound


def bias_maxima(
    bias: Float[Array, "heads length"], tiles: TileSizes
) -> Float[Array, "heads query_tiles key_tiles"]:
    """Returns the largest bias among each tile's causal distances (-inf: none)."""
    heads, length = bias.shape
    query_tiles, key_tiles = tiles.count(length)
    # Cut distances into cells of the common divisor: a tile's distances are then
    # whole cells, but for one entry at the near end.
    cell = math.gcd(tiles.queries, tiles.keys)
    cells = (
        _pad(_or_infinite(bias), 1, cell, constant_values=-jnp.inf).reshape(heads, -1, cell).max(-1)
    )
    per_tile = (tiles.queries + tiles.keys) // cell
    before = tiles.keys // cell
    after = query_tiles * tiles.queries // cell - cells.shape[1]
    windows = jax.lax.reduce_window(
        jnp.pad(cells, ((0, 0), (before, after)), constant_values=-jnp.inf),
        -jnp.inf,
        jax.lax.max,
        window_dimensions=(1, per_tile),
        window_strides=(1, 1),
        padding="valid",
    )
    # Tile (I, J) covers distances from I queries - (J + 1) keys + 1 to
    # (I + 1) queries - J keys - 1; window w starts at distance w cell - keys.
    offset = jnp.arange(query_tiles)[:, None] * tiles.queries - jnp.arange(key_tiles) * tiles.keys
    return jnp.where(
        offset + tiles.queries > 0,
        windows[:, jnp.clip(offset // cell, 0, windows.shape[1] - 1)],
        -jnp.inf,
    )


def _or_infinite(x: Array) -> Array:
    """Returns x with NaN as infinity, which visits: on a CPU XLA's maxima may leave NaN out."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _pad(x: Array, axis: int, multiple: int, **how) -> Array:
    """Pads one axis at its end to a multiple."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, **how) if missing else x
