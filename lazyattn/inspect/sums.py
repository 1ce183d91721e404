"""What is added up over the queries of a row, by head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float

from lazyattn.inspect.walk import LayerInput
from lazyattn.inspect.weights import Block, Head, block_size, cell_size, map_heads, scan_blocks
from pallas_kernels.bias import sum_diagonals

# Queries and keys of the smallest tiles whose liveness is kept.
TILE = 64


def head_sums(layer: LayerInput, renormalize: bool) -> dict[str, Array]:
    """Returns a layer's sums over queries, with leading axes [rows, heads].

    Every visible pair of a query and a key counts alike. First means the first token of
    the query's document; later queries are all but those of first tokens, which can see
    nothing else.

    Returns:
      pairs, zeros: visible pairs, and those whose weight is exactly 0.
      queries, later, attending: queries, later ones, and those with any weight.
      mass, mass_later, first: sums of all weights, of those of later queries, and of
        those on first tokens by later queries.
      entropy_softmax, entropy: of the softmax and of the weights divided by their sum
        (attending queries only), nats.
      distance [length]: sum of the weights at each distance.
      received [length], own [length]: sum of the weights on each key, and of its own
        query's on it.
    """
    return _look(layer, renormalize, lambda head, block: None)[0]


def _block_sums(block: Block) -> dict[str, Array]:
    weights, visible = block.weights, block.visible
    size, keys = weights.shape
    index = block.start + jnp.arange(size)
    later = index > block.first
    mass = weights.sum(axis=-1)
    attending = mass > 0
    first = jnp.take_along_axis(weights, block.first[:, None], axis=-1)[:, 0]
    share = weights / jnp.where(attending, mass, 1)[:, None]
    real = visible.any(axis=-1)
    # Diagonal n has the distance start + n - (keys - 1).
    diagonals = jnp.pad(sum_diagonals(weights), (0, keys - size + 1))
    distance = jax.lax.dynamic_slice_in_dim(diagonals, keys - 1 - block.start, keys)
    own = jnp.where(index[:, None] == jnp.arange(keys), weights, 0)
    return {
        "pairs": visible.sum(dtype=jnp.float32),
        "zeros": (visible & (weights == 0)).sum(dtype=jnp.float32),
        "queries": real.sum(dtype=jnp.float32),
        "later": (real & later).sum(dtype=jnp.float32),
        "attending": attending.sum(dtype=jnp.float32),
        "mass": mass.sum(),
        "mass_later": jnp.where(later, mass, 0).sum(),
        "first": jnp.where(later, first, 0).sum(),
        "entropy_softmax": entr(block.softmax).sum(),
        "entropy": entr(share).sum(),
        "distance": distance,
        "received": weights.sum(axis=0),
        "own": own.sum(axis=0),
    }


def head_pictures(
    layer: LayerInput, renormalize: bool, rollout: Float[Array, "rows length columns"]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns `head_sums`, and what is kept of every query, with leading axes [rows, heads].

    Args:
      layer: the layer, of one row.
      renormalize: as in `scan_blocks`.
      rollout: what of the input has come to each token, before this layer.

    Returns:
      The sums, and
      live [query_tiles, key_tiles]: whether a tile of `TILE` x `TILE` has a weight
        above 0.
      map [cells, cells]: the largest weight of each cell of `cell_size(length)`.
      mass [length]: sum of each query's weights.
      rollout [length, columns]: the weights' product with `rollout`.
    """
    (flow,) = rollout
    length, cell = flow.shape[0], cell_size(flow.shape[0])

    def keep(head: Head, block: Block) -> dict[str, Array]:
        return {
            "live": _pooled(block.weights, TILE) > 0,
            "map": _pooled(block.weights, cell),
            "mass": block.weights.sum(axis=-1),
            "rollout": block.weights @ jnp.pad(flow, ((0, head.key.shape[0] - length), (0, 0))),
        }

    sums, kept = _look(layer, renormalize, keep)
    tiles, cells = -(-length // TILE), -(-length // cell)
    return sums, {
        "live": kept["live"][..., :tiles, :tiles],
        "map": kept["map"][..., :cells, :cells],
        "mass": kept["mass"][..., :length],
        "rollout": kept["rollout"][..., :length, :],
    }


def _look(
    layer: LayerInput, renormalize: bool, keep: Callable[[Head, Block], Any]
) -> tuple[dict[str, Array], Any]:
    length = layer.query.shape[1]

    def one(head: Head) -> Any:
        sums, kept = scan_blocks(
            head,
            renormalize,
            block_size(length),
            lambda block: (_block_sums(block), keep(head, block)),
        )
        return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)

    sums, kept = map_heads(layer, one)
    for name in ("distance", "received", "own"):
        sums[name] = sums[name][..., :length]
    return sums, kept


def _pooled(
    weights: Float[Array, "queries keys"], tile: int
) -> Float[Array, "query_tiles key_tiles"]:
    rows, columns = weights.shape
    return weights.reshape(rows // tile, tile, columns // tile, tile).max(axis=(1, 3))
