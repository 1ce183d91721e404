"""`--mode=eval` and `--mode=sample` on the folder of a run, called as train.py does."""

import json
import shutil
import sys

import pytest

from lazyattn.errors import InputError
from lazyattn.evaluation import scoring
from lazyattn.evaluation.checkpoint import evaluate
from lazyattn.evaluation.options import EvaluationOptions
from lazyattn.generation.checkpoint import sample
from lazyattn.generation.sampling import SamplingConfig
from tests.evaluation.items import write_items
from tests.evaluation.runs import make_run
from tests.training import tiny

GREEDY = SamplingConfig(max_new_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lazy"))


@pytest.fixture(scope="module")
def tailless(tmp_path_factory):
    """A model whose bias ends after 8 distances, trained on rows of 16 tokens."""
    return make_run(tmp_path_factory.mktemp("tailless"), **{"model.attention.bias_tail": False})


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
    evaluate(trained, options=options)
    shown = capsys.readouterr().out
    assert "| validation | 16 | 16 |" in shown and "| other | 64 * | 64 |" in shown
    assert "2 shapes were compiled" in shown
    data = json.loads((tmp_path / "out" / "contexts.json").read_text())
    assert [r["corpus"] for r in data["texts"]] == ["validation"] * 2 + ["other"] * 2
    assert data["trained_context"] == 16 and len(data["lambada"]) == 2
    assert (tmp_path / "out" / "contexts.md").read_text().startswith("| text |")


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
    alone = capsys.readouterr().out
    sample(trained, ["no word", "a"], GREEDY)
    together = capsys.readouterr().out
    assert alone.startswith("no word") and alone.endswith("\n")
    assert together.startswith(alone + "\na")
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
