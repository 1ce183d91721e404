"""Tasks of lm-evaluation-harness, each measured by itself: one that fails costs no other."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lazyattn.errors import InputError
from lazyattn.eval import benchmarks
from lazyattn.eval.harness import LazyAttentionLM


class TaskResults(NamedTuple):
    """What came of some tasks.

    Attributes:
      results: what `lm_eval.simple_evaluate` returns, of the tasks that were measured.
      written: the harness's own file of them; None: there is none.
      failed: why a task, or a group as a whole, has no result.
    """

    results: dict[str, Any]
    written: Path | None
    failed: dict[str, str]


class _Loaded(NamedTuple):
    """Tasks and groups as `TaskManager.load` returns them."""

    tasks: dict[str, Task]
    groups: dict[str, Group]


def run_tasks(
    lm: LazyAttentionLM,
    tasks: Sequence[str],
    *,
    tasks_dir: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    name: str = "lazyattn",
    output: str | os.PathLike[str] | None = None,
    bootstrap_iters: int = 1000,
) -> TaskResults:
    """Measures a model on tasks of the harness.

    All tasks' requests are built and checked before the model answers the first one.
    A task that can't be loaded or fails later is left out of the results.

    Args:
      lm: the model.
      tasks, tasks_dir: as `tasks` and `folder` in `benchmarks.find_tasks`.
      num_fewshot: solved examples in a prompt; None: the task's own number.
      limit: items a task; None: all.
      name: what the results call the model.
      output: folder that gets the results as the harness writes them; None: none does.
      bootstrap_iters: resamplings behind the standard error of a perplexity.

    Raises:
      InputError: as `benchmarks.find_tasks`, and for a request that the model can't
        answer, all before anything runs.
    """
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work, _one_process():
        names, manager = benchmarks.find_tasks(tasks, tasks_dir, Path(work))
        asked = [_load(manager, each, failed) for each in names]
        asked = [_checked(lm, loaded, num_fewshot, limit, failed) for loaded in asked]
        tracker = EvaluationTracker(output_path=None if output is None else str(output))

        def measure(loaded: _Loaded) -> dict[str, Any]:
            found: Any = simple_evaluate(
                model=lm,
                model_args={"pretrained": name},
                tasks=list(loaded.tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                log_samples=True,
                evaluation_tracker=tracker,
                task_manager=_LoadedManager(manager, loaded),
            )
            return found

        parts = [part for loaded in asked for part in _parts(measure, loaded, failed)]
    results = _joined(parts)
    samples = results.pop("samples", {})
    if output is None or not parts:
        return TaskResults(results, None, failed)
    before = set(Path(output).rglob("results_*.json"))
    tracker.save_results_aggregated(results=results, samples=samples)
    # A failure to write it only logs.
    written = set(Path(output).rglob("results_*.json")) - before
    return TaskResults(results, next(iter(written), None), failed)


def _load(manager: TaskManager, spec: Any, failed: dict[str, str]) -> _Loaded:
    """Returns what a name stands for; of a group that can't be loaded, what of it can."""
    try:
        found = manager.load([spec])
    except Exception as error:  # a task is anybody's code and data
        name = spec if isinstance(spec, str) else str(spec.get("task") or spec.get("group"))
        _fail(failed, [name], error)
        loaded = _Loaded({}, {})
        for part in _members(manager, name):
            loaded.tasks.update(_load(manager, part, failed).tasks)
        return loaded
    return _Loaded(dict(found["tasks"]), dict(found.get("groups", {})))


def _members(manager: TaskManager, name: str) -> list[Any]:
    """Returns what a group or tag consists of; nothing if it is a task."""
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    if name in manager.all_tags:
        return sorted(entry.tags)
    members = (entry.cfg or {}).get("task") if name in manager.all_groups else None
    return members if isinstance(members, list) else []


def _checked(
    lm: LazyAttentionLM,
    loaded: _Loaded,
    num_fewshot: int | None,
    limit: int | None,
    failed: dict[str, str],
) -> _Loaded:
    """Returns the tasks whose requests could be built.

    Raises:
      InputError: for one of these that the model can't answer.
    """
    good = {}
    for task_name, task in loaded.tasks.items():
        try:
            lm.check(_requests(task, num_fewshot, limit))
        except InputError:
            raise
        except Exception as error:  # as above
            _fail(failed, [task_name], error)
        else:
            good[task_name] = task
    if len(good) == len(loaded.tasks):
        return loaded
    for group in loaded.groups:
        failed[group] = "not all of its tasks could be measured"
    return _Loaded(good, {})


def _requests(task: Task, num_fewshot: int | None, limit: int | None) -> list[Instance]:
    """Returns a task's requests, as `simple_evaluate` will build them."""
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif default is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.build_all_requests(limit=limit)
    return task.instances


def _parts(
    measure: Callable[[_Loaded], dict[str, Any]],
    loaded: _Loaded,
    failed: dict[str, str],
) -> list[dict[str, Any]]:
    """Returns the results of some tasks; of each by itself where together they fail."""
    if not loaded.tasks:
        return []
    try:
        return [measure(loaded)]
    except Exception as error:  # as above
        alone = len(loaded.tasks) == 1 and not loaded.groups
        _fail(failed, loaded.tasks if alone else loaded.groups, error)
    if alone:
        return []
    return [
        part
        for name, task in loaded.tasks.items()
        for part in _parts(measure, _Loaded({name: task}, {}), failed)
    ]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the results of several evaluations as if they were of one."""
    joined: dict[str, Any] = {"results": {}}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                joined.setdefault(key, {}).update(value)
            else:
                joined.setdefault(key, value)
    return joined


def _fail(failed: dict[str, str], names: Iterable[str], error: Exception) -> None:
    """Notes why tasks or groups have no result, and says so at once: others may take hours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    for name in names:
        failed[name] = reason
        logging.warning("%s could not be measured: %s", name, reason)
    logging.info("The whole of it:", exc_info=error)


class _LoadedManager:
    """A `TaskManager` that gives tasks that are loaded already."""

    def __init__(self, manager: TaskManager, loaded: _Loaded):
        self.task_index = manager.task_index
        self._loaded = loaded

    def load(self, names: Sequence[str]) -> dict[str, Any]:
        """As `TaskManager.load`."""
        del names
        return self._loaded._asdict()


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keeps the harness from forking to resample: JAX has threads, so a fork may hang."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
