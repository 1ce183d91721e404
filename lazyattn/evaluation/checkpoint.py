"""`--mode=eval`: the validation figures of a run's newest checkpoint."""

import os

from lazyattn.data.pipeline import prepare, unigram_entropy
from lazyattn.errors import InputError
from lazyattn.evaluation.perplexity import Evaluator, validation_rows
from lazyattn.experiment import ExperimentConfig
from lazyattn.sharding import check_batch
from lazyattn.training.workdir import load_trained


def evaluate(
    path: str | os.PathLike[str],
    experiment: ExperimentConfig | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Prints validation loss, perplexity and bits per byte.

    Args:
      path: the run's folder.
      experiment: settings to use; None: the checkpoint's own.
      cache_dir: where prepared data is kept; None: the user's cache.

    Raises:
      InputError: if there is no checkpoint, or the data is not what it was.
    """
    trained = load_trained(path, experiment)
    experiment = trained.experiment
    check_batch(trained.mesh, experiment.data.batch_size)
    prepared = prepare(experiment.data, cache_dir)
    if prepared.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise InputError(
            "The data prepared here has another tokenizer than the run was trained with (another"
            " Python or other settings); evaluate with what it was trained with."
        )
    evaluator = Evaluator(
        experiment.model, trained.mesh, trained.param_shardings, trained.tokenizer.bytes_per_token
    )
    found = evaluator(trained.params, validation_rows(experiment, prepared))
    print(f"checkpoint       {trained.checkpoint}")
    print(
        f"validation loss  {found.loss:.4f} nats a token over {found.tokens:,} tokens"
        f" (unigram entropy {unigram_entropy(prepared):.4f})"
    )
    print(f"perplexity       {found.perplexity:.3f}")
    print(f"bits per byte    {found.bits_per_byte:.4f} over {found.bytes:,} bytes")
