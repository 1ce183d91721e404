"""tools/setup where there is no Python, an old one, or nothing to do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(tmp_path):
    """Runs a copy of tools/setup; the PATH holds what `commands` maps to scripts."""
    folder = tmp_path / "project"
    (folder / "tools").mkdir(parents=True)
    for name in ("tools/setup", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cat", "cksum", "dirname", "rm"):
        path = shutil.which(name)
        assert path is not None
        (tools / name).symlink_to(path)

    def run(**commands):
        for name, script in commands.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        return subprocess.run(
            [shutil.which("bash"), folder / "tools" / "setup"],
            env={"PATH": str(tools), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    run.folder = folder
    return run


@pytest.mark.parametrize("commands", [{}, {"python3": "exit 1", "python": "echo 3.9; exit 1"}])
def test_without_a_python_that_is_new_enough(setup, commands):
    done = setup(**commands)
    assert done.returncode == 1
    assert done.stdout == "" and not (setup.folder / ".venv").exists()
    assert done.stderr.startswith("lazyattn needs Python >= 3.12 and found none: looked for")
    for looked_for in ("$PYTHON", "python3.13", "python3.12", "python3 and python", "pyenv"):
        assert looked_for in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_second_call_installs_nothing(setup):
    # A stand-in for Python that makes a stand-in for an environment, and logs its calls.
    log = setup.folder / "log"
    stand_in = f"""echo "$*" >>{log}
if [ "$2" = venv ]; then
  {shutil.which("mkdir")} -p .venv/bin
  cat "$0" >.venv/bin/python
  {shutil.which("chmod")} +x .venv/bin/python
fi"""
    first = setup(python3=stand_in)
    assert first.returncode == 0, first.stderr
    calls = log.read_text()
    assert "install -r requirements.txt" in calls and "--no-deps" in calls
    log.write_text("")
    assert setup().returncode == 0
    assert "install" not in log.read_text()
    # What is pinned has changed: everything again.
    (setup.folder / "requirements.txt").write_text("jax==0\n")
    assert setup().returncode == 0
    assert "install -r requirements.txt" in log.read_text()


def test_the_tests_of_other_jax_versions_exist():
    named = re.findall(r"tests/[\w/.]+", (ROOT / "tools/test_jax").read_text())
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
