"""Continuing prompts: one pass over the prompt, then one compiled loop over new tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lazyattn.errors import InputError, require
from lazyattn.generation.cache import CachePlan, KVCache, full_plan
from lazyattn.generation.prepared import PreparedModel, prepare
from lazyattn.generation.sampling import SamplingConfig, next_token
from lazyattn.generation.serving import NO_TOKEN, start_rows, step_rows
from lazyattn.model.config import ModelConfig


class Continuation(NamedTuple):
    """New tokens of each row.

    Attributes:
      tokens: int32; row b's are tokens[b, :lengths[b]], zeros after them.
      lengths: int32, new tokens before the end-of-sequence token, which is left out.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]


def generate(
    params: Mapping[str, Any] | PreparedModel,
    config: ModelConfig,
    prompts: Int[np.ndarray | Array, "batch prompt_length"],
    prompt_lengths: Int[np.ndarray | Array, " batch"],
    *,
    sampling: SamplingConfig,
    key: Array,
    eos_id: int | None = None,
    cache_length: int | None = None,
    plan: CachePlan | None = None,
) -> Continuation:
    """Continues a batch of prompts; prefill and decoding are one compiled function.

    Stops when every row has ended. Under the same key, row b's tokens do not depend
    on how many rows there are nor on how far the prompts are padded.

    Args:
      params: the model's parameters, unboxed, or what `prepare` made of them.
      config: the model.
      prompts: token ids, padded on the right with any valid id.
      prompt_lengths: tokens of each prompt, from 1 to prompt_length.
      sampling: how to draw, and how many tokens.
      key: a PRNG key; unused at temperature 0.
      eos_id: the token that ends a row; None: none does.
      cache_length: room for prompt and continuation; None: prompt_length +
        max_new_tokens. It matters to the result for the variant
        `lazy_length_offset` alone, which divides the offset by it.
      plan: which keys the cache holds; None: all. Its length is the cache's.

    Raises:
      InputError: for an empty prompt, one that does not fit the cache with its
        continuation, ids outside the vocabulary, or shapes that do not go together.
    """
    if plan is not None:
        cache_length = plan.length
    cache_length = check_prompts(prompts, prompt_lengths, config, sampling, cache_length)
    prompts, prompt_lengths = np.asarray(prompts), np.asarray(prompt_lengths)
    return _generate(
        prepare(params, config),
        jnp.asarray(prompts[:, :cache_length], jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        key,
        jnp.asarray(NO_TOKEN if eos_id is None else eos_id, jnp.int32),
        sampling=sampling,
        plan=plan or full_plan(config, cache_length),
    )


def check_prompts(
    prompts: Int[np.ndarray | Array, "batch prompt_length"],
    prompt_lengths: Int[np.ndarray | Array, " batch"],
    config: ModelConfig,
    sampling: SamplingConfig,
    cache_length: int | None,
) -> int:
    """Returns the length of the cache; arguments and errors as in `generate`."""
    prompts, prompt_lengths = np.asarray(prompts), np.asarray(prompt_lengths)
    require(
        prompts.ndim == 2 and prompts.size > 0, "prompts' shape", prompts.shape, "[batch, length]"
    )
    require(
        prompt_lengths.shape == prompts.shape[:1],
        "prompt_lengths' shape",
        prompt_lengths.shape,
        f"({prompts.shape[0]},), one for each prompt",
    )
    for name, array in (("prompts", prompts), ("prompt_lengths", prompt_lengths)):
        require(
            np.issubdtype(array.dtype, np.integer), f"{name}' dtype", str(array.dtype), "an integer"
        )
    if prompt_lengths.min() < 1:
        raise InputError("A prompt is empty, but it must have at least 1 token.")
    require(
        prompt_lengths.max() <= prompts.shape[1],
        "prompt_lengths",
        int(prompt_lengths.max()),
        f"at most {prompts.shape[1]}, the length of prompts",
    )
    for worst in (int(prompts.min()), int(prompts.max())):
        require(
            0 <= worst < config.vocab_size,
            "a token of prompts",
            worst,
            f"from 0 to {config.vocab_size - 1}",
        )
    if cache_length is None:
        cache_length = prompts.shape[1] + sampling.max_new_tokens
    longest = int(prompt_lengths.max())
    require(
        longest + sampling.max_new_tokens <= cache_length,
        "the longest prompt's length",
        longest,
        f"at most {cache_length - sampling.max_new_tokens}: the cache has room for {cache_length}"
        f" tokens, of which max_new_tokens takes {sampling.max_new_tokens}",
    )
    return cache_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of decoding: `count` columns of `tokens` are filled.

    Attributes:
      count: int32, tokens drawn for each row so far.
      token: int32, the last of them.
      tokens: int32, new tokens, 0 where a row has ended.
      lengths: int32, new tokens of each row before its end.
      ended: rows that draw no more.
      seen: tokens each row holds, for the repetition penalty; None without one.
      cache: keys and values of all tokens but the last.
    """

    count: Int[Array, ""]
    token: Int[Array, " batch"]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"] | None
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class _Loop:
    """How one token follows another; what is compiled is a method of it."""

    model: PreparedModel
    sampling: SamplingConfig
    key: Array
    eos_id: Int[Array, ""]

    def start(
        self,
        prompts: Int[Array, "batch prompt_length"],
        prompt_lengths: Int[Array, " batch"],
        plan: CachePlan,
    ) -> Progress:
        """Returns the state with each row's first new token."""
        batch, width = prompts.shape
        rows = jnp.arange(batch)
        seen = None
        if self.sampling.repetition_penalty != 1:
            # The padding is no part of a row, so its ids go out of bounds.
            vocab = self.model.config.vocab_size
            real = jnp.arange(width) < prompt_lengths[:, None]
            ids = jnp.where(real, prompts, vocab)
            seen = jnp.zeros((batch, vocab), bool)
            seen = seen.at[rows[:, None], ids].set(True, mode="drop")
        logits, cache = start_rows(self.model, plan, prompts, prompt_lengths)
        start = Progress(
            count=jnp.zeros((), jnp.int32),
            token=jnp.zeros(batch, jnp.int32),
            tokens=jnp.zeros((batch, self.sampling.max_new_tokens), jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            ended=jnp.zeros(batch, bool),
            seen=seen,
            cache=cache,
        )
        return self._add(start, logits)

    def advance(self, progress: Progress, until: Int[Array, ""] | int) -> Progress:
        """Returns the state when `until` tokens are drawn or every row has ended."""

        def unfinished(progress: Progress) -> Bool[Array, ""]:
            return (progress.count < until) & ~jnp.all(progress.ended)

        return jax.lax.while_loop(unfinished, self._step, progress)

    def _step(self, progress: Progress) -> Progress:
        # Rows that have ended read nothing more.
        tokens = jnp.where(progress.ended, NO_TOKEN, progress.token)
        logits, cache = step_rows(self.model, progress.cache, tokens[:, None])
        return self._add(dataclasses.replace(progress, cache=cache), logits[:, 0])

    def _add(self, progress: Progress, logits: Float[Array, "batch vocab"]) -> Progress:
        """Draws each row's next token."""
        count = progress.count
        rows = jnp.arange(logits.shape[0])
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(self.key, row), count))(
            rows
        )
        token = next_token(logits, keys, self.sampling, progress.seen)
        ended = progress.ended | (token == self.eos_id)
        return dataclasses.replace(
            progress,
            count=count + 1,
            token=token,
            tokens=progress.tokens.at[:, count].set(jnp.where(ended, 0, token)),
            lengths=progress.lengths + ~ended,
            ended=ended,
            seen=None if progress.seen is None else progress.seen.at[rows, token].set(True),
        )


@functools.partial(jax.jit, static_argnames=("sampling", "plan"))
def _generate(
    model: PreparedModel,
    prompts: Int[Array, "batch prompt_length"],
    prompt_lengths: Int[Array, " batch"],
    key: Array,
    eos_id: Int[Array, ""],
    *,
    sampling: SamplingConfig,
    plan: CachePlan,
) -> Continuation:
    loop = _Loop(model, sampling, key, eos_id)
    end = loop.advance(loop.start(prompts, prompt_lengths, plan), sampling.max_new_tokens)
    return Continuation(end.tokens, end.lengths)


@functools.partial(jax.jit, static_argnames=("sampling", "plan"))
def start(
    model: PreparedModel,
    prompts: Int[Array, "batch prompt_length"],
    prompt_lengths: Int[Array, " batch"],
    key: Array,
    eos_id: Int[Array, ""],
    *,
    sampling: SamplingConfig,
    plan: CachePlan,
) -> Progress:
    """Returns the state with each row's first new token; arguments as in `generate`."""
    return _Loop(model, sampling, key, eos_id).start(prompts, prompt_lengths, plan)


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("progress",))
def advance(
    model: PreparedModel,
    progress: Progress,
    until: Int[Array, ""],
    key: Array,
    eos_id: Int[Array, ""],
    *,
    sampling: SamplingConfig,
) -> Progress:
    """Returns the state after more tokens; it is the one `generate` would come to.

    Args:
      model, key, eos_id, sampling: those of `start`.
      progress: where to go on; used up.
      until: tokens to have drawn for each row.
    """
    return _Loop(model, sampling, key, eos_id).advance(progress, until)
