"""Text in, text out: prompts of unequal length, stop strings, and text as it comes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from lazyattn.data.decoding import Continuation, Decoder
from lazyattn.data.text_files import check_unicode
from lazyattn.errors import InputError, require
from lazyattn.generation.cache import CachePlan, full_plan
from lazyattn.generation.decode import advance, check_prompts, start
from lazyattn.generation.prepared import PreparedModel, prepare
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.model.config import ModelConfig

# Prompts are padded to a multiple of this, so that few lengths are ever compiled.
_PROMPT_MULTIPLE = 32

# Tokens drawn between two looks at the text, where nobody waits for it.
_STRIDE = 16


class TextTokenizer(Decoder, Protocol):
    """What this module needs of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""


def generate_text(
    params: Mapping[str, Any] | PreparedModel,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig,
    key: Array,
    stop: Sequence[str] = (),
    cache_length: int | None = None,
    plan: CachePlan | None = None,
) -> list[str]:
    """Returns the continuation of each text, without the text itself.

    A prompt is the beginning-of-sequence token and the text's tokens, so an empty
    text asks for a document from its start. Prompt and continuation together are what
    all tokens decode to (`data.decoding`).

    Args:
      params, config, sampling, key, cache_length, plan: as in `decode.generate`.
      tokenizer: between text and ids.
      prompts: at least one text.
      stop: a continuation ends before the first of these strings.

    Raises:
      InputError: as `decode.generate`, for an empty stop string, and for a text that is
        not valid Unicode.
    """
    texts: list[str] = []
    for texts in stream_text(  # noqa: B007
        params,
        config,
        tokenizer,
        prompts,
        sampling=sampling,
        key=key,
        stop=stop,
        cache_length=cache_length,
        plan=plan,
        every=_STRIDE if stop else sampling.max_new_tokens,
    ):
        pass
    return texts


def stream_text(
    params: Mapping[str, Any] | PreparedModel,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    *,
    sampling: SamplingConfig,
    key: Array,
    stop: Sequence[str] = (),
    cache_length: int | None = None,
    plan: CachePlan | None = None,
    every: int = 1,
) -> Iterator[list[str]]:
    """Yields the continuations so far, each time a little longer.

    What was shown is never taken back: an unfinished character is held until it is
    whole, and what may become a stop string until it can't any more.

    Args:
      params, config, tokenizer, prompts, sampling, key, stop, cache_length, plan: as in
        `generate_text`, whose result comes last.
      every: tokens drawn from one time to the next.

    Raises:
      InputError: as `generate_text`.
    """
    if not prompts:
        raise InputError("There is no prompt, but there must be at least 1 (it may be empty text).")
    for text in prompts:
        check_unicode(text, f"The prompt {text!r}")
    encoded = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts]
    yield from stream_ids(
        params,
        config,
        tokenizer,
        encoded,
        width=prompt_width(max(map(len, encoded))),
        sampling=sampling,
        key=key,
        stop=stop,
        cache_length=cache_length,
        plan=plan,
        every=every,
        texts=prompts,
    )


def prompt_width(longest: int) -> int:
    """Returns what prompts are padded to, of which the longest has so many tokens."""
    return -(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE


def stream_ids(
    params: Mapping[str, Any] | PreparedModel,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    sampling: SamplingConfig,
    key: Array,
    stop: Sequence[str] = (),
    cache_length: int | None = None,
    plan: CachePlan | None = None,
    every: int = _STRIDE,
    texts: Sequence[str | None] | None = None,
) -> Iterator[list[str]]:
    """Yields the continuations of prompts that are token ids already.

    Args:
      params, config, tokenizer, sampling, key, stop, cache_length, plan, every: as in
        `stream_text`.
      prompts: token ids of each, at least one.
      width: what the prompts are padded to.
      texts: the texts that were encoded to `prompts`, None for one that was cut; None:
        what they decode to.
    """
    require("" not in stop, "a stop string", "", "a text of at least one character")
    for string in stop:
        check_unicode(string, f"The stop string {string!r}")
    require(every >= 1, "every", every, "at least 1")
    lengths = np.asarray([len(ids) for ids in prompts], np.int32)
    padded = _pad(prompts, max(width, int(lengths.max())))
    if plan is not None:
        cache_length = plan.length
    cache_length = check_prompts(padded, lengths, config, sampling, cache_length)
    eos_id = jnp.asarray(tokenizer.eos_id, jnp.int32)
    model = prepare(params, config)
    state = start(
        model,
        jnp.asarray(padded[:, :cache_length]),
        jnp.asarray(lengths),
        key,
        eos_id,
        sampling=sampling,
        plan=plan or full_plan(config, cache_length),
    )
    rows = [
        Continuation(tokenizer, before, text)
        for before, text in zip(prompts, texts or [None] * len(prompts), strict=True)
    ]
    while True:
        count, tokens, new, ended = jax.device_get(
            (state.count, state.tokens, state.lengths, state.ended)
        )
        last = count >= sampling.max_new_tokens
        found, stopped = [], []
        for row, ids, length, end in zip(rows, tokens, new, ended, strict=True):
            whole = end or last
            text = (row.text if whole else row.settled)(ids[:length].tolist())
            cut = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
            stopped.append(cut is not None)
            if cut is not None:
                found.append(text[:cut])
            else:
                found.append(text if whole else _certain(text, stop))
        done = ended | stopped
        if last or done.all():
            yield found
            return
        yield found
        if any(stopped):
            state = dataclasses.replace(state, ended=jnp.asarray(done))
        until = jnp.asarray(min(count + every, sampling.max_new_tokens), jnp.int32)
        state = advance(model, state, until, key, eos_id, sampling=sampling)


def _pad(prompts: Sequence[Sequence[int]], width: int) -> Int32[np.ndarray, "batch width"]:
    padded = np.zeros((len(prompts), width), np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    return padded


def _certain(text: str, stop: Sequence[str]) -> str:
    """Returns `text` without an end that may yet become a stop string."""
    held = 0
    for string in stop:
        for size in range(1, min(len(string), len(text) + 1)):
            if text.endswith(string[:size]):
                held = max(held, size)
    return text[: len(text) - held]
