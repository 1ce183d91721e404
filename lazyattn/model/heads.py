"""Which heads are global, and which head starts with which slope.

The heads of a layer are equal, so who gets which slope is free, and two things hang on it.

- A device that shares the heads holds a contiguous share of them. A head's work grows with
  its span, about 1 / slope, so every share should hold as many long spans as any other.
- Heads of one key/value head should have neighboring slopes: a cache must keep what the
  longest of them looks at.

So ALiBi's slopes, in their order, are cut into groups of neighbors, and the groups are laid
out so that equal contiguous shares have about equal work. That needs several groups in each
share. Where a device has but one or two key/value heads, `slope_shards` says for how many
devices single heads, not groups, are dealt out evenly first: equal work for a larger cache.

Which heads are global is part of a model, not of its start only, so those are chosen by a
rule that does not depend on any of that work.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from lazyattn.model.config import AttentionConfig
from lazyattn.op_parameters import alibi_slopes
from lazyattn.sharding.balance import visited_tiles

# What work is foretold for: queries and keys of `_SCORE_BOUND` nats, as heads of 64 have at
# initialization, at these lengths, and what an uneven share at each of them weighs.
_SCORE_BOUND = 8.0
_LENGTHS = {4096: 1.0, 16_384: 0.1}
_TILE = 128
# Shares of the heads that are made even, and how even each at least, where it can be.
_SHARES = range(2, 9)
_EVEN = 0.04
# Orders of the groups that swapping starts from: at least, if one is even then, and at most.
# With so many groups one is enough, and swapping ends as soon as it is even.
_FEW, _STARTS = 6, 24
_MANY = 24


def global_heads(config: AttentionConfig) -> Bool[np.ndarray, " heads"]:
    """Returns which heads have no slope, no window and, if so set, no RoPE.

    Whole key/value groups at the end of equal blocks of groups, as many blocks as can be, so
    that as many devices as can be have the same. Where they are no whole groups, or would
    not fall evenly to `slope_shards`, they are the last heads of each of these shares.
    """
    heads, number = config.num_heads, config.num_global_heads
    group = heads // config.kv_heads
    found = np.zeros(heads, bool)
    blocks = head_blocks(config) if number % group == 0 else None
    if blocks is not None and (config.by_group or blocks.number % config.slope_shards == 0):
        by_block = found.reshape(blocks.number, blocks.groups, group)
        by_block[:, blocks.local :] = True
        return found
    shares = found.reshape(config.slope_shards, -1)
    for share, mine in enumerate(shares):
        before, after = (n * number // len(shares) for n in (share, share + 1))
        mine[mine.size - (after - before) :] = True
    return found


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
    """Returns the blocks of a layer whose global heads are whole groups."""
    number = config.num_global_heads * config.kv_heads // config.num_heads
    blocks = math.gcd(config.kv_heads, number) if number else 1
    groups = config.kv_heads // blocks
    return HeadBlocks(blocks, groups, groups - number // blocks)


def head_windows(config: AttentionConfig) -> tuple[int | None, ...]:
    """Returns the window of each head, None where it sees its whole document."""
    return tuple(None if is_global else config.window for is_global in global_heads(config))


def initial_slopes(config: AttentionConfig) -> Float[np.ndarray, " heads"]:
    """Returns the slope each head starts with, 0 for global heads.

    The others have ALiBi's slopes for as many heads N as they are: 2^(-8 (r + 1) / N) for
    r = 0 ... N - 1, dealt out as this module says.

    Returns:
      float32 [heads], per token of distance.

    Source: slopes from Press et al., arXiv 2108.12409, section 3; the order is ours.
    """
    everywhere = global_heads(config)
    found = _slopes(tuple(everywhere.tolist()), config.kv_heads, config.slope_shards)
    return found.astype(np.float32)


@functools.cache
def _slopes(
    everywhere: tuple[bool, ...], kv_heads: int, slope_shards: int
) -> Float[np.ndarray, " heads"]:
    is_global = np.asarray(everywhere)
    local = np.flatnonzero(~is_global)
    steep_to_flat = alibi_slopes(max(local.size, 1))[: local.size].astype(np.float64)
    groups = np.arange(is_global.size) // (is_global.size // kv_heads)
    shards = np.arange(is_global.size) // (is_global.size // slope_shards)
    slopes = np.zeros(is_global.size)
    # Groups with global heads, of which a cache keeps all, come last: they get the flattest.
    with_global = np.bincount(groups, weights=is_global, minlength=kv_heads) > 0
    sizes = np.bincount(shards[local], minlength=slope_shards).tolist()
    for shard, ranks in enumerate(_dealt(list(range(local.size)), sizes)):
        mine = [head for head in local if shards[head] == shard]
        mine.sort(key=lambda head: (with_global[groups[head]], head))
        slopes[mine] = steep_to_flat[ranks]
    order = _even_order(slopes, is_global, groups, shards)
    return slopes.reshape(kv_heads, -1)[order].reshape(-1)


def _dealt(cards: list[int], sizes: list[int]) -> list[list[int]]:
    """Deals to and fro into hands of these sizes, by way of a few larger ones; each is in order."""
    if len(sizes) < 2:
        return [cards] if sizes else []
    factor = next(n for n in range(2, len(sizes) + 1) if len(sizes) % n == 0)
    step = len(sizes) // factor
    parts = [sizes[i * step : (i + 1) * step] for i in range(factor)]
    hands: list[list[int]] = [[] for _ in parts]
    order, dealt = list(range(factor)), 0
    while dealt < len(cards):
        for hand in order:
            if len(hands[hand]) < sum(parts[hand]):
                hands[hand].append(cards[dealt])
                dealt += 1
        order.reverse()
    return [one for hand, part in zip(hands, parts, strict=True) for one in _dealt(hand, part)]


def _even_order(
    slopes: Float[np.ndarray, " heads"],
    is_global: Bool[np.ndarray, " heads"],
    groups: Int[np.ndarray, " heads"],
    shards: Int[np.ndarray, " heads"],
) -> list[int]:
    """Returns which group stands where, so that equal shares of them have about equal work.

    Groups stay in their shard, and those with global heads where they are. Pairs are swapped
    as long as that helps, from a few starts, of which the best is taken.
    """
    count = int(groups[-1]) + 1
    work = {length: _work(slopes, length).reshape(count, -1).sum(axis=1) for length in _LENGTHS}
    shard_of = shards.reshape(count, -1)[:, 0]
    free = np.flatnonzero(~is_global.reshape(count, -1).any(axis=1)).tolist()
    pairs = [(i, j) for i in free for j in free if i < j and shard_of[i] == shard_of[j]]

    # Groups one by one leave nothing to choose, and two a share little.
    shares = [n for n in _SHARES if count % n == 0 and n < count]
    several = [n for n in shares if count // n > 2]

    def excess(order: list[int], shares: int, length: int) -> float:
        sums = work[length][order].reshape(shares, -1).sum(axis=1)
        return float(sums.max() / sums.mean() - 1)

    def cost(order: list[int]) -> float:
        total = 0.0
        for number in shares:
            first = 1.0 if number in several else 0.01
            for length, weight in _LENGTHS.items():
                found = excess(order, number, length)
                total += first * weight * (found + 20 * max(0.0, found - _EVEN))
        return total

    def even(order: list[int]) -> bool:
        return all(excess(order, number, min(_LENGTHS)) <= _EVEN for number in several)

    draw = np.random.RandomState(0)  # whose stream is promised never to change
    order = _to_and_fro(free, shard_of, count)
    if count > _MANY:
        return _swapped(order, pairs, cost, even)[1]
    found = []
    for start in range(_STARTS if pairs else 1):
        found.append(_swapped(order, pairs, cost))
        if start + 1 >= _FEW and even(min(found)[1]):
            break
        order = list(range(count))
        for shard in sorted(set(shard_of[free].tolist())):
            places = [place for place in free if shard_of[place] == shard]
            for place, group in zip(places, draw.permutation(places).tolist(), strict=True):
                order[place] = group
    return min(found)[1]


def _swapped(
    order: list[int],
    pairs: list[tuple[int, int]],
    cost: Callable[[list[int]], float],
    enough: Callable[[list[int]], bool] = lambda order: False,
) -> tuple[float, list[int]]:
    """Returns the cost of an order that no swap of a pair betters or that is enough, and it."""
    order, best, improved = list(order), cost(order), True
    while improved:
        improved = False
        for i, j in pairs:
            if enough(order):
                return best, order
            order[i], order[j] = order[j], order[i]
            found = cost(order)
            if found < best - 1e-9:
                best, improved = found, True
            else:
                order[i], order[j] = order[j], order[i]
    return best, order


def _to_and_fro(free: list[int], shard_of: Int[np.ndarray, " groups"], count: int) -> list[int]:
    """Returns a first order, the free groups of each shard dealt as cards are."""
    order = list(range(count))
    for shard in sorted(set(shard_of[free].tolist())):
        places = [place for place in free if shard_of[place] == shard]
        for place, (group,) in zip(places, _dealt(places, [1] * len(places)), strict=True):
            order[place] = group
    return order


def _work(slopes: Float[np.ndarray, " heads"], length: int) -> Int[np.ndarray, " heads"]:
    """Returns how many tiles each head visits in a row."""
    return visited_tiles(
        -slopes[:, None] * np.arange(length),
        np.zeros(slopes.size, bool),
        score_bound=_SCORE_BOUND,
        skip_mass=1e-6,
        tile=_TILE,
    ).sum(axis=1)
