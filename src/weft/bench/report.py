"""The generated parts of the documentation: README's table of numbers and docs/systems.md, from the records in `benchmarks/`.

    python -m weft.bench.report     (or `make docs`)

README has a line per system and what is missed, docs/systems.md every claim. No number is typed by hand: a test compares both
with the records.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from weft.bench import every_system
from weft.bench.record import find_records, record_path
from weft.bench.system import System

__all__ = ["main", "numbers", "readme_with", "systems_page"]

BEGIN, END = "<!-- numbers: begin (make docs) -->", "<!-- numbers: end -->"


def numbers(folder: Path) -> str:
    """Markdown: a line per system, with its first claim, and under it each claim that its newest record misses."""
    lines = [
        "| system | claims met | the first of them | bound | measured |",
        "| --- | --: | --- | --: | --: |",
    ]
    missed = []
    for system in every_system():
        if record := _newest(folder, system):
            claims = record["claims"]
            first = claims[0]
            lines.append(
                f"| [{system.name}](docs/systems.md#{system.name}) | {sum(c['met'] for c in claims)} of {len(claims)} "
                f"| {first['text']} | {first['bound']} | {_measured(first)} |"
            )
            missed += [
                f"- {system.name}: {claim['text']}: {_measured(claim)}, bound {claim['bound']}"
                for claim in claims
                if not claim["met"]
            ]
    if len(lines) == 2:
        return "No results are recorded yet: `make bench` measures them."
    return "\n".join([*lines, "", "Missed so far:", "", *missed] if missed else lines)


def _newest(folder: Path, system: System) -> dict[str, Any] | None:
    records = find_records(folder, system.name) if folder.is_dir() else []
    return records[0] if records else None


def _measured(claim: dict[str, Any]) -> str:
    return "not measured" if claim["value"] is None else f"{claim['value']:.3g}"


def _setting(record: dict[str, Any]) -> str:
    """Where and when a record was made."""
    machine, versions = record["machine"], record["versions"]
    processor = " ".join(machine["processor"].replace("(R)", "").replace("(TM)", "").split())
    setting = f"{processor}, {machine['cores']} cores, {round(machine['memory'] / 2**30)} GiB"
    setting += f", {len(machine['accelerators'])} × {machine['accelerators'][0]}" if machine["accelerators"] else ""
    count = len(record["seeds"])
    return f"{setting}; torch {versions['torch']}, {record['date']}, {count} seed{'s' if count > 1 else ''}"


def _claims(system: System, record: dict[str, Any] | None) -> list[str]:
    """Markdown: the claims of a system, with what was measured if there is a record."""
    if record is None:
        return ["| claim | bound |", "| --- | --: |", *(f"| {claim.text} | {claim.bound} |" for claim in system.claims)]
    return [
        f"Measured on {_setting(record)}:",
        "",
        "| claim | bound | measured | |",
        "| --- | --: | --: | --- |",
        *(
            f"| {claim['text']} | {claim['bound']} | {_measured(claim)} | {'met' if claim['met'] else '**missed**'} |"
            for claim in record["claims"]
        ),
    ]


def _picture(folder: Path, system: System, record: dict[str, Any] | None) -> list[str]:
    """Markdown: the curves that were recorded with a record, if there are any."""
    if record is None or system.axes is None:
        return []
    picture = record_path(record, folder).with_suffix(".svg")
    if not picture.is_file():
        return []
    return ["", f"![{system.axes[1]} over {system.axes[0]}](../{folder.name}/{picture.name})"]


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


def systems_page(folder: Path) -> str:
    """docs/systems.md: the catalogue, one section per system, with the numbers of its newest record in the folder."""
    lines = [
        "# The published systems in weft",
        "",
        "Written by `make docs` from the catalogue (`weft.bench.CATALOGUE`); do not edit. `weft systems` prints the same, and",
        "`weft bench NAME` measures a system's claims on your machine: side by side in one run, each method taking",
        "turns step by step in the same processes. Ratios are of medians.",
    ]
    for system in every_system():
        record = _newest(folder, system)
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
            *_claims(system, record),
            *_picture(folder, system, record),
        ]
    return "\n".join(lines) + "\n"


def main(root: Path | None = None) -> int:
    """Rewrite the generated parts in the repository at `root` (the current directory)."""
    root = root or Path.cwd()
    readme = root / "README.md"
    if not readme.is_file():
        print(f"weft: no README.md in {root}; run this in the repository", file=sys.stderr)
        return 2
    folder = root / "benchmarks"
    readme.write_text(readme_with(readme.read_text(), numbers(folder)))
    (root / "docs" / "systems.md").write_text(systems_page(folder))
    print("wrote README.md and docs/systems.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
