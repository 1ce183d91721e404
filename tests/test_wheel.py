"""The package as pip installs it: a wheel, in an empty environment, in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

OP = """
import jax, jax.numpy as jnp, lazyattn
x = jax.random.normal(jax.random.key(0), (1, 24, 2, 8))
gradients = jax.grad(lambda x: lazyattn.lazy_attention(x, x, x, offset=-jnp.ones(2)).sum())(x)
assert bool(jnp.isfinite(gradients).all()) and bool((gradients != 0).any())
print(lazyattn.__file__)
"""


def _run(*command, cwd, **environment):
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools writes beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("lazyattn", "pallas_kernels", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("train.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    made = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "-q", "-w", made)
    _run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=made)
    (path,) = made.glob("lazyattn-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A Python that has the wheel and what it asks for, as pinned here, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    pins = ROOT / "requirements.txt"
    _run(python, "-m", "pip", "install", "-q", "-c", pins, wheel, cwd=folder)
    return python


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (about,) = (name for name in names if name.endswith("dist-info/METADATA"))
        metadata = files.read(about).decode()
    assert {"train.py", "configs/quickstart.py", "configs/ablations/no_bias.py"} <= names
    for folder in ("lazyattn", "pallas_kernels", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: jax<0.13,>=0.11.2" in metadata


def test_it_runs_the_op_and_trains_the_quickstart(python, tmp_path):
    assert str(ROOT) not in _run(python, "-c", OP, cwd=tmp_path)
    small = (
        *("--config.training.steps=3", "--config.model.width=32", "--config.model.num_layers=1"),
        *("--config.data.sequence_length=32", "--config.data.vocab_size=300"),
        *("--config.training.eval_batches=1", "--config.model.attention.bias_width=16"),
    )
    out = _run(
        python,
        *("-m", "train", "--config=configs/quickstart.py", "--workdir=run", *small),
        cwd=tmp_path,
        LAZYATTN_CACHE=str(tmp_path / "cache"),
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "python -m train --mode=sample --workdir=run" in out
    sampled = _run(
        python,
        *("-m", "train", "--mode=sample", "--workdir=run", "--prompt=The", "--max_new_tokens=4"),
        cwd=tmp_path,
    )
    assert sampled.startswith("The")
    assert "--mode=eval" in _run(python, "-m", "train", "--help", cwd=tmp_path)
    assert "--on_fault" in _run(python, "-m", "lazyattn.data.prepare", "-h", cwd=tmp_path)


def test_it_finds_all_configs(python, tmp_path):
    configs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("[a-z]*.py")]
    configs = [name for name in configs if name != "configs/base.py"]
    script = f"""
from absl import flags
from ml_collections import config_flags
from lazyattn import command_line
for name in {configs!r}:
    values = flags.FlagValues()
    argv = ["train", f"--config={{name}}"]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    command_line.parse(argv, values)
    assert command_line.experiment(values) is not None
    print(name)
"""
    assert _run(python, "-c", script, cwd=tmp_path).split() == configs
