"""The names and options that users rely on, as a snapshot: a change of them is seen, and is meant.

Refresh after a change that is meant (and say so in CHANGELOG.md):

    python tests/test_public_api.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "public_api.json"
SOURCE = Path(__file__).parents[1] / "src"
PACKAGES = (
    "weft", "weft.names", "weft.errors", "weft.graph", "weft.cluster", "weft.nn", "weft.placement", "weft.planner",
    "weft.memory", "weft.comm", "weft.comm.straggler", "weft.comm.zeroth", "weft.runtime", "weft.federated", "weft.tasks",
    "weft.bench", "weft.cli",
)  # fmt: skip


def command_line() -> dict[str, list[str]]:
    """Options and arguments of every command of `weft`."""
    from weft.cli import parser

    found = {}
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found[name] = sorted(
                    word for option in command._actions for word in (option.option_strings or [option.dest.upper()])
                )
    return found


def surface() -> dict[str, object]:
    """Public names per package (`__all__`) and options per command."""
    names = {package: sorted(importlib.import_module(package).__all__) for package in PACKAGES}
    return {"names": names, "commands": command_line()}


def test_snapshot():
    golden = json.loads(GOLDEN.read_text())
    now = surface()
    assert now == golden, (
        "the public surface changed; if that is meant: python tests/test_public_api.py, and CHANGELOG.md"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("weft", ("torch", "numpy", "scipy", "highspy")),
        ("weft.bench", ("torch", "scipy", "highspy")),
        ("weft.cli", ("torch", "scipy", "highspy")),
        ("weft.cluster", ("scipy.optimize", "highspy")),
    ],
)
def test_importing_is_light(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_packages_need_no_import_of_their_own():
    code = "import weft; weft.memory.limit, weft.comm.attach, weft.comm.zeroth.SharedSeed, weft.federated.Asynchronous"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(SOURCE)}, timeout=120)


def test_unknown_name_of_weft_says_what_there_is():
    import weft

    with pytest.raises(AttributeError, match=r"it has .*plan"):
        weft.plann  # noqa: B018


if __name__ == "__main__":
    sys.path.insert(0, str(SOURCE))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n")
    print(f"wrote {GOLDEN}")
