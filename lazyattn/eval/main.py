"""`--mode=eval`: a run's checkpoint, measured as the flags say."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lazyattn import buckets
from lazyattn.checkpoint.load import TrainedModel, load_trained
from lazyattn.checkpoint.workdir import check_tokenizer
from lazyattn.data.documents import (
    VALIDATION,
    Corpus,
    Text,
    is_prepared,
    read_prepared,
    read_texts,
    tokenize,
    validation_texts,
)
from lazyattn.data.pipeline import prepare, unigram_entropy
from lazyattn.data.read_ahead import read_together
from lazyattn.distributed import say
from lazyattn.errors import InputError, require
from lazyattn.eval import extrapolation, reach
from lazyattn.eval.flags import EvaluationOptions
from lazyattn.eval.lambada import Passage, read_lambada, tokenize_passages
from lazyattn.eval.perplexity import Evaluator, coverage, validation_rows
from lazyattn.eval.scoring import Scorer
from lazyattn.eval.training_tasks import check_known
from lazyattn.experiment import ExperimentConfig
from lazyattn.generation.cache import check_context
from lazyattn.paths import results
from lazyattn.sharding import check_batch

_FOLDER = "evaluation"


def evaluate(
    path: str | os.PathLike[str],
    experiment: ExperimentConfig | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    options: EvaluationOptions | None = None,
    step: int | str | None = None,
) -> int:
    """Measures and prints what was asked for; without any, the validation figures.

    Args:
      path: the run's folder, or an export's.
      experiment: settings to use; None: the checkpoint's own.
      cache_dir: where prepared data is kept; None: the user's cache.
      options: what to measure; None: the validation figures.
      step: which checkpoint, as `load_trained` has it.

    Returns:
      The exit status: 1 if a task could not be measured, else 0.

    Raises:
      InputError: if there is no checkpoint or tokenizer, the data is not what it was,
        or something asked for is wrong, all before anything is compiled.
    """
    options = EvaluationOptions() if options is None else options
    wanted = _wanted(options)
    texts = {
        name: read_texts(name)[: options.limit]
        for name in options.texts
        if name != VALIDATION and not is_prepared(name)
    }
    passages = [] if options.lambada is None else read_lambada(options.lambada)[: options.limit]
    if "tasks" in wanted:
        require(
            jax.process_count() == 1,
            "--tasks",
            ",".join(options.tasks),
            "left out where several processes evaluate: the harness runs in one",
        )
        check_known("--tasks", options.tasks, options.tasks_dir)
    folder = results(options.output, path, _FOLDER, writes=wanted != {"validation"})
    check_tokenizer(path)
    trained = load_trained(path, experiment, step)
    contexts = _contexts(trained, options)

    @functools.cache
    def corpus(name: str) -> Corpus:
        return _corpus(trained, name, texts, options.limit)

    # What is wrong with the text comes out before anything is measured.
    if "validation" in wanted:
        trained.require_data("--text")
    if "texts" in wanted:
        names = options.texts if options.texts or passages else [VALIDATION]
        corpora = list(map(corpus, names))
        tokens = tokenize_passages(passages, trained.tokenizer)
        extrapolation.check(tokens, contexts, options.stride)
    if "retrieval" in wanted:
        plan = reach.Plan(
            tuple(sorted(set(options.retrieval_distances))),
            options.retrieval_span,
            options.retrieval_rows,
            options.seed,
        )
        reach.check_plan(plan, contexts)
        sources = list(map(corpus, options.texts or [VALIDATION]))
        for source in sources:
            reach.check_corpus(source, plan, contexts)

    say(f"checkpoint       {trained.checkpoint}")
    all_measured = "tasks" not in wanted or _print_tasks(trained, options, contexts[0], folder)
    scorer = Scorer(
        trained.params,
        trained.experiment.model,
        trained.mesh,
        batch_tokens=options.batch_tokens,
        exact=options.precision == "float32",
    )
    if "texts" in wanted:
        _print_texts(trained, scorer, corpora, tokens, contexts, options.stride, folder)
    if "retrieval" in wanted:
        _print_retrieval(trained, scorer, sources, plan, contexts, folder)
    if "validation" in wanted:
        _print_validation(trained, cache_dir)
    return 0 if all_measured else 1


def _wanted(options: EvaluationOptions) -> set[str]:
    """Returns what is asked for: "tasks", "retrieval", "texts"; or else "validation"."""
    found = {name for name in ("tasks", "retrieval") if getattr(options, name)}
    # A list of contexts alone is a question about the run's own text.
    if options.texts or options.lambada is not None or (options.contexts and not found):
        found.add("texts")
    return found or {"validation"}


def _contexts(trained: TrainedModel, options: EvaluationOptions) -> tuple[int, ...]:
    """Returns the context lengths, which the model must know.

    Raises:
      InputError: if it does not.
    """
    length = trained.experiment.data.sequence_length
    contexts = options.contexts or (length,)
    for context in contexts:
        check_context(
            context,
            trained.experiment.model,
            length,
            name="--contexts" if options.contexts else "the context",
            beyond_table=options.beyond_table,
        )
    return contexts


def _compiled(scorer: Scorer) -> str:
    number = scorer.compilations
    return "1 shape was compiled." if number == 1 else f"{number} shapes were compiled."


def _print_validation(trained: TrainedModel, cache_dir: str | os.PathLike[str] | None) -> None:
    """Prints loss, perplexity and bits per byte of the whole validation split.

    Its rows are packed as in training, whatever part of them training validates on.
    """
    experiment = trained.experiment
    length = experiment.data.sequence_length
    check_batch(trained.mesh, experiment.data.batch_size, sequence_length=length)
    prepared = prepare(experiment.data, cache_dir)
    if prepared.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise InputError(
            "The data prepared here has another tokenizer than the run was trained with (another"
            " Python or other settings); evaluate with what it was trained with."
        )
    evaluator = Evaluator(
        experiment.model, trained.mesh, trained.param_shardings, trained.tokenizer.bytes_per_token
    )
    rows = read_together(validation_rows(experiment, prepared, trained.mesh), "evaluation, batch")
    found = evaluator(trained.params, rows)
    say(
        f"validation loss  {found.loss:.4f} nats a token {coverage(found.tokens)}"
        f" (unigram entropy {unigram_entropy(prepared):.4f})"
    )
    say(f"perplexity       {found.perplexity:.3f}")
    say(f"bits per byte    {found.bits_per_byte:.4f} over {found.bytes:,} bytes")


def _corpus(
    trained: TrainedModel, name: str, texts: dict[str, list[Text]], limit: int | None
) -> Corpus:
    """Returns the documents of a name on the command line; `texts` are those read before."""
    data = trained.experiment.data
    label, tokenizer = Path(name).stem, trained.tokenizer
    if name in texts:
        return tokenize(label, texts[name], tokenizer)
    if name != VALIDATION:
        return read_prepared(label, [name], tokenizer, limit)
    trained.require_data("--text")
    if data.tokenised:
        return read_prepared(label, [path for path, _ in data.weighted_paths], tokenizer, limit)
    return tokenize(label, validation_texts(data)[:limit], tokenizer)


def _print_texts(
    trained: TrainedModel,
    scorer: Scorer,
    corpora: list[Corpus],
    passages: list[Passage],
    contexts: tuple[int, ...],
    stride: int | None,
    folder: Path,
) -> None:
    """Measures texts at every context; prints a table and writes it, data and plot."""
    found = extrapolation.extrapolate(scorer, corpora, passages, contexts, stride)
    length = trained.experiment.data.sequence_length
    table, data = extrapolation.as_table(*found, length), extrapolation.as_data(*found, length)
    with _written(trained, scorer, folder, "contexts", table, data) as work:
        if work is not None and not extrapolation.draw(*found, length, work / "contexts.png"):
            say("There is no picture: matplotlib is not installed.")


def _print_retrieval(
    trained: TrainedModel,
    scorer: Scorer,
    corpora: list[Corpus],
    plan: reach.Plan,
    contexts: tuple[int, ...],
    folder: Path,
) -> None:
    """Measures how far back the model reaches; prints tables and writes them and their data."""
    tokenizer = trained.tokenizer
    found = [
        reach.measure(scorer.score_rows, corpus, context, plan, tokenizer, tokenizer.bos_id)
        for corpus in corpora
        for context in sorted(set(contexts))
    ]
    length = trained.experiment.data.sequence_length
    table, data = reach.as_table(found, plan, length), reach.as_data(found, plan, length)
    with _written(trained, scorer, folder, "retrieval", table, data):
        pass


@contextlib.contextmanager
def _written(
    trained: TrainedModel,
    scorer: Scorer,
    folder: Path,
    name: str,
    table: str,
    data: dict[str, Any],
) -> Iterator[Path | None]:
    """Prints a table; yields the folder it was written to with its data, on the first process."""
    say(f"\n{table}\n\n{_compiled(scorer)}")
    if jax.process_index() > 0:
        yield None
        return
    with buckets.written(folder) as work:
        work.mkdir(parents=True, exist_ok=True)
        (work / f"{name}.md").write_text(table + "\n")
        content = json.dumps(data | {"checkpoint": str(trained.checkpoint)}, indent=2)
        (work / f"{name}.json").write_text(content + "\n")
        yield work
    say(f"Written to {folder}: {name}.md, {name}.json.")


def _print_tasks(
    trained: TrainedModel, options: EvaluationOptions, context: int, folder: Path
) -> bool:
    """Runs the harness; prints the table and writes it beside the harness's results.

    Returns:
      Whether every task could be measured.
    """
    from lazyattn.eval import benchmarks, harness, tasks

    harness.quiet()
    lm = harness.LazyAttentionLM.from_trained(
        trained,
        context=context,
        beyond_table=options.beyond_table,
        batch_tokens=options.batch_tokens,
        exact=options.precision == "float32",
    )
    with buckets.written(folder) as work:
        found = tasks.run_tasks(
            lm,
            options.tasks,
            tasks_dir=options.tasks_dir,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            name=f"{trained.name}-{trained.step}",
            output=work,
        )
        table = benchmarks.as_table(found.results["results"], found.failed)
        print(f"\n{table}\n\n{_compiled(lm.scorer)}")
        work.mkdir(parents=True, exist_ok=True)
        (work / "benchmarks.md").write_text(table + "\n", encoding="utf-8")
        own = None if found.written is None else folder / found.written.relative_to(work)
    if own is None:
        print(f"Written to {folder}: benchmarks.md; the harness wrote no file of its own.")
    else:
        print(f"Written to {folder}: benchmarks.md, and the harness's own {own}.")
    return not found.failed
