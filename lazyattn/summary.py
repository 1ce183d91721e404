"""What a finished run shows for itself."""

import sys
import textwrap
from pathlib import Path

import jax
import numpy as np

from lazyattn.checkpoint.state import TrainState
from lazyattn.data.pipeline import unigram_entropy, validation_batches
from lazyattn.eval.perplexity import coverage
from lazyattn.inspect.statistics import attention_statistics
from lazyattn.sample.samples import SAMPLING, continuation
from lazyattn.training.hooks import Finished, Started

_PROMPT = "The "


def print_summary(run: Started, end: Finished) -> None:
    """Prints the end of a run: loss, sparsity, a sample, and where to go from here."""
    say, path, prepared, checkpoint = run.say, run.path, run.data, end.checkpoint
    tokens = int(end.record["validation_tokens"])
    split = prepared.counts["validation"].targets
    part = run.experiment.training.eval_batches if tokens < split else 0
    say("")
    say(
        f"validation loss            {end.record['validation_loss']:.4f} nats a token"
        f" {coverage(tokens, part)} (unigram entropy {unigram_entropy(prepared):.4f})"
    )
    say(f"bits per byte              {end.record['validation_bits_per_byte']:.4f}")
    if jax.process_count() == 1:  # else no process holds the model
        _show_attention_and_sample(run, end.state)
    for line in end.spent:
        say(line)
    say(f"checkpoint                 {checkpoint}")
    if end.best is not None:
        say(
            f"best checkpoint            {checkpoint.with_name(str(end.best[0]))}"
            f" (validation loss {end.best[1]:.4f}; --step=best)"
        )
    say("go on with")
    train = _program()
    say(f"    {train} --mode=sample --workdir={path} --prompt='{_PROMPT.strip()}'")
    say(f"    {train} --mode=eval --workdir={path}")
    say(f"    {train} --mode=inspect --workdir={path}")


def _show_attention_and_sample(run: Started, state: TrainState) -> None:
    say, experiment, prepared = run.say, run.experiment, run.data
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
