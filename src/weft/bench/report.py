"""The generated parts of the documentation: README's table of numbers and docs/systems.md, from the records in `benchmarks/`.

    python -m weft.bench.report                  (or `make docs`)
    python -m weft.bench.report --reevaluate     after a claim has changed: judge all records' rows anew first, without a run

README has a line per system and what is missed, docs/systems.md every claim. No number is typed by hand: a test compares both
with the records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.bench import CATALOGUE, entry, every_system
from weft.bench.harness import judged_anew
from weft.bench.record import find_records, record_path, write_record
from weft.bench.system import Results, Row, System

__all__ = ["main", "numbers", "readme_with", "reevaluate", "systems_page"]

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


def _setting(system: System, record: dict[str, Any]) -> str:
    """Where, when and from which commit a record was made, and how often it was measured."""
    machine, versions = record["machine"], record["versions"]
    processor = " ".join(machine["processor"].replace("(R)", "").replace("(TM)", "").split())
    setting = f"{processor}, {machine['cores']} cores, {round(machine['memory'] / 2**30)} GiB"
    setting += f", {len(machine['accelerators'])} × {machine['accelerators'][0]}" if machine["accelerators"] else ""
    count = len(record["seeds"])
    often = f"medians of {count} seeds" if count > 1 else "1 run" if system.repeats else "1 seed"
    often += f", in which {system.repeats}" if system.repeats else ""
    setting += f"; torch {versions['torch']}, {record['date']}, {_commit(record['commit'])}; {often}"
    for later in record.get("added", ()):
        setting += f"; {later['what']} added {later['date']}, {_commit(later['commit'])}"
    return setting + (f"; claims judged anew on these rows {record['judged']}" if "judged" in record else "")


def _commit(name: str) -> str:
    """The commit of a record in words; `+` is what `record.commit` says of changed files."""
    if not name:
        return "no commit known"
    return f"commit {name.removesuffix('+')}{' with changes' if name.endswith('+') else ''}"


def _claims(system: System, record: dict[str, Any] | None) -> list[str]:
    """Markdown: the claims of a system, with what was measured if there is a record."""
    if record is None:
        return ["| claim | bound |", "| --- | --: |", *(f"| {claim.text} | {claim.bound} |" for claim in system.claims)]
    return [
        f"Measured on {_setting(system, record)}:",
        "",
        "| claim | bound | measured | |",
        "| --- | --: | --: | --- |",
        *(
            f"| {claim['text']} | {claim['bound']} | {_measured(claim)} | {'met' if claim['met'] else '**missed**'} |"
            for claim in record["claims"]
        ),
        *_beside(system, record),
    ]


def _beside(system: System, record: dict[str, Any]) -> list[str]:
    """Markdown: what the entry says beside its numbers."""
    said = system.said_beside(Results(Row.from_dict(row) for row in record["rows"]))
    return ["", *(f"- {sentence}" for sentence in said)] if said else []


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


def reevaluate(folder: Path) -> list[Path]:
    """Judge the claims of today's catalogue on the rows of every record in the folder; the records that this changed."""
    changed = []
    for record in find_records(folder):
        if record["system"] not in CATALOGUE:
            print(f"weft: no system {record['system']} in the catalogue; its record stays", file=sys.stderr)
            continue
        judged = judged_anew(record, entry(record["system"])[0])
        if judged != record:
            changed.append(write_record(judged, folder))
    return changed


def main(root: Path | None = None, arguments: Sequence[str] = ()) -> int:
    """Rewrite the generated parts in the repository at `root` (the current directory)."""
    parser = argparse.ArgumentParser(
        "python -m weft.bench.report", description="Write README's numbers, docs/systems.md."
    )
    parser.add_argument("--reevaluate", action="store_true", help="judge the claims anew on the recorded rows first")
    options = parser.parse_args(list(arguments))
    root = root or Path.cwd()
    readme = root / "README.md"
    if not readme.is_file():
        print(f"weft: no README.md in {root}; run this in the repository", file=sys.stderr)
        return 2
    folder = root / "benchmarks"
    for path in reevaluate(folder) if options.reevaluate else ():
        print(f"judged anew: {path.name}")
    readme.write_text(readme_with(readme.read_text(), numbers(folder)))
    (root / "docs" / "systems.md").write_text(systems_page(folder))
    print("wrote README.md and docs/systems.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(arguments=sys.argv[1:]))
