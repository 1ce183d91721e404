"""Softmax runs of the study that are taught to be lazy."""

import json

import pytest

from benchmarks.study import data, taught, uptrain
from benchmarks.study.__main__ import main
from benchmarks.study.settings import Spec, experiment_of
from lazyattn.data.tokenizer import Tokenizer
from tests.benchmarks.study.made_up import TINY, write_tokens

BATCH, LENGTH = 2, 64
STEP = BATCH * LENGTH


def _argv(command, folder, tmp_path, *more):
    settings = [f"--set={name}={text}" for name, text in TINY]
    shape = [f"--batch={BATCH}", f"--length={LENGTH}", "--commit=abc"]
    return ["x", command, f"--data={folder}", *shape, *settings, *more]


def test_rows_come_after_those_of_the_softmax_run():
    experiment = experiment_of(Spec("softmax", 3, 4 * STEP, 1e-3, None, BATCH, LENGTH))
    seen = data.order(40 * STEP, LENGTH, 8, BATCH, 3)
    found = uptrain.later_rows(40 * STEP, experiment, before=8)
    assert found.starts.shape == (4, BATCH)
    assert not set(found.starts.ravel()) & set(seen.starts.ravel())
    assert found.epochs == pytest.approx(12 / 39.5)


def test_runs_that_are_asked_for(tmp_path):
    asked = uptrain.UptrainOptions(
        *("x", ("softmax", "sharp_steady"), (0, 1), (1e-3,), 800, tmp_path),
        **{"length": LENGTH, "batch": BATCH, "overrides": TINY},
        **{"counts": (4 * STEP, 10 * STEP), "ramps": (0.5, 0.01)},
    )
    found = [(s.variant, s.tokens // STEP, s.seed, dict(s.overrides)) for s in asked.specs()]
    kinds = [(v, n, seed, more.get("teaching.offset_steps")) for v, n, seed, more in found]
    assert kinds[:6] == [
        *(("softmax", 4, seed, None) for seed in (0, 1)),
        *(("sharp_steady", 4, seed, ramp) for ramp in ("2", "1") for seed in (0, 1)),
    ]
    assert len(kinds) == 12
    teaching = experiment_of(asked.specs()[2]).teaching
    assert (teaching.offset_steps, teaching.bias_steps) == (2, 2)


@pytest.mark.slow
def test_a_softmax_run_is_taught(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.study.scorer.BATCH_TOKENS", 512)
    monkeypatch.setattr("benchmarks.study.measures.COPY_ROWS", 4)
    monkeypatch.setattr("benchmarks.study.measures.PASSKEY_ROWS", 4)
    folder = write_tokens(tmp_path / "data")
    Tokenizer.train(["a few words, for a tokenizer"], 280).save(
        tmp_path / "data" / "tokenizer.json"
    )
    work, output = tmp_path / "work", tmp_path / "taught.jsonl"
    unrolled = "--set=model.scan_layers=False"  # as the study's runs are
    base = _argv("run", folder, tmp_path, unrolled, "--variants=softmax", f"--tokens={4 * STEP}")
    base += ["--measure=loss", f"--workdir={work}", "--keep", f"--output={tmp_path / 'x.jsonl'}"]
    assert main(base) == 0
    more = [f"--kept={work}", f"--kept_tokens={4 * STEP}", f"--output={output}"]
    argv = _argv("uptrain", folder, tmp_path, unrolled, *more, f"--tokens={STEP},{2 * STEP}")
    assert main(argv) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line.get("error") for line in lines] == [None] * 4
    assert [(line["variant"], line["tokens"]) for line in lines] == [
        ("softmax", STEP),
        ("sharp_steady", STEP),
        ("softmax", 2 * STEP),
        ("sharp_steady", 2 * STEP),
    ]
    # With offsets and slopes of 0 it is the softmax model.
    start = lines[0]["before"]
    assert "sink" in start
    for line in lines[1:]:
        assert line["before"]["val"] == pytest.approx(start["val"], abs=1e-6)
        assert line["val"] != start["val"]
    assert lines[3]["offsets"][0][0] == pytest.approx(-0.5, abs=0.01)
    assert lines[3]["slopes"][0][0] == pytest.approx(2**-4, rel=0.02)
    rows = taught.table(lines)
    assert [row[:2] for row in rows] == [
        ["0", "`softmax`, as it was"],
        *(["0.000128M", "`softmax`"], ["0.000128M", "`sharp_steady`"]),
        *(["0.000256M", "`softmax`"], ["0.000256M", "`sharp_steady`"]),
    ]
    assert [float(row[6] or 0) for row in rows] == [
        *(0, 0, pytest.approx(lines[1]["val"] - lines[0]["val"], abs=5e-4)),
        *(0, pytest.approx(lines[3]["val"] - lines[2]["val"], abs=5e-4)),
    ]
    for line in lines:
        line["settings"]["teaching"]["slope_share"] = 0.25
    assert taught.table(lines)[2][1] == "`sharp_steady`, slopes times 0.25"
    assert all(len(row) == len(taught.HEAD.split(" | ")) for row in rows)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--kept=/no/where", "--kept is '/no/where', but it must be a folder that has softmax-"),
        ("--ramp=2", "--ramp is 2.0, but it must be from 0 to 1"),
        ("--tokens=many", "--tokens is 'many'"),
        ("--nothing", "Unknown command line flag 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence(flag, message, capsys, tmp_path):
    assert main(_argv("uptrain", "x", tmp_path, "--kept=x", flag)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
