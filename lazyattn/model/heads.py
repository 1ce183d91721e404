"""Which heads are global, and which head starts with which slope."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

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


def global_heads(config: AttentionConfig) -> Bool[np.ndarray, " heads"]:
    """Returns which heads have no slope, no window and, if so set, no RoPE."""
    return _layout(config) == 0


def initial_slopes(config: AttentionConfig) -> Float[np.ndarray, " heads"]:
    """Returns the slope each head starts with, 0 for global heads.

    The other heads have ALiBi's slopes for as many heads as they are.
    """
    return _layout(config)


def _layout(config: AttentionConfig) -> Float[np.ndarray, " heads"]:
    heads, kv_heads, number = config.num_heads, config.kv_heads, config.num_global_heads
    if number == 0:
        return alibi_slopes(heads, kv_heads)
    slopes = np.zeros(heads, np.float32)
    if number == heads:
        return slopes
    if config.by_group:
        # Whole groups, at the end of equal blocks, so that equal shares of the heads
        # have the same groups global in the same places.
        blocks, group = head_blocks(config), heads // kv_heads
        local = np.zeros((blocks.number, blocks.groups, group), bool)
        local[:, : blocks.local] = True
        slopes[local.reshape(-1)] = alibi_slopes(heads - number, kv_heads - number // group)
        return slopes
    # Global heads are the flattest of all.
    ranks = np.argsort(np.argsort(-alibi_slopes(heads, kv_heads)))
    local = ranks < heads - number
    slopes[local] = np.exp2(-8.0 * (ranks[local] + 1) / (heads - number))
    return slopes


@dataclasses.dataclass(frozen=True)
class HeadBlocks:
    """Where local and global heads lie, which are whole key/value groups.

    Attributes:
      number: equal blocks that all heads consist of, one after the other.
      groups: key/value heads of a block.
      local: how many of them are local; they come first.
    """

    number: int
    groups: int
    local: int


def head_blocks(config: AttentionConfig) -> HeadBlocks:
    """Returns the blocks of a layer whose global heads are whole groups.

    There are as many as can be, so that as many devices as can be have the same heads.
    """
    number = config.num_global_heads * config.kv_heads // config.num_heads
    blocks = math.gcd(config.kv_heads, number) if number else 1
    groups = config.kv_heads // blocks
    return HeadBlocks(blocks, groups, groups - number // blocks)


def head_windows(config: AttentionConfig) -> tuple[int | None, ...]:
    """Returns the window of each head, None where it sees its whole document."""
    return tuple(None if is_global else config.window for is_global in global_heads(config))
