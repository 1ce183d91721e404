"""The paper's nine benchmarks: their order, their figures, and tasks from local files."""

import dataclasses
import difflib
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from lazyattn.data.copies import here
from lazyattn.data.text_files import check_unicode, json_objects
from lazyattn.errors import InputError, bad_value

# In the paper's order, by the names of lm-evaluation-harness.
BENCHMARKS = (
    "wikitext",
    "lambada_openai",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "boolq",
)

# `--tasks=paper` is all of them.
PAPER = "paper"

# (task, metric) -> what arXiv 2601.00919 reports for its model of 340M parameters.
# What its text doesn't say in numbers we could check is left out.
PAPER_340M = {
    ("wikitext", "word_perplexity"): 25.32,
    ("lambada_openai", "perplexity"): 31.84,
}

# The lines of the table: perplexities first, as in the paper.
_LINES = (
    ("wikitext", "word_perplexity"),
    ("lambada_openai", "perplexity"),
    ("lambada_openai", "acc"),
    ("piqa", "acc"),
    ("piqa", "acc_norm"),
    ("hellaswag", "acc"),
    ("hellaswag", "acc_norm"),
    ("winogrande", "acc"),
    ("arc_easy", "acc"),
    ("arc_easy", "acc_norm"),
    ("arc_challenge", "acc"),
    ("arc_challenge", "acc_norm"),
    ("social_iqa", "acc"),
    ("boolq", "acc"),
)

# What is written next to the task's items goes by these names.
_SPLITS = ("training_split", "validation_split", "test_split")


def task_names(tasks: Sequence[str]) -> list[str]:
    """Returns the tasks asked for, `paper` spelt out and each named once."""
    names = [name for task in tasks for name in (BENCHMARKS if task == PAPER else (task,))]
    return list(dict.fromkeys(names))


def find_tasks(
    tasks: Sequence[str], folder: str | None, work: Path
) -> tuple[list[str], TaskManager]:
    """Returns the tasks' names and the harness's manager that knows them.

    Args:
      tasks: names of tasks, groups or tags; "paper": the nine.
      folder: where each task has its items, as TASK.jsonl, or its settings, as a
        `.yaml` of the harness. None: the harness knows where, usually on a server.
      work: an empty folder to write settings into, to be kept while tasks are loaded.

    Raises:
      InputError: for an unknown task, or one the folder has nothing for.
    """
    names = task_names(tasks)
    # It reports every setting that replaces one of its own, which is the purpose.
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        shipped = _shipped()
        if folder is None:
            _check_names(names, shipped)
            return names, shipped
        place = here("--tasks_dir", folder)
        if not place.is_dir():
            raise bad_value("--tasks_dir", folder, "a folder that exists")
        own = TaskManager(include_path=[str(place)], include_defaults=False)
        _check_names(names, shipped, own)
        for name in names:
            items = place / f"{name}.jsonl"
            if items.is_file():
                settings = _local_settings(name, items, own if name in own.all_tasks else shipped)
                (work / f"{name}.yaml").write_text(yaml.safe_dump(settings))
            elif name not in own.all_tasks:
                raise InputError(
                    f"--tasks_dir is {folder!r}, but it has neither {name}.jsonl nor a .yaml of"
                    f" the task {name}."
                )
        # A group of one's own may be of the harness's tasks.
        return names, TaskManager(
            include_path=[str(place), str(work)], include_defaults=bool(own.all_groups)
        )
    finally:
        logger.setLevel(level)


@functools.cache
def _shipped() -> TaskManager:
    """Returns the manager of the harness's own tasks; it reads thousands of files."""
    return TaskManager()


def _check_names(names: Sequence[str], *managers: TaskManager) -> None:
    known = [name for manager in managers for name in manager.all_tasks]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, PAPER], n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise InputError(
                f"--tasks has {name!r}, which lm-evaluation-harness doesn't know{hint}."
            )


def _local_settings(name: str, items: Path, manager: TaskManager) -> dict[str, Any]:
    """Returns the settings of a task that reads `items` and is otherwise unchanged.

    The items stand for the split that the task is scored on: the test split where it
    has one, else the validation split. There are no others.

    Raises:
      InputError: if the file has no item or a line that is none, or `name` is a group of
        tasks.
    """
    entry = manager.task_index[name]
    settings = entry.cfg if entry.cfg is not None else {}
    if entry.yaml_path is None or "task" not in settings:
        raise InputError(f"--tasks has {name!r}, which is no single task, so {items} can't be its.")
    found = list(json_objects(items, "A file of --tasks_dir"))
    for place, item in found:
        check_unicode(json.dumps(item, ensure_ascii=False), f"{place} has text that")
    if not found:
        raise InputError(f"--tasks_dir has {items.name}, but there is no item in it.")
    scored = "test_split" if settings.get("test_split") else "validation_split"
    split = settings[scored]
    return {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(items.resolve())}},
        **{field: split if field == scored else None for field in _SPLITS},
    }


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table."""

    task: str
    metric: str
    value: float
    stderr: float | None
    paper: float | None


def lines(results: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """Returns the benchmarks' figures in the paper's order, then those of other tasks.

    Args:
      results: "results" of what the harness returns.
    """
    found = []
    others = [
        (task, key.partition(",")[0])
        for task, metrics in results.items()
        if task not in BENCHMARKS
        for key in metrics
        if "," in key and "_stderr" not in key
    ]
    for task, metric in [*_LINES, *others]:
        metrics = results.get(task, {})
        for key, value in metrics.items():
            name, _, how = key.partition(",")
            if name != metric or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{how}")
            found.append(
                Line(
                    task,
                    metric,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    PAPER_340M.get((task, metric)),
                )
            )
    return found


def as_table(
    results: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str] | None = None
) -> str:
    """Returns the figures as Markdown, with the paper's beside them; "-": not known.

    Args:
      results: as in `lines`.
      failed: why a task has no figure.
    """
    rows = [
        "| benchmark | metric | this model | standard error | paper, 340M |",
        "|---|---|---|---|---|",
    ]
    for line in lines(results):
        rows.append(
            f"| {line.task} | {line.metric} | {_number(line.value)} | {_number(line.stderr)}"
            f" | {_number(line.paper)} |"
        )
    accuracies = [
        line.value for line in lines(results) if line.task in BENCHMARKS and line.metric == "acc"
    ]
    if len(accuracies) == sum(metric == "acc" for _, metric in _LINES):
        mean = sum(accuracies) / len(accuracies)
        rows.append(f"| mean of the eight | acc | {_number(mean)} | - | - |")
    notes = [f"- {task} could not be measured: {why}" for task, why in (failed or {}).items()]
    return "\n".join([*rows, *([""] if notes else []), *notes])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 2 else f"{value:,.2f}"
