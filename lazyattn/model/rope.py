"""Where tokens stand in their documents, for RoPE."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from lazyattn.attention import document_starts


def document_positions(
    segment_ids: Int[Array, "batch length"],
) -> Int[Array, "batch length"]:
    """Returns each token's place in its document: 0, 1, ... from every change of id."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return index - document_starts(segment_ids)
