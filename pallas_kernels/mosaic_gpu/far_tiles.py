"""Tiles that lie wholly past the bias table, which have loops of their own.

There the bias is one number, or with a slope affine in the distance. So nothing of it is loaded
from SMEM, where loads queue behind products; nothing is masked by causality; and what only
concerns the table, or only its tail, is decided when the loop is compiled.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import lanes, rings
from pallas_kernels.mosaic_gpu.plan import UNIT, Plan


def exist(plan: Plan, length: int) -> bool:
    """Returns whether a row of this length has such tiles."""
    return -(-length // UNIT) > plan.near_units


def loops(
    plan: Plan,
    length: int,
    diagonal: Any,
    start: Any,
    stop: Any,
    loop: Any,
    carry: Any,
    units: int = 1,
) -> Any:
    """Runs one loop over steps start, ..., stop-1 as two: near tiles, then those past the table.

    Args:
      plan: of the call.
      length: of its rows.
      diagonal: step of the tile on the diagonal, from which steps lead away.
      start: first step.
      stop: after the last one.
      loop: called as loop(far, start, stop, carry), where far is static; returns the next carry.
        There is no step if `stop` is not above `start`.
      carry: for the first step.
      units: of keys in a tile.

    Returns:
      the last carry.
    """
    if not exist(plan, length):
        return loop(False, start, stop, carry)
    # A wider tile's last unit may be the diagonal's neighbour.
    near = -(-(plan.near_units + units - 1) // units)
    first = jnp.asarray(diagonal + near, jnp.int32)
    carry = loop(False, start, lax.min(first, rings.as_index(stop)), carry)
    return loop(True, lax.max(first, rings.as_index(start)), stop, carry)


def bias(
    plan: Plan,
    apart: Int[Array, ""],
    tail: tuple[Float[Array, ""], Float[Array, ""]],
    *,
    falling: bool,
    whole: bool,
    interpret: bool,
) -> tuple[Any, Any]:
    """Returns a tile's bias and what is still to be added to it, as `Plan.bias_of_tile` does.

    Args:
      plan: of the call.
      apart: first query less first key.
      tail: value and slope, see `Plan.table`.
      falling: whether the tile's rows are queries rather than keys.
      whole: nothing is to be added.
      interpret: for interpret mode.

    Returns:
      the bias, one number or a tile [64, 64], not above 0 but for what is to be added; and that.
    """
    value, slope = tail
    if not plan.has_slope:
        return value, 0.0
    # The nearest entry has a distance of at least one more than that past the table's end.
    rest = value - slope * (apart - UNIT - (plan.reach - 1)).astype(jnp.float32)
    base = -UNIT * slope + rest if whole else -UNIT * slope
    tile = lanes.slanted(base, slope if falling else -slope, UNIT, interpret=interpret)
    return tile, 0.0 if whole else rest
