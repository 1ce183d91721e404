"""Which keys and values a device fetches where others hold parts of its rows.

A head with a window sees no key before it. Where no score exceeds U or is below -U before the
bias, a query that sees more than H keys before its own has at most

    exp(2 U) (sum over x > H of exp(b(x))) / (sum over x <= H of exp(b(x)))

of its softmax mass on those beyond: it sees all of the nearer ones, too. Where that is at most
half of `skip_mass`, they are left out; the other half is for tiles that the op skips. Biases and
bounds are learned, so a head's reach is chosen when the program runs, for each layer and step,
from a few lengths: nothing is compiled again, and what none of these will do for fetches all.

What is not fetched is 0. As scores those keys have b(x), so the bound holds for them, too, and
their values add nothing. A key that is NaN is not seen from beyond the reach; queries near it are
NaN all the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn import sharding
from lazyattn.model.heads import HeadBlocks

# Added to bounds, in nats: covers float32 rounding of biases and sums.
_SLACK = 1e-2
# Reaches that a program can choose from besides whole chunks: so many go into a chunk.
_PARTS = (16, 4)


class Group(NamedTuple):
    """Key/value heads of a device that fetch alike.

    Attributes:
      heads: their indices.
      reaches: what they may choose from, keys before a query's own, shortest first; None: all.
    """

    heads: tuple[int, ...]
    reaches: tuple[int | None, ...] = (None,)


class Bound(NamedTuple):
    """What is known of the scores of a layer.

    Attributes:
      score: U, no score exceeds it or is below its negative, before the bias.
      slopes: [heads], at initialization; 0: the head sees everything.
    """

    score: Float[Array, ""]
    slopes: Float[np.ndarray, " heads"]


def by_window(
    heads: int, window: int | None, blocks: HeadBlocks | None, length: int
) -> tuple[Group, ...]:
    """Returns the groups of a device's key/value heads where only windows bound their reach.

    Args:
      heads: their number.
      window: of local heads.
      blocks: where global heads lie among the device's; None: there are none.
      length: of the whole row.
    """
    if window is None or 2 * (window - 1) > length:
        return (Group(tuple(range(heads))),)
    local = np.ones(heads, bool)
    if blocks is not None:
        local.reshape(blocks.number, blocks.groups)[:, blocks.local :] = False
    groups = Group(_indices(local), (window - 1,)), Group(_indices(~local))
    return tuple(group for group in groups if group.heads)


def by_slope(
    slopes: Float[np.ndarray, "shards kv_heads group"], length: int, shards: int
) -> tuple[Group, ...]:
    """Returns the groups of a device's key/value heads where their biases bound their reach.

    Heads that see everything are one. Of the others the steepest half is, of the rest again,
    until there are four: a few long reaches make most of what is sent.

    Args:
      slopes: at initialization, of all devices that share the heads, 0 where a head sees
        everything.
      length: of the whole row.
      shards: devices that share it.
    """
    flattest = slopes.min(axis=(0, 2))
    chunk = length // (2 * shards)
    lengths = {chunk // part for part in _PARTS} | {chunk * n for n in range(1, shards)}
    reaches = tuple(sorted(lengths - {0}))
    left = sorted(np.flatnonzero(flattest > 0).tolist(), key=lambda head: -flattest[head])
    everything = _indices(flattest == 0)
    found = [Group(everything)] if everything else []
    for share in (2, 2, 2, 1):
        size = -(-len(left) // share)
        if size:
            found.append(Group(tuple(left[:size]), (*reaches, None)))
        left = left[size:]
    return tuple(found)


def _indices(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def choices(
    groups: Sequence[Group],
    bound: Bound,
    bias: Float[Array, "heads width"],
    slope: Float[Array, " heads"] | None,
    offset: Float[Array, " heads"] | None,
    *,
    length: int,
    skip_mass: float,
    head_shards: int,
) -> Int[Array, " groups"]:
    """Returns which of its reaches each group takes.

    Args:
      groups: as `by_slope` returns them.
      bound: of the layer's scores.
      bias, slope, offset: of all heads, as in `lazy_attention`.
      length: of the whole row.
      skip_mass: that what is not fetched may hold.
      head_shards: devices that share the heads.
    """
    bias, slope, offset, score = jax.lax.stop_gradient((bias, slope, offset, bound.score))
    # All that have a choice have the same.
    reaches = max((group.reaches for group in groups), key=len)[:-1]
    mass = _mass_beyond(np.asarray(reaches, np.int32), bias, slope, length)
    enough = 2 * score + mass + _SLACK <= math.log(skip_mass)
    if offset is not None:
        # Every key has a weight where tau > 0, and counts in tau's gradient where it is 0.
        enough &= (offset < 0)[:, None]
    # The one after the last that falls short; what is NaN does.
    needed = jnp.max(jnp.where(enough, 0, jnp.arange(1, len(reaches) + 1)), axis=1, initial=0)
    kv_heads = head_shards * sum(len(group.heads) for group in groups)
    by_head = needed.reshape(head_shards, kv_heads // head_shards, -1).max(axis=(0, 2))
    found = [
        by_head[np.asarray(group.heads)].max() if len(group.reaches) > 1 else jnp.zeros((), int)
        for group in groups
    ]
    return jnp.stack(found).astype(jnp.int32)


def _mass_beyond(
    reaches: Int[np.ndarray, " reaches"],
    bias: Float[Array, "heads width"],
    slope: Float[Array, " heads"] | None,
    length: int,
) -> Float[Array, "heads reaches"]:
    """Returns log of the sum of exp(b(x)) beyond each reach, over that within; float32."""
    bias = bias[:, :length].astype(jnp.float32)
    width = bias.shape[1]
    # Without a slope the bias is 0 past the table.
    last = jnp.zeros(len(bias)) if slope is None else bias[:, -1]
    slope = jnp.zeros(len(bias)) if slope is None else slope.astype(jnp.float32)
    last, slope = last[:, None], slope[:, None]

    def past_the_table(start: np.ndarray, stop: np.ndarray) -> Array:
        """Returns log of a geometric series, from its largest term."""
        number = np.maximum(stop - start, 1)
        ends = [last - slope * (x - (width - 1)) for x in (start, start + number - 1)]
        rate = jnp.abs(slope)
        ratio = jnp.expm1(-rate * number) / jnp.expm1(-jnp.where(rate > 0, rate, 1.0))
        found = jnp.maximum(*ends) + jnp.log(jnp.where(rate > 0, ratio, number))
        return jnp.where(stop > start, found, -jnp.inf)

    near = jax.lax.cumlogsumexp(bias, axis=1)[:, np.minimum(reaches, width - 1)]
    far = jax.lax.cumlogsumexp(bias, axis=1, reverse=True)
    far = jnp.pad(far, [(0, 0), (0, 1)], constant_values=-jnp.inf)
    far = far[:, np.minimum(reaches + 1, width)]
    edge = np.full_like(reaches, width)
    within = jnp.logaddexp(near, past_the_table(edge, reaches + 1))
    start = np.maximum(reaches + 1, width)
    beyond = jnp.logaddexp(far, past_the_table(start, np.full_like(reaches, length)))
    return beyond - within


def fetch(
    x: Float[Array, "batch part kv_heads d"],
    groups: Sequence[Group],
    choices: Int[Array, " groups"] | None,
    shards: int,
) -> Float[Array, "batch length kv_heads d"]:
    """Returns whole rows that hold what this device's queries see; inside `jax.shard_map` only.

    Args:
      x: keys, values or both of this device's part, in the order of `sharding.deal_sequence`.
      groups: of all heads.
      choices: which of its reaches each group takes; None: all have but one.
      shards: devices that share a row.
    """
    parts = []
    for number, group in enumerate(groups):
        mine = _heads(x, group.heads)
        with jax.named_scope(f"fetch_{number}"):
            if len(group.reaches) > 1:
                assert choices is not None
                parts.append(_chosen(mine, group.reaches, choices[number], shards))
            elif group.reaches[0] is None:
                parts.append(sharding.gather_sequence(mine))
            else:
                parts.append(sharding.fetch_sequence(mine, group.reaches[0], shards))
    order = np.argsort(np.concatenate([group.heads for group in groups]))
    return _heads(jnp.concatenate(parts, axis=2), order.tolist())


def _chosen(
    x: Array, reaches: tuple[int | None, ...], choice: Int[Array, ""], shards: int
) -> Array:
    """Returns what one of the reaches asks for: parts of a chunk, so many chunks, or all."""
    ways: list[Callable[[Array, Array], Array]] = [
        lambda x, hops, reach=reach: sharding.fetch_sequence(x, reach, shards)  # type: ignore[misc]
        for reach in reaches
        if reach is not None and reach < x.shape[1] // 2
    ]
    hops = choice - len(ways) + 1
    way = jnp.where(choice == len(reaches) - 1, len(ways) + 1, jnp.minimum(choice, len(ways)))
    ways.append(lambda x, hops: sharding.fetch_chunks(x, hops, shards))
    ways.append(lambda x, hops: sharding.gather_sequence(x))
    return jax.lax.switch(way, ways, x, hops)


def _heads(x: Array, heads: Sequence[int]) -> Array:
    """Returns these heads of `x`, by slices."""
    if list(heads) == list(range(x.shape[2])):
        return x
    return jnp.concatenate([x[:, :, head : head + 1] for head in heads], axis=2)
