"""Benchmarks that tests import don't define flags among those of `train.py`."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
IMPORTED = sorted(
    {
        f"{node.module}.{name.name}".replace(".", "/") + ".py"
        for path in (ROOT / "tests").rglob("*.py")
        if "from benchmarks" in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks")
        for name in node.names
    }
)


def defined_at_import(text):
    """Returns the lines of flags that are defined at import among all programs' flags."""
    return [
        node.lineno
        for statement in ast.parse(text).body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr.split("_")[0].lower())
        in (("flags", "define"), ("paths", "define"))
        and not any(one.arg in (None, "flag_values") for one in node.keywords)
    ]


@pytest.mark.parametrize("name", [name for name in IMPORTED if (ROOT / name).exists()])
def test_imported_benchmarks_keep_their_flags_to_themselves(name):
    assert defined_at_import((ROOT / name).read_text()) == []


def test_flags_among_all_are_found():
    text = 'A = flags.DEFINE_string("a", "", "A.")\nB = paths.define("b", None, "B.")\n'
    own = 'C = flags.DEFINE_bool("c", True, "C.", flag_values=OWN)\ndef f(): flags.DEFINE_x("d")\n'
    assert defined_at_import(text + own) == [1, 2]
