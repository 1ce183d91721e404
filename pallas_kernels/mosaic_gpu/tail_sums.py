"""What the gradient of the bias's tail takes: sums over the tiles past the table."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import layout
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan
from pallas_kernels.mosaic_gpu.tile_kind import TileKind


def add(
    plan: Plan,
    sums: tuple[Float[Array, "64"], ...],
    x: Float[Array, "64 64"],
    apart: Int[Array, ""],
    kind: TileKind,
    *,
    interpret: bool,
) -> tuple[Float[Array, "64"], ...]:
    """Adds a tile if it lies wholly past the table.

    Args:
      plan: of the call.
      sums: two, per lane, of x and of x times the distance past the table's end.
      x: of a tile, its rows queries.
      apart: its first query less its first key.
      kind: where it lies; MASKED: not known before it is computed.
      interpret: for interpret mode.
    """

    def added():
        plain = layout.lane_sums(x, False, interpret=interpret)
        moment = layout.lane_sums(x, True, interpret=interpret)
        row = layout.row_index(interpret=interpret)
        distance = row + (apart - (plan.width - 1)).astype(jnp.float32)
        return sums[0] + plain, sums[1] + plain * distance - moment

    if kind is TileKind.MASKED:
        return lax.cond(apart >= UNIT * plan.near_units, added, lambda: sums)
    return added() if kind is TileKind.TAIL else sums
