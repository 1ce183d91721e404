"""Asks the Python that has torch and transformers: this one, or LAZYATTN_PEER_PYTHON's."""

import os
import subprocess
import sys

import pytest


def ask(tmp_path, *command):
    """Runs a program of another Python, that knows nothing of this project; skips without one."""
    python = os.environ.get("LAZYATTN_PEER_PYTHON", sys.executable)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Code that comes with models is copied there.
    clean |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    needed = [python, "-c", "import safetensors, torch, transformers"]
    if subprocess.run(needed, capture_output=True, env=clean).returncode:
        pytest.skip("torch or transformers is not installed (LAZYATTN_PEER_PYTHON)")
    done = subprocess.run([python, *command], capture_output=True, env=clean, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
