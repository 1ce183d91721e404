"""`--mode=sample`: text from a run's checkpoint."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from lazyattn.checkpoint.load import TrainedModel, load_trained
from lazyattn.checkpoint.workdir import check_tokenizer
from lazyattn.data.text_files import check_unicode
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig
from lazyattn.generation import spans
from lazyattn.generation.cache import (
    CacheOptions,
    CachePlan,
    check_context,
    check_memory,
    free_memory,
    trained_cache_length,
)
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.text import generate_text, prompt_width, stream_text


def sample(
    path: str | os.PathLike[str],
    prompts: str | Sequence[str],
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
    beyond_table: bool = False,
    cache: CacheOptions | None = None,
    experiment: ExperimentConfig | None = None,
    step: int | str | None = None,
) -> None:
    """Prints each prompt and its continuation.

    One prompt is continued before the reader's eyes, and nothing else is printed;
    several, which are decoded as one batch, are printed when all are done, each below
    a line that says which it is. What the cache of keys and values takes comes first, on
    standard error.

    Args:
      path: the run's folder, or an export's.
      prompts: one or several; an empty text asks for a document from its start.
      sampling: how to draw, and how many tokens.
      seed: of the draws.
      stop: a continuation ends before the first of these strings.
      beyond_table: go on where a bias table without a tail ends.
      cache: what to hold of keys and values; None: of each head what it can need.
      experiment: settings to use; None: the checkpoint's own.
      step: which checkpoint, as `load_trained` has it.

    Raises:
      InputError: if a text is not valid Unicode, there is no checkpoint or tokenizer, or
        the text would not fit a cache whose length the model fixes, or go past its bias
        table, or the cache would not fit in memory.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise InputError("There is no prompt, but there must be at least 1 (it may be empty text).")
    if "" in stop:
        raise InputError("--stop is '', but it must be a text of at least one character.")
    for flag, texts in (("--prompt", prompts), ("--stop", stop)):
        for text in texts:
            check_unicode(text, f"{flag} is {text!r}, which")
    check_tokenizer(path)
    trained = load_trained(path, experiment, step)
    model, tokenizer = trained.experiment.model, trained.tokenizer
    trained_length = trained.experiment.data.sequence_length
    longest = 1 + max(len(tokenizer.encode(prompt)) for prompt in prompts)
    check_context(
        longest + sampling.max_new_tokens,
        model,
        trained_length,
        name="the prompt's tokens and --max_new_tokens together",
        beyond_table=beyond_table,
    )
    how: dict[str, Any] = {"sampling": sampling, "key": jax.random.PRNGKey(seed), "stop": stop}
    with jax.set_mesh(trained.mesh):
        length = trained_cache_length(model, trained_length)
        if length is None or longest + sampling.max_new_tokens <= length:
            length = length or prompt_width(longest) + sampling.max_new_tokens
            how["plan"] = _plan(trained, length, len(prompts), cache or CacheOptions())
        else:
            how["cache_length"] = length  # which is refused
        if len(prompts) > 1:
            texts = generate_text(trained.params, model, tokenizer, prompts, **how)
            both = zip(prompts, texts, strict=True)
            for number, (prompt, text) in enumerate(both, 1):
                print(f"=== sample {number} of {len(prompts)} ===\n{prompt}{text}")
            return
        shown = ""
        print(prompts[0], end="", flush=True)
        for (text,) in stream_text(trained.params, model, tokenizer, prompts, **how):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()


def _plan(trained: TrainedModel, length: int, rows: int, options: CacheOptions) -> CachePlan:
    """Returns which keys to hold, having said what that takes."""
    params, model = trained.params, trained.experiment.model
    plan = spans.plan_by(params, model, length, options)
    check_memory(plan, rows, free_memory())
    print(f"cache: {spans.describe(plan, rows)}", file=sys.stderr)
    why = spans.everything_kept(params, model) if options.kind == "spans" else None
    if why is not None:
        kept = "all keys" if model.attention.window is None else "all keys of its window"
        print(f"cache: every head holds {kept}, since {why}", file=sys.stderr)
    return plan
