"""The pages of the site, made of the repository's documents, and its links, checked.

`make docs` calls it: `pages.py stage FOLDER` before the site is built, `pages.py check FOLDER/site`
after. Documents keep their places, so that links between them stay as they are. A link to code
becomes one to a page that shows it: the site needs no repository beside it.
"""

import html.parser
import json
import os
import re
import shutil
import sys
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("*.md", "docs/**/*.md", "pallas_kernels/README.md")
NOTEBOOKS = ("docs/*.ipynb",)

_LINK = re.compile(r"\]\(([^()\s]+)\)")
_ROW = re.compile(r"^\|.*", re.M)
_CODE = re.compile(r"`[^`]+`")
_LANGUAGES = {".py": "python", ".toml": "toml"}
# Code is found by its name; in the search it would bury the documents.
_NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def stage(folder: Path, root: Path = ROOT) -> list[str]:
    """Writes what the site is built from: `pages/`, which is emptied first, and `zensical.toml`.

    Args:
      folder: where to. A page goes where it stands in the repository.
      root: the repository.

    Returns:
      The pages' paths in `pages/`, sorted.

    Raises:
      FileNotFoundError: a document links to what is not there.
    """
    shutil.rmtree(folder / "pages", ignore_errors=True)
    site = _Site(root, folder / "pages")
    for pattern in DOCUMENTS:
        for path in sorted(root.glob(pattern)):
            site.pages[path] = path.read_text(encoding="utf-8")
    for pattern in NOTEBOOKS:
        for path in sorted(root.glob(pattern)):
            site.pages[path.with_suffix(".md")] = notebook_page(path.read_text(encoding="utf-8"))
    waiting = list(site.pages)
    while waiting:
        before = set(site.pages)
        site.write(waiting.pop())
        waiting += [path for path in site.pages if path not in before]
    settings = (Path(__file__).parent / "zensical.toml").read_text(encoding="utf-8")
    settings = settings.replace('"ROOT"', json.dumps(str(root)))
    (folder / "zensical.toml").write_text(settings, encoding="utf-8")
    return sorted(page.relative_to(root).as_posix() for page in site.pages)


class _Site:
    """The pages made so far, by where they would stand in the repository."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        self.pages: dict[Path, str] = {}
        self.code: set[Path] = set()

    def write(self, page: Path) -> None:
        """Writes a page, and makes the pages that it links to."""
        text = self.pages[page]
        if page not in self.code:
            text = _LINK.sub(lambda match: f"]({self._link(page, match[1])})", text)
            # Within code GitHub wants a bar of a table's row escaped, and here that would be shown.
            text = _ROW.sub(lambda row: _CODE.sub(lambda c: c[0].replace(r"\|", "|"), row[0]), text)
        target = self.folder / page.relative_to(self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def _link(self, page: Path, link: str) -> str:
        """Returns what a link of a page is on the site."""
        name, mark, anchor = link.partition("#")
        if not name or re.match(r"\w+:", link):
            return link
        target = Path(os.path.normpath(page.parent / name))
        if target not in self.pages:
            target = self._made(target, page, link)
        return os.path.relpath(target, page.parent) + mark + anchor

    def _made(self, target: Path, page: Path, link: str) -> Path:
        """Returns the page that shows a file or a folder, or the picture itself."""
        if not target.exists():
            raise FileNotFoundError(f"{page.relative_to(self.root)} links to {link}: not there")
        if target.suffix == ".png":
            copy = self.folder / target.relative_to(self.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copy)
            return target
        if target.suffix == ".ipynb":
            return target.with_suffix(".md")
        if target.is_dir():
            if target / "README.md" in self.pages:
                return target / "README.md"
            shown = target / "index.md"
            self.pages.setdefault(shown, self._folder_page(target))
        else:
            shown = target.with_name(target.name + ".md")
            self.pages.setdefault(shown, self._code_page(target))
            self.code.add(shown)
        return shown

    def _code_page(self, path: Path) -> str:
        code = path.read_text(encoding="utf-8")
        fence = "`" * (1 + max([2, *map(len, re.findall("`+", code))]))
        name = path.relative_to(self.root).as_posix()
        language = _LANGUAGES.get(path.suffix, "text")
        return f"{_NOT_SEARCHED}# `{name}`\n\n{fence}{language}\n{code}{fence}\n"

    def _folder_page(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        lines = [f"{_NOT_SEARCHED}# `{name}/`\n", "| file | what |", "|---|---|"]
        for file in sorted([*path.rglob("*.py"), *path.rglob("*.md")]):
            text = file.read_text(encoding="utf-8")
            first = re.match(r'"""(.*?)(?:"""|\n)|# (.*)', text)
            about = (first[1] or first[2]).replace("|", r"\|") if first else ""
            name = file.relative_to(path).as_posix()
            lines.append(f"| [`{name}`]({name}) | {about} |")
        return "\n".join(lines) + "\n"


def notebook_page(text: str) -> str:
    """Returns a notebook as a page: its text, its code, and what was printed where that is kept."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join(parts) + "\n"


class _Links(html.parser.HTMLParser):
    """Collects what a page links to, and the places in it that can be linked to."""

    def __init__(self):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        """Called for each tag."""
        values = {name: value for name, value in attrs if value}
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.anchors |= {values[name] for name in ("id", "name") if name in values}


def broken_links(folder: Path) -> list[str]:
    """Returns "PAGE: LINK" of all links within a built site that lead nowhere."""
    folder = folder.resolve()
    found = {}
    for path in folder.rglob("*.html"):
        found[path] = _Links()
        found[path].feed(path.read_text(encoding="utf-8"))
    broken = set()
    for path, page in found.items():
        if path.name == "404.html":  # its links are those of wherever it is shown
            continue
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = Path(os.path.normpath(path.parent / urllib.parse.unquote(parts.path)))
                target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(parts.fragment)
            leads = target.exists()
            if leads and anchor and target in found:
                # The theme's own places are made by its script.
                leads = anchor in found[target].anchors or anchor.startswith("__")
            if not leads:
                broken.add(f"{path.relative_to(folder).as_posix()}: {link}")
    return sorted(broken)


def main(command: str, folder: str) -> str | None:
    """Does one command; returns what is wrong."""
    if command == "stage":
        print(f"{len(stage(Path(folder)))} pages")
        return None
    broken = broken_links(Path(folder))
    return "\n".join(["These links lead nowhere:", *broken]) if broken else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
