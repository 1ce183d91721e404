import io
import json
import math
import time

import pytest

from lazyattn import patience
from lazyattn.training.log import RunLog
from lazyattn.training.metrics import (
    PEAK_FLOPS,
    JsonLines,
    MeanLoss,
    Progress,
    utilisation,
)

RECORD = {"loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "nonfinite_total": 0}


def _progress(out, **settings):
    defaults = dict(step=0, steps=1000, flops_per_token=1e6, device_kind="cpu", devices=1)
    return Progress(out, **(defaults | settings))


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


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


def test_the_mean_loss_weighs_tokens_and_leaves_out_skipped_steps():
    mean = MeanLoss()
    for loss, tokens in ((2.0, 30), (4.0, 10), (float("nan"), 40), (float("inf"), 40)):
        mean.add(loss, tokens)
    assert mean.take() == 2.5
    mean.add(7.0, 1)
    assert mean.take() == 7.0  # of what came since
    assert math.isnan(mean.take())


def test_the_terminal_has_the_mean_since_the_last_line(tmp_path, capsys):
    losses = [8.0, 6.0, 4.0, 3.0, 2.0, 1.0]
    with RunLog(tmp_path, step=0, steps=6, log_every=3, flops_per_token=1.0) as log:
        for step, loss in enumerate(losses, 1):
            log.write({"step": step, **RECORD, "loss": loss, "tokens": 10})
            if step == 1:
                log.started(1)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("  ")[1] for line in printed] == ["loss 6.0000", "loss 2.0000"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == losses
    assert [record["tokens_total"] for record in records] == [10, 20, 30, 40, 50, 60]


def test_the_time_of_day_and_the_tokens_so_far_go_on_after_a_resumption(tmp_path):
    def run(*steps):
        settings = {"steps": 9, "log_every": 3, "flops_per_token": 1.0}
        with RunLog(tmp_path, step=steps[0] - 1, **settings) as log:
            for step in steps:
                log.write({"step": step, **RECORD, "tokens": step})

    path, begin = tmp_path / "metrics.jsonl", time.time()
    run(1, 2, 3, 4)
    run(3, 4, 5)  # step 4 was killed before it was saved
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["tokens_total"] for record in records] == [1, 3, 6, 10, 15]
    times = [record["wall_time"] for record in records]
    assert times == sorted(times) and begin - 0.01 <= times[0] and times[-1] <= time.time() + 0.01
    # Lines of an older version.
    for record in records:
        del record["tokens_total"], record["wall_time"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    run(6)
    assert json.loads(path.read_text().splitlines()[-1])["tokens_total"] == 21
    # Lines that are lost.
    path.write_text("")
    run(7)
    assert json.loads(path.read_text())["tokens_total"] is None


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


def test_logs_that_are_waited_for_are_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(patience, "NOTICE", 0.1)
    with RunLog(tmp_path, step=0, steps=6, log_every=3, flops_per_token=1.0) as log:
        monkeypatch.setattr(log._lines, "sync", lambda: time.sleep(0.4))
        log.sync()
    said = capfd.readouterr().err
    assert f"Waiting for the logs in {tmp_path} to be written: 0 s so far." in said
