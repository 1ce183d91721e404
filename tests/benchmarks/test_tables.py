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
