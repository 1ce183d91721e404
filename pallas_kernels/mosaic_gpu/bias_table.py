"""Where tiles lie with respect to the bias table: loops that know it, and what is past the table.

There the bias is one number, or with a slope affine in the distance. So nothing of it is loaded
from SMEM, where loads queue behind products, and what only concerns the table, or only its
tail, is decided when the loop is compiled. Tiles in which documents or windows begin, or whose
head has a tau above 0, come last and have a loop of their own: a branch for them would keep the
compiler from putting products beside exponentials.
"""

import enum
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import layout, memory, pipeline
from pallas_kernels.mosaic_gpu.kernel_types import Carry, Index, Ref, Scalar
from pallas_kernels.mosaic_gpu.plan import BLOCK, Plan


class TileKind(enum.Enum):
    """Where a tile lies with respect to the bias table.

    Attributes:
      NEAR: it has an entry inside the table.
      TAIL: it lies wholly past the table.
      MASKED: anywhere; entries may have to be masked for more than causality.
    """

    NEAR = enum.auto()
    TAIL = enum.auto()
    MASKED = enum.auto()


def loops(
    plan: Plan,
    length: int,
    diagonal: Index,
    start: Index,
    stop: Index,
    loop: Callable[[TileKind, Scalar, Scalar, Carry], Carry],
    carry: Carry,
    *,
    masked: Index | None = None,
) -> Carry:
    """Runs one loop over steps start, ..., stop-1 as several that know more of their tiles.

    Args:
      plan: the call, and how it is done.
      length: of a row.
      diagonal: step of the tile on the diagonal, from which steps lead away.
      start, stop: first step, and after the last one.
      loop: called as loop(kind, start, stop, carry), with a static `TileKind`; returns the next
        carry. There is no step if `stop` is not above `start`.
      carry: for the first step.
      masked: first step with MASKED tiles; None: there are none.
    """
    start, stop = pipeline.as_index(start), pipeline.as_index(stop)
    end = stop if masked is None else lax.min(pipeline.as_index(masked), stop)
    if -(-length // BLOCK) > plan.near_blocks:
        first = pipeline.as_index(diagonal + plan.near_blocks)
        carry = loop(TileKind.NEAR, start, lax.min(first, end), carry)
        carry = loop(TileKind.TAIL, lax.max(first, start), end, carry)
    else:
        carry = loop(TileKind.NEAR, start, end, carry)
    return carry if masked is None else loop(TileKind.MASKED, lax.max(end, start), stop, carry)


def tile_bias(
    plan: Plan,
    table: Ref,
    tile_distance: Scalar,
    tail: tuple[Float[Array, ""], Float[Array, ""]],
    kind: TileKind,
    *,
    rows_are_keys: bool,
    whole: bool,
    interpret: bool,
) -> tuple[Array | float, Array | float]:
    """Returns the bias of a 64 x 64 tile, and what is still to be added to it.

    Loaded before the tile's products are issued: behind them in the queue to memory it would
    wait for the tensor cores. Of a tile past the table it is one number or a tile, not above 0
    but for what is to be added.

    Args:
      plan: the call, and how it is done.
      table: of the head, in SMEM; not read past the table.
      tile_distance: first query less first key.
      tail: value and slope, see `Plan.table`.
      kind: of the tile.
      rows_are_keys: of the tile, rather than queries.
      whole: nothing is to be added.
      interpret: for interpret mode.
    """
    if kind is not TileKind.TAIL:
        start, rest = plan.bias_of_tile(tile_distance, BLOCK, tail, rows_are_keys=rows_are_keys)
        plus = rest if whole else 0.0
        return memory.gather(table, start, BLOCK, interpret=interpret, plus=plus), rest
    value, slope = tail
    if not plan.has_slope:
        return value, 0.0
    # The nearest entry has a distance of at least one more than that past the table's end.
    rest = value - slope * (tile_distance - BLOCK - (plan.reach - 1)).astype(jnp.float32)
    base = -BLOCK * slope + rest if whole else -BLOCK * slope
    tile = layout.slanted(base, -slope if rows_are_keys else slope, BLOCK, interpret=interpret)
    return tile, 0.0 if whole else rest


def add_tail_sums(
    plan: Plan,
    sums: tuple[Float[Array, "64"], ...],
    x: Float[Array, "64 64"],
    tile_distance: Scalar,
    kind: TileKind,
    *,
    interpret: bool,
) -> tuple[Float[Array, "64"], ...]:
    """Adds a tile, its rows queries, if it lies wholly past the table.

    `sums` are two, per lane, of x and of x times the distance past the table's end. Where a
    MASKED tile lies is not known before it is computed.
    """

    def added():
        plain = layout.lane_sums(x, False, interpret=interpret)
        moment = layout.lane_sums(x, True, interpret=interpret)
        row = layout.row_index(interpret=interpret)
        distance = row + (tile_distance - (plan.width - 1)).astype(jnp.float32)
        return sums[0] + plain, sums[1] + plain * distance - moment

    if kind is TileKind.MASKED:
        return lax.cond(tile_distance >= BLOCK * plan.near_blocks, added, lambda: sums)
    return added() if kind is TileKind.TAIL else sums
