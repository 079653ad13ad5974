"""`weft cite`: the papers that a plan, or a system of the catalogue, rests on."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from weft.bench import System

__all__ = ["PAPERS", "Paper", "add", "papers_of"]


class Paper(NamedTuple):
    """A paper and, in a few words, what of it is used."""

    key: str
    authors: str
    title: str
    year: int
    where: str
    used_for: str
    journal: str = ""  # beside `where`


PAPERS: dict[str, Paper] = {
    paper.key: paper
    for paper in (
        Paper("oneflow", "Yuan et al.", "OneFlow: Redesign the Distributed Deep Learning Framework from Scratch", 2021,
              "arXiv:2110.15032", "placements, boxing and its duals"),
        Paper("ddp", "Li et al.", "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020,
              "arXiv:2006.15704", "data parallelism with bucketed gradients"),
        Paper("zero", "Rajbhandari et al.", "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
              "arXiv:1910.02054", "optimizer state, gradients or parameters in shards"),
        Paper("megatron", "Shoeybi et al.",
              "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
              "arXiv:1909.08053", "parameters split where they are used"),
        Paper("sequence", "Korthikanti et al.", "Reducing Activation Recomputation in Large Transformer Models", 2022,
              "arXiv:2205.05198", "activations split by sequence beside split parameters"),
        Paper("highs", "Huangfu and Hall", "Parallelizing the dual revised simplex method", 2018,
              "doi:10.1007/s12532-017-0130-5", "the integer programmes of the plan (HiGHS)"),
        Paper("adamw", "Loshchilov and Hutter", "Decoupled Weight Decay Regularization", 2019, "arXiv:1711.05101",
              "the optimizer"),
        Paper("adam", "Kingma and Ba", "Adam: A Method for Stochastic Optimization", 2015, "arXiv:1412.6980",
              "the optimizer"),
        Paper("collectives", "Thakur, Rabenseifner and Gropp", "Optimization of Collective Communication Operations in MPICH",
              2005, "doi:10.1177/1094342005051521", "the cost of collectives"),
    )
}  # fmt: skip


def add(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "cite",
        help="the papers that a plan or a system rests on",
        description="Name the papers behind what a plan uses, or behind a system of the catalogue.",
        epilog="examples:\n  weft cite plan.json\n  weft cite oneflow\n  weft cite plan.json --bibtex > weft.bib",
    )
    command.add_argument(
        "what", nargs="+", metavar="PLAN.json|SYSTEM", help="saved plans, or names from `weft systems`"
    )
    command.add_argument("--bibtex", action="store_true", help="as BibTeX entries")
    command.set_defaults(run=run)
    return command


def run(arguments: argparse.Namespace) -> int:
    papers: dict[str, Paper] = {}
    for what in arguments.what:
        papers |= {paper.key: paper for paper in _papers(what)}
    if arguments.json:
        print(json.dumps([paper._asdict() for paper in papers.values()], indent=1))
    elif arguments.bibtex:
        print("\n\n".join(bibtex(paper) for paper in papers.values()))
    else:
        for paper in papers.values():
            parts = (paper.authors, paper.title, paper.journal, paper.year, paper.where)
            print(f"{', '.join(str(part) for part in parts if part)}\n    for {paper.used_for}")
    return 0


def _papers(what: str) -> list[Paper]:
    if what.endswith(".json") or Path(what).exists():
        from weft.planner import Plan

        return papers_of(Plan.load(what))
    from weft.bench import entry

    system, _ = entry(what)
    known = [paper for paper in PAPERS.values() if paper.where == system.paper]
    return known or [_paper_of(system)]


def _paper_of(system: System) -> Paper:
    """The paper of a system, whose `cite` is its authors, a journal if there is one, and the year, with commas between."""
    found = re.fullmatch(r"(.+?)(?:, ([^,]*\d[^,]*))?, (\d{4})", system.cite)
    authors, journal, year = found.groups() if found else (system.cite, None, 0)
    return Paper(system.name, authors, system.title, int(year), system.paper, system.solves, journal or "")


def papers_of(plan: Any) -> list[Paper]:
    """The papers of what a plan really uses, read from its placements, its optimizer and the method that found it."""
    from weft.placement.layout import Replicate, Shard

    assignment = plan.assignment
    parameters = list(assignment.parameters.values())
    many = assignment.mesh.size > 1
    signatures = [signature for per_axis in assignment.signatures.values() for signature in per_axis]
    split = any(isinstance(placement, Shard) for p in parameters for placement in p.used)
    whole = any(used == state == Replicate() for p in parameters for used, state in zip(p.used, p.state, strict=True))
    zero = any(
        isinstance(state, Shard) and not isinstance(used, Shard)
        for p in parameters
        for used, state in zip(p.used, p.state, strict=True)
    )
    sequence = split and any(isinstance(o, Shard) and o.dim == 1 for s in signatures for o in s.outputs)
    optimizer = plan.optimizer.name.lower()
    uses: dict[str, Callable[[], bool]] = {
        "oneflow": lambda: many,
        "ddp": lambda: many and whole,
        "zero": lambda: zero,
        "megatron": lambda: split,
        "sequence": lambda: sequence,
        "collectives": lambda: many,
        "highs": lambda: any(word in str(plan.method).lower() for word in ("highs", "integer", "milp")),
        "adamw": lambda: "adamw" in optimizer,
        "adam": lambda: "adam" in optimizer and "adamw" not in optimizer,
    }
    return [PAPERS[key] for key, used in uses.items() if used()]


def bibtex(paper: Paper) -> str:
    """One BibTeX entry."""
    kind, _, number = paper.where.partition(":")
    where = f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}," if kind == "arXiv" else f"  doi = {{{number}}},"
    year = f"  year = {{{paper.year}}},\n" if paper.year else ""
    year += f"  journal = {{{paper.journal}}},\n" if paper.journal else ""
    authors = paper.authors.replace(" et al.", " and others").replace(", ", " and ")
    return f"@article{{{paper.key},\n  author = {{{authors}}},\n  title = {{{{{paper.title}}}}},\n{year}{where}\n}}"
