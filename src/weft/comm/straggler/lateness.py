"""Who may be late, and when: the patterns that the codes are made for.

A pattern is a boolean matrix late[t, i], rounds by workers. Each model says which patterns conform; all are closed under taking
late marks away and under cutting off rounds at either end, which is what lets a master keep to one by waiting.

    PerRound(s)          at most s late workers in every round
    Bursty(B, W, lam)    in any W consecutive rounds: at most lam distinct late workers, and the first and last late round of each
                         less than B apart (one burst of at most B)
    Arbitrary(N, W, lam) in any W consecutive rounds: at most lam distinct late workers, each late in at most N of them
    gilbert_elliott      a generator: every worker is a two-state Markov chain, on time or late

Source: Krishnan, Ebrahimi, Khisti, Sequential Gradient Coding for Straggler Mitigation, ICLR 2023, arXiv:2211.13802, section 2.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

import numpy as np

__all__ = ["Arbitrary", "Bursty", "Lateness", "PerRound", "gilbert_elliott"]


class Lateness(abc.ABC):
    """A set of patterns."""

    @abc.abstractmethod
    def allows(self, late: np.ndarray) -> bool:
        """Whether a pattern, bool (rounds, workers), conforms in every window."""


@final
@dataclass(frozen=True)
class PerRound(Lateness):
    """At most `s` late workers in every round."""

    s: int

    def allows(self, late: np.ndarray) -> bool:
        return not late.size or bool(late.sum(1).max() <= self.s)


@final
@dataclass(frozen=True)
class Bursty(Lateness):
    """In any W rounds: at most `lam` distinct late workers, the late rounds of each within B consecutive rounds."""

    B: int
    W: int
    lam: int

    def allows(self, late: np.ndarray) -> bool:
        for window in _windows(late, self.W):
            ever = window.any(0)
            if ever.sum() > self.lam:
                return False
            first = window.argmax(0)
            last = len(window) - 1 - window[::-1].argmax(0)
            if ((last - first >= self.B) & ever).any():
                return False
        return True


@final
@dataclass(frozen=True)
class Arbitrary(Lateness):
    """In any W rounds: at most `lam` distinct late workers, each late at most N times."""

    N: int
    W: int
    lam: int

    def allows(self, late: np.ndarray) -> bool:
        for window in _windows(late, self.W):
            times = window.sum(0)
            if (times > 0).sum() > self.lam or times.max(initial=0) > self.N:
                return False
        return True


def _windows(late: np.ndarray, length: int) -> list[np.ndarray]:
    """Every stretch of `length` rounds, or the whole pattern if it is shorter; the last first, which breaks a model soonest."""
    return [late[start : start + length] for start in reversed(range(max(1, len(late) - length + 1)))]


def gilbert_elliott(rounds: int, workers: int, late: float, recover: float, seed: int) -> np.ndarray:
    """A random pattern, bool (rounds, workers): in each round a worker on time turns late with probability `late`, a late one
    recovers with probability `recover`; the chain starts in its stationary state, late / (late + recover) of the time late.

    Raises:
        ValueError: a probability is outside (0, 1].
    """
    if not (0 < late <= 1 and 0 < recover <= 1):
        raise ValueError(f"gilbert_elliott: late and recover must be in (0, 1], got {late} and {recover}")
    generator = np.random.default_rng(seed)
    state = generator.random(workers) < late / (late + recover)
    pattern = np.empty((rounds, workers), dtype=bool)
    for row in pattern:
        draw = generator.random(workers)
        state = np.where(state, draw >= recover, draw < late)
        row[:] = state
    return pattern
