"""The harness's requests, and its nine benchmarks on items made up here."""

import functools
import json
import os

import jax
import numpy as np
import pytest
import yaml

from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError
from lazyattn.sharding import MeshConfig, make_mesh
from tests.data import real_tokenizers
from tests.eval.items import ITEMS, write_items
from tests.model.tiny import make_config, make_params
from tests.training.tiny import TEXT

pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements/evaluation.txt)")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.instance import Instance

from lazyattn.eval import benchmarks, harness
from lazyattn.eval.tasks import run_tasks

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
        ("loglikelihood", ("a", ""), "'' of 'a' in request 0 has no token to score: it is empty"),
        ("loglikelihood", ("", ""), "The continuation '' of '' in request 0 has no token to score"),
        ("generate_until", ("a", {"max_gen_toks": 64}), "the tokens to generate is 64, but it mu"),
        ("generate_until", ("a", {"beams": 2}), "setting beams of request 0 is 2, but it is unkn"),
    ],
)
def test_bad_requests(kind, arguments, message):
    requests = _requests(kind, [arguments])
    for ask in (_lm().check, getattr(_lm(), kind)):
        with pytest.raises(InputError, match=message):
            ask(requests)


@functools.cache
def _lm_with(kind):
    config = make_config(vocab_size=400, attention={"implementation": "xla_chunked"})
    tokenizer = getattr(real_tokenizers, kind)()
    return harness.LazyAttentionLM(
        make_params(config), config, tokenizer, MESH, context=CONTEXT, batch_tokens=512
    )


def test_a_continuation_that_merges_into_its_context_is_refused():
    lm = _lm_with("across_spaces")
    pairs = [("look: the", " cat"), ("the cat", " sat on"), ("Answer:", " yes")]
    merged = [
        pair for pair in pairs if len(lm.tok_encode("".join(pair))) <= len(lm.tok_encode(pair[0]))
    ]
    assert ("the cat", " sat on") in merged
    for pair in merged:
        (request,) = _requests("loglikelihood", [pair])
        request.task_name, request.doc_id = "mine", 7
        for ask in (lm.check, lm.loglikelihood):
            with pytest.raises(InputError) as error:
                ask([request])
            assert str(error.value) == (
                f"The continuation {pair[1]!r} of {pair[0]!r} in item 7 of task mine (counted from"
                " 0) has no token to score: the tokenizer merges it into its context."
            )


def test_a_context_of_white_space_alone_is_the_beginning_of_a_document():
    requests = _requests("loglikelihood", [("  ", "word"), ("", "  word")])
    for add_bos in (True, False):
        spaces, nothing = _lm(add_bos=add_bos).loglikelihood(requests)
        assert spaces == (pytest.approx(nothing[0], rel=1e-6), nothing[1])


def test_an_empty_document_has_a_log_likelihood_of_zero():
    answers = _lm().loglikelihood_rolling(
        _requests("loglikelihood_rolling", [("a word",), ("",), ("no",)])
    )
    assert answers[1] == 0 > max(answers[0], answers[2])
    assert _lm().loglikelihood_rolling(_requests("loglikelihood_rolling", [("",)])) == [0]


@pytest.mark.parametrize("kind", ["llama_like", "across_spaces"])
def test_continuations_keep_their_first_space_and_stop_at_it(kind):
    lm = _lm_with(kind)
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    prompts = ["the cat"] * 12 + ["the cat sat on the mat and " * 8]  # one longer than the room
    ask = [(prompt, settings) for prompt in prompts]
    texts = lm.generate_until(_requests("generate_until", ask))
    row, text = next((i, text) for i, text in enumerate(texts) if text[:1] == " " and text[1:])
    until = [(prompt, {**settings, "until": [text[:2]]}) for prompt in prompts]
    assert lm.generate_until(_requests("generate_until", until))[row] == ""
    again = lm.generate_until(_requests("generate_until", ask))
    assert again == texts


def test_the_same_question_asked_again_gets_another_answer():
    """As pass@k asks: more often than a batch has rows."""
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    number = 3 * _lm().scorer.rows(32)
    requests = _requests("generate_until", [("attention", settings)] * number)
    texts = _lm().generate_until(requests)
    assert len(set(texts)) == number
    seeded = [("attention", {**settings, "seed": seed}) for seed in (1, 1, 2)]
    first, second, third = (
        _lm().generate_until(_requests("generate_until", [ask]))[0] for ask in seeded
    )
    assert first == second != third


def test_text_that_is_not_unicode_is_named():
    for kind, arguments in (
        ("loglikelihood", ("a\ud800", "b")),
        ("loglikelihood_rolling", ("\udcff",)),
        ("generate_until", ("\ud800", {})),
    ):
        with pytest.raises(InputError, match="A text in request 0 is not valid Unicode"):
            _lm().check(_requests(kind, [arguments]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    lm = _lm()
    before = lm.scorer.compilations
    results, written, failed = run_tasks(
        lm,
        ["paper"],
        tasks_dir=str(write_items(folder / "items")),
        name="tiny-3",
        output=folder / "out",
        bootstrap_iters=10,
    )
    assert not failed
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
    results, _, _ = run_tasks(
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


# A task in the harness's format over the items of piqa; what is not given is a multiple choice.
TASK = {
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{goal}}",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "doc_to_target": "label",
}
GENERATES = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{sol1}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def _own_tasks(folder, **tasks):
    """Writes tasks of one's own, given by what they have in other ways; returns the folder."""
    write_items(folder, ["piqa"])
    for name, changes in tasks.items():
        data = {"test": str(folder / "piqa.jsonl")}
        settings = {"task": name, **TASK, "dataset_kwargs": {"data_files": data}, **changes}
        settings = {key: value for key, value in settings.items() if value is not None}
        if "group" in settings:
            settings = {key: settings[key] for key in changes}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """The kinds of request that the model is asked, instead of answering them."""
    kinds = []
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(
            harness.LazyAttentionLM, kind, lambda *_, kind=kind, **__: kinds.append(kind)
        )
    return kinds


def _generating(settings):
    return {**GENERATES, "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], **settings}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            _generating({"num_beams": 10}),
            "num_beams of item 0 of task bad .counted from 0. is 10, but",
        ),
        (
            _generating({"max_gen_toks": 64}),
            "In item 0 of task bad .* the tokens to generate is 64",
        ),
        (
            {"doc_to_text": "the cat", "doc_to_choice": ["sat on", "is"]},
            "The continuation ' sat on' of 'the cat' in item 0 of task bad .* has no token",
        ),
    ],
)
def test_what_a_task_can_not_ask_is_refused_before_anything_runs(tmp_path, asked, changes, message):
    lm = _lm_with("across_spaces")
    folder = _own_tasks(tmp_path, first=_generating({"num_beams": 1, "seed": 3}), bad=changes)
    with pytest.raises(InputError, match=message):
        run_tasks(lm, ["piqa", "first", "bad"], tasks_dir=folder, bootstrap_iters=0)
    assert asked == []


def test_a_task_that_fails_costs_no_other(tmp_path, caplog):
    folder = _own_tasks(
        tmp_path,
        good=_generating({"num_beams": 1, "num_return_sequences": 1, "seed": 3}),
        no_items={"dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}},
        no_column={"doc_to_target": "{{1 / 0}}"},
        no_metric={**_generating({}), "doc_to_target": "{{nothing.at.all}}"},
        together={"group": "together", "task": ["good", "no_column"]},
    )
    asked = ["no_items", "no_column", "good", "together", "no_metric", "piqa"]
    found = run_tasks(
        _lm(), asked, tasks_dir=folder, bootstrap_iters=0, output=tmp_path / "out", name="x"
    )
    assert set(found.results["results"]) == {"good", "piqa"}
    assert set(found.failed) == {"no_items", "no_column", "no_metric", "together"}
    assert "no_items could not be measured: FileNotFoundError: " in caplog.text
    assert set(json.loads(found.written.read_text())["results"]) == {"good", "piqa"}
    table = benchmarks.as_table(found.results["results"], found.failed)
    assert "- no_items could not be measured: " in table and "| piqa | acc |" in table
    alone = run_tasks(_lm(), ["piqa"], tasks_dir=folder, bootstrap_iters=0).results
    assert alone["results"]["piqa"] == found.results["results"]["piqa"]


def test_a_group_is_aggregated_where_all_of_it_can_be_measured(tmp_path):
    mean = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    folder = _own_tasks(
        tmp_path,
        one={},
        two={"doc_to_text": "{{sol1}} {{goal}}"},
        both={"group": "both", "task": ["one", "two"], "aggregate_metric_list": mean},
    )
    found = run_tasks(_lm(), ["both"], tasks_dir=folder, bootstrap_iters=0)
    assert not found.failed and set(found.results["results"]) == {"both", "one", "two"}
    assert "both" in found.results["groups"]


def test_a_failure_while_the_model_answers_costs_no_other(tmp_path, monkeypatch):
    folder = _own_tasks(tmp_path, good={}, bad={"doc_to_text": "BAD {{goal}}"})
    whole = harness.LazyAttentionLM.loglikelihood

    def loglikelihood(self, requests, **settings):
        if requests[0].args[0].startswith("BAD"):
            raise RuntimeError("RESOURCE_EXHAUSTED\nmore of it")
        return whole(self, requests, **settings)

    monkeypatch.setattr(harness.LazyAttentionLM, "loglikelihood", loglikelihood)
    found = run_tasks(_lm(), ["bad", "good"], tasks_dir=folder, bootstrap_iters=0)
    assert found.failed == {"bad": "RuntimeError: RESOURCE_EXHAUSTED"}
    assert "acc,none" in found.results["results"]["good"]


def test_all_tasks_may_fail(tmp_path):
    folder = _own_tasks(tmp_path, bad={"doc_to_target": "{{1 / 0}}"})
    found = run_tasks(_lm(), ["bad"], tasks_dir=folder, output=tmp_path / "out")
    assert (
        found.results == {"results": {}} and found.written is None and set(found.failed) == {"bad"}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"goal": "\xff"}\n',
            "A file of --tasks_dir is .*piqa.jsonl', whose line 1 is not UTF-8",
        ),
        (b'{"goal": "\\ud800"}\n', "piqa.jsonl', whose line 1 has text that is not valid Unicode"),
        (b"\xef\xbb\xbf\n3\n", "piqa.jsonl', whose line 2 is no JSON object"),
    ],
)
def test_items_that_are_no_text_are_named(tmp_path, content, message):
    (tmp_path / "piqa.jsonl").write_bytes(content)
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError, match=message):
        benchmarks.find_tasks(["piqa"], str(tmp_path), tmp_path / "work")


def test_items_may_begin_with_a_mark_and_hold_any_line_separator(tmp_path):
    items = [{**item, "goal": "a\u2028b\u0085c"} for item in ITEMS["piqa"]]
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    (tmp_path / "piqa.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    found = run_tasks(_lm(), ["piqa"], tasks_dir=str(tmp_path), bootstrap_iters=0)
    assert not found.failed and found.results["n-samples"]["piqa"]["effective"] == 2
