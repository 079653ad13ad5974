"""The catalogue of published systems, and the harness that measures their claims.

    CATALOGUE     name -> module; one file per system, `weft.bench.systems.<package>.<system>`
    System        the entry: paper, API, baselines, claims, tests
    run_system    run it for some seeds and judge its claims
    record        results in `benchmarks/`, with machine, versions, date, commit
    pair          the methods of one comparison, alternating step by step in the same processes
    baselines     what a user would otherwise pick: DDP, FSDP2, parallelize_module
    report        README's table of numbers and docs/systems.md, written from the records

A system's module has `SYSTEM: System` and `run(seed) -> Iterator[Row]`, and imports torch only inside `run`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from weft import names
from weft.bench.harness import Outcome, render, run_system
from weft.bench.system import Claim, Results, Row, System, difference, ratio, value

__all__ = [
    "CATALOGUE", "Claim", "Outcome", "Results", "Row", "System",
    "difference", "entry", "every_system", "ratio", "render", "run_system", "value",
]  # fmt: skip

CATALOGUE: dict[str, str] = {
    "oneflow": "weft.bench.systems.placement.oneflow",
    "zero-sharding": "weft.bench.systems.placement.zero_sharding",
    "coop": "weft.bench.systems.memory.coop",
    "zero-infinity": "weft.bench.systems.memory.zero_infinity",
    "gradient-exchange": "weft.bench.systems.comm.gradient_exchange",
    "deep-gradient-compression": "weft.bench.systems.comm.deep_gradient_compression",
    "l-greco": "weft.bench.systems.comm.l_greco",
    "robust-aggregation": "weft.bench.systems.comm.robust_aggregation",
    "flag-aggregator": "weft.bench.systems.comm.flag_aggregator",
    "monna": "weft.bench.systems.comm.monna",
    "sequential-gradient-coding": "weft.bench.systems.comm.sequential_gradient_coding",
    "one-byte-per-gradient": "weft.bench.systems.comm.one_byte_per_gradient",
    "masha": "weft.bench.systems.comm.masha",
    "fedfix-async": "weft.bench.systems.comm.fedfix_async",
}


def entry(name: str) -> tuple[System, Callable[[int], Iterable[Row]]]:
    """The catalogue entry called `name`, and its `run`.

    Raises:
        ValueError: no such system; the message gives the nearest names.
    """
    module = importlib.import_module(names.pick(name, CATALOGUE, "system"))
    return module.SYSTEM, module.run


def every_system() -> list[System]:
    """Every system of the catalogue, in its order."""
    return [entry(name)[0] for name in CATALOGUE]
