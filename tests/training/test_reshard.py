"""A checkpoint of one mesh goes on another, exactly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_state_is_the_same_on_every_mesh(tmp_path):
    program = subprocess.run(
        [sys.executable, "-m", "tests.training.reshard_program", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert program.returncode == 0, program.stderr[-3000:]
    split = {}
    for _, restored, leaves, count in map(str.split, program.stdout.splitlines()):
        assert int(leaves) > 20
        split.setdefault(restored, set()).add(int(count))
    assert len(program.stdout.splitlines()) == 15
    assert split["one"] == split["data"] == {0}
    assert min(split["fsdp"]) > 10 and min(split["mixed"]) > 10  # they are cut in earnest
