"""Continuing prompts: one pass over the prompt, then one compiled loop over new tokens."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lazyattn.errors import InputError, require
from lazyattn.generation.cache import KVCache, init_cache
from lazyattn.generation.sampling import SamplingConfig, next_token
from lazyattn.model.config import ModelConfig
from lazyattn.model.transformer import Transformer, logits, output_embedding

# Prompts are padded to a multiple of this, so that few lengths are ever compiled.
_PROMPT_MULTIPLE = 32

# An id that no token has.
_NO_TOKEN = -1


class Continuation(NamedTuple):
    """New tokens of each row.

    Attributes:
      tokens: int32; row b's are tokens[b, :lengths[b]], zeros after them.
      lengths: int32, new tokens before the end-of-sequence token, which is left out.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]


class TextTokenizer(Protocol):
    """What `generate_text` needs of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""


def generate(
    params: Mapping[str, Any],
    config: ModelConfig,
    prompts: Int[np.ndarray | Array, "batch prompt_length"],
    prompt_lengths: Int[np.ndarray | Array, " batch"],
    *,
    sampling: SamplingConfig,
    key: Array,
    eos_id: int | None = None,
    cache_length: int | None = None,
) -> Continuation:
    """Continues a batch of prompts; prefill and decoding are one compiled function.

    Stops when every row has ended. Under the same key, row b's tokens do not depend
    on how many rows there are nor on how far the prompts are padded.

    Args:
      params: the model's parameters, unboxed.
      config: the model.
      prompts: token ids, padded on the right with any valid id.
      prompt_lengths: tokens of each prompt, from 1 to prompt_length.
      sampling: how to draw, and how many tokens.
      key: a PRNG key; unused at temperature 0.
      eos_id: the token that ends a row; None: none does.
      cache_length: room for prompt and continuation; None: prompt_length +
        max_new_tokens. It matters to the result for the variant
        `lazy_length_offset` alone, which divides the offset by it.

    Raises:
      InputError: for an empty prompt, one that does not fit the cache with its
        continuation, ids outside the vocabulary, or shapes that do not go together.
    """
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
    return _generate(
        params,
        jnp.asarray(prompts[:, :cache_length], jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        key,
        jnp.asarray(_NO_TOKEN if eos_id is None else eos_id, jnp.int32),
        config=config,
        sampling=sampling,
        cache_length=cache_length,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """The decoding loop's state: `count` columns of `tokens` are filled."""

    count: Int[Array, ""]
    token: Int[Array, " batch"]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("config", "sampling", "cache_length"))
def _generate(
    params: Mapping[str, Any],
    prompts: Int[Array, "batch prompt_length"],
    prompt_lengths: Int[Array, " batch"],
    key: Array,
    eos_id: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: SamplingConfig,
    cache_length: int,
) -> Continuation:
    batch = prompts.shape[0]
    rows = jnp.arange(batch)
    table = output_embedding(params, config)

    def feed(
        tokens: Int[Array, "batch length"], cache: KVCache
    ) -> tuple[Float[Array, "batch length width"], KVCache]:
        result: Any = Transformer(config).apply({"params": params}, tokens, cache=cache)
        return result

    def add(progress: _Progress, hidden: Float[Array, "batch width"]) -> _Progress:
        """Draws each row's next token from the hidden state before it."""
        count = progress.count
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), count))(rows)
        token = next_token(logits(hidden, table), keys, sampling)
        ended = progress.ended | (token == eos_id)
        return dataclasses.replace(
            progress,
            count=count + 1,
            token=token,
            tokens=progress.tokens.at[:, count].set(jnp.where(ended, 0, token)),
            lengths=progress.lengths + ~ended,
            ended=ended,
        )

    def step(progress: _Progress) -> _Progress:
        hidden, cache = feed(progress.token[:, None], progress.cache)
        return add(dataclasses.replace(progress, cache=cache), hidden[:, 0])

    def unfinished(progress: _Progress) -> Bool[Array, ""]:
        return (progress.count < sampling.max_new_tokens) & ~jnp.all(progress.ended)

    # The prompts' padding is written to the cache as well, then forgotten.
    hidden, cache = feed(prompts, init_cache(config, batch, cache_length))
    start = _Progress(
        count=jnp.zeros((), jnp.int32),
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.zeros((batch, sampling.max_new_tokens), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        ended=jnp.zeros(batch, bool),
        cache=dataclasses.replace(cache, lengths=prompt_lengths),
    )
    start = add(start, hidden[rows, prompt_lengths - 1])
    end = jax.lax.while_loop(unfinished, step, start)
    return Continuation(end.tokens, end.lengths)


def generate_text(
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig,
    key: Array,
    cache_length: int | None = None,
) -> list[str]:
    """Returns the continuation of each text, without the text itself.

    A prompt is the beginning-of-sequence token and the text's tokens, so an empty
    text asks for a document from its start.

    Args:
      params, config, sampling, key, cache_length: as in `generate`.
      tokenizer: between text and ids.
      prompts: at least one text.

    Raises:
      InputError: as `generate`.
    """
    if not prompts:
        raise InputError("There is no prompt, but there must be at least 1 (it may be empty text).")
    encoded = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts]
    lengths = np.asarray([len(ids) for ids in encoded])
    width = -(-int(lengths.max()) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    padded = np.zeros((len(encoded), width), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    new = generate(
        params,
        config,
        padded,
        lengths,
        sampling=sampling,
        key=key,
        eos_id=tokenizer.eos_id,
        cache_length=cache_length,
    )
    tokens, counts = jax.device_get((new.tokens, new.lengths))
    return [
        tokenizer.decode(row[:count].tolist()) for row, count in zip(tokens, counts, strict=True)
    ]
