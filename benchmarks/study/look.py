"""What a model's attention does on rows of one document each: tiles, weights, activations."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn.inspect.sequences import LENGTH as SINK_LENGTH
from lazyattn.inspect.sequences import THRESHOLD
from lazyattn.inspect.statistics import SPAN_NATS
from lazyattn.inspect.sums import TILE
from lazyattn.inspect.tiles import SIZES, tile_counts
from lazyattn.inspect.walk import LayerInput, walk
from lazyattn.inspect.weights import Block, Head, block_size, map_heads, scan_blocks
from lazyattn.model.config import ModelConfig

# Queries looked at together; few large blocks are faster than many small ones.
_BLOCK = 1024


def look(
    params: Mapping[str, Any], inputs: Int[Array, "rows length"], *, config: ModelConfig
) -> dict[str, Array]:
    """Returns sums and counts by layer, row and head.

    Args:
      params: the model's parameters.
      inputs: token ids, each row one document.
      config: the model.

    Returns:
      causal_S, visited_S, live_S: tiles of S x S, as the kernels' visit ranges count them.
      mass, zeros, pairs: sum of all weights; visible pairs, and those whose weight is 0.
      first: sum of the weights on the first token.
      kurtosis, largest [layers]: of the residual stream after the layer, the kurtosis over
        the width (mean over tokens) and the largest magnitude.
      bias [layers, heads, length]: b(x), where there is one.
      offset [layers, heads]: tau, where there is one.
    """
    renormalize = config.attention.variant == "lazy_renormalized"
    length = inputs.shape[1]
    size = _BLOCK if length % _BLOCK == 0 else block_size(length)

    def observe(
        layer: LayerInput, x: Float[Array, "rows length width"], carry: None
    ) -> tuple[None, dict[str, Array]]:
        def one(head: Head) -> tuple[dict[str, Array], Array]:
            sums, live = scan_blocks(
                head, renormalize, size, lambda block: (_sums(block), _live(block))
            )
            return sums, live.reshape(-1, live.shape[-1])

        sums, live = map_heads(layer, one)
        tiles = -(-length // TILE)
        kept = sums | tile_counts(layer, live[..., :tiles, :tiles], config.attention.skip_mass)
        kept |= _activations(x)
        if layer.bias is not None:
            kept["bias"] = layer.bias
        if layer.offset is not None:
            kept["offset"] = layer.offset
        return carry, kept

    return walk(params, config, inputs, jnp.ones_like(inputs), observe)[1]


def _sums(block: Block) -> dict[str, Array]:
    return {
        "mass": block.weights.sum(),
        "first": block.weights[:, 0].sum(),
        "pairs": block.visible.sum(dtype=jnp.float32),
        "zeros": (block.visible & (block.weights == 0)).sum(dtype=jnp.float32),
    }


def _live(block: Block) -> Array:
    rows, columns = block.weights.shape
    tiles = block.weights.reshape(rows // TILE, TILE, columns // TILE, TILE)
    return tiles.max(axis=(1, 3)) > 0


def _activations(x: Float[Array, "rows length width"]) -> dict[str, Array]:
    x = x.astype(jnp.float32)
    centered = x - x.mean(axis=-1, keepdims=True)
    square = jnp.square(centered)
    kurtosis = jnp.square(square).mean(axis=-1) / jnp.square(square.mean(axis=-1))
    return {"kurtosis": kurtosis.mean(), "largest": jnp.abs(x).max()}


def shares(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the visited and live shares of the causal tiles, of both sizes of tile."""
    share = {}
    for size in SIZES:
        causal = found[f"causal_{size}"].sum(dtype=np.float64)
        for name in ("visited", "live"):
            share[f"{name}_{size}"] = float(found[f"{name}_{size}"].sum(dtype=np.float64) / causal)
    return share


def sink(found: Mapping[str, np.ndarray], length: int = SINK_LENGTH) -> float:
    """Returns the share of layers, sequences and heads whose first token is a sink.

    Source: Gu et al., arXiv 2410.10781, section 3, as `lazyattn.inspect.sequences` has it.
    """
    return float((found["first"] / length > THRESHOLD).mean())


def learned(found: Mapping[str, np.ndarray]) -> dict[str, list[list[float]] | None]:
    """Returns what heads have learned, by layer and head; None where a model has none.

    Returns:
      slopes: how much the bias falls a token, over the row's second half; 0 for global heads.
      offsets: tau.
      spans: distance from which on the bias stays `SPAN_NATS` below its largest value; the
        row's length where it never does.
    """
    slopes = spans = offsets = None
    if "bias" in found:
        bias = np.asarray(found["bias"], np.float64)
        half = bias.shape[-1] // 2
        slopes = _rounded((bias[..., half] - bias[..., -1]) / (bias.shape[-1] - 1 - half))
        near = bias >= bias.max(axis=-1, keepdims=True) - SPAN_NATS
        spans = _rounded(near.shape[-1] - np.argmax(near[..., ::-1], axis=-1))
    if "offset" in found:
        offsets = _rounded(found["offset"])
    return {"slopes": slopes, "offsets": offsets, "spans": spans}


def _rounded(x: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in np.asarray(x, np.float64)]
