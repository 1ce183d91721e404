import json
import re

import pytest

from benchmarks import provenance, tables


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_documents_hold_what_the_results_give(path):
    text = path.read_text(encoding="utf-8")
    assert tables.render(text) == text, "python -m benchmarks.tables writes the tables anew"
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->")


def test_every_table_stands_in_one_document():
    text = "\n".join(path.read_text(encoding="utf-8") for path in tables.documents())
    assert sorted(re.findall(r"<!-- table: (\w+) -->", text)) == sorted(tables.TABLES)


def test_rows_say_when_they_were_measured():
    undated = [row for row in tables.attention_rows() if not row["date"]]
    assert undated == [], "`date` is missing beside `results` in the file"


def test_a_changed_figure_is_put_right():
    text = f"a\n<!-- table: scaling -->\n{tables.scaling()}<!-- end of table -->\nb\n"
    assert tables.render(text) == text
    assert tables.render(text.replace("97.2%", "99.2%")) == text


def test_ratios_are_those_of_the_same_run(tmp_path, monkeypatch):
    def entry(implementation, which, milliseconds, case="", error=None):
        return {
            "shape": "1x2x256x64",
            "case": case,
            "implementation": implementation,
            "which": which,
            "milliseconds": milliseconds,
            "error": error,
        }

    results = [
        entry("cudnn", "forward", 2.0),
        entry("triton", "forward", 1.0, "alibi"),
        entry("triton", "training", 3.0, "alibi"),
        entry("triton", "forward", 0.0, "dense", "out of memory"),
    ]
    about = {"device": "NVIDIA H200", "date": "2026-11-30", "results": results}
    (tmp_path / "a.json").write_text(json.dumps(about))
    (tmp_path / "b.json").write_text(json.dumps({"results": [{"tokens_per_second": 1}]}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (row,) = tables.attention_rows()
    assert (row["forward"]["ratio"], row["training"]["ratio"]) == (0.5, None)
    assert (
        "| triton | H200 | 1x2x256x64 | alibi |  |  | 1.000 | 0.50 | 3.000 |" in tables.attention()
    )


def test_a_file_says_when_and_how_it_was_made(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    argv = ["--cases=dense", "--learned=/somewhere/alibi.npz", "--output=/tmp/x"]
    made = provenance.made_by("benchmarks.attention", argv)
    assert made["command"] == (
        "XLA_FLAGS=--xla_gpu_autotune_level=0 python -m benchmarks.attention --cases=dense"
        " --learned=FILE"
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"])


def test_of_a_decoding_case_the_newest_line_with_a_time_stands(tmp_path, monkeypatch):
    line = {
        "implementation": "lazyattn",
        "attention": "lazy",
        "cache": "spans",
        "slopes": "alibi",
        "context": 4096,
        "batch": 8,
        "ms_attention": 0.5,
        "limit_attention_ms": 0.25,
        "ms_token": None,
        "limit_ms": None,
        "cache_bytes_share": 0.073,
        "read_share": 0.22,
        "largest_batch": 787,
        "jax_triton": "0.4.1",
        "date": "2026-11-30",
        "commit": "0123456789",
    }
    others = [{"ms_attention": 0.7}, {}, {"ms_attention": None}, {"fused": True}]
    others += [{"jax_triton": ""}, {"slopes": "study x", "commit": "f"}]
    lines = [json.dumps(line | other) for other in others]
    (tmp_path / "h_decode.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    first, second = tables.decoding().splitlines()[2:]
    numbers = "7.3% | 22% | 0.50 | 2.00 |  |  | 787 | 2026-11-30, "
    assert first == f"| 4,096 x 8 | lazy, spans | {numbers}0123456 |"
    assert second == f"| 4,096 x 8 | lazy, spans, trained slopes | {numbers}f |"
