"""What attention does: how much of it is zero, is left, and is on the first token."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn.inspect.sums import head_sums
from lazyattn.inspect.tiles import visit_counts
from lazyattn.inspect.walk import LayerInput, walk
from lazyattn.model.config import ModelConfig
from lazyattn.model.distance_bias import bias_arguments
from lazyattn.model.parameters import stack_blocks
from pallas_kernels import bias as bias_lib

# A head's span ends where its bias stays this much below its largest: a factor of e^-8.
SPAN_NATS = 8.0


@dataclasses.dataclass(frozen=True)
class AttentionStatistics:
    """Means over queries, by layer and head. A pair is a query and a key it may see.

    Attributes:
      zero_share: share of the pairs whose weight is exactly 0.
      mass: mean sum of a query's weights; 1 for softmax.
      first_token: mean weight on the first token of the query's document. That
        token's own queries are left out, since they can see nothing else.
      queries: queries looked at.
    """

    zero_share: Float[np.ndarray, "layers heads"]
    mass: Float[np.ndarray, "layers heads"]
    first_token: Float[np.ndarray, "layers heads"]
    queries: int


def attention_statistics(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Mapping[str, Int[np.ndarray, "rows length"]],
    *,
    max_rows: int = 8,
) -> AttentionStatistics:
    """Measures a model on a few rows, in memory linear in their length.

    Args:
      params: the model's parameters.
      config: the model.
      batch: `inputs` and `segment_ids`, int32; 0 marks padding.
      max_rows: rows looked at, at most.

    Returns:
      The statistics.

    Raises:
      ValueError: if all of it is padding.
    """
    if not np.any(batch["segment_ids"][:max_rows]):
        raise ValueError("the batch has no tokens, only padding")
    rows = {name: batch[name][:max_rows] for name in ("inputs", "segment_ids")}
    found = jax.device_get(layer_sums(params, config=config, **rows))
    total = {name: np.sum(np.asarray(x, np.float64), axis=1) for name, x in found.items()}
    return AttentionStatistics(
        zero_share=total["zeros"] / total["pairs"],
        mass=total["mass"] / total["queries"],
        first_token=total["first"] / np.maximum(total["later"], 1),
        queries=int(total["queries"][0, 0]),
    )


@functools.partial(jax.jit, static_argnames="config")
def layer_sums(
    params: Mapping[str, Any],
    inputs: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    *,
    config: ModelConfig,
) -> dict[str, Float[Array, "layers rows heads ..."]]:
    """Returns `sums.head_sums` of every layer, and the tiles: "causal" and "visited".

    Args:
      params: the model's parameters.
      inputs: int32 token ids.
      segment_ids: documents are runs of equal ids; 0 marks padding.
      config: the model.
    """
    renormalize = config.attention.variant == "lazy_renormalized"

    def observe(layer: LayerInput, x: Array, carry: None) -> tuple[None, dict[str, Array]]:
        del x
        counts, _ = visit_counts(layer, config.attention.skip_mass)
        return carry, head_sums(layer, renormalize) | counts

    return walk(params, config, inputs, segment_ids, observe)[1]


def bias_spans(
    params: Mapping[str, Any], config: ModelConfig, length: int
) -> Int[Array, "layers heads"]:
    """Returns how far heads see: from which distance on the bias is far below its largest.

    Args:
      params: the model's parameters.
      config: the model, which has a distance bias.
      length: distances that are looked at; what a head gets whose bias never ends.

    Returns:
      Tokens; the bias stays `SPAN_NATS` below its largest value from there on.
    """
    if not config.scan_layers:
        params = stack_blocks(params)
    given = bias_arguments(params["blocks"]["attention"], config.attention)
    slope = given.get("distance_slope")
    bias = jax.vmap(lambda table, slope: bias_lib.expand(table, slope, length))(
        given["distance_bias"], slope
    )
    near = bias >= bias.max(axis=-1, keepdims=True) - SPAN_NATS
    return length - jnp.argmax(near[..., ::-1], axis=-1)
