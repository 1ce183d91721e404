"""The site of the documents: its pages, its links, and, slow, what is built."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"

_spec = importlib.util.spec_from_file_location("pages", SITE / "pages.py")
pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)


@pytest.fixture
def repository(tmp_path):
    """A small repository: documents that link to each other, to code and to a picture."""
    root = tmp_path / "repository"
    (root / "docs" / "pictures").mkdir(parents=True)
    (root / "code" / "part").mkdir(parents=True)
    (root / "README.md").write_text("[a](docs/a.md#part) [b](code) [c](https://example.org)\n")
    (root / "docs" / "a.md").write_text(
        "# A\n[up](../README.md) [x](../code/x.py) ![p](pictures/p.png) [n](n.ipynb) [h](#part)\n"
        "| `a\\|b` | c \\| d |\n"
    )
    (root / "docs" / "pictures" / "p.png").write_bytes(b"picture")
    (root / "code" / "x.py").write_text('"""What x is.\n\n```\n[no](link)\n```\n"""\n')
    (root / "code" / "part" / "y.py").write_text('"""What | y is."""\n')
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[a](a.md)"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": ["1\n"]}]},
        {"cell_type": "code", "source": ["pass"], "outputs": []},
    ]
    (root / "docs" / "n.ipynb").write_text(json.dumps({"cells": cells}))
    return root


def test_links_lead_to_pages(repository, tmp_path):
    found = pages.stage(tmp_path / "out", repository)
    assert found == [
        *("README.md", "code/index.md", "code/part/y.py.md", "code/x.py.md"),
        *("docs/a.md", "docs/n.md"),
    ]
    out = tmp_path / "out" / "pages"
    assert out.joinpath("README.md").read_text() == (
        "[a](docs/a.md#part) [b](code/index.md) [c](https://example.org)\n"
    )
    assert "[x](../code/x.py.md) ![p](pictures/p.png) [n](n.md) [h](#part)" in (
        out.joinpath("docs/a.md").read_text()
    )
    # Python-Markdown shows the backslash of a bar in code, and needs it elsewhere.
    assert "\n| `a|b` | c \\| d |\n" in out.joinpath("docs/a.md").read_text()
    assert out.joinpath("docs/pictures/p.png").read_bytes() == b"picture"
    folder = out.joinpath("code/index.md").read_text()
    assert "| [`part/y.py`](part/y.py.md) | What \\| y is. |\n" in folder
    assert "| [`x.py`](x.py.md) | What x is. |" in folder
    code = out.joinpath("code/x.py.md").read_text()
    assert "# `code/x.py`\n\n````python\n" in code and code.endswith('"""\n````\n')
    assert "[no](link)" in code  # code stays as it is
    assert out.joinpath("docs/n.md").read_text() == (
        "# Title\n[a](a.md)\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        "```python\npass\n```\n"
    )
    assert json.dumps(str(repository)) in (tmp_path / "out" / "zensical.toml").read_text()


def test_a_link_to_nothing(repository, tmp_path):
    (repository / "docs" / "a.md").write_text("[x](../code/z.py)")
    with pytest.raises(FileNotFoundError, match=re.escape("docs/a.md links to ../code/z.py")):
        pages.stage(tmp_path / "out", repository)


def test_broken_links_of_a_site(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="part/b.html#here">1</a> <a href="part/b.html#there">2</a> <a href="c.html">3</a>'
        '<a href="part/">4</a> <a href="#top">5</a> <img src="d.png"> <a href="https://x.org">6</a>'
    )
    (tmp_path / "part" / "b.html").write_text('<h2 id="here">1</h2> <a href="../index.html">2</a>')
    broken = [f"index.html: {link}" for link in ("#top", "c.html", "d.png", "part/")]
    assert pages.broken_links(tmp_path) == [*broken, "index.html: part/b.html#there"]
    (tmp_path / "part" / "index.html").write_text("")
    assert "index.html: part/" not in pages.broken_links(tmp_path)


def test_every_document_is_in_the_navigation():
    """But those that others lead to: pages of the log."""
    settings = (SITE / "zensical.toml").read_text()
    named = set(re.findall(r'= "([\w/.]+\.md)"', settings))
    documents = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")}
    documents = {path for path in documents if not path.startswith("docs/log/")}
    documents |= {path.name for path in ROOT.glob("*.md")} | {"pallas_kernels/README.md"}
    documents |= {"docs/log/README.md", "docs/notebook.md", "LICENSE.md"}
    assert named == documents


def test_what_the_reference_names_exists():
    for path in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M):
            module, _, member = name.rpartition(".")
            file = importlib.util.find_spec(module).origin
            defined = rf"^(?:def|class) {member}\b|^    \"{member}\",$"  # or in __all__
            assert re.search(defined, Path(file).read_text(), re.M), name


@pytest.mark.slow
def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path):
    """What `make docs` does; its environment needs a package index."""
    done = subprocess.run(
        [ROOT / "tools" / "docs"],
        env=os.environ | {"DOCS_DIR": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    site = tmp_path / "site"
    assert done.stdout.splitlines()[-1] == str(site / "index.html")
    assert "Lazy Attention for JAX" in (site / "index.html").read_text()
    reference = (site / "docs" / "api" / "op.html").read_text()
    assert 'id="lazyattn.lazy_attention"' in reference and "distance_slope" in reference
    results = (site / "docs" / "results.html").read_text()
    assert "pictures/study_loss.png" in results
    assert (site / "docs" / "pictures" / "study_loss.png").is_file()
    # Nothing is fetched from elsewhere.
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="?https?:', reference)
