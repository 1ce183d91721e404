"""The code of docs/op.md and docs/relative_bias.md, run as it stands."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("op.md", "relative_bias.md")]


def blocks(page):
    """Returns (heading, code) of each Python block of a page."""
    found, heading = [], ""
    for match in re.finditer(
        r"^## ([^\n]*)$|^```python\n(.*?)^```$", page.read_text(), re.M | re.S
    ):
        heading = match[1] or heading
        if match[2]:
            found.append((f"{page.name}, {heading}", match[2]))
    return found


# Their modules and arguments have tests of their own; here `make test` only does their imports.
SLOW = {"op.md, Flax Linen", "relative_bias.md, ALiBi, fixed or learned"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
EQUINOX = [code for _, code in BLOCKS if "import equinox" in code]


def missing_packages(code):
    """Returns the packages that the code imports and that aren't installed."""
    roots = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    return sorted(root for root in roots if importlib.util.find_spec(root) is None)


@pytest.mark.parametrize(
    ("heading", "code"),
    [
        pytest.param(*block, id=block[0], marks=[pytest.mark.slow] if block[0] in SLOW else [])
        for block in BLOCKS
    ],
)
def test_code_runs_as_it_stands(heading, code):
    if missing := missing_packages(code):
        pytest.skip(f"{', '.join(missing)} is not installed")
    exec(compile(code, heading, "exec"), {"__name__": "__page__"})


@pytest.mark.parametrize("heading", sorted(SLOW))
def test_what_the_slow_blocks_import_is_there(heading):
    tree = ast.parse(dict(BLOCKS)[heading])
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(getattr(node, "module", "").startswith("lazyattn") for node in tree.body)
    exec(compile(tree, heading, "exec"), {"__name__": "__page__"})


@pytest.mark.slow
def test_equinox_block(tmp_path):
    """In a folder of its own: the package is none of ours. It needs what jaxtyping needs."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", tmp_path, "equinox"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip("equinox could not be installed")
    (code,) = EQUINOX
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_package_is_seen():
    code = "import jax.numpy, no_such_package.part\nfrom nowhere_at_all import x"
    assert missing_packages(code) == ["no_such_package", "nowhere_at_all"]
    assert len(BLOCKS) >= 9 and len(EQUINOX) == 1
