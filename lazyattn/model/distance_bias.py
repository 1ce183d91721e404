"""How the learned distance bias starts, and which head gets which slope."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lazyattn.model.config import AttentionConfig

# Tensor parallelism splits heads over a power of two of devices. Beyond eight, a few heads
# each leave nothing to balance.
_MAX_HALVINGS = 3
_HEADS_BEYOND = 4


def alibi_slopes(num_heads: int, num_kv_heads: int) -> Float[np.ndarray, " heads"]:
    """Returns ALiBi's slopes, dealt out evenly over groups and shards.

    The slopes are m_r = 2^(-8 (r + 1) / num_heads) for r = 0 ... num_heads - 1, for
    any number of heads. A head's work grows with its span, about 1 / m_r, so a
    contiguous share of the heads should hold as many long spans as any other. Heads
    are ranked by slope and dealt as cards are, to and fro, into two halves, each
    half into two again, up to eight shards (more where each keeps four heads), then
    into the grouped-query groups. Where a share is an even number of heads, all shares
    have the same product of slopes (equal sums of ranks).

    Args:
      num_heads: query heads H.
      num_kv_heads: key/value heads, a divisor of `num_heads`; query heads of a
        group are contiguous.

    Returns:
      float32 [heads], positive, per token of distance.

    Source: slopes from Press et al., arXiv 2108.12409, section 3; the order is ours.
    """
    factors: list[int] = []
    parts = 1
    while num_heads % (2 * parts) == 0 and (
        len(factors) < _MAX_HALVINGS or num_heads // (2 * parts) >= _HEADS_BEYOND
    ):
        factors.append(2)
        parts *= 2
    together = math.lcm(parts, num_kv_heads)
    if num_heads % together == 0:
        factors.append(together // parts)
    ranks = np.asarray(_deal(range(num_heads), factors))
    return np.exp2(-8.0 * (ranks + 1) / num_heads).astype(np.float32)


def _deal(ranks: Sequence[int], factors: Sequence[int]) -> list[int]:
    """Deals `ranks` to and fro into `factors[0]` hands, and each hand likewise."""
    if not factors:
        return list(ranks)
    hands: list[list[int]] = [[] for _ in range(factors[0])]
    for start in range(0, len(ranks), len(hands)):
        for hand, rank in zip(hands, ranks[start : start + len(hands)], strict=True):
            hand.append(rank)
        hands.reverse()
    # An odd number of rounds leaves the hands reversed, which changes no balance.
    return [rank for hand in hands for rank in _deal(hand, factors[1:])]


def table_init(config: AttentionConfig) -> nn.initializers.Initializer:
    """Returns the initialiser of the bias at the distances below `bias_width`.

    "alibi": table[h, x] = -m_h x. "normal": independent with standard deviation
    `bias_std` (the paper's model).
    """
    if config.bias_init == "normal":
        return nn.initializers.normal(config.bias_std)

    def init(key: Array, shape: Any, dtype: Any) -> Float[Array, "heads distance"]:
        del key
        slopes = jnp.asarray(alibi_slopes(config.num_heads, config.kv_heads), dtype)
        return -slopes[:, None] * jnp.arange(shape[1], dtype=dtype)

    return init


def slope_init(config: AttentionConfig) -> nn.initializers.Initializer:
    """Returns the initialiser of the slope of the tail past the table.

    "alibi": m_h, so the line goes on. "normal": 0, so the table's last entry does.
    """
    if config.bias_init == "normal":
        return nn.initializers.zeros_init()

    def init(key: Array, shape: Any, dtype: Any) -> Float[Array, " heads"]:
        del key, shape
        return jnp.asarray(alibi_slopes(config.num_heads, config.kv_heads), dtype)

    return init
