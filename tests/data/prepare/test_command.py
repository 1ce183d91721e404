import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from lazyattn.data.manifest import Manifest
from lazyattn.data.prepare import __main__ as command
from lazyattn.data.prepare.progress import ProgressLine
from lazyattn.data.prepare.unit import Progress
from tests.data.prepare.corpora import make_documents, write_parquet

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def parsed_flags():
    for known in (flags.FLAGS, command.FLAGS):
        if not known.is_parsed():
            known.mark_as_parsed()


def _run(**settings):
    saved = flagsaver.save_flag_values(command.FLAGS)
    try:
        for name, value in settings.items():
            setattr(command.FLAGS, name, value)
        return command.main(["prepare"])
    finally:
        flagsaver.restore_flag_values(saved, command.FLAGS)


def test_names_that_are_no_text_are_printed(tmp_path, monkeypatch):
    """Standard output of most people is strict: it refuses bytes that are no UTF-8."""
    write_parquet(tmp_path / "in" / "a.parquet", make_documents(200))
    broken = os.fsencode(tmp_path) + b"/in/caf\xe9.parquet"
    with open(broken, "wb") as file:
        file.write(b"PAR1 and no end")
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    settings = {"tokenizer": "train", "vocab_size": 300, "num_workers": 1}
    assert _run(input=[f"{tmp_path}/in"], output=f"{tmp_path}/out", **settings) == 0
    stdout.flush()
    assert b"caf\\udce9.parquet: " in stdout.buffer.getvalue()


def test_what_is_printed(tmp_path, capsys):
    write_parquet(tmp_path / "in" / "a.parquet", make_documents(200))
    settings = {
        "input": [f"{tmp_path}/in/*.parquet"],
        "output": f"{tmp_path}/out",
        "tokenizer": "train",
        "vocab_size": 300,
        "validation_fraction": 0.1,
        "min_int_score": 3,
        "num_workers": 1,
    }
    assert _run(**settings) == 0
    out = capsys.readouterr().out
    for part in (
        "train  ",
        "validation  ",
        "documents: low_score",
        " a token), 1 shard\n",
        "took ",
    ):
        assert part in out
    assert f"--config.data.path={tmp_path}/out" in out
    assert _run(**settings) == 0
    assert "It had been prepared before; nothing was done." in capsys.readouterr().out


def test_what_is_printed_after_the_disk_was_full_at_the_very_end(tmp_path, capsys, monkeypatch):
    write_parquet(tmp_path / "in" / "a.parquet", make_documents(60))
    settings = {
        "input": [f"{tmp_path}/in"],
        "output": f"{tmp_path}/out",
        "tokenizer": "train",
        "vocab_size": 300,
        "validation_fraction": 0.1,
        "num_workers": 1,
    }

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Manifest, "write", full)
    assert _run(**settings) == 2
    message = f"--output is '{tmp_path}/out', but nothing can be written there (No space left on"
    assert message in capsys.readouterr().err
    monkeypatch.undo()
    assert _run(**settings) == 0
    printed = capsys.readouterr()
    assert "prepare  goes on: 1 of 1 piece was done before\n" in printed.err
    assert "All pieces were done before; this run finished the folder.\n" in printed.out
    assert "nothing was done" not in printed.out
    assert _run(**settings) == 0
    printed = capsys.readouterr()
    assert "It had been prepared before; nothing was done.\n" in printed.out
    assert "goes on" not in printed.err


@pytest.mark.parametrize("parents", ["new", "new/below"])
def test_no_training_document_leaves_nothing(tmp_path, capsys, parents):
    write_parquet(tmp_path / "in" / "a.parquet", make_documents(20))
    settings = {"input": [f"{tmp_path}/in"], "tokenizer": "train", "num_workers": 1}
    settings |= {"output": f"{tmp_path}/{parents}", "min_int_score": 99, "vocab_size": 300}
    assert _run(**settings) == 2
    assert "No training document is left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]


def test_mistakes_are_one_sentence_and_status_2(tmp_path, capsys):
    assert _run(input=[str(tmp_path)], output="x", tokenizer="train") == 2
    assert capsys.readouterr().err.startswith(f"--input is '{tmp_path}', but it must be folders")
    with pytest.raises(SystemExit) as ended:
        command._parse(["prepare", "stray.parquet"])
    message = "The argument 'stray.parquet' is not a flag; flags look like --input=PATTERN (with "
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "lazyattn.data.prepare", "--output=x", "--tokenizer=train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--input is '', but it must be files to prepare.\n"


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal, file = _Terminal(), io.StringIO()
    lines = [ProgressLine(1000, 200, terminal), ProgressLine(1000, 200, file)]
    for line in lines:
        now[0] = 0.0
        for now[0] in (0.1, 1.0, 2.0):
            line.add(Progress(100, 5, 10**6, 7000))
        assert line.text() == (
            "prepare  [############            ]  50%  1.5 MB/s  10,500 tokens/s  15 documents"
            "  3s left"
        )
        line.line("skipped  something")
        line.close()
    assert terminal.getvalue().count("\r") == 4  # two times the bar, one line, wiped
    assert file.getvalue() == "skipped  something\n"  # no bar in a log of a few seconds
    now[0] = 40.0
    lines[1].show()
    assert file.getvalue().count("\n") == 2
    lines[1].add(Progress())
    assert lines[1].text().endswith("1m07s left")
