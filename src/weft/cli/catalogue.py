"""`weft systems` and `weft bench`: the catalogue of published systems, and their claims measured."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from weft.bench import CATALOGUE, Outcome, Row, System, entry, every_system, render, run_system
from weft.bench.record import check_committed, commit, find_records, write_record
from weft.paths import to_folder

__all__ = ["add_bench", "add_systems"]


def add_systems(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "systems",
        help="list the published systems that weft implements",
        description="The catalogue: what each system solves, which names of weft implement it, and its claims.",
        epilog="examples:\n  weft systems\n  weft systems memory        only those about memory\n  weft systems --json",
    )
    command.add_argument("need", nargs="*", help="only systems whose entry has all of these words")
    command.set_defaults(run=list_systems)
    return command


def add_bench(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure the claims of a system, side by side with what users have now",
        description="Run a system of the catalogue and its baselines in turn, in the same processes, and judge its claims.\n"
        "Run it on a quiet machine. Exit code 1 if a claim is missed.",
        epilog="examples:\n  weft bench oneflow\n  weft bench oneflow --seeds 3 --record\n  weft bench --all --record",
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="systems to run: see `weft systems`")
    command.add_argument("--all", action="store_true", help="run every system of the catalogue")
    command.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="how many seeds; claims read the medians (default 1)"
    )
    command.add_argument(
        "--record",
        action="store_true",
        help="write the result into --folder as SYSTEM-MACHINE.json, curves beside it as .svg; refused where files differ "
        "from the commit, which the record names",
    )
    command.add_argument(
        "--folder", default="benchmarks", metavar="DIR", help="where records are kept (default benchmarks)"
    )
    command.set_defaults(run=bench)
    return command


def list_systems(arguments: argparse.Namespace) -> int:
    chosen = [system for system in every_system() if _about(system, arguments.need)]
    if arguments.need and not chosen:
        raise ValueError(f"no system is about {' '.join(arguments.need)}; `weft systems` lists all {len(CATALOGUE)}")
    if arguments.json:
        print(json.dumps([_describe(system) for system in chosen], indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("system", "solves", "paper")
    for system in chosen:
        table.add_row(system.name, system.solves, system.paper)
    console.print(table)
    for system in chosen if arguments.need else ():
        console.print(f"\n[bold]{system.name}[/]: {system.title}. Use {', '.join(system.use)}", highlight=False)
        for claim in system.claims:
            console.print(f"  {claim.text}: {claim.bound}", highlight=False)
    if not arguments.need:
        console.print("`weft systems WORD` shows claims and names to use; `weft bench NAME` measures them")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    if bool(arguments.names) == arguments.all:
        raise ValueError("say which systems to run, or --all; `weft systems` lists them")
    if arguments.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {arguments.seeds}")
    chosen = [entry(name) for name in (CATALOGUE if arguments.all else arguments.names)]
    folder = Path(arguments.folder)
    if arguments.record:
        to_folder("--folder", folder)
    at = check_committed(folder) if arguments.record else commit(folder)  # now: files may change while it runs
    outcomes, written = [], []
    for system, run in chosen:
        before = find_records(folder, system.name) if folder.is_dir() else []
        outcome = run_system(system, run, range(arguments.seeds), _progress(system))
        outcomes.append(outcome)
        if arguments.record:
            record = write_record(outcome.to_record(at), folder)
            written.append(str(record))
            if picture := outcome.picture():
                record.with_suffix(".svg").write_text(picture)
                written.append(str(record.with_suffix(".svg")))
        if not arguments.json:
            _show(outcome, before)
    if arguments.json:
        print(json.dumps([outcome.to_record(at) for outcome in outcomes], indent=1))
    for path in written:
        print(f"recorded in {path}", file=sys.stderr)
    return 0 if all(outcome.met for outcome in outcomes) else 1


def _about(system: System, words: list[str]) -> bool:
    text = json.dumps(_describe(system)).lower()
    return all(word.lower() in text for word in words)


def _describe(system: System) -> dict[str, Any]:
    return {
        "name": system.name, "title": system.title, "paper": system.paper, "solves": system.solves,
        "keywords": list(system.keywords), "use": list(system.use), "baselines": list(system.baselines),
        "minutes": system.minutes, "tests": list(system.tests),
        "claims": [{"text": claim.text, "bound": claim.bound} for claim in system.claims],
    }  # fmt: skip


def _progress(system: System) -> Any:
    print(f"{system.name}: about {system.minutes:g} minutes a seed", file=sys.stderr)

    def on_row(seed: int, row: Row) -> None:
        numbers = "  ".join(f"{name}={number:.4g}" for name, number in row.values.items())
        print(f"  seed {seed}  {row.method}  {numbers}", file=sys.stderr, flush=True)

    return on_row


def _show(outcome: Outcome, before: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console()
    console.print(render(outcome))
    missed = [claim for claim in outcome.claims if not claim.met]
    console.print(f"{len(outcome.claims) - len(missed)} of {len(outcome.claims)} claims met in {outcome.seconds:.0f} s")
    if before:
        met = sum(claim["met"] for claim in before[0]["claims"])
        console.print(
            f"the record of {before[0]['date']}: {met} of {len(before[0]['claims'])} met, {before[0]['machine']['name']}"
        )
