"""Run a catalogue entry: its `run(seed)` for some seeds, its claims on the medians, one record and one table.

run over seeds, judge the claims              `run_system`
judge the claims anew on a record's rows      `judged_anew`
the table for people                          `render`
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.bench import record
from weft.bench.system import Results, Row, System, constants
from weft.pages import COLOURS, Line, chart

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Judged", "Outcome", "judge", "judged_anew", "render", "run_system", "settings"]


@dataclass(frozen=True)
class Judged:
    """A claim and what the run says of it."""

    text: str
    bound: str
    number: float
    met: bool

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "bound": self.bound, "value": _finite(self.number), "met": self.met}


@dataclass(frozen=True)
class Outcome:
    """What `weft bench NAME` found."""

    system: System
    results: Results
    claims: tuple[Judged, ...]
    seeds: tuple[int, ...]
    seconds: float

    @property
    def met(self) -> bool:
        """Whether every claim holds."""
        return all(claim.met for claim in self.claims)

    def picture(self) -> str | None:
        """SVG text of the curves of the first seed's rows; None if no row has one."""
        lines: dict[str, Line] = {}
        for row in self.results.rows:
            if row.curve and row.method not in lines:
                lines[row.method] = Line(row.curve, row.method, COLOURS[len(lines) % len(COLOURS)])
        if not lines:
            return None
        across, up = self.system.axes or ("", "")
        return chart(list(lines.values()), self.system.name, self.system.title, across, up, log=True)

    def to_record(self, commit: str | None = None) -> dict[str, Any]:
        """The JSON value that `benchmarks/` keeps. What was not measured, or not reached (infinite seconds), is null.

        `commit`: of the code that ran, if it was asked for before; the files may have changed since.
        """
        return {
            "system": self.system.name,
            "paper": self.system.paper,
            "date": record.today(),
            "commit": record.commit() if commit is None else commit,
            "machine": record.machine(),
            "versions": record.versions(),
            "seeds": list(self.seeds),
            "settings": settings(self.system),
            "seconds": round(self.seconds, 1),
            "rows": [{key: _finite(value) for key, value in row.to_dict().items()} for row in self.results.rows],
            "claims": [claim.to_dict() for claim in self.claims],
        }


def _finite(value: Any) -> Any:
    """None for NaN and infinities, which are no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settings(system: System) -> dict[str, Any]:
    """What a run of the system is set to, by where it stands: constants of its modules, and threads as the environment says."""
    from weft.bench import CATALOGUE

    own = (CATALOGUE[system.name],) if system.name in CATALOGUE else ()
    found = {place: held for place in (*own, *system.settings) if (held := constants(place))}
    if threads := os.environ.get("OMP_NUM_THREADS"):
        found["environment"] = {"OMP_NUM_THREADS": threads}
    plain: dict[str, Any] = json.loads(json.dumps(found))  # as it will be read: tuples are lists
    return plain


def judged_anew(found: dict[str, Any], system: System) -> dict[str, Any]:
    """A record with the claims that the system has now, on the rows that were recorded. Nothing is measured.

    It says when that was, unless nothing has changed: `judged` is the day.
    """
    results = Results(Row.from_dict(row) for row in found["rows"])
    claims = [claim.to_dict() for claim in judge(system, results)]
    return found if claims == found["claims"] else {**found, "claims": claims, "judged": record.today()}


def judge(system: System, results: Results) -> tuple[Judged, ...]:
    """Every claim with its number; a claim whose rows are missing is missed, with NaN for its number."""
    judged = []
    for claim in system.claims:
        try:
            number = float(claim.measure(results))
        except (KeyError, ZeroDivisionError):
            number = float("nan")
        judged.append(Judged(claim.text, claim.bound, number, claim.holds(number)))
    return tuple(judged)


def run_system(
    system: System,
    run: Callable[[int], Iterable[Row]],
    seeds: Sequence[int] = (0,),
    on_row: Callable[[int, Row], None] | None = None,
) -> Outcome:
    """Run a system for each seed and judge its claims on the medians.

    Args:
        system: the catalogue entry.
        run: the entry's `run(seed)`, an iterable of rows.
        seeds: at least one.
        on_row: called with (seed, row) as rows come, for progress.
    """
    if not seeds:
        raise ValueError("run_system: give at least one seed")
    start, rows = time.perf_counter(), []
    for seed in seeds:
        for row in run(seed):
            rows.append(row)
            if on_row is not None:
                on_row(seed, row)
    results = Results(rows)
    return Outcome(system, results, judge(system, results), tuple(seeds), time.perf_counter() - start)


def render(outcome: Outcome) -> Group:
    """Tables for a terminal: what each method measured, one for each kind of methods, and the claims."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    measured = []
    for methods, measures in outcome.results.tables:
        rows = Table("method", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
        for measure in measures:
            rows.add_column(measure.replace("_", " "), justify="right")
        for method in methods:
            found = [outcome.results.get(method, measure) for measure in measures]
            rows.add_row(method, *("" if number is None else f"{number:.5g}" for number in found))
        measured.append(rows)
    title = f"{outcome.system.name}: {outcome.system.title} ({outcome.system.paper})"
    claims = Table(title="claims", title_justify="left")
    for column in ("claim", "bound", "measured", ""):
        claims.add_column(column, justify="left" if column == "claim" else "right")
    for claim in outcome.claims:
        verdict = "[green]met[/]" if claim.met else "[red]missed[/]"
        claims.add_row(claim.text, claim.bound, f"{claim.number:.4g}", verdict)
    return Group(title, *measured, claims, *outcome.system.said_beside(outcome.results))
