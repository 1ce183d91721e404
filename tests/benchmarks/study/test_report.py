import json
import math

import pytest

from benchmarks.study import rule
from benchmarks.study.__main__ import main
from benchmarks.study.summary import groups, main_tokens, stat

_MANY, _FEW = 100_000_000, 30_000_000


def line(variant, seed=0, tokens=_MANY, rate=2e-3, **changes):
    found = {
        "id": f"{variant} seed={seed} tokens={tokens} learning_rate={rate:g} batch=16x4096",
        "variant": variant,
        "seed": seed,
        "tokens": tokens,
        "learning_rate": rate,
        "log_slope_factor": None,
        "measure": "all",
        "device": "made up",
        "jax": "0",
        "date": "2026-01-02 03:04",
        "commit": "0123456789abcdef",
        "parameters": 45_800_000,
        "epochs": 0.6,
        "val": 3.0 + 0.01 * seed,
        "val_rfc": 3.1,
        "val_code": 2.9,
        "val_books": 3.0,
        "val_2x": 3.0,
        "val_4x": 3.01 + 0.01 * seed,
        "val_by_position": [[1, 16, 4.0, 0.1], [17, 32, 3.5, 0.1]],
        "val_4x_by_position": [[1, 16, 4.0, 0.1], [17, 32, 3.5, None]],
        "copy": {"96": 1.5 + 0.02 * seed, "3800": 3.0 + 0.02 * seed, "nothing": 4.0},
        "copy_error": {"96": 0.05, "3800": 0.05, "nothing": 0.05},
        "passkey": {"96": 0.9, "3800": 0.1},
        "ms_per_step": 100.0,
        "attention_by": "ours",
        "visited_4096": 0.5,
        "live_4096": 0.2,
        "visited_16384": 0.2,
        "live_16384": 0.1,
        "sink": 0.1,
        "mass": 0.6,
        "zeros": 0.7,
        "kurtosis": [3.0, 5.0],
        "slopes": [[0.1, -0.1]],
        "offsets": [[-0.5, -0.7]],
        "spans": [[80.0, 16384.0]],
        "curve": [[1e6, 1.0, 5.0], [2e6, 2.0, 4.0]],
        "visited_in_training": [[0, 0.6, 0.3], [1e6, 0.5, 0.2]],
        "settings": {"data": {"batch_size": 16, "sequence_length": 4096}},
    }
    return found | changes


def everything(variant, **changes):
    """Runs of three seeds, and one of the sweep."""
    short = {"val": 3.5, "measure": "loss"}
    return [line(variant, seed, **changes) for seed in range(3)] + [line(variant, 0, _FEW, **short)]


def softmax():
    return everything("softmax", visited_4096=1.0, visited_16384=1.0)


def verdict(*more):
    found = rule.apply([*softmax(), *more], _MANY)
    return found, {row.group.variant: row for row in found.rows}


def test_statistics_over_seeds():
    found = stat([1.0, 2.0, None, 3.0])
    assert (found.mean, found.worst, found.count) == (2.0, 3.0, 3)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert stat([1.0]).error is None
    assert stat([None]) is None


def test_one_that_passes_all_wins():
    found, rows = verdict(*everything("sharp"))
    assert found.winner == "sharp"
    assert rows["softmax"].checks["visited_4096"].passed is False
    # From 3.5 to the mean of 3.00, 3.01 and 3.02.
    gain = 0.49 / math.log(100 / 30)
    assert found.gain == pytest.approx(gain)
    assert rows["sharp"].equal == pytest.approx(3.01)


def test_time_is_charged():
    slow = [line("sharp", seed, ms_per_step=200.0, val=2.9) for seed in range(3)]
    found, rows = verdict(*slow, *everything("sharp_gate"))
    gain = 0.49 / math.log(100 / 30)
    assert rows["sharp"].equal == pytest.approx(2.9 + gain * math.log(2))
    assert found.winner == "sharp_gate"
    assert [row.group.variant for row in found.rows][-1] == "sharp"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"visited_4096": 0.56}, "visited_4096"),
        ({"visited_16384": 0.31}, "visited_16384"),
        ({"val_4x": 3.05}, "length"),
    ],
)
def test_what_fails_cannot_win(changes, check):
    found, rows = verdict(*[line("sharp", seed, **changes) for seed in range(3)])
    assert found.winner is None
    failed = [name for name, at in rows["sharp"].checks.items() if not at.passed]
    assert failed == [check]


def test_copying_is_held_against_one_standard_error():
    # Seeds differ by 0.02: the error of a mean of three is 0.02 / sqrt(3), of both sqrt(2) as
    # much.
    error = 0.02 / math.sqrt(3) * math.sqrt(2)

    def shifted(by):
        return [
            line("sharp", seed, copy={"96": 1.5 + 0.02 * seed, "3800": 3.0 + 0.02 * seed + by})
            for seed in range(3)
        ]

    found, rows = verdict(*shifted(0.99 * error))
    assert found.winner == "sharp"
    found, rows = verdict(*shifted(1.01 * error))
    assert found.winner is None
    assert rows["sharp"].checks["copying"].passed is False
    assert rows["sharp"].checks["copying"].text.endswith("at 3800")
    # With one seed it is the error over rows: 0.05 each.
    row_error = 0.05 * math.sqrt(2)
    for by, winner in ((0.9, "sharp"), (1.1, None)):
        one = line("sharp", copy={"96": 1.52, "3800": 3.02 + by * row_error})
        assert verdict(one)[0].winner == winner


def test_what_is_missing_is_not_passed():
    found = rule.apply([line("sharp"), line("paper", val_4x=None)], _MANY)
    assert found.winner is None
    assert found.gain is None
    rows = {row.group.variant: row for row in found.rows}
    assert rows["sharp"].equal is None
    assert rows["sharp"].checks["copying"].passed is None
    assert rows["paper"].checks["length"].passed is None


def test_runs_are_grouped():
    lines = [
        line("sharp", 0, val=3.5),
        line("sharp", 0, val=3.0),  # made again: the last counts
        line("sharp", 1),
        line("sharp", 0, rate=4e-3, val=2.0),  # one seed only
        line("paper", 0, error="non-finite"),
        line("sharp", 0, _FEW, measure="loss"),
    ]
    found = groups(lines, _MANY)
    assert set(found) == {"sharp"}
    assert [at["val"] for at in found["sharp"].lines] == [3.0, 3.01]
    assert main_tokens(lines) == _MANY
    assert main_tokens([]) is None


def _report(tmp_path, lines):
    source, page = tmp_path / "lines.jsonl", tmp_path / "docs" / "results.md"
    source.write_text("".join(json.dumps(at) + "\n" for at in lines))
    argv = ["x", "report", f"--input={source}", f"--output={page}"]
    return main([*argv, f"--pictures={tmp_path / 'docs' / 'pictures'}"]), page


@pytest.mark.slow
def test_the_page_and_its_pictures(tmp_path):
    long = line("sharp", 0, 320_000_000, val=2.7, epochs=2.0)
    failed = line("paper", 0, error="non-finite: 10 steps in a row")
    lines = [*softmax(), *everything("sharp"), long, failed]
    status, page = _report(tmp_path, lines)
    assert status == 0
    assert all(len(x) <= 100 for x in page.read_text().splitlines() if not x.startswith("|"))
    text = " ".join(page.read_text().split())
    assert "**The rule chooses `sharp`.**" in text
    assert "| `softmax` | 3 | 3.010 ± 0.006 | 100.0 | 3.010 |" in text
    assert "No run of `softmax_qk_norm`," in text
    assert "Learning rates not swept: `softmax` at 0.001" in text
    assert "320M tokens of `softmax`, `softmax_alibi`, `sharp_qk_norm_steady`." in text
    assert "| 320M | `sharp` | 1 | 2.00 | 2.700 |" in text
    assert "non-finite: 10 steps in a row" in text
    assert "not web text" in text
    assert "| 50% |" in text  # tails that rise
    pictures = sorted(path.name for path in (tmp_path / "docs" / "pictures").iterdir())
    names = ("loss", "positions", "retrieval", "visited")
    assert pictures == [f"study_{name}.png" for name in names]
    assert all(f"(pictures/study_{name}.png)" in text for name in names)
    # What was written by hand stays.
    old = page.read_text()
    page.write_text(old.replace("<!-- by hand -->\n", "<!-- by hand -->\nWe chose it.\n"))
    _report(tmp_path, lines)
    assert "<!-- by hand -->\nWe chose it.\n<!-- end -->" in page.read_text()


def test_a_page_of_hardly_anything(tmp_path):
    bare = {"settings", "curve", "copy", "passkey", "kurtosis", "slopes", "spans", "offsets"}
    only = {name: x for name, x in line("paper").items() if name not in bare}
    status, page = _report(tmp_path, [only])
    assert status == 0
    text = page.read_text()
    assert "**No variant passes all of the rule.**" in text
    assert "Fewer than 3 seeds: `paper` (1)." in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--input is "),
        ("[1]\n", "line 1, is no JSON object"),
        ("", "has no finished run of any tokens"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, content, message):
    source = tmp_path / "lines.jsonl"
    if content is not None:
        source.write_text(content)
    assert main(["x", "report", f"--input={source}", f"--output={tmp_path / 'x.md'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
