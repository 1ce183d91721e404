"""Tasks while a run trains: what is logged, what is refused, and, slow, the harness itself."""

import json
import sys

import pytest

from lazyattn import hooks
from lazyattn.errors import InputError
from lazyattn.eval.training_tasks import check_tasks
from lazyattn.experiment import from_config_dict
from tests.eval.items import write_items
from tests.training import tiny


def _experiment(text="", **changes):
    config = tiny.get_config(text)
    config.training.steps = 4
    config.update_from_flattened_dict({f"training.{k}": v for k, v in changes.items()})
    return from_config_dict(config)


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_figures_are_logged_and_the_training_is_the_same(tmp_path, capsys, monkeypatch):
    class Tasks:
        def __init__(self, experiment, mesh, tokenizer):
            pass

        def __call__(self, params):
            assert params
            return {"tasks_piqa_acc": 0.5}

    monkeypatch.setattr(hooks, "Tasks", Tasks)
    monkeypatch.setattr(hooks, "check_tasks", lambda training: None)
    text, cache = tiny.write_text(tmp_path / "text"), tmp_path / "cache"
    for name, changes in (("with", {"tasks_every": 2, "tasks": "piqa"}), ("without", {})):
        assert tiny.train(_experiment(text, **changes), tmp_path / name, cache, summary=False) == 0
    assert "step 4/4  tasks: piqa_acc 0.5000" in capsys.readouterr().out
    measured, silent = _lines(tmp_path / "with"), _lines(tmp_path / "without")
    assert [line.get("tasks_piqa_acc") for line in measured] == [None, 0.5, None, 0.5]
    assert [line["loss"] for line in measured] == [line["loss"] for line in silent]


def test_what_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"training\.tasks is '', but it must be names of tasks"):
        _experiment(tasks_every=2)
    with pytest.raises(InputError, match=r"training\.tasks_dir is 'az://items', but it must be"):
        _experiment(tasks_dir="az://items")
    training = _experiment(tasks_every=2, tasks=" piqa, boolq,").training
    assert training.task_names == ("piqa", "boolq")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="tasks_every needs lm-evaluation-harness, which is not"):
        check_tasks(training)
    check_tasks(_experiment(tasks="piqa").training)


@pytest.mark.slow
def test_the_harness_measures_while_a_run_trains(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements/evaluation.txt)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    items = str(write_items(tmp_path / "items"))
    with pytest.raises(InputError, match=r"training\.tasks has 'piqqa', which lm-evaluation-harn"):
        check_tasks(_experiment(tasks_every=2, tasks="piqqa", tasks_dir=items).training)
    with pytest.raises(InputError, match=r"training\.tasks_dir is .*, but it must be a folder"):
        check_tasks(_experiment(tasks_every=2, tasks="piqa", tasks_dir=items + "x").training)
    text, cache = tiny.write_text(tmp_path / "text"), tmp_path / "cache"
    tasks = {"tasks_every": 2, "tasks": "piqa,lambada_openai", "tasks_dir": items}
    for name, changes in (("with", tasks), ("without", {})):
        assert tiny.train(_experiment(text, **changes), tmp_path / name, cache, summary=False) == 0
    measured, silent = _lines(tmp_path / "with"), _lines(tmp_path / "without")
    for line in measured:
        figures = {name for name in line if name.startswith("tasks_")}
        expected = {"tasks_piqa_acc", "tasks_lambada_openai_perplexity"}
        assert expected <= figures if line["step"] % 2 == 0 else not figures
    assert [line["loss"] for line in measured] == [line["loss"] for line in silent]
