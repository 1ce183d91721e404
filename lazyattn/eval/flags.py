"""The flags of `--mode=eval`."""

import dataclasses
from typing import Annotated, Any

from absl import flags

from lazyattn import command_line, paths
from lazyattn.allowed import at_least, check_settings, one_of
from lazyattn.errors import InputError, require
from lazyattn.eval.retrieval import DISTANCES, ROWS, SPAN

PRECISIONS = ("float32", "model")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how.

    Attributes:
      tasks: of lm-evaluation-harness.
      tasks_dir: folder with the tasks' items or settings; None: the harness's own.
      num_fewshot: solved examples in a prompt; None: the task's own number.
      limit: items a task, documents a text, passages of LAMBADA; None: all.
      contexts: context lengths; none: that of the training rows.
      stride: of rolling windows; None: the context.
      texts: files, folders of text and of tokenised shards to measure perplexity on.
      lambada: file of passages; None: none.
      output: folder for results; None: `evaluation` in the run's.
      precision: "float32" (and nothing skipped) or "model" (as in training).
      batch_tokens: tokens of a batch.
      beyond_table: go on where a bias table without a tail ends.
      retrieval: measure copying, pass keys and loss by position.
      retrieval_distances: how far back, tokens; none: what the contexts have room for.
      retrieval_span: tokens copied.
      retrieval_rows: rows of each of those figures.
      seed: of the rows drawn for them.
    """

    tasks: tuple[str, ...] = ()
    tasks_dir: str | None = None
    num_fewshot: Annotated[int, at_least(0)] | None = None
    limit: Annotated[int, at_least(1)] | None = None
    contexts: tuple[int, ...] = ()
    stride: Annotated[int, at_least(1)] | None = None
    texts: tuple[str, ...] = ()
    lambada: str | None = None
    output: str | None = None
    precision: Annotated[str, one_of(PRECISIONS)] = "float32"
    batch_tokens: Annotated[int, at_least(1)] = 16_384
    beyond_table: bool = False
    retrieval: bool = False
    retrieval_distances: tuple[int, ...] = ()
    retrieval_span: Annotated[int, at_least(2)] = SPAN
    retrieval_rows: Annotated[int, at_least(2)] = ROWS  # one row has no standard error
    seed: int = 0

    def __post_init__(self):
        check_settings(self, "--")
        for context in self.contexts:
            require(context >= 1, "--contexts", context, "at least 1")
        if self.tasks and len(self.contexts) > 1:
            raise InputError(
                "--contexts has several lengths, but --tasks are measured at one; give one."
            )
        if self.tasks_dir is not None and not self.tasks:
            raise InputError("--tasks_dir is given, but --tasks doesn't say which to measure.")
        require(self.seed >= 0 or not self.retrieval, "--seed", self.seed, "at least 0")
        for distance in self.retrieval_distances:
            require(
                distance >= self.retrieval_span,
                "--retrieval_distances",
                distance,
                f"at least --retrieval_span = {self.retrieval_span}",
            )
        if not self.retrieval and (
            self.retrieval_distances or (self.retrieval_span, self.retrieval_rows) != (SPAN, ROWS)
        ):
            raise InputError(
                "--retrieval_distances, --retrieval_span or --retrieval_rows is given, but"
                " --retrieval is not."
            )


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags but --seed, which generation defines."""
    where: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list(
        "tasks", [], "eval: tasks of lm-evaluation-harness; 'paper': the paper's nine.", **where
    )
    paths.define(
        "tasks_dir", None, "eval: folder of TASK.jsonl or .yaml files.", values, buckets=True
    )
    flags.DEFINE_integer("num_fewshot", None, "eval: solved examples in a prompt.", **where)
    flags.DEFINE_integer("limit", None, "eval: items a task, documents a text at most.", **where)
    flags.DEFINE_list("contexts", [], "eval: context lengths, such as 512,1024,2048.", **where)
    flags.DEFINE_integer("stride", None, "eval: tokens a rolling window predicts.", **where)
    paths.define_multi(
        "text",
        [],
        "eval, inspect: .txt, .jsonl, folder of .txt or of shards; 'validation': the run's own;"
        " several times for several.",
        values,
        buckets=True,
    )
    paths.define("lambada", None, "eval: .jsonl file of passages.", values, buckets=True)
    paths.define(
        "output",
        None,
        "eval, inspect, plot, export: folder for results.",
        values,
        buckets=True,
    )
    flags.DEFINE_string("precision", "float32", "eval: float32, or the model's own.", **where)
    flags.DEFINE_integer("batch_tokens", 16_384, "eval: tokens of a batch.", **where)
    flags.DEFINE_bool(
        "beyond_table",
        False,
        "eval, inspect, sample: go on past a bias table without tail.",
        **where,
    )
    flags.DEFINE_bool(
        "retrieval",
        False,
        "eval: copying and pass keys by distance, and loss by position in the row.",
        **where,
    )
    flags.DEFINE_list(
        "retrieval_distances",
        [],
        "eval: tokens from what is repeated back to where it stood, such as 96,512;"
        f" default: those of {', '.join(map(str, DISTANCES))} that fit, and the farthest.",
        **where,
    )
    flags.DEFINE_integer("retrieval_span", SPAN, "eval: tokens copied.", **where)
    flags.DEFINE_integer("retrieval_rows", ROWS, "eval: rows of each retrieval figure.", **where)


def options(values: flags.FlagValues = flags.FLAGS) -> EvaluationOptions:
    """Returns what to measure.

    Raises:
      InputError: for a value out of range, or flags that do not go together.
    """
    return command_line.settings(
        EvaluationOptions,
        values,
        tasks=tuple(name.strip() for name in values.tasks if name.strip()),
        contexts=command_line.whole_numbers(values, "contexts"),
        texts=tuple(values.text),
        retrieval_distances=command_line.whole_numbers(values, "retrieval_distances"),
    )
