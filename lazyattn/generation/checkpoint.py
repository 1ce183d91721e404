"""`--mode=sample`: text from a run's newest checkpoint."""

import os

import jax

from lazyattn.experiment import ExperimentConfig
from lazyattn.generation.cache import trained_cache_length
from lazyattn.generation.decode import generate_text
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.training.workdir import load_trained


def sample(
    path: str | os.PathLike[str],
    prompt: str,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    experiment: ExperimentConfig | None = None,
) -> None:
    """Prints the prompt and its continuation, and nothing else.

    Args:
      path: the run's folder.
      prompt: may be empty: then a document is written from its start.
      sampling: how to draw, and how many tokens.
      seed: of the draws.
      experiment: settings to use; None: the checkpoint's own.

    Raises:
      InputError: if there is no checkpoint, or the text would not fit a cache whose
        length the model fixes.
    """
    trained = load_trained(path, experiment)
    model = trained.experiment.model
    with jax.set_mesh(trained.mesh):
        (text,) = generate_text(
            trained.params,
            model,
            trained.tokenizer,
            [prompt],
            sampling=sampling,
            key=jax.random.PRNGKey(seed),
            cache_length=trained_cache_length(model, trained.experiment.data.sequence_length),
        )
    print(prompt + text)
