"""The package as pip installs it: a wheel, in an empty environment, in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lazyattn
from lazyattn.command_line import shipped_configs

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


BUILD = """
import setuptools.build_meta as backend, sys
print(backend.build_sdist(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy: setuptools writes beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("lazyattn", "pallas_kernels", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source / path.name)
    made = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-c", BUILD, made, cwd=source)
    (path,) = made.glob("lazyattn-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, as pip does where there is no wheel."""
    made = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "-q", "-w", made)
    _run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=made)
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
    for folder, inside in (("lazyattn", ""), ("pallas_kernels", ""), ("configs", "lazyattn/")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                assert inside + path.relative_to(ROOT).as_posix() in names
    # Nothing else that another project may have, too.
    about = f"lazyattn-{lazyattn.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lazyattn", "pallas_kernels", about}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: jax<0.13,>=0.11.2" in metadata
    for extra in (
        *("cuda", "tpu", "gcs", "s3", "evaluation", "export", "data", "plot", "wandb"),
        *("docs", "notebook", "buckets-test"),
    ):
        assert f"Provides-Extra: {extra}\n" in metadata


SMALL = (
    *("--config.model.width=32", "--config.model.num_layers=1"),
    *("--config.data.sequence_length=64", "--config.data.vocab_size=300"),
    *("--config.training.eval_batches=1", "--config.model.attention.bias_width=16"),
)


def test_it_runs_the_op_and_trains_the_quickstart(python, tmp_path):
    assert str(ROOT) not in _run(python, "-c", OP, cwd=tmp_path)
    small = (*SMALL, "--config.training.steps=3")
    command = python.with_name("lazyattn")
    cache = {"LAZYATTN_CACHE": str(tmp_path / "cache")}
    out = _run(command, "--config=quickstart", "--workdir=run", *small, cwd=tmp_path, **cache)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "  lazyattn --mode=sample --workdir=run" in out
    again = ("-m", "lazyattn", "--config=configs/quickstart.py", "--workdir=run", *small)
    assert "python -m lazyattn --mode=sample" in _run(python, *again, cwd=tmp_path, **cache)
    sampling = ("--mode=sample", "--workdir=run", "--prompt=The", "--max_new_tokens=4")
    assert _run(command, *sampling, cwd=tmp_path).startswith("The")
    assert "--mode=eval" in _run(command, "--help", cwd=tmp_path)
    assert "--on_fault" in _run(python, "-m", "lazyattn.data.prepare", "-h", cwd=tmp_path)
    version = _run(python, "-c", "import lazyattn; print(lazyattn.__version__)", cwd=tmp_path)
    assert version.strip() == lazyattn.__version__


def test_it_finds_all_configs(python, tmp_path):
    configs = list(shipped_configs())
    assert len(configs) == len(list((ROOT / "configs").rglob("[a-z]*.py")))
    for name in ("hub", "uptrain"):  # which need a folder
        configs.remove(name)
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


@pytest.fixture(scope="module")
def python_with_extras(python, wheel, tmp_path_factory):
    """The same Python, with what the first steps and the notebook ask for."""
    extras = f"lazyattn[plot,export,notebook] @ {wheel.as_uri()}"
    pins = ROOT / "requirements.txt"
    folder = tmp_path_factory.mktemp("extras")
    _run(python, "-m", "pip", "install", "-q", "-c", pins, extras, cwd=folder)
    return python


def blocks(language):
    """Returns the blocks of the page of first steps in one language."""
    text = (ROOT / "docs" / "first_steps.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_the_first_steps_as_they_stand(python_with_extras, tmp_path):
    """Only the model is smaller, and the rows."""
    python = python_with_extras
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    trainings = 0
    for line in lines:
        name, *flags = shlex.split(line)
        assert name == "lazyattn"
        if any(flag.startswith("--config=") for flag in flags):
            flags += SMALL
            trainings += 1
        printed = _run(
            *(python.with_name(name), *flags), cwd=tmp_path, LAZYATTN_CACHE=str(tmp_path / "cache")
        )
        if "--step=best" in flags and "--mode=eval" in flags:
            assert "checkpoints" in printed
    assert trainings == 4 and len(lines) == 9
    (program,) = blocks("python")
    assert _run(python, "-c", program, cwd=tmp_path).startswith("The ")
    for made in (
        *("runs/lazy/plot/loss.png", "runs/lazy/inspection/report.html"),
        *("exports/lazy/params", "exports/lazy/model.safetensors"),
    ):
        assert (tmp_path / made).exists()
    assert list((tmp_path / "runs/lazy/profile").rglob("*.xplane.pb"))


NOTEBOOK = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(book, timeout=1200, kernel_name="python3").execute()
nbformat.write(book, "notebook.ipynb")
"""


def test_the_notebook_runs(python_with_extras, tmp_path):
    source = ROOT / "docs" / "notebook.ipynb"
    cache = {"LAZYATTN_CACHE": str(tmp_path / "cache"), "JUPYTER_PLATFORM_DIRS": "1"}
    _run(python_with_extras, "-c", NOTEBOOK, source, cwd=tmp_path, **cache)
    code = [
        cell
        for cell in json.loads((tmp_path / "notebook.ipynb").read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    shown = [output.get("data", {}) for cell in code for output in cell["outputs"]]
    assert any("image/svg+xml" in data for data in shown)
    (report,) = ("".join(data["text/html"]) for data in shown if "text/html" in data)
    assert "attention" in report and "lazy" in report and "softmax" in report
    losses = [json.loads(line) for run in ("lazy", "softmax") for line in _last(tmp_path, run)]
    assert all(loss["step"] == 120 and loss["validation_loss"] < 6 for loss in losses)


def _last(folder, run):
    return (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()[-1:]


def test_the_notebook_is_kept_without_what_it_shows():
    for cell in json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
