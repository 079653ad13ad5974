"""Blocks of README run as they stand, and those of the pages below (slow): Python in a fresh interpreter, commands in a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.M | re.S
)
PAGES = {"README": README, **{name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("make-it-fit", "exchange")}}
BLOCKS = [
    (name, m["language"], m["code"]) for name, page in PAGES.items() for m in FENCE.finditer(page) if not m["skip"]
]


def environment(folder: Path) -> dict[str, str]:
    """This interpreter's `python` and the `weft` of these sources first on the path, quiet threads."""
    weft = folder / "bin" / "weft"
    weft.parent.mkdir()
    weft.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m weft "$@"\n')
    weft.chmod(0o755)
    path = os.pathsep.join([str(weft.parent), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    sources = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("language", "code"),
    [
        pytest.param(
            language,
            code,
            id=f"{name}-{i}-{language}",
            marks=() if name == "README" else pytest.mark.slow,  # each a process or two of its own: minutes in all
        )
        for i, (name, language, code) in enumerate(BLOCKS)
    ],
)
def test_block_runs(language, code, tmp_path):
    if language == "python":
        (tmp_path / "block.py").write_text(code)
        command = [sys.executable, "block.py"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, f"{code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"


def test_there_is_a_short_program():
    programs = [code for name, language, code in BLOCKS if name == "README" and language == "python"]
    assert programs
    assert len(programs[0].splitlines()) <= 15


def test_skipped_blocks_say_why():
    for page in PAGES.values():
        skipped = [m for m in FENCE.finditer(page) if m["skip"]]
        assert len(skipped) <= 2  # `make demo` and the like, which other jobs run


def test_the_numbers_are_those_of_the_records():
    from weft.bench.report import numbers, readme_with, systems_page

    folder = ROOT / "benchmarks"
    assert readme_with(README, numbers(folder)) == README, "run: make docs"
    assert systems_page(folder) == (ROOT / "docs" / "systems.md").read_text(), "run: make docs"


def test_local_links_lead_somewhere():
    for name in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}, which is not there"
