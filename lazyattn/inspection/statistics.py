"""What attention does: how much of it is zero, is left, and is on the first token."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lazyattn.model.config import ModelConfig
from lazyattn.model.rope import document_positions, document_starts
from lazyattn.model.transformer import attention_weights

# The weights of one row at a time are held, at most this many numbers of them.
_MAX_WEIGHTS = 2**27


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
    """Measures a model on a few rows, by the reference implementation of attention.

    Rows are cut short where their weights (quadratic in length) would be too many.

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
    heads = config.num_layers * config.attention.num_heads
    length = min(batch["inputs"].shape[1], max(int((_MAX_WEIGHTS / heads) ** 0.5), 1))
    totals = [
        _row_totals(
            params,
            batch["inputs"][row : row + 1, :length],
            batch["segment_ids"][row : row + 1, :length],
            config=config,
        )
        for row in range(min(batch["inputs"].shape[0], max_rows))
    ]
    total = {
        name: np.sum([np.asarray(row[name], np.float64) for row in totals], axis=0)
        for name in totals[0]
    }
    return AttentionStatistics(
        zero_share=total["zeros"] / total["pairs"],
        mass=total["mass"] / total["queries"],
        first_token=total["first"] / np.maximum(total["later_queries"], 1),
        queries=int(total["queries"]),
    )


def visible_pairs(segment_ids: Int[Array, "rows length"]) -> Bool[Array, "rows length length"]:
    """Returns which keys [.., i, j] each query may see: same document, not later.

    Padding (segment 0) sees nothing and is not seen.
    """
    index = jnp.arange(segment_ids.shape[1])
    start = document_starts(segment_ids)
    causal = index[:, None] >= index[None, :]
    same = start[:, :, None] == start[:, None, :]
    real = segment_ids > 0
    return causal & same & real[:, :, None] & real[:, None, :]


@functools.partial(jax.jit, static_argnames="config")
def _row_totals(
    params: Mapping[str, Any],
    inputs: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    *,
    config: ModelConfig,
) -> dict[str, Array]:
    """Returns sums by layer and head, and counts, over a row's queries."""
    weights = attention_weights(params, config, inputs, segment_ids)
    visible = visible_pairs(segment_ids)
    positions = document_positions(segment_ids)
    real = segment_ids > 0
    # On the visible pair whose key is its document's first token, query not that token.
    first = visible & (positions == 0)[:, None, :] & (positions > 0)[:, :, None]

    def total(
        values: Float[Array, "layers rows heads length length"],
        pairs: Bool[Array, "rows length length"],
    ) -> Float[Array, "layers heads"]:
        return jnp.sum(values * pairs[None, :, None], axis=(1, 3, 4))

    return {
        "zeros": total((weights == 0).astype(jnp.float32), visible),
        "mass": total(weights, visible),
        "first": total(weights, first),
        "pairs": jnp.sum(visible),
        "queries": jnp.sum(real),
        "later_queries": jnp.sum(real & (positions > 0)),
    }
