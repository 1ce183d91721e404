"""What becomes of the residual stream: collapse and massive activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_TOP = 3


def state_statistics(
    x: Float[Array, "rows length width"], real: Bool[Array, "rows length"]
) -> dict[str, Array]:
    """Returns the statistics of the token states after a layer, over the rows' tokens.

    Args:
      x: residual stream.
      real: False for padding.

    Returns:
      cosine: mean cosine of two different tokens of a row, mean over rows; 1 when all
        tokens point the same way.
      top [3]: largest magnitudes of single activations, each of another dimension.
      median: median magnitude.
      token, dimension: index in the row and in the width of the largest.

    Source: massive activations from Sun et al., arXiv 2402.17762.
    """
    x = x.astype(jnp.float32)
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    unit = jnp.where(real[..., None], unit, 0)
    count = real.sum(axis=-1).astype(jnp.float32)
    # sum_ij u_i . u_j without i = j, whose cosine is 1.
    pairs = jnp.maximum(count * (count - 1), 1)
    cosine = (jnp.square(unit.sum(axis=1)).sum(axis=-1) - count) / pairs
    size = jnp.where(real[..., None], jnp.abs(x), jnp.nan)
    # A dimension that is large tends to be so at several tokens: it counts once.
    largest, where = jax.lax.top_k(jnp.nanmax(size, axis=(0, 1)), _TOP)
    tokens = jnp.nanmax(size, axis=0)[:, where[0]]
    return {
        "cosine": cosine.mean(),
        "top": largest,
        "median": jnp.nanmedian(size),
        "token": jnp.nanargmax(tokens),
        "dimension": where[0],
    }
