"""Documents: width, links, and that the files, modules, flags and settings they name exist."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

from lazyattn import experiment, flag_help
from lazyattn.data.prepare import __main__ as preparation

ROOT = Path(__file__).parents[1]
WIDTH = 100
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "pallas_kernels/README.md"]
# Pages of the log name what there was on their day.
NOW = [path for path in DOCUMENTS if path.parent.name != "log"]
# Folders that a document may speak of without their being in the repository.
OUTSIDE = ("runs/", "data/", "path/", "exports/", "build/", "RUN/", "DIR/", "FOLDER/", "PATH/")

_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_FILE = re.compile(r"[\w.*/-]+\.(?:py|md|jsonl|toml|txt|yml|png)")
_MODULE = re.compile(r"python3? -m ([\w.]+)")
_COMMAND = re.compile(r"python3? (-m [\w.]+|train\.py)([^`#\n]*)")
_LAZYATTN = re.compile(r"\blazyattn (?=--)")


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def _tree():
    """Returns the repository's files, relative to it."""
    hidden = {".git", ".venv", "runs", "build", "__pycache__"}
    found = set()
    for path in ROOT.iterdir():
        if path.name in hidden:
            continue
        found |= (
            {path.name} if path.is_file() else {str(p.relative_to(ROOT)) for p in path.rglob("*")}
        )
    return found


def _text(path):
    """Returns the text, with lines that a backslash breaks put together."""
    return re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))


def too_long(text):
    """Returns the numbers of lines that are too long; tables and single links may be."""
    free = re.compile(r"\s*\|.*|\W*!?\[.*\]\(.*\)\W*|\s*\S+")
    lines = enumerate(text.splitlines(), 1)
    return [n for n, line in lines if len(line) > WIDTH and not free.fullmatch(line)]


def anchors(text):
    """Returns the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(path, text):
    broken = []
    for link in _LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        found = target.exists()
        if found and anchor:
            found = anchor in anchors(target.read_text(encoding="utf-8"))
        if not found:
            broken.append(link)
    return broken


def missing_files(text):
    """Returns files in backticks that are nowhere: by path, or by name where it has no folder."""
    tree = _tree()
    names = {name.rsplit("/", 1)[-1] for name in tree}
    missing = []
    for span in _CODE.findall(text):
        for name in _FILE.findall(span) if re.fullmatch(r"[\w.*/-]+", span) else []:
            if "*" in name or name.startswith(OUTSIDE):
                continue
            if "/" in name:
                found = any(file == name or file.endswith("/" + name) for file in tree)
            else:
                found = name in names
            # What a run or an export writes is nowhere in the tree.
            if not found and ("/" in name or name.endswith((".py", ".toml"))):
                missing.append(name)
    return missing


def missing_modules(text):
    missing = []
    for name in set(_MODULE.findall(text)) - {"pytest", "ruff", "mypy", "pip", "build"}:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(name)
    return missing


@functools.cache
def _source(module):
    """Returns the text of a module, of its package where it is one, and of what defines flags."""
    path = ROOT / module.replace(".", "/")
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    files.append(ROOT / "lazyattn" / "distributed.py")
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())


def unknown_flags(text):
    """Returns (program, flag) of commands whose program has no such flag."""
    from lazyattn import main as train

    del train
    own = {*(flag.name for flag in flag_help.own_flags()), "help", "verbosity"}
    of_prepare = {flag.name for flag in flag_help.own_flags(preparation.FLAGS)}
    settings = experiment.defaults()
    unknown = []
    spans = [span.replace("\n", " ") for span in _CODE.findall(text)]
    for program, arguments in _COMMAND.findall(
        _LAZYATTN.sub("python train.py ", "\n".join([text, *spans]))
    ):
        module = program.removeprefix("-m ")
        for flag in re.findall(r"(?:^|\s)--([\w.]+)", arguments):
            if program == "train.py" or module == "lazyattn":
                if flag.startswith("config."):
                    known = _has(settings, flag.split(".")[1:])
                else:
                    known = flag in own or flag.removeprefix("no") in own
            elif module == "lazyattn.data.prepare":
                known = flag in of_prepare
            elif module.split(".")[0] in ("benchmarks", "tests"):
                name = flag.removeprefix("no")
                known = re.search(rf'["\'](--)?({flag}|{name})["\']', _source(module)) is not None
            else:
                continue
            if not known:
                unknown.append((program, flag))
    return unknown


def _has(settings, keys):
    for key in keys:
        if key not in settings:
            return False
        settings = settings[key]
    return True


@by_name(DOCUMENTS)
def test_lines_are_not_too_long(path):
    assert too_long(path.read_text(encoding="utf-8")) == []


@by_name(DOCUMENTS)
def test_links_lead_somewhere(path):
    assert broken_links(path, path.read_text(encoding="utf-8")) == []


@by_name(NOW)
def test_named_files_and_modules_exist(path):
    assert missing_files(_text(path)) == []
    assert missing_modules(_text(path)) == []


@by_name(NOW)
def test_commands_have_the_flags_they_use(path):
    assert unknown_flags(_text(path)) == []


def test_what_is_wrong_is_found():
    assert too_long("a " * 50 + "b\n| " + "c " * 60 + "|\nd\n") == [1]
    here = ROOT / "README.md"
    assert broken_links(here, "[a](docs/nowhere.md) [b](#the-op) [c](#the-up)") == [
        "docs/nowhere.md",
        "#the-up",
    ]
    assert missing_files("`gone.py`, `train.py`, `lazyattn/no.md`, `metrics.jsonl`") == [
        "gone.py",
        "lazyattn/no.md",
    ]
    assert missing_modules("python -m benchmarks.no, python -m benchmarks.attention") == [
        "benchmarks.no"
    ]
    assert unknown_flags(
        "python train.py --mode=eval --modes=1 --config.model.width=1 --config.model.no=1\n"
        "python -m benchmarks.attention --cases=dense --no_such=1\n"
        "lazyattn --workdir=RUN --none=1"
    ) == [
        ("train.py", "modes"),
        ("train.py", "config.model.no"),
        ("-m benchmarks.attention", "no_such"),
        ("train.py", "none"),
    ]
