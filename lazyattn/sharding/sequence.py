"""Sequence (context) parallelism: every row's length split among devices.

Causal attention has little to do for early queries and much for late ones, so a device
holds an early and a late chunk. Of 2 n chunks, device r of n holds chunks r and
2 n - 1 - r: all devices then have the same number of (query, key) pairs.
`deal_sequence` brings rows into that order and `collect_sequence` back; in between only
attention minds the order, and it gathers keys and values of the whole length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from lazyattn.sharding.rules import active_mesh, fitting_spec, mesh_axes, num_shards
from pallas_kernels.varying import vary_alike


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
    early, late = held = tuple(jnp.split(x, 2, axis=1))
    hop = 0
    while (left := reach - hop * size) > 0:
        hop += 1
        # What neighbors hold now lies `hop` chunks before the next chunk of each. So many
        # devices have none so far before their early ones.
        held = _hop(tuple(part[:, max(0, size - left) :] for part in held), shards, hop - 1)
        early, late = (
            jnp.concatenate(both, axis=1) for both in zip(held, (early, late), strict=True)
        )
    rows = jnp.zeros((x.shape[0], reach + 2 * size * shards, *x.shape[2:]), x.dtype)
    starts = chunk_starts(2 * size * shards, shards)
    # Where they overlap, both are the same.
    rows = jax.lax.dynamic_update_slice_in_dim(rows, late, starts[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(rows, early, starts[0], axis=1)[:, reach:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fetch_chunks(
    x: Shaped[Array, "batch part *rest"], hops: Int[Array, ""], shards: int
) -> Shaped[Array, "batch length *rest"]:
    """Returns what `fetch_sequence` does for a reach of so many chunks, a traced number of them.

    Args:
      x: as there.
      hops: at least 1 and below `shards`, the same on all devices of the mesh.
      shards: as there.
    """
    held = tuple(jnp.split(x, 2, axis=1))
    size = held[0].shape[1]
    # A chunk before the row takes what is none of it.
    rows = jnp.zeros((x.shape[0], size + 2 * size * shards, *x.shape[2:]), x.dtype)
    chunks = chunk_starts(2 * shards, shards)

    def put(rows: Array, held: tuple[Array, ...], hop: Any) -> Array:
        for part, chunk in zip(held, chunks, strict=True):
            start = size * jnp.maximum(chunk - hop + 1, 0)
            rows = jax.lax.dynamic_update_slice_in_dim(rows, part, start, axis=1)
        return rows

    def step(hop: Array, carry: tuple[Array, tuple[Array, ...]]) -> Any:
        rows, held = carry
        held = _hop(held, shards)
        return put(rows, held, hop), held

    rows, _ = jax.lax.fori_loop(1, hops + 1, step, (put(rows, held, 0), held))
    return rows[:, size:]


def _fetch_chunks_fwd(x: Array, hops: Array, shards: int) -> tuple[Array, Array]:
    return fetch_chunks(x, hops, shards), hops


def _fetch_chunks_bwd(shards: int, hops: Array, d_rows: Array) -> tuple[Array, None]:
    size = d_rows.shape[1] // (2 * shards)
    d_rows = jnp.pad(d_rows, [(0, 0), (size, 0), *[(0, 0)] * (d_rows.ndim - 2)])
    early, late = chunk_starts(2 * shards, shards)
    last = jax.lax.axis_index(_axis()) == shards - 1

    def part(chunk: Array) -> Array:
        start = size * jnp.maximum(chunk + 1, 0)
        return jax.lax.dynamic_slice_in_dim(d_rows, start, size, axis=1)

    def step(done: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        # The sums of what came so many hops, on their way back.
        hop = hops - done
        both_ways = (late - hop <= early) & (late - hop >= early - hops)
        above = sums[0] + part(early - hop)
        below = sums[1] + jnp.where(both_ways, 0, part(late - hop))
        back = _send(above, [(r + 1, r) for r in range(shards - 1)])
        return back + jnp.where(last, below, 0), _send(
            below, [(r, r + 1) for r in range(shards - 1)]
        )

    own = (part(early), part(late))
    sums = jax.lax.fori_loop(0, hops, step, tuple(vary_alike(*map(jnp.zeros_like, own), like=own)))
    return jnp.concatenate([a + b for a, b in zip(sums, own, strict=True)], axis=1), None


fetch_chunks.defvjp(_fetch_chunks_fwd, _fetch_chunks_bwd)


def _hop(held: tuple[Array, ...], shards: int, without: int = 0) -> tuple[Array, ...]:
    """Returns, for chunks of an early and a late kind, those that the next chunks of each get.

    Args:
      held: what each device has.
      shards: devices.
      without: devices whose early ones are no chunks of the row; they need not send.
    """
    early, late = held
    up = _send(early, [(r, r + 1) for r in range(without, shards - 1)])
    down = _send(late, [(r, r - 1) for r in range(1, shards)])
    # Chunk n follows chunk n - 1, which the last device has, too.
    return up, jnp.where(jax.lax.axis_index(_axis()) == shards - 1, early, down)


def _send(x: Array, pairs: list[tuple[int, int]]) -> Array:
    return jax.lax.ppermute(x, _axis(), pairs) if pairs else jnp.zeros_like(x)
