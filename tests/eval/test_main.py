"""`--mode=eval` and `--mode=sample` on the folder of a run, called as train.py does."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.eval import scoring
from lazyattn.eval.flags import EvaluationOptions
from lazyattn.eval.main import evaluate
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.sample.main import sample
from tests.eval.items import write_items
from tests.eval.runs import make_run
from tests.training import tiny

RECIPE_WITHOUT_TAIL = {"model.attention.bias_kind": "table", "model.attention.bias_tail": False}
GREEDY = SamplingConfig(max_new_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lazy"))


@pytest.fixture(scope="module")
def tailless(tmp_path_factory):
    """A model whose bias ends after 8 distances, trained on rows of 16 tokens."""
    return make_run(tmp_path_factory.mktemp("tailless"), **RECIPE_WITHOUT_TAIL)


@pytest.fixture
def nothing_compiled(monkeypatch):
    def too_late(*_, **__):
        pytest.fail("the mistake was not found before anything was compiled")

    monkeypatch.setattr(scoring.Scorer, "__call__", too_late)
    monkeypatch.setattr("lazyattn.generation.text.start", too_late)


def test_texts_at_several_contexts_are_shown_and_written(trained, tmp_path, capsys):
    (tmp_path / "passages.jsonl").write_text('{"text": "no word is worth the weight"}\n')
    (tmp_path / "other.txt").write_text(tiny.TEXT)
    options = EvaluationOptions(
        contexts=(16, 64),
        texts=("validation", str(tmp_path / "other.txt")),
        lambada=str(tmp_path / "passages.jsonl"),
        output=str(tmp_path / "out"),
        batch_tokens=1024,
    )
    assert evaluate(trained, options=options) == 0
    shown = capsys.readouterr().out
    assert "| validation | 16 | 16 |" in shown and "| other | 64 * | 64 |" in shown
    assert "2 shapes were compiled" in shown
    data = json.loads((tmp_path / "out" / "contexts.json").read_text())
    assert [r["corpus"] for r in data["texts"]] == ["validation"] * 2 + ["other"] * 2
    assert data["trained_context"] == 16 and len(data["lambada"]) == 2
    assert (tmp_path / "out" / "contexts.md").read_text().startswith("| text |")


def _tables(path):
    """Returns the cells of each line of the tables in a Markdown file."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_retrieval_is_shown_and_written_for_any_checkpoint(trained, tmp_path, capsys):
    options = EvaluationOptions(
        contexts=(96, 320),
        retrieval=True,
        retrieval_distances=(40, 100, 280),
        retrieval_span=16,
        retrieval_rows=4,
        output=str(tmp_path),
        batch_tokens=1024,
    )
    evaluate(trained, options=options)
    shown = capsys.readouterr().out
    assert (tmp_path / "retrieval.md").read_text() in shown
    # Everything of one length is one program; the validation figures are not asked for.
    assert "2 shapes were compiled." in shown and "validation loss" not in shown
    cells = [line[1:3] for line in _tables(tmp_path / "retrieval.md")[1:7]]
    assert cells == [
        *(["96 *", "40"], ["96 *", "nowhere"]),
        *(["320 *", "40"], ["320 *", "100"], ["320 *", "280"], ["320 *", "nowhere"]),
    ]
    data = json.loads((tmp_path / "retrieval.json").read_text())
    assert (data["span"], data["rows"], data["seed"]) == (16, 4, 0)
    short, long = data["results"]
    assert [one["distance"] for one in long["copy"]] == [40, 100, 280, None]
    assert all(one["count"] == 4 * 15 and one["mean"] > 3 for one in long["copy"])
    # A key and its question have some 70 tokens with this tokenizer.
    assert [one["distance"] for one in long["pass_keys"]] == [100, 280]
    assert short["pass_keys"] == []
    assert [one["right"]["mean"] for one in long["pass_keys"]] == [0, 0]
    assert [(one["first"], one["last"]) for one in long["position"]][-2:] == [
        (128, 255),
        (256, 319),
    ]
    assert sum(one["count"] for one in long["position"]) == long["whole"]["count"]


def test_a_model_that_copies_is_seen_to(trained, tmp_path, monkeypatch):
    """From the flags to the table, with a model whose answer is known."""

    def from_48_before(self, tokens, label=""):
        hit = np.zeros((len(tokens), tokens.shape[1] - 1), bool)
        hit[:, 47:] = tokens[:, 48:] == tokens[:, :-48]
        return np.where(hit, 0, 5).astype(np.float32), hit

    monkeypatch.setattr(scoring.Scorer, "score_rows", from_48_before)
    options = EvaluationOptions(
        contexts=(160,),
        retrieval=True,
        retrieval_distances=(32, 48),
        retrieval_span=32,
        retrieval_rows=8,
        output=str(tmp_path),
    )
    evaluate(trained, options=options)
    (result,) = json.loads((tmp_path / "retrieval.json").read_text())["results"]
    near, there, nowhere = (one["mean"] for one in result["copy"])
    assert there == 0 and near > 2 and nowhere > 2


@pytest.mark.slow
def test_retrieval_beside_the_perplexity_of_the_same_text(trained, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(tiny.TEXT * 2)
    options = EvaluationOptions(
        contexts=(16,),
        texts=(str(tmp_path / "other.txt"),),
        retrieval=True,
        retrieval_span=4,
        retrieval_rows=2,
        output=str(tmp_path),
    )
    evaluate(trained, options=options)
    shown = capsys.readouterr().out
    assert "| other | 16 | 16 |" in shown and "| other | 16 | 12 |" in shown
    assert {"contexts.md", "retrieval.md"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_harness_is_run_and_its_results_kept(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    options = EvaluationOptions(
        tasks=("boolq",),
        tasks_dir=str(write_items(tmp_path / "items")),
        contexts=(64,),
        output=str(tmp_path / "out"),
        batch_tokens=1024,
    )
    evaluate(trained, options=options)
    assert "| boolq | acc |" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["max_length"] == 64
    assert (tmp_path / "out" / "benchmarks.md").is_file()


def test_one_prompt_streams_into_what_several_print(trained, capsys):
    sample(trained, ["no word"], GREEDY)
    alone, said = capsys.readouterr()
    assert re.match(r"cache: .* kB for 1 row of \d+ tokens, float32, 100\.0% of all keys", said)
    assert "cache: every head holds all keys, since the model has no qk_norm" in said
    sample(trained, ["no word", "a"], GREEDY)
    together = capsys.readouterr().out
    assert alone.startswith("no word") and alone.endswith("\n")
    assert together.startswith(f"=== sample 1 of 2 ===\n{alone}=== sample 2 of 2 ===\na")
    text = alone.removeprefix("no word")
    sample(trained, ["no word"], GREEDY, stop=[text[1:3]])
    assert capsys.readouterr().out == "no word" + text.partition(text[1:3])[0] + "\n"


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ("nowhere.txt",)}, "--text is 'nowhere.txt', but it must be a .txt"),
        ({"lambada": "nowhere.jsonl"}, "--lambada is 'nowhere.jsonl', but it must be a .jsonl"),
        ({"contexts": (17,)}, "--contexts is 17, but the model's bias table has 8 distances and"),
        (
            {"retrieval": True},
            "--retrieval_span is 64, but it must be at most 8, half of the contex",
        ),
        (
            {"retrieval": True, "retrieval_span": 4, "retrieval_distances": (13,)},
            r"--retrieval_distances is 13, but it must be from 4 \(--retrieval_span\) to 12, what",
        ),
        (
            {"retrieval": True, "contexts": (90_000,), "beyond_table": True},
            r"The text has [\d,]+ tokens, but it must have at least 90,065 for rows of 90,000",
        ),
        ({"contexts": (16, 8), "stride": 9}, "--stride is 9, but it must be from 1 to the short"),
    ],
)
def test_mistakes_come_out_before_anything_is_compiled(tailless, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(tailless, options=EvaluationOptions(**options))


def test_a_longer_context_than_the_table_can_be_asked_for(tailless, tmp_path, capsys):
    (tmp_path / "x.txt").write_text(tiny.TEXT)
    options = EvaluationOptions(
        contexts=(17,), texts=(str(tmp_path / "x.txt"),), beyond_table=True, output=str(tmp_path)
    )
    evaluate(tailless, options=options)
    assert "| x | 17 * |" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_compiled")
def test_samples_past_the_table_are_refused(tailless):
    with pytest.raises(InputError, match=r"the prompt's tokens and --max_new_tokens together is"):
        sample(tailless, ["no word"], SamplingConfig(max_new_tokens=16))
    with pytest.raises(InputError, match="--stop is '', but it must be a text"):
        sample(tailless, ["no word"], GREEDY, stop=[""])


@pytest.mark.usefixtures("nothing_compiled")
def test_a_checkpoint_without_its_tokenizer(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    for mode in (evaluate, lambda path: sample(path, ["a"], GREEDY)):
        with pytest.raises(InputError, match=r"--workdir is .*, but it must be a folder with a to"):
            mode(tmp_path / "run")


@pytest.mark.usefixtures("nothing_compiled")
def test_an_unknown_task(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    options = EvaluationOptions(tasks=("winogrant",))
    with pytest.raises(InputError, match=r"--tasks has 'winogrant', which .* winogrande"):
        evaluate(tmp_path, options=options)


def test_tasks_without_the_harness(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="--tasks needs lm-evaluation-harness, which is not inst"):
        evaluate(tmp_path, options=EvaluationOptions(tasks=("piqa",)))


@pytest.mark.usefixtures("nothing_compiled")
def test_no_prompt_at_all(trained):
    with pytest.raises(InputError, match="There is no prompt"):
        sample(trained, [], GREEDY)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("bad", ["caf\udce9", "\ud800"])
def test_bytes_of_the_command_line_that_are_no_text(tmp_path, bad):
    with pytest.raises(
        InputError, match=r"--prompt is 'caf.*', which is not valid|--prompt is '.u"
    ):
        sample(tmp_path, ["a", bad], GREEDY)
    with pytest.raises(InputError, match=r"--stop is '.*', which is not valid Unicode: character "):
        sample(tmp_path, ["a"], GREEDY, stop=[bad])


@pytest.mark.usefixtures("nothing_compiled")
def test_a_last_word_longer_than_a_context_comes_out_before_anything_is_compiled(trained, tmp_path):
    (tmp_path / "l.jsonl").write_text('{"text": "a w\u00e9i\u00dfzxqvzxqvzxqv"}\n')
    options = EvaluationOptions(lambada=str(tmp_path / "l.jsonl"), contexts=(4,))
    with pytest.raises(InputError, match="the context is 4, but it must be at least"):
        evaluate(trained, options=options)


def test_a_task_that_fails_is_told_and_ends_with_status_1(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lazyattn.eval import tasks

    def run(*_, **__):
        return tasks.TaskResults({"results": {}}, None, {"piqa": "OSError: no network"})

    monkeypatch.setattr(tasks, "run_tasks", run)
    options = EvaluationOptions(
        tasks=("piqa",),
        tasks_dir=str(write_items(tmp_path / "items")),
        lambada=str(tmp_path / "l.jsonl"),
        output=str(tmp_path / "out"),
    )
    (tmp_path / "l.jsonl").write_text('{"text": "no word is worth the weight"}\n')
    assert evaluate(trained, options=options) == 1
    shown = capsys.readouterr().out
    assert "- piqa could not be measured: OSError: no network" in shown
    assert "| LAMBADA, context |" in shown  # what else was asked for is measured all the same
    assert "could not be measured" in (tmp_path / "out" / "benchmarks.md").read_text()
