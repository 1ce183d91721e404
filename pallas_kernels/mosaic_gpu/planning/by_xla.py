"""The planning of a call in plain JAX; see `by_triton` for the same in few launches."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import bias as bias_lib
from pallas_kernels.mosaic_gpu.plan import BLOCK, EXPONENT_LIMIT, LOG2_E, Plan, reference
from pallas_kernels.mosaic_gpu.planning.types import KeyRanges, ParameterGradients, Table, Visits
from pallas_kernels.mosaic_gpu.scheduler import TileOrder
from pallas_kernels.problem import Inputs
from pallas_kernels.visit import TileSizes, ranges_by_norms, tile_norms


def table(
    plan: Plan,
    distance_bias: Float[Array, "heads width"] | None,
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Table:
    """Returns the bias in the kernels' form, of a row of this length."""
    del length
    return Table(*plan.table(distance_bias, distance_slope), None)


def visits(plan: Plan, inputs: Inputs, table: Table) -> Visits:
    """Returns which tiles are visited, and whether no exponential can overflow."""
    del table
    query, key, segment_start = inputs.query, inputs.key, inputs.segment_start
    length, heads = query.shape[1:3]
    bias = None
    if inputs.distance_bias is not None:
        bias = bias_lib.expand(inputs.distance_bias, inputs.distance_slope, length)
    if not plan.packed:
        segment_start = jnp.zeros_like(segment_start)
    tiles = TileSizes(BLOCK, BLOCK)
    norms = tile_norms(query, key, bias, segment_start, plan.scale, tiles)
    ranges = ranges_by_norms(
        norms if plan.skip_mass > 0 else None,
        *(heads, bias, inputs.offset, segment_start, plan.skip_mass, tiles),
    )
    bound = jnp.prod(jnp.max(jnp.stack([norms.query, norms.key]), axis=-1), axis=0)
    if bias is not None:
        # Without a score of its own a row's sum has no lower bound.
        largest = jnp.max(bias, axis=1) - reference(bias)
        bound = bound + jnp.where(bias[:, 0] == -jnp.inf, jnp.inf, largest)
    blocks = jnp.arange(ranges.first.shape[-1], dtype=jnp.int32)
    work = jnp.sum(blocks - ranges.first + 1, axis=-1, keepdims=True)
    return Visits(ranges.first, (bound * LOG2_E <= EXPONENT_LIMIT).astype(jnp.int32), work)


def tile_orders(
    work: Int[Array, "batch heads parts"], group: int, orders: Sequence[TileOrder]
) -> list[Int[Array, " work_tiles+1"]]:
    """Returns the numbers of work tiles as they are handed out, in each of some orders.

    Args:
      work: of each head, see `Visits`.
      group: query heads a key head: they rank together.
      orders: see `TileOrder`.
    """
    total = work.sum(axis=-1).reshape(-1, group).sum(axis=-1)
    most_first = jnp.argsort(-total, stable=True)
    return [order.tile_order(most_first) for order in orders]


def key_ranges(
    first: Int[Array, "batch heads blocks"],
    live: Int[Array, "batch heads blocks"],
    work: Int[Array, "batch heads parts"],
    group: int,
    orders: Sequence[TileOrder],
    distances: int,
    filled: int,
    parts: int,
) -> KeyRanges:
    """Returns the ranges of the backward pass, and the order of its work tiles.

    Args:
      first: first block of keys that each block of queries visits.
      live: first one of them that may be live.
      work: as for `tile_orders`, like the next two.
      group: query heads a key head.
      orders: wanted.
      distances: of tiles, in blocks, from the diagonal on, that have an entry inside the bias
        table; 0: there is no bias.
      filled: the same with those that only fill up the warpgroups and have nothing to do.
      parts: runs that the blocks of queries are cut into for the bias table's gradient.
    """
    by_distance = distance_ranges(first, live, distances, filled, parts) if distances else None
    found_orders = tile_orders(work, group, orders)
    return KeyRanges(_last_query(first), _last_query(live), by_distance, found_orders)


def _last_query(first: Int[Array, "batch heads blocks"]) -> Int[Array, "batch heads blocks"]:
    """Returns the last block of queries whose range of keys, from `first` on, has each block."""
    blocks = jnp.arange(first.shape[-1], dtype=jnp.int32)
    seen = (first[..., None] <= blocks) & (blocks <= blocks[:, None])
    return jnp.max(jnp.where(seen, blocks[:, None], 0), axis=-2)


def distance_ranges(
    first: Int[Array, "batch heads blocks"],
    live: Int[Array, "batch heads blocks"],
    distances: int,
    filled: int,
    parts: int,
) -> Int[Array, "batch heads parts filled 3"]:
    """Returns what `backward_dbias` wants to know of each distance and run of queries.

    The first query block of the run that visits the tile there, the first for which it may be
    live, and the one after the last that visits it; live ones are taken to be those from there on.
    Where nothing is visited the last is not above the first.
    """
    blocks = first.shape[-1]
    block = jnp.arange(blocks, dtype=jnp.int32)
    distance = jnp.arange(filled, dtype=jnp.int32)[:, None]
    key = block - distance
    size = -(-blocks // parts)
    part = jnp.arange(parts, dtype=jnp.int32)[:, None, None]
    exists = (key >= 0) & (block // size == part) & (distance < distances)

    def inside(first: Array) -> Bool[Array, "batch heads parts filled blocks"]:
        return exists & (first[:, :, None, None] <= key)

    visited, alive = inside(first), inside(live)
    start = jnp.where(visited, block, blocks).min(axis=-1)
    stop = jnp.where(visited, block + 1, 0).max(axis=-1)
    return jnp.stack([start, jnp.where(alive, block, blocks).min(axis=-1), stop], axis=-1)


def gradients(
    groups: int,
    width: int | None,
    has_slope: bool,
    of_offset: Float[Array, "batch heads blocks 64"] | None,
    sums: Float[Array, "batch parts heads filled columns"] | None,
    tail_sums: Float[Array, "batch heads blocks 2 64"] | None,
    *,
    length: int,
    distances: int,
) -> ParameterGradients:
    """Returns the gradients of the parameters, from what the kernels leave.

    Args:
      groups: that the batch is made of, each with gradients of its own.
      width: of the table as given; None: no bias.
      has_slope: whether it goes on past its end.
      of_offset: what each query adds to the gradient of tau; None without an offset.
      sums: of dS over the diagonals of tiles, of 128 columns; or of 64, over distances from 0
        on; None without a bias.
      tail_sums: for each query the sum of dS past the table, and of dS times the distance past its
        end; None without a slope or where no tile is there.
      length: of the sequence.
      distances: how many of `filled` are distances inside the table.
    """

    def by_group(x: Float[Array, "batch *axes"]) -> Float[Array, "groups rows *axes"]:
        return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])

    d_bias = d_slope = d_offset = None
    if of_offset is not None:
        d_offset = by_group(of_offset).sum(axis=(1, 3, 4))
    if sums is not None:
        assert width is not None
        near = by_group(sums).sum(axis=(1, 2))
        if sums.shape[-1] == BLOCK:
            near = near.reshape(*near.shape[:2], -1)
        else:
            near = bias_lib.join_diagonals(near[:, :, :distances, :-1])
        past = None if tail_sums is None else by_group(tail_sums).sum(axis=(1, 3, 5))
        reached = min(near.shape[2], length)
        d_bias, d_slope = bias_lib.adjoint(
            near[:, :, :reached], width, has_slope=has_slope, past=past
        )
    return ParameterGradients(d_bias, d_slope, d_offset)
