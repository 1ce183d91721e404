"""Who may import whom. The order of the house stands here, once."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("train", "lazyattn", "configs", "pallas_kernels")

# From the bottom up: a layer imports only from those before it, and within itself.
LAYERS = {
    "kernels": ("pallas_kernels",),
    "basics": (
        *("lazyattn.errors", "lazyattn.quantity", "lazyattn.identity", "lazyattn.paths"),
        *("lazyattn.file_lock", "lazyattn.distributed", "lazyattn.compile_cache"),
        *("lazyattn.flag_help", "lazyattn.allowed", "lazyattn.buckets", "lazyattn.patience"),
    ),
    "op": (
        *("lazyattn.reference", "lazyattn.call", "lazyattn.compile_target", "lazyattn.blocks"),
        *("lazyattn.derivatives", "lazyattn.explicit_mesh", "lazyattn.op_parameters"),
        *("lazyattn.attention", "lazyattn.decode_attention", "lazyattn.rotary", "lazyattn"),
    ),
    "sharding": ("lazyattn.sharding",),
    "model": ("lazyattn.model", "lazyattn.layer", "lazyattn.linen", "lazyattn.nnx"),
    "data": ("lazyattn.data",),
    "settings": ("lazyattn.experiment", "lazyattn.recipes", "lazyattn.command_line"),
    "pretrained": ("lazyattn.pretrained",),
    "checkpoint": ("lazyattn.checkpoint",),
    "generation": ("lazyattn.generation",),
    "training": ("lazyattn.training",),
    "compile": ("lazyattn.compile",),
    "check": ("lazyattn.check",),
    "eval": ("lazyattn.eval", "lazyattn.evaluation"),
    "export": ("lazyattn.export",),
    "inspect": ("lazyattn.inspect",),
    "plot": ("lazyattn.plot",),
    "sample": ("lazyattn.sample",),
    "hooks": ("lazyattn.summary", "lazyattn.hooks"),
    "command": ("lazyattn.main", "configs", "train"),
}
# One above the other only because a list has an order: none knows another.
MODES = ("compile", "check", "eval", "export", "inspect", "plot", "sample")


def modules(root=ROOT):
    """Returns the file of each module."""
    found = {}
    for package in PACKAGES:
        file = root / f"{package}.py"
        for path in [file] if file.is_file() else sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _nodes(tree, annotations):
    """Yields the nodes of a tree; `annotations`: also what is imported for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if annotations or not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            yield node
            yield from _nodes(node, annotations)


def imports(files, annotations=True):
    """Returns what each module imports of `files`, wherever in its text."""
    found = {}
    for module, path in files.items():
        names = set()
        for node in _nodes(ast.parse(path.read_text()), annotations):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports by dots"
                both = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {name if name in files else node.module for name in both}
        found[module] = {name for name in names if name in files} - {module}
    return found


def layer(module):
    """Returns a module's layer: that of the longest name that it begins with."""
    if module.endswith(".__main__"):
        return "command"  # a program, which no module imports
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        for key, names in LAYERS.items():
            if name in names and (name != "lazyattn" or count == len(parts)):
                return key
    return None


def upward(graph):
    """Returns the imports that lead up, or from mode to mode."""
    order = list(LAYERS)

    def wrong(low, high):
        return order.index(high) > order.index(low) or (
            low != high and low in MODES and high in MODES
        )

    return [
        f"{module} -> {name}"
        for module, names in sorted(graph.items())
        for name in sorted(names)
        if wrong(layer(module), layer(name))
    ]


def circle(graph):
    """Returns modules that import each other in turn, or []."""
    done, path = set(), []

    def walk(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        for name in sorted(graph[module]):
            if found := walk(name):
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(graph) if (found := walk(module))), [])


@functools.cache
def whole_graph():
    return imports(modules())


def test_every_module_has_its_place():
    assert [module for module in whole_graph() if layer(module) is None] == []
    names = [name for names in LAYERS.values() for name in names]
    assert [name for name in names if name not in whole_graph() and name != "configs"] == []


def test_no_arrow_leads_up():
    assert upward(whole_graph()) == []


def test_there_is_no_circle():
    assert circle(imports(modules(), annotations=False)) == []
    # Kernels don't know each other for their types' sake either.
    every = imports(modules())
    kernels = {name: every[name] for name in every if name.startswith("pallas_kernels")}
    assert circle(kernels) == []


def test_nothing_of_the_house_knows_its_tests_or_benchmarks():
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
            assert (name or "").split(".")[0] not in ("tests", "benchmarks"), path


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pallas_kernels.visit", "lazyattn.errors"),
        ("lazyattn.training.main", "lazyattn.eval.perplexity"),
        ("lazyattn.sample.main", "lazyattn.eval.scoring"),
        ("lazyattn.model.transformer", "lazyattn.checkpoint.load"),
        ("lazyattn.attention", "lazyattn.model.heads"),
    ],
)
def test_a_wrong_arrow_is_found(module, name):
    assert upward(whole_graph() | {module: whole_graph()[module] | {name}}) == [
        f"{module} -> {name}"
    ]


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
