"""The distance bias on tiles.

The bias depends on i - j alone, so a tile of it is a Toeplitz matrix that depends
only on the head and on how far the tile lies from the diagonal. Its gradient is the
adjoint: sum each diagonal of dS, once per offset.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.varying import vary_alike


def expand(
    distance_bias: Float[Array, "heads width"],
    distance_slope: Float[Array, " heads"] | None,
    length: int,
) -> Float[Array, "heads length"]:
    """Returns the bias of every distance 0 <= x < length, differentiably.

    Inside the table b(x) = table[x]; past it table[W-1] - slope (x - (W-1)), or 0
    where no slope is given.
    """
    heads, width = distance_bias.shape
    if length <= width:
        return distance_bias[:, :length]
    if distance_slope is None:
        tail = jnp.zeros((heads, length - width), distance_bias.dtype)
    else:
        past = jnp.arange(1, length - width + 1, dtype=distance_bias.dtype)
        tail = distance_bias[:, -1:] - distance_slope[:, None] * past
    return jnp.concatenate([distance_bias, tail], axis=1)


def adjoint(
    d_values: Float[Array, "groups heads reached"],
    width: int,
    *,
    has_slope: bool,
    past: Float[Array, "groups heads 2"] | None = None,
) -> tuple[Float[Array, "groups heads width"], Float[Array, "groups heads"] | None]:
    """Returns the gradients of table and slope, of each group of the batch.

    Args:
      d_values: gradient of b(x) for distances 0 <= x < reached.
      width: of the table.
      has_slope: whether it goes on past its end.
      past: of distances that `d_values` has not, the sum of their gradients, and that of their
        gradients times how far they lie past the table's end; None: there are none.
    """
    _, heads, reached = d_values.shape
    table = jnp.zeros((heads, width), d_values.dtype)
    slope = jnp.zeros(heads, d_values.dtype) if has_slope else None
    leaves, tree = jax.tree.flatten((table, slope))
    table, slope = jax.tree.unflatten(tree, vary_alike(*leaves, like=(d_values,)))
    _, vjp = jax.vjp(lambda table, slope: expand(table, slope, reached), table, slope)
    d_table, d_slope = jax.vmap(vjp)(d_values)
    if past is not None:
        # In one fusion with what made it, unlike `at`.
        end = jnp.arange(width) == width - 1
        d_table = d_table + jnp.where(end, past[:, :, :1], 0)
        d_slope = d_slope - past[:, :, 1]
    return d_table, d_slope


def toeplitz(
    values: Float[Array, "*axes diagonals"], rows: int, columns: int
) -> Float[Array, "*axes rows columns"]:
    """Returns the tile with tile[r, c] = values[r - c + columns - 1].

    Args:
      values: one value a diagonal, `rows + columns - 1` of them, the top right
        corner's first.
      rows: queries of the tile.
      columns: keys of the tile.
    """
    period = rows + columns
    # A sequence of that period, written into rows one entry shorter than the period,
    # moves on by one place a row: skewed[r, c] = sequence[(c - r) mod period]. One
    # entry of it is never read. No gather, which is slow everywhere.
    sequence = jnp.concatenate(
        [
            values[..., :columns][..., ::-1],
            jnp.zeros_like(values[..., :1]),
            values[..., columns:][..., ::-1],
        ],
        axis=-1,
    )
    axes = values.shape[:-1]
    repeated = jnp.broadcast_to(sequence[..., None, :], (*axes, rows, period))
    flat = repeated.reshape(*axes, rows * period)[..., : rows * (period - 1)]
    return flat.reshape(*axes, rows, period - 1)[..., :columns]


def sum_diagonals(
    tile: Float[Array, "*axes rows columns"],
) -> Float[Array, "*axes diagonals"]:
    """Returns the sum of each diagonal: the adjoint of `toeplitz`."""
    *axes, rows, columns = tile.shape
    period = rows + columns
    no_axes = [(0, 0)] * len(axes)
    skewed = jnp.pad(tile, [*no_axes, (0, 0), (0, rows - 1)])
    flat = jnp.pad(skewed.reshape(*axes, rows * (period - 1)), [*no_axes, (0, rows)])
    sums = flat.reshape(*axes, rows, period).sum(axis=-2)
    return jnp.concatenate(
        [sums[..., :columns][..., ::-1], sums[..., columns + 1 :][..., ::-1]], -1
    )


def join_diagonals(
    diagonals: Float[Array, "*axes heads distances 2*size-1"],
) -> Float[Array, "*axes heads near"]:
    """Returns the sum over each distance x >= 0, from the diagonals of tiles `size` apart.

    Args:
      diagonals: for each distance of tiles from the diagonal on, as from `sum_diagonals`.
    """
    *axes, distances, count = diagonals.shape
    size = (count + 1) // 2
    # Tile n has the distances from (n - 1) size + 1 to (n + 1) size - 1.
    no_axes = [(0, 0)] * len(axes)
    halves = jnp.pad(diagonals, [*no_axes, (0, 0), (0, 1)])
    halves = halves.reshape(*axes, distances, 2, size)
    total = jnp.pad(halves[..., 0, :], [*no_axes, (0, 1), (0, 0)])
    total += jnp.pad(halves[..., 1, :], [*no_axes, (1, 0), (0, 0)])
    return total.reshape(*axes, -1)[..., size - 1 :]
