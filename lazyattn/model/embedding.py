"""Looking tokens up, on a mesh each device in its own part of the table."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lazyattn import sharding


def look_up(
    table: Float[Array, "vocab width"], ids: Int[Array, "batch length"]
) -> Float[Array, "batch length width"]:
    """Returns the table's rows, in its dtype; an id out of range gives NaN.

    A device holds part of the vocabulary and, of those rows, part of the width: it
    fetches the rest of the width, takes what it has for its own tokens, and devices
    with other parts of the vocabulary add theirs. Left to itself, XLA would bring
    every token's row to every device.

    Args:
      table: one row a token.
      ids: int32.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return jnp.take(table, ids, axis=0, mode="fill")
    rows = sharding.fitting_spec(mesh, table.shape, "vocab", "embed")
    tokens = sharding.fitting_spec(mesh, ids.shape, "batch", "length")
    vocab = table.shape[0]

    def share(table: Array, ids: Array) -> Array:
        if rows[1] is not None:
            table = jax.lax.all_gather(table, rows[1], axis=1, tiled=True)
        known = (ids >= 0) & (ids < vocab)
        if rows[0] is None:
            found = jnp.take(table, ids, axis=0, mode="clip")
        else:
            mine = ids - jax.lax.axis_index(rows[0]) * table.shape[0]
            here = (mine >= 0) & (mine < table.shape[0])
            found = jnp.take(table, mine, axis=0, mode="clip")
            found = jax.lax.psum(jnp.where(here[..., None], found, 0), rows[0])
        return jnp.where(known[..., None], found, jnp.nan)

    return jax.shard_map(
        share,
        in_specs=(rows, tokens),
        out_specs=jax.sharding.PartitionSpec(*tokens, None),
        # What is gathered is the same everywhere, which the check can't know.
        check_vma=False,
    )(table, ids)
