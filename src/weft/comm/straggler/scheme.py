"""What every code for late workers has in common: when a round may close, and what it hands over.

Round t starts job t; job t must be decoded by the end of round t + T (`delay`). A batch is cut once and for all into chunks of
fixed shares (`fractions`); a worker's message for a job in a round is a weighted sum of chunk gradients, and a decoded gradient
is a weighted sum of messages. The load is the share of a batch that a worker computes in a round.

Closing    kappa = time of the fastest worker. At (1 + mu) kappa the round closes if its late set, together with the recorded
           past, keeps to the lateness that the scheme copes with (`admits`); else with the first arrival after which it does.
Guarantee  every job is decoded by its deadline whatever the workers do, as long as they come back; and as long as they keep to
           the lateness model no round lasts longer than (1 + mu) kappa.
Source     Krishnan, Ebrahimi, Khisti, Sequential Gradient Coding for Straggler Mitigation, ICLR 2023, arXiv:2211.13802.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from weft.comm.combine import Arrival
from weft.comm.wait import Decision, Task, Wait
from weft.errors import WeftError

__all__ = ["Past", "Scheme", "TooManyLate"]

S = TypeVar("S", bound="Scheme")


class TooManyLate(WeftError, RuntimeError):
    """Workers that will not come back are more than a scheme copes with: `job` cannot be decoded. `late` are their numbers."""

    def __init__(self, scheme: str, round: int, job: int, late: tuple[int, ...], copes: str):
        super().__init__(scheme, round, job, late, copes)
        self.scheme, self.round, self.job, self.late, self.copes = scheme, round, job, tuple(late), copes

    def __str__(self) -> str:
        return (
            f"{self.scheme}: round {self.round} cannot end, and job {self.job} cannot be decoded, because workers "
            f"{list(self.late)} do not come back; the scheme copes with {self.copes}. Start again without them, or take GC "
            "with a larger s: it alone bears workers that are late for ever."
        )


@dataclass(frozen=True)
class Past:
    """The recorded rounds: late[t, i] and redo[t, i] (worker i worked on an older job again), bool (rounds, workers)."""

    late: np.ndarray
    redo: np.ndarray

    @staticmethod
    def of(history: Sequence[Decision], workers: int, recent: int) -> Past:
        """The record of a history; only the last `recent` rounds are looked at, those before them count as on time."""
        late, redo = np.zeros((len(history), workers), dtype=bool), np.zeros((len(history), workers), dtype=bool)
        for number in range(max(0, len(history) - recent), len(history)):
            late[number, sorted(history[number].late)] = True
            redo[number] = _redoing(number, history[number].tasks, workers)
        return Past(late, redo)

    def then(self, late: np.ndarray, redo: np.ndarray) -> Past:
        """One round more."""
        return Past(np.vstack((self.late, late)), np.vstack((self.redo, redo)))


class Scheme(Wait):
    """A rule for closing rounds that also says who computes what. Frozen; `sized(n)` makes it definite for n workers."""

    workers: int | None
    mu: float

    # what a scheme says of itself

    @property
    @abc.abstractmethod
    def delay(self) -> int:
        """T: a job is decoded at most so many rounds after the round in which it started."""

    @property
    @abc.abstractmethod
    def load(self) -> float:
        """Share of a batch that a worker computes in a round, the largest of all workers; needs `workers`."""

    @property
    def messages(self) -> int:
        """Messages that a worker makes in a round, one for each job, the largest of all workers."""
        return 1

    @abc.abstractmethod
    def fractions(self) -> tuple[float, ...]:
        """Share of a batch in each chunk; they add up to 1."""

    @abc.abstractmethod
    def holds(self, worker: int) -> tuple[int, ...]:
        """The chunks that a worker may be asked for."""

    @abc.abstractmethod
    def copes(self) -> str:
        """The lateness that the scheme copes with, in words."""

    @abc.abstractmethod
    def admits(self, past: Past, late: np.ndarray) -> bool:
        """Whether the round after `past` may close with a late set, bool (workers,): never later with fewer late workers."""

    @abc.abstractmethod
    def weights(self, job: int, past: Past) -> Mapping[tuple[int, int], float] | None:
        """(round, worker) of messages -> weight by which `job` is decoded after the rounds of `past`, or None."""

    def redo(self, past: Past) -> np.ndarray:
        """Workers that work on an older job instead in the round after `past`, bool (workers,)."""
        return np.zeros(self.count, dtype=bool)

    def check(self) -> None:
        """Raise ValueError if `workers` is impossible; called once it is known."""

    # what follows from it

    @property
    def count(self) -> int:
        """The number of workers n."""
        if self.workers is None:
            raise ValueError(f"{self}: the number of workers must be known, got None; call sized(n) first")
        return self.workers

    def sized(self: S, workers: int, seconds: Sequence[float] = ()) -> S:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"{type(self).__name__}: workers must be a whole number >= 1, got {workers!r}")
        known: Any = replace(self, workers=workers)  # type: ignore[type-var]
        known.check()
        return known

    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        return self.tasks(Past.of(history[:round], self.count, self.memory))

    @abc.abstractmethod
    def tasks(self, past: Past) -> Mapping[int, tuple[Task, ...]]:
        """What each worker computes in the round after `past`."""

    @property
    def memory(self) -> int:
        """How many rounds back a decision may look."""
        return 2 * (self.delay + 1)

    def close(
        self, round: int, arrivals: Sequence[Arrival], now: float, history: Sequence[Decision] = ()
    ) -> Decision | None:
        """The decision, or None to wait on.

        Args:
            round: number of the round, from 0.
            arrivals: what has come in this round; `seconds` is when, since the round began.
            now: seconds since the round began; infinity where nobody else will ever come: None then means failure.
            history: the decisions of all rounds before this one, exactly as `close` gave them.
        """
        late = np.ones(self.count, dtype=bool)
        late[[arrival.source for arrival in arrivals]] = False
        if (late.any() and now < self.wake(arrivals)) or late.all():
            return None
        past = Past.of(history, self.count, self.memory)
        if not self.admits(past, late):
            return None
        tasks = self.tasks(past)
        known = past.then(late, _redoing(round, tasks, self.count))
        found = {}
        for job in range(max(0, round - self.delay), round + 1):
            if any(job in decision.jobs for decision in history[job:]):
                continue
            weights = self.weights(job, known)
            if weights is not None:
                found[job] = weights
        return Decision(found, frozenset(np.flatnonzero(late).tolist()), tasks)

    def wake(self, arrivals: Sequence[Arrival]) -> float:
        """Seconds since the round began at which `close` is to be asked though nobody has come since; infinity before the
        first arrival."""
        return (1 + self.mu) * min((arrival.seconds for arrival in arrivals), default=math.inf)


def _redoing(round: int, tasks: Mapping[int, tuple[Task, ...]], workers: int) -> np.ndarray:
    """Who works on an older job in a round, bool (workers,)."""
    return np.array([any(task.job < round for task in tasks.get(worker, ())) for worker in range(workers)])


def whole(name: str, **numbers: int) -> None:
    """Raise ValueError unless all numbers are whole and not negative."""
    for what, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{name}: {what} must be a whole number >= 0, got {number!r}")


def grace(name: str, mu: float) -> None:
    """Raise ValueError unless mu is a number >= 0."""
    if not 0 <= mu < math.inf:
        raise ValueError(f"{name}: mu must be >= 0, got {mu}; with 1 a round lasts at least twice its fastest worker")
