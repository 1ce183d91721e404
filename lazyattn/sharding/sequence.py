"""Sequence (context) parallelism: every row's length split among devices.

Causal attention has little to do for early queries and much for late ones, so a device
holds an early and a late chunk. Of 2 n chunks, device r of n holds chunks r and
2 n - 1 - r: all devices then have the same number of (query, key) pairs.
`deal_sequence` brings rows into that order and `collect_sequence` back; in between only
attention minds the order, and it gathers keys and values of the whole length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from lazyattn.sharding.rules import active_mesh, fitting_spec, mesh_axes, num_shards


def sequence_shards(length: int) -> int:
    """Returns how many devices of the active mesh share each row of this length.

    1 without a mesh, and where the length is not a multiple of two chunks a device:
    then every device works on whole rows.
    """
    mesh = active_mesh()
    if mesh is None:
        return 1
    shards = num_shards(mesh, "length")
    return shards if length % (2 * shards) == 0 else 1


def deal_sequence(x: Shaped[Array, "batch length *rest"]) -> Shaped[Array, "batch length *rest"]:
    """Returns `x` with each device's part of the length holding an early and a late chunk.

    Every device sends and receives a part no larger than its own. As it was where
    `sequence_shards` is 1.
    """
    return _exchange(x, _deal)


def collect_sequence(
    x: Shaped[Array, "batch length *rest"],
) -> Shaped[Array, "batch length *rest"]:
    """Undoes `deal_sequence`."""
    return _exchange(x, _collect)


def _exchange(x, share):
    shards = sequence_shards(x.shape[1])
    mesh = active_mesh()
    if shards == 1 or mesh is None:
        return x
    place = fitting_spec(mesh, x.shape, "batch", "length", *[None] * (x.ndim - 2))
    return jax.shard_map(lambda part: share(part, shards), in_specs=place, out_specs=place)(x)


def _axis() -> str:
    (axis,) = mesh_axes("length")
    return axis


def _owner(chunk: int, shards: int) -> int:
    return min(chunk, 2 * shards - 1 - chunk)


def _deal(x: Array, shards: int) -> Array:
    """From chunks 2 r and 2 r + 1 to chunks r and 2 n - 1 - r, on device r."""
    even, odd = jnp.split(x, 2, axis=1)
    even = jax.lax.ppermute(even, _axis(), [(r, _owner(2 * r, shards)) for r in range(shards)])
    odd = jax.lax.ppermute(odd, _axis(), [(r, _owner(2 * r + 1, shards)) for r in range(shards)])
    # Chunk r is the early one: even on even devices.
    first = jax.lax.axis_index(_axis()) % 2 == 0
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis=1)


def _collect(x: Array, shards: int) -> Array:
    early, late = jnp.split(x, 2, axis=1)
    first = jax.lax.axis_index(_axis()) % 2 == 0
    even, odd = jnp.where(first, early, late), jnp.where(first, late, early)
    even = jax.lax.ppermute(even, _axis(), [(_owner(2 * r, shards), r) for r in range(shards)])
    odd = jax.lax.ppermute(odd, _axis(), [(_owner(2 * r + 1, shards), r) for r in range(shards)])
    return jnp.concatenate([even, odd], axis=1)


def chunk_starts(length: int, shards: int) -> Int[Array, "2"]:
    """Returns where this device's two chunks start; inside `jax.shard_map` only.

    Args:
      length: of the whole row.
      shards: `sequence_shards(length)`.
    """
    size = length // (2 * shards)
    index = jax.lax.axis_index(_axis()).astype(jnp.int32)
    return jnp.stack([index, 2 * shards - 1 - index]) * size


def gather_sequence(
    x: Shaped[Array, "batch part *rest"],
) -> Shaped[Array, "batch length *rest"]:
    """Returns whole rows, in order, from dealt parts; inside `jax.shard_map` only.

    The gradient that comes back is summed over devices, each keeping its part.
    """
    parts = jax.lax.all_gather(x, _axis())
    early, late = jnp.split(parts, 2, axis=2)
    chunks = jnp.moveaxis(jnp.concatenate([early, late[::-1]]), 0, 1)
    return chunks.reshape(x.shape[0], -1, *x.shape[2:])


def fetch_sequence(
    x: Shaped[Array, "batch part *rest"], reach: int, shards: int
) -> Shaped[Array, "batch length *rest"]:
    """Returns whole rows of which what this device's queries see is there; in `jax.shard_map` only.

    That is its own two chunks and the `reach` tokens before each of them; the others are 0.
    Chunks go from neighbor to neighbor, as far as they are needed: early ones up the devices,
    late ones down. Gradients come back the same way.

    Args:
      x: this device's part, an early and a late chunk.
      reach: tokens before its own that a token sees. Up to half of the length this sends less
        than `gather_sequence`: three quarters at most.
      shards: `sequence_shards(length)`.
    """
    size = x.shape[1] // 2
    last = jax.lax.axis_index(_axis()) == shards - 1
    early, late = held = list(jnp.split(x, 2, axis=1))
    hop = 0
    while (left := reach - hop * size) > 0:
        hop += 1
        # What neighbors hold now lies `hop` chunks before the next chunk of each.
        ends = [part[:, max(0, size - left) :] for part in held]
        up = [(r, r + 1) for r in range(hop - 1, shards - 1)]
        down = [(r, r - 1) for r in range(1, min(shards, 2 * shards - hop + 1))]
        # Chunk n follows chunk n - 1, which the last device has, too.
        held = [_send(ends[0], up), jnp.where(last, ends[0], _send(ends[1], down))]
        early, late = (
            jnp.concatenate(both, axis=1) for both in zip(held, (early, late), strict=True)
        )
    rows = jnp.zeros((x.shape[0], reach + 2 * size * shards, *x.shape[2:]), x.dtype)
    starts = chunk_starts(2 * size * shards, shards)
    # Where they overlap, both are the same.
    rows = jax.lax.dynamic_update_slice_in_dim(rows, late, starts[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(rows, early, starts[0], axis=1)[:, reach:]


def _send(x: Array, pairs: list[tuple[int, int]]) -> Array:
    return jax.lax.ppermute(x, _axis(), pairs) if pairs else jnp.zeros_like(x)
