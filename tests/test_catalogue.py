"""Every entry of the catalogue: what it uses resolves, its paper is named, it has a test and a recorded result."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weft.bench import CATALOGUE, entry
from weft.bench.record import find_records

ROOT = Path(__file__).parents[1]


def resolve(path: str) -> object:
    """The object called `weft.planner.plan`: the longest importable prefix, then attributes."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("name", CATALOGUE)
def test_entry(name):
    system, run = entry(name)
    assert system.name == name
    assert callable(run)
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:10\.\S+", system.paper), "name the paper as arXiv:... or doi:..."
    assert len({claim.text for claim in system.claims}) == len(system.claims)


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_it_uses_resolves(name):
    for path in entry(name)[0].use:
        assert resolve(path) is not None


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_has_tests(name):
    for path in entry(name)[0].tests:
        assert (ROOT / path).is_file(), f"{name}: {path} is not there"
        assert "def test_" in (ROOT / path).read_text()


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_has_a_recorded_result(name):
    system, _ = entry(name)
    records = find_records(ROOT / "benchmarks", name)
    assert records, f"no result of {name} in benchmarks/; make one: weft bench {name} --record"
    newest = records[0]
    assert [claim["text"] for claim in newest["claims"]] == [claim.text for claim in system.claims], (
        f"the newest record of {name} is of other claims; make one: weft bench {name} --record"
    )
    assert newest["machine"]["name"] and newest["versions"]["torch"] and newest["date"] and newest["seeds"]


def test_every_module_is_in_the_table():
    folder = ROOT / "src" / "weft" / "bench" / "systems"
    modules = {
        ".".join(["weft.bench.systems", *path.relative_to(folder).with_suffix("").parts])
        for path in folder.rglob("*.py")
        if path.stem != "__init__"
    }
    assert modules == set(CATALOGUE.values())


def test_listing_imports_no_torch():
    code = "import sys; from weft.bench import every_system; every_system(); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


def test_no_record_names_a_host():
    import socket

    host = socket.gethostname()
    for path in (ROOT / "benchmarks").glob("*.json"):
        assert host not in path.read_text()
