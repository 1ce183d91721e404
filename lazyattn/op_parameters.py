"""What the learned arguments of `lazy_attention` may start as, or be made of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lazyattn.call import is_number
from lazyattn.errors import require


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Returns ALiBi's slopes, 2^(-8 (h + 1) / heads) for head h: the steepest first.

    As arguments of the op, `distance_bias = -slopes[:, None] * numpy.arange(width)` and
    `distance_slope = slopes` are ALiBi at every distance. Heads of one key/value head then have
    neighboring slopes. `lazyattn.model` also deals the groups out so that devices that share
    the heads have about equal work.

    Args:
      heads: number of query heads, at least 1.

    Returns:
      float32 [heads], in nats per token of distance.

    Raises:
      InputError: if heads is no integer of at least 1.

    Source: Press et al., arXiv 2108.12409, section 3; the formula serves any number of heads,
    where the authors interleave two lists if it is no power of two.
    """
    _require_count("heads", heads)
    return np.exp2(-8.0 * (np.arange(heads) + 1) / heads).astype(np.float32)


def t5_buckets_to_table(
    embedding: Float[Array, "buckets heads"], max_distance: int = 128
) -> Float[Array, "heads width"]:
    """Returns the `distance_bias` that a T5 decoder's relative position embedding stands for.

    The table has max_distance + 1 entries; the last one is the last bucket's, which T5 uses for
    everything farther away. So pass `distance_slope = zeros(heads)` beside it: without a
    slope the op's bias is 0 past the table. T5 does not scale its scores: pass `scale=1.0`
    too for a model of T5's. Gradients reach the embedding as sums in a fixed order.

    Args:
      embedding: one row for each bucket, as in T5's checkpoints, floating. Of a
        decoder (`bidirectional=False`); of an encoder's, the first half of the
        rows is what looks back.
      max_distance: from which distance on all share the last bucket; more than half the
        number of buckets.

    Returns:
      [heads, max_distance + 1] in the embedding's dtype.

    Raises:
      InputError: for a shape or a dtype that doesn't fit, or too small a max_distance.

    Source: Raffel et al., arXiv 1910.10683, section 2.1: half of the buckets are
    for single distances, the others grow logarithmically up to max_distance.
    """
    embedding = jnp.asarray(embedding)
    require(
        embedding.ndim == 2 and embedding.shape[0] >= 2 and embedding.shape[1] >= 1,
        "embedding.shape",
        embedding.shape,
        "[buckets, heads] with at least 2 buckets",
    )
    floating = jnp.issubdtype(embedding.dtype, jnp.floating)
    require(floating, "embedding.dtype", str(embedding.dtype), "floating")
    buckets = embedding.shape[0]
    single = buckets // 2
    _require_count("max_distance", max_distance)
    require(
        max_distance > single,
        "max_distance",
        max_distance,
        f"more than {single}, the number of buckets that hold one distance",
    )
    distance = np.arange(max_distance + 1)
    # In float32 and in this order as T5 has it, so that bounds of buckets fall alike.
    ratio = np.maximum(distance, single).astype(np.float32) / np.float32(single)
    share = np.log(ratio) / np.float32(math.log(max_distance / single))
    far = single + (share * np.float32(buckets - single)).astype(np.int32)
    bucket = np.where(distance < single, distance, np.minimum(far, buckets - 1))
    # A product with zeros and ones: exact, and its gradient has no scatter.
    chosen = jax.nn.one_hot(bucket, buckets, dtype=embedding.dtype)
    return jnp.einsum("xb,bh->hx", chosen, embedding, precision=jax.lax.Precision.HIGHEST)


def init_offset(heads: int, tau: float = -0.5) -> Float[Array, " heads"]:
    """Returns what the offset of every head starts as.

    Args:
      heads: number of query heads, at least 1.
      tau: negative suppresses weak weights. The paper's models start at -1.0, where a
        document's first token attends to nothing and early gradients are small; ours
        start at -0.5, as the authors' training code does.

    Returns:
      float32 [heads].

    Raises:
      InputError: if heads is no integer of at least 1, or tau no finite number.

    Source: arXiv 2601.00919, section on Elastic-Softmax, and its authors' code.
    """
    _require_count("heads", heads)
    require(is_number(tau), "tau", tau, "a finite number")
    return jnp.full(heads, tau, jnp.float32)


def _require_count(name: str, value: int) -> None:
    is_count = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1
    require(is_count, name, value, "an integer of at least 1")
