"""The harness's requests, and its nine benchmarks on items made up here."""

import functools
import json
import os

import jax
import numpy as np
import pytest

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.sharding import MeshConfig, make_mesh
from tests.evaluation.items import ITEMS, write_items
from tests.model.tiny import make_config, make_params
from tests.training.tiny import TEXT

pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements/evaluation.txt)")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.instance import Instance

from lazyattn.evaluation import benchmarks, harness

CONTEXT = 64
CONFIG = make_config(vocab_size=300, attention={"implementation": "xla_chunked"})
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def _tokenizer():
    return Tokenizer.train([TEXT], 300)


@functools.cache
def _lm(**settings):
    params = make_params(CONFIG)
    return harness.LazyAttentionLM(
        params, CONFIG, _tokenizer(), MESH, context=CONTEXT, batch_tokens=512, **settings
    )


def _requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=tuple(a), idx=i)
        for i, a in enumerate(arguments)
    ]


def test_log_likelihoods_are_sums_over_the_continuation():
    pairs = [("attention may", " look at nothing"), ("", "no word"), (TEXT[:9], TEXT[9:30])]
    answers = _lm().loglikelihood(_requests("loglikelihood", pairs))
    backwards = _lm().loglikelihood(_requests("loglikelihood", pairs[::-1]))[::-1]
    bos, encode = _tokenizer().bos_id, _tokenizer().encode
    for (context, continuation), (total, greedy), again in zip(
        pairs, answers, backwards, strict=True
    ):
        whole = [bos, *encode(context + continuation)]
        first = 1 + len(encode(context))
        (score,) = _lm().scorer([whole], context=CONTEXT)
        assert total == pytest.approx(-score.nll[first - 1 :].sum(), rel=1e-5)
        assert greedy == score.greedy[first - 1 :].all()
        assert again == (pytest.approx(total, rel=1e-6), greedy)


def test_long_contexts_lose_their_beginning():
    long, short = TEXT * 4, _tokenizer().decode(_tokenizer().encode(TEXT * 4)[-CONTEXT:])
    answers = _lm(add_bos=False).loglikelihood(
        _requests("loglikelihood", [(long, "x"), (short, "x")])
    )
    assert answers[0] == (pytest.approx(answers[1][0], rel=1e-5), answers[1][1])


def test_a_continuation_longer_than_the_context_is_scored_in_windows():
    text = TEXT * 3
    (whole,) = _lm().loglikelihood_rolling(_requests("loglikelihood_rolling", [(text,)]))
    ((total, _),) = _lm().loglikelihood(_requests("loglikelihood", [("", text)]))
    assert total == pytest.approx(whole, rel=1e-6)
    assert len(_tokenizer().encode(text)) > CONTEXT


def test_rolling_log_likelihoods_count_every_token_once():
    texts = [("x",), (TEXT * 3,)]
    short, long = _lm().loglikelihood_rolling(_requests("loglikelihood_rolling", texts))
    ids = [_tokenizer().bos_id, *_tokenizer().encode(TEXT * 3)]
    rows = [ids[: CONTEXT + 1]]
    while sum(len(row) - 1 for row in rows) < len(ids) - 1:
        done = sum(len(row) - 1 for row in rows)
        rows.append(ids[done : done + CONTEXT + 1])
    # The last window reaches back; the others don't overlap.
    rows[-1] = ids[-(CONTEXT + 1) :]
    left = (len(ids) - 1) % CONTEXT or CONTEXT
    scores = _lm().scorer(rows, context=CONTEXT)
    expected = sum(s.nll.sum() for s in scores[:-1]) + scores[-1].nll[-left:].sum()
    assert long == pytest.approx(-expected, rel=1e-5)
    assert -20 < short < 0


def test_continuations_stop_where_they_should():
    prompts = ["attention may", "no", "a word is worth the weight of a glance"]
    settings = {"until": [], "max_gen_toks": 12}
    whole = _lm().generate_until(_requests("generate_until", [(p, settings) for p in prompts]))
    stop = whole[0][3:5]
    cut = _lm().generate_until(
        _requests("generate_until", [(p, {**settings, "until": [stop, ""]}) for p in prompts])
    )
    assert cut == [text.partition(stop)[0] for text in whole]
    one = {"until": stop, "max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 3}
    drawn = _lm().generate_until(_requests("generate_until", [(prompts[0], one)] * 2))
    assert len(drawn) == 2 and all(stop not in text for text in drawn)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("a", ""), "A continuation to score is empty text"),
        ("loglikelihood_rolling", ("",), "A text to score is empty"),
        ("generate_until", ("a", {"max_gen_toks": 64}), "the tokens to generate is 64, but it mu"),
        ("generate_until", ("a", {"beams": 2}), "generation setting beams is unknown; it must be"),
    ],
)
def test_bad_requests(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        getattr(_lm(), kind)(_requests(kind, [arguments]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    lm = _lm()
    before = lm.scorer.compilations
    results, written = harness.run_tasks(
        lm,
        ["paper"],
        tasks_dir=str(write_items(folder / "items")),
        name="tiny-3",
        output=folder / "out",
        bootstrap_iters=10,
    )
    return results, written, lm.scorer.compilations - before


def test_all_nine_benchmarks_run_on_local_items(measured):
    results, _, compiled = measured
    assert set(results["results"]) == set(benchmarks.BENCHMARKS) == set(ITEMS)
    for name, items in ITEMS.items():
        assert results["n-samples"][name]["effective"] == len(items)
    assert compiled <= 2
    wiki = results["results"]["wikitext"]
    assert wiki["word_perplexity,none"] > wiki["byte_perplexity,none"] > 1
    lambada = results["results"]["lambada_openai"]
    assert lambada["perplexity,none"] > 1 and lambada["acc,none"] in (0, 0.5, 1)


def test_results_are_written_as_the_harness_writes_them(measured):
    results, written, _ = measured
    assert written.parent.name == "tiny-3" and written.name.startswith("results_")
    data = json.loads(written.read_text())
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "config"} <= set(data)
    assert data["results"]["piqa"] == results["results"]["piqa"]
    assert data["model_name"] == "tiny-3"
    assert data["config"]["max_length"] == CONTEXT
    assert data["config"]["model_dtype"] == "float32"
    assert set(data["task_hashes"]) == set(benchmarks.BENCHMARKS)


def test_the_table_has_the_paper_s_order_and_figures(measured):
    table = benchmarks.as_table(measured[0]["results"])
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    names = list(dict.fromkeys(row[0].lstrip("| ") for row in rows))
    assert names == [*benchmarks.BENCHMARKS, "mean of the eight"]
    assert rows[0][1] == "word_perplexity" and rows[0][4].startswith("25.32")
    assert rows[1][1] == "perplexity" and rows[1][4].startswith("31.84")
    assert all(row[4].startswith("-") for row in rows[2:])
    accuracy = [float(row[2]) for row in rows[:-1] if row[1] == "acc"]
    assert len(accuracy) == 8
    assert float(rows[-1][2]) == pytest.approx(np.mean(accuracy), abs=1e-4)


@pytest.mark.slow
def test_real_items_of_all_nine_benchmarks(data_folder, tmp_path, monkeypatch):
    if data_folder is None or not (data_folder / "benchmarks").is_dir():
        pytest.skip("LAZYATTN_TEST_DATA does not name a folder with benchmarks/*.jsonl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    lm = _lm()
    results, _ = harness.run_tasks(
        lm, ["paper"], tasks_dir=str(data_folder / "benchmarks"), bootstrap_iters=0
    )
    assert results["n-samples"]["wikitext"]["effective"] == 20
    for name in benchmarks.BENCHMARKS[1:]:
        assert results["n-samples"][name]["effective"] == 100
    # Nothing was learned, so answers are drawn by lot.
    for name, choices in (("piqa", 2), ("winogrande", 2), ("hellaswag", 4), ("social_iqa", 3)):
        assert abs(results["results"][name]["acc,none"] - 1 / choices) < 0.2
    assert lm.scorer.compilations <= 3


def test_other_tasks_come_after(measured):
    results = {"mine": {"alias": "mine", "acc,none": 0.25, "acc_stderr,none": "N/A"}}
    results["piqa"] = measured[0]["results"]["piqa"]
    rows = benchmarks.as_table(results).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| piqa", "| piqa", "| mine"]
    assert rows[-1] == "| mine | acc | 0.2500 | - | - |"


def test_settings_of_one_s_own(tmp_path):
    write_items(tmp_path, ["piqa"])
    (tmp_path / "mine.yaml").write_text(
        "task: mine\noutput_type: loglikelihood\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'piqa.jsonl'}\n"
        'doc_to_text: "{{goal}}"\ndoc_to_target: " {{sol1}}"\n'
    )
    (tmp_path / "work").mkdir()
    names, manager = benchmarks.find_tasks(["mine", "piqa"], str(tmp_path), tmp_path / "work")
    assert names == ["mine", "piqa"]
    tasks = manager.load(names)["tasks"]
    assert len(tasks["mine"].test_docs()) == len(tasks["piqa"].validation_docs()) == 2


@pytest.mark.parametrize(
    ("tasks", "folder", "message"),
    [
        (["piqqa"], None, "--tasks has 'piqqa', which lm-evaluation-harness doesn't know.*piqa"),
        (["piqa", "boolq"], "items", "--tasks_dir is .* it has neither boolq.jsonl nor a .yaml"),
        (["arc_easy"], "items", "--tasks_dir has arc_easy.jsonl, but there is no item in it"),
        (["piqa"], "nowhere", "--tasks_dir is .*nowhere', but it must be a folder that exists"),
        (["glue"], "items", "--tasks has 'glue', which is no single task"),
    ],
)
def test_bad_tasks(tmp_path, tasks, folder, message):
    items = write_items(tmp_path / "items", ["piqa"])
    (items / "arc_easy.jsonl").write_text("\n")
    (items / "glue.jsonl").write_text("{}\n")
    folder = folder and str(tmp_path / folder)
    with pytest.raises(InputError, match=message):
        benchmarks.find_tasks(tasks, folder, tmp_path)
