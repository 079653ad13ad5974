"""Measured seconds to rates and links: the two fits behind `weft profile`.

Roofline   For one operator kind, find overhead o, FLOP rate R and bandwidth B so that for every sample            `fit_rate`
               predicted = sum over its phases of  calls o + max(flops / R, nbytes / B)
           is near what was measured. Phases are forward and backward. The error that counts is relative, and outliers
           count less: least squares of soft_l1(log(predicted / measured)) over (log o, log R, log B), from several starts.
           Where no sample is bound by one of the two, that one ends no slower than the samples show.
Alpha-beta For collectives of several sizes, find latency a and bandwidth b so that                                `fit_link`
               predicted = a * messages + nbytes * fraction / b
           likewise; (messages, fraction) of a collective come from `weft.cluster.costs` itself, on a link of unit cost.

Both return the fit with its samples, so that whoever reads the report sees the error of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from weft.cluster.device import Link, Rate

__all__ = ["CollectiveSample", "Fit", "OperatorSample", "Phase", "fit_link", "fit_rate"]

TINY = 1e-8  # seconds; nothing measured here is as short
SOFT = 0.1  # a log error beyond this counts linearly, not squared


@dataclass(frozen=True)
class Phase:
    """One pass of a sample: so many operator calls, FLOPs and bytes."""

    calls: float
    flops: float
    nbytes: float


@dataclass(frozen=True)
class OperatorSample:
    """`seconds` that the phases took together."""

    label: str
    phases: tuple[Phase, ...]
    seconds: float


@dataclass(frozen=True)
class CollectiveSample:
    """`seconds` of a collective that costs `messages` latencies and moves `moved` bytes over its slowest link."""

    label: str
    messages: float
    moved: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What was fitted, and how far it is from each sample: (label, measured seconds, predicted seconds)."""

    name: str
    samples: tuple[tuple[str, float, float], ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative errors |predicted - measured| / measured, one per sample."""
        return tuple(abs(predicted - measured) / measured for _, measured, predicted in self.samples)

    @property
    def error(self) -> float:
        """The median relative error."""
        return float(np.median(self.errors))


def fit_rate(kind: str, samples: Sequence[OperatorSample]) -> tuple[Rate, Fit]:
    """Rate of one operator kind (float32), and its fit. Needs at least one sample."""
    measured = np.array([sample.seconds for sample in samples])
    phases = np.array([[(p.calls, p.flops, p.nbytes) for p in _padded(sample.phases)] for sample in samples])
    calls, flops, nbytes = phases[..., 0], phases[..., 1], phases[..., 2]
    overhead = max(float(np.min(measured / np.maximum(calls.sum(1), 1))), TINY)
    rate = max(float(np.max(flops.sum(1) / measured)), 1e3)
    bandwidth = max(float(np.max(nbytes.sum(1) / measured)), 1e3)

    def predicted(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        o, r, b = np.exp(logs)
        return (calls * o + np.maximum(flops / r, nbytes / b)).sum(1)  # type: ignore[no-any-return]

    starts = [(0.6 * overhead, rate * y, bandwidth * z) for y in (1.0, 3.0) for z in (1.0, 3.0)]
    best = _least(predicted, measured, [np.log(start) for start in starts])
    o, r, b = (float(v) for v in np.exp(best))
    # A roof that no sample touches could lie anywhere above; put it where the samples come nearest to it.
    busy = np.maximum(measured[:, None] - calls * o, 0.2 * measured[:, None])
    r = min(r, max(float(np.max(flops / busy)), 1e3) * 4)
    b = min(b, max(float(np.max(nbytes / busy)), 1e3) * 4)
    fitted = predicted(np.log([o, r, b]))
    return Rate({"float32": r}, b, o), _fit(kind, samples, measured, fitted)


def fit_link(name: str, samples: Sequence[CollectiveSample]) -> tuple[Link, Fit]:
    """The link of one level, and its fit. Needs at least one sample."""
    measured = np.array([sample.seconds for sample in samples])
    messages = np.array([sample.messages for sample in samples])
    moved = np.array([sample.moved for sample in samples])

    def predicted(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = np.exp(logs)
        return a * messages + moved / b  # type: ignore[no-any-return]

    latency = max(float(np.min(measured / messages)), TINY)
    bandwidth = max(float(np.max(moved / measured)), 1e3)
    best = _least(predicted, measured, [np.log((latency * x, bandwidth * y)) for x in (0.3, 1.0) for y in (1.0, 2.0)])
    a, b = (float(v) for v in np.exp(best))
    return Link(a, b), _fit(name, samples, measured, predicted(best))


def _least(predicted: Any, measured: NDArray[np.float64], starts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The parameters, as logarithms, with the least robust relative error over all starts."""

    def residual(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(predicted(logs) / measured)  # type: ignore[no-any-return]

    found = [
        least_squares(residual, start, loss="soft_l1", f_scale=SOFT, bounds=(start - 7, start + 7), max_nfev=100)
        for start in starts
    ]
    return min(found, key=lambda result: result.cost).x  # type: ignore[no-any-return]


def _padded(phases: Sequence[Phase], length: int = 2) -> list[Phase]:
    assert 0 < len(phases) <= length
    return [*phases, *[Phase(0, 0, 0)] * (length - len(phases))]


def _fit(name: str, samples: Sequence[Any], measured: NDArray[np.float64], fitted: NDArray[np.float64]) -> Fit:
    rows = zip((sample.label for sample in samples), measured.tolist(), fitted.tolist(), strict=True)
    return Fit(name, tuple(rows))
