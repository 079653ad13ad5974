"""What a catalogue entry is: a published system, what it claims in numbers, and the rows that a run yields.

    System    name, paper, what it solves, the API it uses, baselines, claims, tests
    Claim     a number computed from the rows, with the bound it must keep
    Row       what one method measured in one run
    Results   rows by method, medians over seeds: what claims read
    constants the settings of a run that stand in the code: what records keep of them

Nothing here imports torch, so that `weft systems` lists the catalogue at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Claim", "Results", "Row", "System", "constants", "difference", "ratio", "value"]

Measure = Callable[["Results"], float]


class Row:
    """What one method measured: `Row("DDP", cpu_seconds=0.74, loss=2.31)`. Numbers in SI units, named with them."""

    def __init__(self, method: str, **values: float):
        self.method = method
        self.curve: tuple[tuple[float, float], ...] = ()
        self.values = {name: float(number) for name, number in values.items()}

    def __repr__(self) -> str:
        return f"Row({self.method!r}, {', '.join(f'{k}={v:.6g}' for k, v in self.values.items())})"

    def drawn(self, points: Iterable[tuple[float, float]]) -> Row:
        """The row with a curve in the system's picture: points (x, y), see `System.axes`. Records do not hold them."""
        self.curve = tuple(points)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **self.values}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Row:
        """The row of a record. What is null there, infinite seconds among it, is NaN here: no claim holds on it."""
        values = {name: math.nan if number is None else number for name, number in found.items() if name != "method"}
        return cls(found["method"], **values)


class Results:
    """Rows of all seeds: `results[method, measure]` is the median over the seeds."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def measures(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    @property
    def tables(self) -> list[tuple[list[str], list[str]]]:
        """(methods, measures) of what people see: methods stand in the first table that has all their measures, or only such."""
        found: list[tuple[list[str], dict[str, None]]] = []
        for method in self.methods:
            own = dict.fromkeys(name for row in self.rows if row.method == method for name in row.values)
            for methods, measures in found:
                if own.keys() <= measures.keys() or measures.keys() <= own.keys():
                    methods.append(method)
                    measures.update(own)
                    break
            else:
                found.append(([method], own))
        return [(methods, list(measures)) for methods, measures in found]

    def get(self, method: str, measure: str) -> float | None:
        """The median, NaN if a seed's is, or None if no row of the method has the measure."""
        found = [row.values[measure] for row in self.rows if row.method == method and measure in row.values]
        if any(math.isnan(number) for number in found):
            return math.nan
        return statistics.median(found) if found else None

    def __getitem__(self, key: tuple[str, str]) -> float:
        found = self.get(*key)
        if found is None:
            raise KeyError(
                f"no row of {key[0]!r} measured {key[1]!r}; methods: {self.methods}, measures: {self.measures}"
            )
        return found


def value(measure: str, method: str) -> Measure:
    """The measure itself."""
    return lambda results: results[method, measure]


def ratio(measure: str, ours: str, baseline: str) -> Measure:
    """ours / baseline."""
    return lambda results: results[ours, measure] / results[baseline, measure]


def difference(measure: str, ours: str, baseline: str) -> Measure:
    """|ours - baseline| / |baseline|: how far apart two values are that should be equal."""
    return lambda results: abs(results[ours, measure] - results[baseline, measure]) / abs(results[baseline, measure])


@dataclass(frozen=True)
class Claim:
    """One number of a paper, or one that we set ourselves: `measure(results)` must keep the bound.

    >>> Claim("step CPU seconds, ours / DDP", ratio("cpu_seconds", "ours", "DDP"), at_most=1.05).holds(1.02)
    True
    """

    text: str
    measure: Measure
    at_least: float = -math.inf
    at_most: float = math.inf

    def __post_init__(self) -> None:
        if math.isinf(self.at_least) == math.isinf(self.at_most):
            raise ValueError(f"Claim {self.text!r}: give exactly one of at_least and at_most")

    @property
    def bound(self) -> str:
        return f"≥ {self.at_least:g}" if math.isinf(self.at_most) else f"≤ {self.at_most:g}"

    def holds(self, number: float) -> bool:
        """Whether the number keeps the bound; a NaN never does."""
        return self.at_least <= number <= self.at_most


@dataclass(frozen=True)
class System:
    """A published system in weft's catalogue.

    Attributes:
        name: what `weft bench NAME` takes: lower case, digits, dashes.
        title, paper: the paper's title and where to find it (`arXiv:2110.15032`, `doi:...`).
        solves: the need it answers, in a user's words.
        use: public names of weft that implement it; each must resolve.
        baselines: what a user would otherwise take, measured in the same run.
        claims: the numbers to reach.
        tests: test files that prove it right.
        minutes: about how long `run` takes on two cores.
        cite: one line for a bibliography.
        axes: what x and y are of the curves that its rows have; none where there are no curves.
        repeats: what a run repeats and averages within one seed, as a clause: "accuracies are means of three draws".
        settings: modules (`weft.bench.games`) and dataclasses (`weft.bench.robust:Server`) whose `constants` are the run's
            settings, besides those of the entry's own module.
        beside: sentences that belong beside the numbers, made from the rows: what they were measured on, where it loses.
    """

    name: str
    title: str
    paper: str
    solves: str
    use: tuple[str, ...]
    baselines: tuple[str, ...]
    claims: tuple[Claim, ...]
    tests: tuple[str, ...]
    minutes: float = 1.0
    cite: str = ""
    keywords: tuple[str, ...] = field(default=())
    axes: tuple[str, str] | None = None
    repeats: str = ""
    settings: tuple[str, ...] = ()
    beside: Callable[[Results], Iterable[str]] | None = None

    def said_beside(self, results: Results) -> list[str]:
        """The sentences of `beside`; none if the rows that they need are missing."""
        try:
            return list(self.beside(results)) if self.beside is not None else []
        except KeyError:
            return []

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(f"System: name must be lower case words joined by dashes, got {self.name!r}")
        if not self.use or not self.claims or not self.tests:
            raise ValueError(f"System {self.name}: needs at least one name in `use`, one claim and one test file")


def constants(place: str) -> dict[str, Any]:
    """What a module's names in capitals hold, or a dataclass's fields by default: numbers, and tuples and dicts of plain values.

    >>> constants("weft.bench.robust:Server")["workers"]
    15
    """
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    if name:
        fields = dataclasses.fields(getattr(found, name))
        return {
            one.name: one.default for one in fields if _plain(one.default) and one.default is not dataclasses.MISSING
        }
    held = {key: value for key, value in vars(found).items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", key)}
    return {key: value for key, value in held.items() if not isinstance(value, str | bool) and _plain(value)}


def _plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _plain(one) for key, one in value.items())
    if isinstance(value, tuple | list):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
