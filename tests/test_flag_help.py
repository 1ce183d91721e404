"""`--help`: all modes, every flag under its modes, status 0; and a document for every flag."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazyattn import flag_help
from lazyattn.command_line import flags
from lazyattn.data.prepare import __main__ as preparation

ROOT = Path(__file__).parents[1]


def _sections():
    """Returns {heading: names of flags} of train.py's help."""
    from lazyattn import main as train

    sections, heading = {}, ""
    for line in train._help().splitlines():
        assert len(line) <= 100
        if line.startswith(("Flags of", "Modes")):
            heading = line
            sections[heading] = []
        elif match := re.match(r"  --(?:\[no\])?([\w.]+)", line):
            sections[heading].append(match[1])
    return sections


def test_every_flag_is_under_its_modes():
    from lazyattn import main as train

    sections = _sections()
    assert list(sections) == [
        "Modes",
        "Flags of all modes",
        *(f"Flags of --mode={mode}" for mode in train._MODES),
    ]
    for mode in train._MODES:
        assert f"  --mode={mode} " in train._help()
    listed = {name for names in list(sections.values())[1:] for name in names}
    assert {flag.name for flag in flag_help.own_flags()} - {"mode"} <= listed
    assert len(listed) >= 35
    assert {"limit", "tasks", "text", "contexts"} <= set(sections["Flags of --mode=eval"])
    assert "text" in sections["Flags of --mode=inspect"]
    for mode in ("eval", "inspect", "export"):
        assert "output" in sections[f"Flags of --mode={mode}"]
    assert "prompt" not in sections["Flags of --mode=eval"]
    assert {"seed", "prompt"} <= set(sections["Flags of --mode=sample"])
    assert sections["Flags of all modes"] == ["config", "config.KEY", "verbosity", "workdir"]
    assert sections["Flags of --mode=compile"] == ["print_config", "topology"]


def test_defaults_are_shown():
    from lazyattn import main as train

    for expected in (
        "Seed of the draws, of --retrieval in eval (0).",
        "(16384).",
        "(float32).",
        "(orbax).",
    ):
        assert expected in train._help()
    assert "None" not in train._help() and "repeat this option" not in train._help()


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["-h"], True),
        (["--help"], True),
        (["-help"], True),
        (["--helpfull"], True),
        (["--mode=eval", "-?"], True),
        (["--", "--help"], False),
        (["--prompt=-h"], False),
        ([], False),
    ],
)
def test_when_help_is_asked_for(arguments, asked):
    assert flag_help.is_asked(["train.py", *arguments]) is asked


@pytest.mark.parametrize(
    ("program", "asking"),
    [
        (["train.py"], "--help"),
        (["-m", "lazyattn.data.prepare"], "-h"),
        *(
            pytest.param(program, asking, marks=pytest.mark.slow)
            for program, asking in (
                (["train.py"], "-h"),
                (["-m", "lazyattn.data.prepare"], "--help"),
            )
        ),
    ],
)
def test_it_is_printed_with_status_0(program, asking):
    done = subprocess.run(
        [sys.executable, *program, asking],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("mode=sample", "limit") if program == ["train.py"] else ("input", "on_fault"):
        assert f"--{name}" in done.stdout


def test_every_flag_is_in_a_document():
    from lazyattn import main as train

    del train
    documents = [ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text() for path in documents)
    both = [*flag_help.own_flags(), *flag_help.own_flags(preparation.FLAGS)]
    names = {flag.name for flag in both}
    missing = [name for name in sorted(names) if not re.search(rf"--(no)?{name}\b", text)]
    assert missing == []
    assert flags.FLAGS is not preparation.FLAGS
