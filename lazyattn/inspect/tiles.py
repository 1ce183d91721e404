"""Which tiles the kernels can leave out, and what they cost by the count of their products.

For one head, v is the share of causal tiles that is visited (not negligible), r the
share that is live (some weight is above 0). In matrix products of a tile: softmax
attention takes 2 forward and 5 backward, Lazy Attention v + 2 r forward for inference,
v + 3 r for training, which keeps the sum of live values, and 3 v + 2 r backward.
Source: docs/lazy_attention.md, "Three kinds of tiles".
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lazyattn.inspect.sums import TILE
from lazyattn.inspect.walk import LayerInput
from pallas_kernels.visit import TileSizes, visit_ranges

SIZES = (64, 128)


def tile_counts(
    layer: LayerInput, live: Bool[Array, "rows heads tiles tiles"], skip_mass: float
) -> dict[str, Float[Array, "rows heads"]]:
    """Returns the numbers of tiles by row and head: causal_S, visited_S and live_S.

    A live tile that is not visited, which `skip_mass` allows where tau is almost 0,
    counts as neither.

    Args:
      layer: the layer.
      live: whether each tile of 64 x 64 has a weight above 0.
      skip_mass: as in `lazyattn.lazy_attention`.
    """
    counts: dict[str, Float[Array, "rows heads"]] = {}
    for size in SIZES:
        found, first = visit_counts(layer, skip_mass, size)
        of_size = _merge(live, size // TILE)
        visits = jnp.arange(of_size.shape[-1]) >= first[..., None]
        counts |= {f"{name}_{size}": x for name, x in found.items()}
        counts[f"live_{size}"] = (of_size & visits).sum(axis=(-2, -1), dtype=jnp.float32)
    return counts


def visit_counts(
    layer: LayerInput, skip_mass: float, size: int = SIZES[0]
) -> tuple[dict[str, Float[Array, "rows heads"]], Int[Array, "rows heads query_tiles"]]:
    """Returns the numbers of tiles, causal and visited, and the first that is visited.

    Args:
      layer, skip_mass: as in `tile_counts`.
      size: of a tile, queries and keys.
    """
    first, last = _ranges(layer, skip_mass, size)
    rows, heads, _ = first.shape
    counts = {
        "causal": jnp.full((rows, heads), (last + 1).sum(), jnp.float32),
        "visited": (last - first + 1).sum(axis=-1).astype(jnp.float32),
    }
    return counts, first


def _ranges(
    layer: LayerInput, skip_mass: float, size: int
) -> tuple[Int[Array, "rows heads query_tiles"], Int[Array, " query_tiles"]]:
    """Returns the first and the last key tile that each query tile visits."""
    heads, kv_heads = layer.query.shape[2], layer.key.shape[2]
    found: dict[int, Array] = {}
    # Heads of a group have one window.
    for window in dict.fromkeys(layer.windows):
        groups = [g for g in range(kv_heads) if layer.windows[g * heads // kv_heads] == window]
        chosen = [head for head in range(heads) if layer.windows[head] == window]
        first = layer.first
        if window is not None:
            first = jnp.maximum(first, jnp.arange(first.shape[1]) - (window - 1))
        index = np.asarray(chosen)
        ranges = visit_ranges(
            layer.query[:, :, index],
            layer.key[:, :, np.asarray(groups)],
            None if layer.bias is None else layer.bias[index],
            None if layer.offset is None else layer.offset[index],
            first,
            scale=layer.query.shape[-1] ** -0.5,
            skip_mass=skip_mass,
            tiles=TileSizes(size, size),
        )
        found |= {head: ranges.first[:, i] for i, head in enumerate(chosen)}
    return jnp.stack([found[head] for head in range(heads)], axis=1), ranges.last


def _merge(
    live: Bool[Array, "rows heads tiles tiles"], factor: int
) -> Bool[Array, "rows heads merged merged"]:
    missing = -live.shape[-1] % factor
    live = jnp.pad(live, ((0, 0), (0, 0), (0, missing), (0, missing)))
    return jax.lax.reduce_window(
        live, False, jax.lax.bitwise_or, (1, 1, factor, factor), (1, 1, factor, factor), "valid"
    )


def cost_over_softmax(
    visited: Float[np.ndarray, "..."], live: Float[np.ndarray, "..."], has_offset: bool
) -> dict[str, Float[np.ndarray, "..."]]:
    """Returns the tile products over those of softmax attention that visits every tile.

    Args:
      visited: share of the causal tiles that is visited.
      live: share that is live.
      has_offset: whether there is a threshold; without one all that is visited is live
        and softmax's own count applies.

    Returns:
      inference (forward alone), forward (of training), backward, and training.
    """
    if not has_offset:
        return {name: visited for name in ("inference", "forward", "backward", "training")}
    return {
        "inference": (visited + 2 * live) / 2,
        "forward": (visited + 3 * live) / 2,
        "backward": (3 * visited + 2 * live) / 5,
        "training": (4 * visited + 5 * live) / 7,
    }
