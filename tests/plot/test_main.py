"""`--mode=plot`: what is read of a run, and two runs in one picture."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import numpy as np
import pytest

from lazyattn.errors import InputError
from lazyattn.plot import curves, main
from lazyattn.plot.flags import define, runs


def _write(folder, steps=400, drop=0.0, **changes):
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 3 + 4 / step - drop, "tokens": 100, "seconds": 0.5}
        line["tokens_total"] = 100 * step
        if step % 100 == 0:
            line["validation_loss"] = 3.1 - drop
        lines.append(json.dumps(line | changes))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_run_is_read_over_its_tokens_and_its_time(tmp_path):
    found = curves.read(_write(tmp_path / "a"), "a")
    assert found.steps == 400 and found.training.shape == (200, 3)
    np.testing.assert_allclose(found.training[-1], [40_000, 200, 3 + (4 / 399 + 4 / 400) / 2])
    np.testing.assert_allclose(found.validation[:, 0], [10_000, 20_000, 30_000, 40_000])
    np.testing.assert_allclose(found.validation[0, 1:], [50, 3.1])


def test_steps_weigh_as_their_tokens_and_skipped_ones_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "tokens": 30, "seconds": 1}\n'
        '{"step": 2, "loss": null, "tokens": 30, "seconds": 1}\n'
        '{"step": 3, "loss": 4.0, "tokens": 10, "seconds": 1}\n'
        '{"step": 4, "lo'
    )
    found = curves.read(tmp_path, "a")
    np.testing.assert_allclose(found.training, [[30, 1, 2], [70, 3, 4]])
    assert found.steps == 3 and found.validation.shape == (0, 3)


def test_steps_in_one_point_weigh_as_their_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "_POINTS", 1)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "tokens": 30, "seconds": 1}\n'
        '{"step": 2, "loss": 4.0, "tokens": 10, "seconds": 1}\n'
    )
    np.testing.assert_allclose(curves.read(tmp_path, "a").training, [[40, 2, 2.5]])


def test_two_runs_in_one_picture(tmp_path, capsys):
    folders = [str(_write(tmp_path / "lazy")), str(_write(tmp_path / "softmax", drop=0.2))]
    svg, png = main.plot(folders)
    assert (svg, png) == (tmp_path / "lazy" / "plot" / "loss.svg", svg.with_suffix(".png"))
    text = svg.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for word in ("lazy", "softmax", "thousand tokens", "minutes of training", "nats a token"):
        assert word in text  # matplotlib says each text in a comment
    assert matplotlib.image.imread(png).std() > 0.01
    first, second, *paths = capsys.readouterr().out.splitlines()
    assert first == "lazy: 400 steps, 40,000 tokens in 3m20s, loss 3.0100, validation 3.1000"
    assert second.endswith("loss 2.8100, validation 2.9000") and paths == [str(svg), str(png)]
    before = svg.read_bytes()
    main.plot(folders)
    assert svg.read_bytes() == before


def test_names_of_runs():
    assert curves.names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert curves.names(["x/run", "y/run", "z"]) == ["x/run", "y/run", "z"]


def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch):
    folder = str(_write(tmp_path / "a"))
    with pytest.raises(InputError, match=r"^--workdir or --runs is '/no/run', but it must be the"):
        main.plot([folder, "/no/run"])
    empty = _write(tmp_path / "empty", loss=None)
    with pytest.raises(InputError, match=r"with steps in its metrics.jsonl"):
        main.plot([str(empty)])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--output is '.*/file/x', but it must be a folder that"):
        main.plot([folder], tmp_path / "file" / "x")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"^--mode=plot needs matplotlib, which is not installed"):
        main.plot([folder])


def test_flags():
    from absl import flags

    from lazyattn import paths

    def given(*arguments):
        values = flags.FlagValues()
        define(values)
        paths.define("workdir", None, "", values)
        values(["lazyattn", *arguments])
        return runs(values)

    assert given("--workdir=a", "--runs=b, c,a") == ["a", "b", "c"]
    assert given("--runs=b") == ["b"]
    with pytest.raises(InputError, match=r"^--workdir is not given"):
        given()
