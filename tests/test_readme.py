"""What README and the pages of docs/ show runs: Python in a fresh interpreter, commands in a shell.

README, `WHOLE`    each block by itself, as it stands
`STORIES`          the Python blocks of a page are one program, in order, in one interpreter; what a reader need not see stands
                   in a comment of the page, `<!-- set-up ... -->`. Its lines keep their numbers: a traceback names the page's
"""

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
HIDDEN = re.compile(r"^<!-- set-up\n(?P<code>.*?)^-->$", re.M | re.S)
WHOLE = ("make-it-fit", "exchange")
STORIES = ("concepts", "planning", "training", "extend")
PAGES = {"README": README, **{name: (ROOT / "docs" / f"{name}.md").read_text() for name in (*WHOLE, *STORIES)}}
BLOCKS = [
    (name, m["language"], m["code"])
    for name in ("README", *WHOLE)
    for m in FENCE.finditer(PAGES[name])
    if not m["skip"]
]


def story(page: str) -> str:
    """The Python of a page, each line where it stands there."""
    lines = [""] * (page.count("\n") + 1)
    for m in (*HIDDEN.finditer(page), *FENCE.finditer(page)):
        if m.groupdict().get("language", "python") == "python" and not m.groupdict().get("skip"):
            first = page.count("\n", 0, m.start("code"))
            code = m["code"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


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
    done = run(command, tmp_path)
    assert done.returncode == 0, f"{code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=360)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", STORIES)
def test_story_runs(name, tmp_path):
    (tmp_path / f"{name}.md").write_text(story(PAGES[name]))  # a name that tracebacks show
    done = run([sys.executable, f"{name}.md"], tmp_path)
    assert done.returncode == 0, f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"


def test_no_page_with_code_is_forgotten():
    for path in (ROOT / "docs").glob("*.md"):
        assert "```python" not in path.read_text() or path.stem in PAGES, f"{path.name}: name it in WHOLE or STORIES"
    for name in STORIES:
        assert not any(m["language"] == "bash" for m in FENCE.finditer(PAGES[name])), (
            f"{name}: commands run in WHOLE only"
        )


def test_cluster_files_load(tmp_path):
    from weft.cluster import Cluster

    page = (ROOT / "docs" / "cluster-file.md").read_text()
    whole = [m[1] for m in re.finditer(r"^```yaml\n(.*?)^```$", page, re.M | re.S) if "devices:" in m[1]]
    assert len(whole) >= 2
    for text in whole:
        (tmp_path / "cluster.yaml").write_text(text)
        assert len(Cluster.load(tmp_path / "cluster.yaml")) > 1


@pytest.mark.slow
def test_the_bytes_that_make_it_fit_quotes(tmp_path):
    quote = r"fits in ([\d.]+) MiB, [\d.]+ % slower, least possible ([\d.]+) MiB"
    command = next(code for _, _, code in BLOCKS if "weft memory --task" in code)
    done = run(["bash", "-euo", "pipefail", "-c", command.replace("--explain", "")], tmp_path)
    quoted, found = (re.search(quote, text) for text in (PAGES["make-it-fit"], done.stdout))
    assert quoted and found, done.stdout + done.stderr
    for ours, theirs in zip(quoted.groups(), found.groups(), strict=True):
        assert abs(float(ours) / float(theirs) - 1) < 0.15, found[0]


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
