"""What the kernels do to one tile: its bias, its mask, its products.

A tile is [keys, queries]. Its distance is the index of its query tile's first key tile
minus its own index: at least 1 where all keys come before all queries; 0, -1, ... on the
diagonal, where the first -distance * keys queries see nothing and are cut off.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tpu.config import LANES
from pallas_kernels.tpu.plan import SUBLANES, Plan

# A score below any other, finite so that differences stay numbers.
LOWEST = -1.0e30
# A threshold that no weight passes.
UNREACHABLE = 1.0e30
# A tile must miss its threshold by this much, in units of log2, to be called dead: more
# than the rounding of its scores.
DEAD_SLACK = 1.0e-3

# Contracted axes of a product: of the left and of the right operand.
FIRST_FIRST = (((0,), (0,)), ((), ()))
LAST_FIRST = (((1,), (0,)), ((), ()))
LAST_LAST = (((1,), (1,)), ((), ()))


def dot(a: Array, b: Array, axes: Any) -> Float[Array, "m n"]:
    """Contracts with float32 accumulation and no loss on float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def at_tile(index: Any, size: int) -> pl.Slice:
    """Returns the positions of a tile."""
    return pl.ds(pl.multiple_of(index * size, size), size)


def bias_start(plan: Plan, distance: Any) -> Any:
    """Returns the first lane of `Plan.bias` that a tile at this distance reads."""
    return pl.multiple_of((distance + plan.ratio - 1) * plan.keys, LANES)


def bias_tile(
    plan: Plan, window: Float[Array, "8 window"], skipped: int
) -> Float[Array, "keys queries"]:
    """Returns a tile's bias from the lanes of `Plan.bias` at its `bias_start`.

    Key 8 a + s reads row s, 8 a lanes to the left of key s: turns of less than a vector,
    shared by all keys that are a multiple of 128 apart, and whole vectors.
    """
    turned = [window] + [
        pltpu.roll(window, SUBLANES * turn, 1) for turn in range(1, LANES // SUBLANES)
    ]
    strips = []
    for strip in range(plan.keys // SUBLANES):
        vectors, turn = divmod(strip, LANES // SUBLANES)
        start = plan.keys - LANES * vectors
        strips.append(turned[turn][:, start + skipped : start + plan.queries])
    return jnp.concatenate(strips, axis=0)


def add_diagonals(
    plan: Plan, total: Any, start: Any, tile: Float[Array, "keys queries"], skipped: int
) -> None:
    """Adds a tile's diagonals to the gradient of `Plan.bias`: the adjoint of `bias_tile`."""
    vectors = plan.bias_window // LANES
    key_vectors, skipped_vectors = plan.keys // LANES, skipped // LANES
    query_vectors = (plan.queries - skipped) // LANES
    zero = jnp.zeros((SUBLANES, LANES), jnp.float32)
    result = None
    for turn in range(LANES // SUBLANES):
        blocks = []
        for place in range(vectors):
            parts = []
            for vector in range(key_vectors):
                query = place - (key_vectors - vector) - skipped_vectors
                if 0 <= query < query_vectors:
                    key = LANES * vector + SUBLANES * turn
                    parts.append(tile[key : key + SUBLANES, LANES * query : LANES * (query + 1)])
            blocks.append(sum(parts[1:], parts[0]) if parts else zero)
        row = jnp.concatenate(blocks, axis=1)
        if turn:
            row = pltpu.roll(row, plan.bias_window - SUBLANES * turn, 1)
        result = row if result is None else result + row
    at = pl.ds(start, plan.bias_window)
    total[:, at] = total[:, at] + result


def visible(
    plan: Plan,
    document: Int[Array, "1 queries"] | None,
    key_tile: Any,
    shape: tuple[int, ...],
    *,
    diagonal: bool,
) -> Bool[Array, "keys queries"] | None:
    """Returns which keys the queries of a tile see; None: all.

    Args:
      plan: of the call.
      document: first key that each query sees; None: the first.
      key_tile: index of the tile of keys.
      shape: of the tile.
      diagonal: the tile's first query is its first key.
    """
    seen = None
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if diagonal:
        seen = key <= jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if document is not None:
        inside = key >= document - key_tile * plan.keys
        seen = inside if seen is None else seen & inside
    return seen


def thresholds(
    plan: Plan, tau: Any, scale: Float[Array, "1 queries"], query_tile: Any
) -> Float[Array, "1 queries"]:
    """Returns what a softmax weight must exceed to be live, -tau/n.

    No weight exceeds 1, said outright: see the Triton kernels. Queries past the length
    have no live weight.
    """
    threshold = -tau * scale
    dead = threshold >= 1
    if plan.padded_length != plan.length:
        row = jax.lax.broadcasted_iota(jnp.int32, threshold.shape, 1)
        dead = dead | (row + query_tile * plan.queries >= plan.length)
    return jnp.where(dead, UNREACHABLE, threshold)
