"""What a finished run shows for itself."""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from lazyattn.checkpoint.state import TrainState
from lazyattn.data.pipeline import TrainingData, unigram_entropy, validation_batches
from lazyattn.eval.perplexity import coverage
from lazyattn.experiment import ExperimentConfig
from lazyattn.inspect.statistics import attention_statistics
from lazyattn.training.samples import SAMPLING, continuation

_PROMPT = "The "


def print_summary(
    say: Callable[[str], None],
    path: str | os.PathLike[str],
    experiment: ExperimentConfig,
    prepared: TrainingData,
    state: TrainState,
    *,
    checkpoint: Path,
    best: tuple[int, float] | None,
    spent: Sequence[str],
    loss: float,
    bits_per_byte: float,
    tokens: int,
) -> None:
    """Prints the end of a run: loss, sparsity, a sample, and where to go from here.

    Args:
      say: prints a line.
      path: the run's folder, as the user wrote it.
      experiment: the settings.
      prepared: the data.
      state: the last state.
      checkpoint: its checkpoint.
      best: step and validation loss of the best checkpoint, if one is known.
      spent: lines on time and memory.
      loss: validation loss, nats a token.
      bits_per_byte: of the same tokens.
      tokens: tokens that both are over.
    """
    split = prepared.counts["validation"].targets
    part = experiment.training.eval_batches if tokens < split else 0
    say("")
    say(
        f"validation loss            {loss:.4f} nats a token"
        f" {coverage(tokens, part)} (unigram entropy {unigram_entropy(prepared):.4f})"
    )
    say(f"bits per byte              {bits_per_byte:.4f}")
    if jax.process_count() == 1:  # else no process holds the model
        _show_attention_and_sample(say, experiment, prepared, state)
    for line in spent:
        say(line)
    say(f"checkpoint                 {checkpoint}")
    if best is not None:
        say(
            f"best checkpoint            {checkpoint.with_name(str(best[0]))}"
            f" (validation loss {best[1]:.4f}; --step=best)"
        )
    say("go on with")
    train = _program()
    say(f"    {train} --mode=sample --workdir={path} --prompt='{_PROMPT.strip()}'")
    say(f"    {train} --mode=eval --workdir={path}")
    say(f"    {train} --mode=inspect --workdir={path}")


def _show_attention_and_sample(
    say: Callable[[str], None],
    experiment: ExperimentConfig,
    prepared: TrainingData,
    state: TrainState,
) -> None:
    rows = next(validation_batches(prepared, experiment.data))
    params = state.evaluated(experiment.training.use_ema)
    found = attention_statistics(params, experiment.model, rows)
    share = np.mean(found.first_token / np.maximum(found.mass, 1e-9))
    say(f"attention exactly zero     {found.zero_share.mean():.1%} of the visible pairs")
    say(f"attention on first token   {share:.2%} of all attention, mean over layers and heads")
    say("sample, after a given first word")
    key = jax.random.fold_in(state.rng, state.step)
    said = continuation(params, experiment, prepared.tokenizer, _PROMPT, SAMPLING, key)
    text = _PROMPT + said
    for line in textwrap.wrap(" ".join(text.split()), 90):
        say(f"    {line}")


def _program() -> str:
    """Returns how to call the program: with a Python below the current folder by its path."""
    if Path(sys.argv[0]).name == "lazyattn":
        return "lazyattn"
    path = Path(sys.executable)
    here = Path.cwd()
    python = str(path.relative_to(here)) if path.is_relative_to(here) else "python"
    return f"{python} {'train.py' if Path('train.py').is_file() else '-m lazyattn'}"
