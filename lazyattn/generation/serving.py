"""What a server calls: requests come and go in the rows of one cache, between steps.

    model = prepare(params, config)
    cache = init_cache(plan_cache(params, config, 4096), batch=8)
    logits, cache = prefill(model, cache, prompts, lengths, rows)   # a document in each row
    logits, cache = decode_step(model, cache, tokens)               # one more token a row
    cache = free(cache, row)

Each function takes the cache it is given as its own (donation): the arrays of the old cache are
gone, and no key is copied. Nothing here waits for the device: ids and lengths that are handed in
from the host are checked, those on the device are not. docs/decoding.md has a whole loop.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lazyattn.decode_attention import MAX_NEW
from lazyattn.errors import InputError, require
from lazyattn.generation import rings
from lazyattn.generation.attend import Step
from lazyattn.generation.cache import SPARE, CachePlan, KVCache
from lazyattn.generation.prepared import PreparedModel, forward, last_logits
from lazyattn.model.transformer import logits

# An id that no token has: of a row that gets none.
NO_TOKEN = -1


def prefill(
    model: PreparedModel,
    cache: KVCache,
    tokens: Int[np.ndarray | Array, "n length"],
    lengths: Int[np.ndarray | Array, " n"] | Sequence[int],
    rows: Int[np.ndarray | Array, " n"] | Sequence[int] | None = None,
) -> tuple[Float[Array, "n vocab"], KVCache]:
    """Begins a document in each of some rows; what they held before is forgotten.

    Time is that of one pass over the tokens, and memory linear in their number. Compiled
    once for each shape of `tokens`, so pad prompts to a few lengths.

    Args:
      model: the model (`prepare`).
      cache: used up.
      tokens: ids of the prompts, padded on the right with any valid id.
      lengths: tokens of each prompt, at least 1.
      rows: which row each begins in, all different; None: all rows in order.

    Returns:
      float32 logits of the token after each prompt, and the cache.

    Raises:
      InputError: for an empty prompt, one longer than the cache, ids that are no tokens, rows
        that don't exist or come twice, or shapes that don't fit.
    """
    tokens = _tokens(tokens, 2, model)
    batch = cache.lengths.shape[0]
    if rows is None:
        require(tokens.shape[0] == batch, "the number of prompts", tokens.shape[0], f"{batch}")
    else:
        rows = np.asarray(rows) if not isinstance(rows, jax.Array) else rows
        wanted = f"({tokens.shape[0]},), one for each prompt"
        require(rows.shape == tokens.shape[:1], "rows' shape", rows.shape, wanted)
        if isinstance(rows, np.ndarray):
            known = len(set(rows.tolist())) == len(rows) and 0 <= rows.min() <= rows.max() < batch
            require(known, "rows", rows.tolist(), f"different numbers from 0 to {batch - 1}")
    lengths = _counts(lengths, tokens, 1)
    if isinstance(lengths, np.ndarray):
        check_prompt(int(lengths.max()), cache.plan)
        tokens = tokens[:, : cache.plan.length]
    return _prefill(model, cache, tokens, lengths, rows)


def extend(
    model: PreparedModel,
    cache: KVCache,
    tokens: Int[np.ndarray | Array, "batch length"],
    lengths: Int[np.ndarray | Array, " batch"] | Sequence[int],
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Adds any number of tokens to each row's document, a chunk of a long prompt, say.

    Rows are of any length, free ones too, where a document begins then. Memory is linear in
    the length of cache and tokens. For up to eight tokens `decode_step` is faster.

    Args:
      model: the model.
      cache: used up.
      tokens: the next ids of each row, padded on the right with any valid id.
      lengths: how many each row gets; 0: none.

    Returns:
      float32 logits of the token after each row's last new one, and the cache. Logits are
      NaN in rows without new tokens, and in those whose cache is too short, which stay as
      they were.

    Raises:
      InputError: for shapes that don't fit, ids that are no tokens, or more of them than a row
        has room for.
    """
    tokens = _tokens(tokens, 2, model)
    _check_rows(tokens, cache)
    lengths = _counts(lengths, tokens, 0)
    if isinstance(lengths, np.ndarray):
        check_prompt(int(lengths.max()), cache.plan)
    return _extend(model, cache, tokens, lengths)


def decode_step(
    model: PreparedModel,
    cache: KVCache,
    tokens: Int[np.ndarray | Array, "batch *new"],
) -> tuple[Float[Array, "batch *new vocab"], KVCache]:
    """Adds a token to each row, or a few: one step of all of them, whatever their lengths.

    Args:
      model: the model.
      cache: used up.
      tokens: the next id of each row, `NO_TOKEN` (-1) in a row that gets none; or up to 8 ids
        a row, [batch, new], with NO_TOKEN after those there are.

    Returns:
      float32 logits of the token after each of these, and the cache. Logits are NaN where
      there is no token, and in rows that have no room, which stay as they were.

    Raises:
      InputError: for shapes that don't fit, ids that are no tokens, or more than 8 a row.
    """
    tokens = _tokens(tokens, 1 if np.ndim(tokens) == 1 else 2, model, least=NO_TOKEN)
    _check_rows(tokens, cache)
    several = tokens if tokens.ndim == 2 else tokens[:, None]
    longest = min(MAX_NEW, cache.plan.length)
    new = several.shape[1]
    require(1 <= new <= longest, "the tokens of a step", new, f"from 1 to {longest} a row")
    found, cache = _decode_step(model, cache, several)
    return (found if tokens.ndim == 2 else found[:, 0]), cache


def free(cache: KVCache, rows: int | Sequence[int] | Array) -> KVCache:
    """Returns the cache with rows that hold nothing; the old one is used up.

    Raises:
      InputError: for rows that don't exist.
    """
    if not isinstance(rows, jax.Array):
        last, given = cache.lengths.shape[0] - 1, np.asarray(rows)
        there = bool(((given >= 0) & (given <= last)).all())
        require(there, "rows", given.tolist(), f"from 0 to {last}")
    return _free(cache, jnp.atleast_1d(jnp.asarray(rows, jnp.int32)))


def rewind(cache: KVCache, count: Int[np.ndarray | Array, " batch"] | Sequence[int]) -> KVCache:
    """Returns the cache without each row's last few tokens; the old one is used up.

    For tokens of one `decode_step` that a check turned down, so that no span of a head is cut
    short: at most 7.

    Raises:
      InputError: for more, fewer than none, or counts that are not one for each row.
    """
    if not isinstance(count, jax.Array):
        count = np.asarray(count)
        allowed = bool(((count >= 0) & (count <= SPARE)).all())
        require(allowed, "count", count.tolist(), f"from 0 to {SPARE}")
    shape = cache.lengths.shape
    require(count.shape == shape, "count's shape", count.shape, f"{shape}, one for each row")
    return _rewind(cache, jnp.asarray(count, jnp.int32))


def check_prompt(longest: int, plan: CachePlan) -> None:
    """Checks that a prompt fits.

    Raises:
      InputError: if it is longer than a row of the cache.
    """
    require(
        longest <= plan.length,
        "the longest prompt's length",
        longest,
        f"at most {plan.length}, the length of the cache",
    )


def _tokens(tokens: Any, ndim: int, model: PreparedModel, *, least: int = 0) -> Any:
    kind = type(model).__name__
    require(isinstance(model, PreparedModel), "model", kind, "what prepare(params, config) returns")
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    axes = "[batch]" if ndim == 1 else "[batch, length]"
    require(tokens.ndim == ndim and tokens.size > 0, "tokens' shape", tokens.shape, axes)
    integer = jnp.issubdtype(tokens.dtype, jnp.integer)
    require(integer, "tokens' dtype", str(tokens.dtype), "an integer")
    if isinstance(tokens, np.ndarray):
        most = model.config.vocab_size - 1
        for worst in (int(tokens.min()), int(tokens.max())):
            require(least <= worst <= most, "a token", worst, f"from {least} to {most}")
    return tokens.astype(np.int32)


def _check_rows(tokens: Any, cache: KVCache) -> None:
    batch = cache.lengths.shape[0]
    require(tokens.shape[0] == batch, "the rows of tokens", tokens.shape[0], f"{batch}")


def _counts(lengths: Any, tokens: Any, least: int) -> Any:
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths)
    wanted = f"({tokens.shape[0]},), one for each row of tokens"
    require(lengths.shape == tokens.shape[:1], "lengths' shape", lengths.shape, wanted)
    if isinstance(lengths, np.ndarray):
        low, high = int(lengths.min()), int(lengths.max())
        if not least <= low <= high <= tokens.shape[1]:
            worst = low if low < least else high
            raise InputError(
                f"A length is {worst}, but it must be from {least} to {tokens.shape[1]}, the"
                " length of tokens."
            )
    return lengths.astype(np.int32)


def start_rows(
    model: PreparedModel,
    plan: CachePlan,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Returns logits after prompts and a cache that holds these; for use within `jit`."""
    empty = KVCache(((),) * len(plan.layers), jnp.zeros_like(lengths), plan)
    hidden, cache = forward(model, tokens, empty, lengths, Step.START)
    return last_logits(model, hidden, lengths), cache


def step_rows(
    model: PreparedModel, cache: KVCache, tokens: Int[Array, "batch new"]
) -> tuple[Float[Array, "batch new vocab"], KVCache]:
    """Returns logits after new tokens and the cache with them; for use within `jit`."""
    real = jnp.cumprod(tokens >= 0, axis=1) > 0
    count = real.sum(axis=1)
    count = jnp.where(cache.lengths + count <= cache.plan.length, count, 0)
    hidden, cache = forward(model, jnp.maximum(tokens, 0), cache, count, Step.STEP)
    found = logits(hidden, model.output)
    there = jnp.arange(tokens.shape[1]) < count[:, None]
    return jnp.where(there[..., None], found, jnp.nan), cache


@functools.partial(jax.jit, donate_argnames=("cache",))
def _prefill(
    model: PreparedModel,
    cache: KVCache,
    tokens: Int[Array, "n length"],
    lengths: Int[Array, " n"],
    rows: Int[Array, " n"] | None,
) -> tuple[Float[Array, "n vocab"], KVCache]:
    found, new = start_rows(model, cache.plan, tokens, lengths)
    if rows is None:
        return found, new
    layers = tuple(
        tuple(rings.put_rows(old, rows, own) for old, own in zip(*pair, strict=True))
        for pair in zip(cache.layers, new.layers, strict=True)
    )
    whole = cache.lengths.at[rows].set(new.lengths)
    return found, dataclasses.replace(cache, layers=layers, lengths=whole)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _extend(
    model: PreparedModel,
    cache: KVCache,
    tokens: Int[Array, "batch length"],
    count: Int[Array, " batch"],
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    count = jnp.where(cache.lengths + count <= cache.plan.length, count, 0)
    hidden, cache = forward(model, tokens, cache, count, Step.EXTEND)
    found = last_logits(model, hidden, count)
    return jnp.where((count > 0)[:, None], found, jnp.nan), cache


@functools.partial(jax.jit, donate_argnames=("cache",))
def _decode_step(
    model: PreparedModel, cache: KVCache, tokens: Int[Array, "batch new"]
) -> tuple[Float[Array, "batch new vocab"], KVCache]:
    return step_rows(model, cache, tokens)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _free(cache: KVCache, rows: Int[Array, " n"]) -> KVCache:
    return dataclasses.replace(cache, lengths=cache.lengths.at[rows].set(0))


@functools.partial(jax.jit, donate_argnames=("cache",))
def _rewind(cache: KVCache, count: Int[Array, " batch"]) -> KVCache:
    return dataclasses.replace(cache, lengths=jnp.maximum(cache.lengths - count, 0))
