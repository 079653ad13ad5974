"""The examples in docstrings (`>>>`) are true, in every module of weft that has some."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = [
    ".".join(path.with_suffix("").relative_to(SOURCE).parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>>" in path.read_text()
]
# Distributions that weft can do without: a module that needs one is skipped where it is not installed.
OPTIONAL = ("transformers", "sklearn", "tensorboard", "byzfl")
# What is only shown (`# doctest: +SKIP`): it needs processes or a model of the reader's.
SHOWN = ("weft.comm.masha", "weft.comm.straggler.farm", "weft.planner.plan")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    found = doctest.testmod(module)
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples of {name} give something else; see above"
    assert (found.attempted == 0) == (name in SHOWN), "examples that are all skipped are named in SHOWN, and no others"


def test_there_are_many():
    assert len(MODULES) > 30
