"""The study's command line: help, and one sentence for what is wrong."""

import pytest

from benchmarks.study.__main__ import main


def _said(capsys, *arguments):
    status = main(["study", *arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("run", "--tokens=inf", "--tokens is 'inf', but it must be a whole number such as 100e6."),
        ("run", "--tokens=nan", "--tokens is 'nan', but it must be a whole number such as 100e6."),
        ("run", "--learning_rate=inf", "learning_rate is inf, but it must be positive and finite."),
        ("run", "--output=", "--output is '', but it must be a file of lines, not a folder."),
        ("trial", "--try=dots", "--try is 'dots', but it must be like model.remat=dots."),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch, capsys, command, flag, message):
    monkeypatch.chdir(tmp_path)
    status, text = _said(capsys, command, "--data=nowhere", flag)
    assert (status, text.count("\n")) == (2, 1) and text.endswith(f"{message}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["--help"], "study report"), (["run", "-h"], "--seeds"), (["report", "--help"], "--input")],
)
def test_help(capsys, arguments, flag):
    status, text = _said(capsys, *arguments)
    assert status == 0 and "python -m benchmarks.study trial" in text and flag in text
