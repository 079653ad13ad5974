"""When a round is over, where every worker computes its own share and starts again when its result has been used.

    All()       all have come                                      synchronous SGD, FedAvg
    First(c)    the first c have come, the others' work is void    MoNNA, dropping stragglers
    Any()       somebody has come                                  asynchronous SGD, asynchronous FedAvg
    Count(c)    c have come, whenever they started                 FedBuff
    Clock(dt)   dt seconds have passed                             FedFix

How often worker i, which needs t_i seconds, takes part follows from the rule (`shares`); unbiased weights divide by it:

    All 1      Any (1/t_i) / sum_j 1/t_j      Clock 1/ceil(t_i/dt)
    Count      rounds last L: a worker comes back every t_i + (the wait for its round's end, L/2 on average), so
               share_i = min(1, L/(t_i + L/2)) with L such that the shares add up to c (an estimate, to be replaced by counts)

Times are compared as whole nanoseconds, so that 3 x 0.2 s is 0.6 s, which it is not in floating point.

Source: Fraboni et al., A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates,
JMLR 24 (110), 2023, arXiv:2206.10189; Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022 (FedBuff).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from weft.comm.combine import Arrival
from weft.comm.wait import Decision, Task, Wait

__all__ = ["WAITS", "All", "Any", "Clock", "Count", "First", "nanoseconds"]


def nanoseconds(seconds: float) -> int:
    """Whole nanoseconds, at least one for a positive time."""
    return max(1, round(seconds * 1e9)) if seconds > 0 else 0


@final
@dataclass(frozen=True)
class All(Wait):
    """Wait for every worker; `workers` is filled in by `sized`."""

    workers: int | None = None

    def sized(self, workers: int, seconds: Sequence[float] = ()) -> All:
        return All(_checked("All", workers, workers))

    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        return {}

    def close(self, round: int, arrivals: Sequence[Arrival], now: float) -> Decision | None:
        return Decision() if len(arrivals) >= _known("All", self.workers) else None


@final
@dataclass(frozen=True)
class First(Wait):
    """Wait for the first `count` results of a round, n - f where f workers may fail; what comes later does not count.

    The slowest never take part, whatever their weight: no choice of weights makes that unbiased.
    """

    count: int
    workers: int | None = None

    def __post_init__(self) -> None:
        _checked("First", self.count, self.workers)

    def sized(self, workers: int, seconds: Sequence[float] = ()) -> First:
        return First(self.count, workers)

    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        return {}

    def close(self, round: int, arrivals: Sequence[Arrival], now: float) -> Decision | None:
        workers = _known("First", self.workers)
        if len(arrivals) < self.count:
            return None
        return Decision(late=frozenset(range(workers)) - {arrival.source for arrival in arrivals})

    def shares(self, seconds: Sequence[float]) -> tuple[float, ...]:
        last = sorted(seconds)[min(self.count, len(seconds)) - 1]
        return tuple(float(t <= last < math.inf) for t in seconds)


@final
@dataclass(frozen=True)
class Any(Wait):
    """Wait for nobody: every arrival is a round of its own."""

    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        return {}

    def close(self, round: int, arrivals: Sequence[Arrival], now: float) -> Decision | None:
        return Decision() if arrivals else None

    def shares(self, seconds: Sequence[float]) -> tuple[float, ...]:
        speeds = [1 / t for t in seconds]
        total = sum(speeds)
        return tuple(speed / total if total else 0.0 for speed in speeds)


@final
@dataclass(frozen=True)
class Count(Wait):
    """Wait until `count` results are in the buffer, from whichever rounds they started in."""

    count: int

    def __post_init__(self) -> None:
        _checked("Count", self.count, None)

    def sized(self, workers: int, seconds: Sequence[float] = ()) -> Count:
        _checked("Count", self.count, workers)
        return self

    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        return {}

    def close(self, round: int, arrivals: Sequence[Arrival], now: float) -> Decision | None:
        return Decision() if len(arrivals) >= self.count else None

    def shares(self, seconds: Sequence[float]) -> tuple[float, ...]:
        finite = [t for t in seconds if t < math.inf]
        if len(finite) <= self.count:
            return tuple(float(t < math.inf) for t in seconds)

        def share(t: float, length: float) -> float:
            return min(1.0, length / (t + length / 2))

        low, high = 0.0, 2 * max(finite)  # at L = 2 t every share is 1, and their sum grows with L
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(share(t, middle) for t in finite) < self.count else (low, middle)
        return tuple(share(t, high) for t in seconds)


@final
@dataclass(frozen=True)
class Clock(Wait):
    """Close every `dt` seconds, whoever has come, and also if nobody has.

    With dt at least the slowest worker's time this is `All`; as dt goes to 0 it becomes `Any`, up to a common factor.

    Attributes:
        dt: seconds, > 0, or "auto": among the workers' own times the one for which the expected part of them that takes part
            in a round is nearest to `part`. While nobody's time is known, the first round closes with that part of them.
        part: what "auto" aims at, in (0, 1].
        workers: filled in by `sized`; only "auto" needs it.
    """

    dt: float | Literal["auto"] = "auto"
    part: float = 2 / 3
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.dt != "auto" and not (isinstance(self.dt, (int, float)) and 0 < self.dt < math.inf):
            raise ValueError(
                f'Clock: dt must be seconds > 0 or "auto", got {self.dt!r}; try half of the slowest worker\'s time'
            )
        if not 0 < self.part <= 1:
            raise ValueError(
                f"Clock: part must be in (0, 1], got {self.part}; 0.67 lets two workers of three into a round"
            )

    def sized(self, workers: int, seconds: Sequence[float] = ()) -> Clock:
        _checked("Clock", workers, workers)
        known = sorted({t for t in seconds if 0 < t < math.inf})
        if self.dt != "auto" or not known:
            return replace(self, workers=workers)

        def miss(dt: float) -> float:
            return abs(sum(Clock(dt).shares([t for t in seconds if t > 0])) / workers - self.part)

        return replace(self, dt=min(known, key=miss), workers=workers)

    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        return {}

    def close(self, round: int, arrivals: Sequence[Arrival], now: float) -> Decision | None:
        if self.dt == "auto":
            return Decision() if len(arrivals) >= max(1, _round_up(self.part * _known("Clock", self.workers))) else None
        return Decision() if nanoseconds(now) >= nanoseconds(self.dt) else None

    def deadline(self, round: int) -> float:
        return math.inf if self.dt == "auto" else self.dt

    def shares(self, seconds: Sequence[float]) -> tuple[float, ...]:
        if self.dt == "auto":
            return (1.0,) * len(seconds)
        tick = nanoseconds(self.dt)
        return tuple(1 / -(-nanoseconds(t) // tick) if t < math.inf else 0.0 for t in seconds)


def _round_up(number: float) -> int:
    """The next whole number, a rounding error apart."""
    return math.ceil(number - 1e-9)


def _checked(name: str, count: int, workers: int | None) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{name}: count must be a whole number >= 1, got {count!r}; 1 closes a round with the first arrival"
        )
    if workers is not None and count > workers:
        raise ValueError(
            f"{name}: count must be at most the number of workers {workers}, got {count}; no round would ever end"
        )
    return count


def _known(name: str, workers: int | None) -> int:
    if workers is None:
        raise ValueError(f"{name}: the number of workers must be known, got None; use {name}(...).sized(workers)")
    return workers


WAITS: dict[str, type[Wait]] = {"all": All, "any": Any, "clock": Clock, "count": Count, "first": First}
