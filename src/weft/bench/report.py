"""The generated parts of the documentation: README's table of numbers and docs/systems.md, from the records in `benchmarks/`.

    python -m weft.bench.report     (or `make docs`)

No number in README is typed by hand: it stands between two marks, and a test compares it with the records.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from weft.bench import every_system
from weft.bench.record import find_records
from weft.bench.system import System

__all__ = ["main", "numbers", "readme_with", "systems_page"]

BEGIN, END = "<!-- numbers: begin (make docs) -->", "<!-- numbers: end -->"


def numbers(folder: Path) -> str:
    """Markdown: for every system its newest record's claims, each with bound, measured value and verdict, and the machine."""
    parts = []
    for system in every_system():
        records = find_records(folder, system.name) if folder.is_dir() else []
        if records:
            parts.append(_table(system, records[0]))
    return "\n\n".join(parts) if parts else "No results are recorded yet: `make bench` measures them."


def _table(system: System, record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    processor = " ".join(machine["processor"].replace("(R)", "").replace("(TM)", "").split())
    setting = f"{processor}, {machine['cores']} cores, {round(machine['memory'] / 2**30)} GiB"
    setting += f", {len(machine['accelerators'])} × {machine['accelerators'][0]}" if machine["accelerators"] else ""
    count = len(record["seeds"])
    lines = [
        f"**{system.name}** ({system.title}, [{system.paper}]({link(system.paper)}))  ",
        f"{setting}; torch {versions['torch']}, {record['date']}, {count} seed{'s' if count > 1 else ''}",
        "",
        "| claim | bound | measured | |",
        "| --- | --: | --: | --- |",
    ]
    for claim in record["claims"]:
        number = "not measured" if claim["value"] is None else f"{claim['value']:.3g}"
        lines.append(f"| {claim['text']} | {claim['bound']} | {number} | {'met' if claim['met'] else '**missed**'} |")
    return "\n".join(lines)


def link(paper: str) -> str:
    """Address of `arXiv:2110.15032` or `doi:10.1/x`."""
    kind, _, number = paper.partition(":")
    return f"https://arxiv.org/abs/{number}" if kind == "arXiv" else f"https://doi.org/{number}"


def readme_with(readme: str, table: str) -> str:
    """README's text with the table between the marks.

    Raises:
        ValueError: the marks are missing or out of order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def systems_page() -> str:
    """docs/systems.md: the catalogue, one section per system."""
    lines = [
        "# The published systems in weft",
        "",
        "Written by `make docs` from the catalogue (`weft.bench.CATALOGUE`); do not edit. `weft systems` prints the same, and",
        "`weft bench NAME` measures a system's claims on your machine.",
    ]
    for system in every_system():
        lines += [
            "",
            f"## {system.name}",
            "",
            f"{system.title}{f' ({system.cite})' if system.cite else ''}, [{system.paper}]({link(system.paper)})",
            "",
            f"**For** {system.solves}.",
            "",
            f"**Use** {', '.join(f'`{name}`' for name in system.use)}.",
            "",
            f"**Measured against** {', '.join(system.baselines)}; about {system.minutes:g} minutes. "
            f"**Proved by** {', '.join(f'[{test}](../{test})' for test in system.tests)}.",
            "",
            "| claim | bound |",
            "| --- | --: |",
            *(f"| {claim.text} | {claim.bound} |" for claim in system.claims),
        ]
    return "\n".join(lines) + "\n"


def main(root: Path | None = None) -> int:
    """Rewrite the generated parts in the repository at `root` (the current directory)."""
    root = root or Path.cwd()
    readme = root / "README.md"
    if not readme.is_file():
        print(f"weft: no README.md in {root}; run this in the repository", file=sys.stderr)
        return 2
    readme.write_text(readme_with(readme.read_text(), numbers(root / "benchmarks")))
    (root / "docs" / "systems.md").write_text(systems_page())
    print("wrote README.md and docs/systems.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
