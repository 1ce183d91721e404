"""What a run of `--mode=train` does besides training: validates, inspects, samples, sums up."""

import itertools
from collections.abc import Callable

from lazyattn.checkpoint.state import Params
from lazyattn.data.pipeline import validation_batches
from lazyattn.data.read_ahead import read_together
from lazyattn.eval.perplexity import Evaluator, validation_rows
from lazyattn.eval.training_tasks import Tasks, check_tasks
from lazyattn.inspect.probe import AttentionProbe
from lazyattn.sample.samples import Samples
from lazyattn.summary import print_summary
from lazyattn.training.hooks import Hooks, Scalars, Started


def _validate(run: Started) -> Callable[[Params], Scalars]:
    evaluator = Evaluator(
        run.experiment.model, run.mesh, run.param_shardings, run.data.tokenizer.bytes_per_token
    )
    validations = itertools.count(1)

    def validate(params: Params) -> Scalars:
        batches = run.experiment.training.eval_batches
        rows = validation_rows(run.experiment, run.data, run.mesh, batches)
        found = evaluator(params, read_together(rows, f"validation {next(validations)}, batch"))
        return {
            "validation_loss": found.loss,
            "validation_bits_per_byte": found.bits_per_byte,
            "validation_tokens": found.tokens,
        }

    return validate


def _inspect(run: Started) -> Callable[[Params], Scalars]:
    probe: AttentionProbe | None = None

    def inspect(params: Params) -> Scalars:
        nonlocal probe
        if probe is None:  # made when it is first needed, which may be never
            rows = next(validation_batches(run.data, run.experiment.data))
            probe = AttentionProbe(run.experiment.model, run.mesh, rows)
        return probe(params)

    return inspect


HOOKS = Hooks(
    check=lambda experiment: check_tasks(experiment.training),
    validate=_validate,
    inspect=_inspect,
    sample=Samples,
    tasks=lambda run: Tasks(run.experiment, run.mesh, run.data.tokenizer),
    summary=print_summary,
)
