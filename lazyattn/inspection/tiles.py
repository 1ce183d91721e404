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
from jaxtyping import Array, Bool, Float

from lazyattn.inspection.sums import TILE
from lazyattn.inspection.walk import LayerInput
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
    counts = {}
    for size in SIZES:
        ranges = visit_ranges(
            layer.query,
            layer.key,
            layer.bias,
            layer.offset,
            layer.first,
            scale=layer.query.shape[-1] ** -0.5,
            skip_mass=skip_mass,
            tiles=TileSizes(size, size),
        )
        of_size = _merge(live, size // TILE)
        visits = jnp.arange(of_size.shape[-1]) >= ranges.first[..., None]
        rows, heads, _ = ranges.first.shape
        counts[f"causal_{size}"] = jnp.full((rows, heads), (ranges.last + 1).sum(), jnp.float32)
        counts[f"visited_{size}"] = ranges.visited.sum(axis=-1).astype(jnp.float32)
        counts[f"live_{size}"] = (of_size & visits).sum(axis=(-2, -1), dtype=jnp.float32)
    return counts


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
