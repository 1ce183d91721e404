import io
import json

import pytest

from lazyattn.training.metrics import PEAK_FLOPS, JsonLines, Progress, duration, utilisation

RECORD = {"loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "nonfinite_total": 0}


def _progress(out, **settings):
    defaults = dict(step=0, steps=1000, flops_per_token=1e6, device_kind="cpu", devices=1)
    return Progress(out, **(defaults | settings))


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_durations():
    assert [duration(s) for s in (-1, 0, 59.6, 185, 7380, 363_600)] == [
        *("0s", "0s", "1m00s", "3m05s", "2h03m", "4d05h")
    ]


def test_utilisation_needs_a_known_peak():
    kind = "NVIDIA H100 80GB HBM3"
    assert utilisation(1e6, PEAK_FLOPS[kind] / 1e6, kind, 2) == pytest.approx(0.5)
    assert utilisation(1e6, 1e9, "cpu", 1) is None


def test_progress_prints_whole_lines_without_carriage_returns():
    out = io.StringIO()
    progress = _progress(out)
    for step in (10, 20):
        progress.count(4096)
        progress.report(step, RECORD)
    lines = out.getvalue().splitlines(keepends=True)
    assert len(lines) == 2 and "\r" not in out.getvalue()
    for expected in ("step   10/1000", "loss 2.5000", "lr 1.00e-03", "tokens/s", "left"):
        assert expected in lines[0]
    assert "MFU" not in lines[0] and "skipped" not in lines[0]


def test_progress_shows_utilisation_and_skipped_steps():
    out = io.StringIO()
    progress = _progress(out, device_kind="NVIDIA H200")
    progress.count(4096)
    rates = progress.report(10, RECORD | {"nonfinite_total": 3})
    assert rates["mfu"] == pytest.approx(
        rates["tokens_per_second"] * 1e6 / PEAK_FLOPS["NVIDIA H200"]
    )
    assert "MFU" in out.getvalue() and "skipped 3" in out.getvalue()


def test_pauses_do_not_lower_the_rate():
    progress = _progress(io.StringIO())
    progress.pause(-100.0)  # the clock started 100 s earlier
    progress.count(1000)
    assert progress.report(1, RECORD)["tokens_per_second"] == pytest.approx(10, rel=0.01)
    progress.pause(-100.0)
    progress.pause(50.0)
    progress.count(1000)
    assert progress.report(2, RECORD)["tokens_per_second"] == pytest.approx(20, rel=0.01)


def test_nothing_to_time_yet():
    out = io.StringIO()
    assert _progress(out).report(1, RECORD) == {}
    assert "loss 2.5000" in out.getvalue() and "tokens/s" not in out.getvalue()


def test_lines_are_there_at_once(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, "loss": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1}


def test_what_json_lacks_is_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, "loss": float("nan"), "gradient_norm": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "gradient_norm": None}


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', "{}\n", "7\n", "\x00\n"])
def test_lines_are_cut_back_to_the_restored_step(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + torn)
    lines = JsonLines(path, 3)
    assert _steps(path) == [1, 2, 3]
    lines.write({"step": 4})
    lines.close()
    assert _steps(path) == [1, 2, 3, 4]


def test_a_whole_line_without_its_end_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    JsonLines(path, 5).write({"step": 2})
    assert _steps(path) == [1, 2]
