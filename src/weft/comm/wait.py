"""For whom a round waits, and who computes what in it.

A `Wait` policy is pure: it sees rounds, arrivals and a clock that its caller reads, and returns decisions. The same objects run
over real processes and over a virtual clock. What a driver does with one:

    wait = policy.sized(workers, seconds)              once: the rule made definite for this many workers
    each round: wait.assign(round, history)            who computes what
                wait.close(round, arrivals, now)       after every single arrival, in worker order where they come at once,
                                                       and when `wait.deadline(round)` has passed though nothing came
    an empty Decision()                                everything that has arrived counts
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weft.comm.combine import Arrival

__all__ = ["Decision", "Task", "Wait"]


@dataclass(frozen=True, slots=True)
class Task:
    """One mini-task: compute the gradient sum of `chunk` of job `job` and add it, times `coefficient`, to the message.

    All tasks that a worker has for one job in one round make one message.
    """

    job: int
    chunk: int
    coefficient: float = 1.0


@dataclass(frozen=True)
class Decision:
    """A round is over.

    Attributes:
        jobs: jobs that can be decoded now -> ((round, source) of a message -> weight): the result is the weighted sum of those
            messages.
        late: workers whose results of this round do not count.
        tasks: what `assign` gave in this round, so that the decisions so far are all that a policy need know of the past.
    """

    jobs: Mapping[int, Mapping[tuple[int, int], float]] = field(default_factory=dict)
    late: frozenset[int] = frozenset()
    tasks: Mapping[int, tuple[Task, ...]] = field(default_factory=dict)


class Wait(abc.ABC):
    """A rule for closing rounds."""

    def sized(self, workers: int, seconds: Sequence[float] = ()) -> Wait:
        """The same rule made definite for so many workers, whose rounds take about so many seconds each (if known).

        Raises:
            ValueError: the rule is impossible with that many workers.
        """
        return self

    @abc.abstractmethod
    def assign(self, round: int, history: Sequence[Decision]) -> Mapping[int, tuple[Task, ...]]:
        """What each worker computes in a round; {} where everybody computes its own share."""

    @abc.abstractmethod
    def close(self, round: int, arrivals: Sequence[Arrival], now: float) -> Decision | None:
        """The decision, or None to wait on; `now` in seconds since the round began."""

    def deadline(self, round: int) -> float:
        """Seconds since the round began at which `close` is to be asked even if nothing has come; infinity for never."""
        return math.inf

    def shares(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """Expected share of rounds that each worker takes part in, in [0, 1], if its rounds take so many seconds."""
        return (1.0,) * len(seconds)
