"""The architecture: a package imports only from earlier layers. Every import statement is read, inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "weft"

LAYERS = (
    "names errors pages paths",
    "graph cluster nn",
    "placement memory comm",
    "planner compression",
    "runtime",
    "federated search",
    "tasks",
    "bench",
    "cli",
)
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages.split()}
TOP = {"__init__", "__main__"}  # `weft` itself: the verbs, loaded lazily from any package
# `weft.nn` is plain PyTorch, usable without the rest of weft.
ALONE = {"nn"}


def package_of(path: Path) -> str:
    """`placement` for src/weft/placement/rows/views.py, `cli` for src/weft/cli.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute name) of every `weft` module that a file imports, relative imports resolved."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            # `from weft import x` imports the package x (or a verb, which belongs to `weft` itself)
            found += [(node.lineno, f"{base}.{alias.name}" if base == "weft" else base) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return [(line, name) for line, name in found if name == "weft" or name.startswith("weft.")]


def breaches(text: str, path: Path) -> list[str]:
    """What is wrong with the imports of a file of `text` at `path`, a sentence each."""
    package, wrong = package_of(path), []
    module = "weft." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    module = module.removesuffix(".__init__")
    for line, name in imports(ast.parse(text), module, path.name == "__init__.py"):
        other = name.split(".")[1] if "." in name else ""
        where = f"src/weft/{path.relative_to(SOURCE)}:{line} imports {name}"
        if package in TOP or other in (package, "__version__"):
            continue
        if other not in LAYER:
            wrong.append(f"{where}: `weft` itself gathers all packages; import the package that has the name")
        elif package in ALONE:
            wrong.append(f"{where}: `{package}` is usable without the rest of weft and imports nothing of it")
        elif LAYER[other] >= LAYER[package]:
            wrong.append(
                f"{where}: `{other}` (layer {LAYER[other]}) is not earlier than `{package}` (layer {LAYER[package]}); "
                "move the shared part to an earlier layer, or pass it in as an argument"
            )
    return wrong


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_package_has_a_layer():
    packages = {package_of(path) for path in FILES} - TOP
    assert packages <= set(LAYER), f"give {packages - set(LAYER)} a layer in LAYERS and in the design"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_earlier_layers(path):
    wrong = breaches(path.read_text(), path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("import weft.planner", "placement/new.py"),
        ("def f():\n    from weft.runtime import run", "planner/new.py"),
        ("from weft import tasks", "federated/new.py"),
        ("from weft import plan", "runtime/new.py"),
        ("from ..cluster import Device", "graph/new.py"),
        ("from ...planner.plan import Plan", "placement/rows/new.py"),
        ("from .. import cli", "bench/new.py"),
        ("import importlib\nimportlib.import_module('weft.cli')", "bench/new.py"),
        ("from weft.errors import WeftError", "nn/new.py"),
    ],
)
def test_a_breach_is_seen(text, file):
    assert breaches(text, SOURCE / file)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("from weft.graph import Graph\nimport weft.names", "placement/new.py"),
        ("from .layout import Shard\nfrom . import rows", "placement/new.py"),
        ("from weft.bench import CATALOGUE", "cli.py"),
        ("import weaver", "graph/new.py"),
    ],
)
def test_what_is_allowed_passes(text, file):
    assert breaches(text, SOURCE / file) == []
