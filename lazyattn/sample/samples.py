"""What a model says while it trains: a continuation now and then, into `samples.jsonl`."""

import dataclasses
import textwrap
from typing import Any

import jax

from lazyattn.checkpoint.state import Params
from lazyattn.checkpoint.workdir import SAMPLES
from lazyattn.data.text_files import check_unicode
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.experiment import ExperimentConfig
from lazyattn.generation.cache import check_context, trained_cache_length
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.text import generate_text
from lazyattn.training.hooks import Started
from lazyattn.training.metrics import JsonLines

SAMPLING = SamplingConfig(max_new_tokens=60, temperature=0.8, top_p=0.95)


class Samples:
    """Continues `training.sample_prompt` every `training.sample_every` steps.

    The draws depend on the seed of the run and on the step alone, and nothing of the
    training on them. A resumed run cuts the file back to where it resumes.
    """

    def __init__(self, run: Started):
        """Checks that the model can say so much; opens the file when it is first needed.

        Raises:
          InputError: if prompt and continuation would go past what the model can take, or
            several processes hold the model.
        """
        self._run = run
        self._file: JsonLines | None = None
        experiment = run.experiment
        training, attention = experiment.training, experiment.model.attention
        if not training.sample_every:
            return
        if jax.process_count() > 1:
            raise InputError(
                f"training.sample_every is {training.sample_every}, but it must be 0 where several"
                " processes train, since none of them holds the model."
            )
        check_unicode(training.sample_prompt, "training.sample_prompt")
        both = 1 + len(run.data.tokenizer.encode(training.sample_prompt)) + training.sample_tokens
        length = experiment.data.sequence_length
        room = trained_cache_length(experiment.model, length)
        try:
            check_context(both, experiment.model, length, name="")
            fits = room is None or both <= room
        except InputError:  # which names a flag of other modes
            fits = False
        if not fits:
            longest = length if room is not None else max(length, attention.bias_width)
            raise InputError(
                f"training.sample_prompt and training.sample_tokens together are {both} tokens,"
                f" but they must be at most {longest}, since this model knows no longer context."
            )

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, step: int, params: Params) -> None:
        """Prints a continuation and writes it down."""
        run, training = self._run, self._run.experiment.training
        with jax.set_mesh(run.mesh):
            text = continuation(
                params,
                run.experiment,
                run.data.tokenizer,
                training.sample_prompt,
                dataclasses.replace(SAMPLING, max_new_tokens=training.sample_tokens),
                jax.random.fold_in(jax.random.PRNGKey(training.seed), step),
            )
        if self._file is None:
            self._file = JsonLines(run.workdir / SAMPLES, run.step)
        self._file.write({"step": step, "prompt": training.sample_prompt, "text": text})
        run.say(f"step {step}/{training.steps}  sample")
        for line in textwrap.wrap(" ".join((training.sample_prompt + text).split()), 90):
            run.say(f"    {line}")


def continuation(
    params: Params,
    experiment: ExperimentConfig,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig,
    key: jax.Array,
) -> str:
    """Returns what a model says after a prompt, shorter where its cache is."""
    room = trained_cache_length(experiment.model, experiment.data.sequence_length)
    if room is not None:
        taken = len(tokenizer.encode(prompt)) + 1
        room = max(room, taken + 1)
        new = min(sampling.max_new_tokens, room - taken)
        sampling = dataclasses.replace(sampling, max_new_tokens=new)
    (text,) = generate_text(
        params,
        experiment.model,
        tokenizer,
        [prompt],
        sampling=sampling,
        key=key,
        cache_length=room,
    )
    return text
