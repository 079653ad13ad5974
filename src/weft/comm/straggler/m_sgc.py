"""Multiplexed sequential gradient coding (M-SGC): most of a job uncoded, the rest coded, spread over W - 1 + B rounds.

Chunks     D1: n (W - 1), W - 1 private to each worker, uncoded, of share (lam + 1) x each;
           D2: B groups of n, each group protected by an (n, lam)-GC code, of share x each;
           x = 1 / (n (B + (W - 1)(lam + 1))), so that every mini-task computes (lam + 1) x             `fractions`
Round t    a worker runs W - 1 + B mini-tasks, mini-task j for job t - j:                              `tasks`
           j < W - 1           its D1 chunk j for the first time
           j = W - 1 + b       a D1 chunk that it has not delivered yet, if there is one; else its coded sum of group b
           the whole round of a late worker is lost
Decoding   job t when every D1 chunk is in and each D2 group has n - lam sums; T = W - 2 + B            `weights`
Load       (lam + 1)(W - 1 + B) / (n (B + (W - 1)(lam + 1))); with lam = n there is no D2: (W - 1 + B) / (n (W - 1))
Copes      with (B, W, lam)-bursty and (B, W - 1 + B, lam)-arbitrary lateness. A job depends on its own W - 1 + B rounds only,
           so either may hold from window to window                                                     `admits`

Source: Krishnan, Ebrahimi, Khisti, arXiv:2211.13802, section 3; the load is within O(1/W) of a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from weft.comm.straggler import code
from weft.comm.straggler.lateness import Arbitrary, Bursty
from weft.comm.straggler.scheme import Past, Scheme, grace, whole
from weft.comm.wait import Task

__all__ = ["MSGC"]


@final
@dataclass(frozen=True)
class MSGC(Scheme):
    """Multiplexed coding for (B, W, lam)-bursty lateness.

    Attributes:
        B: longest burst in rounds, 0 < B < W.
        W: window in rounds.
        lam: distinct late workers in a window, 0 <= lam <= n.
        mu: how much longer than the fastest worker a round lasts before somebody counts as late.
    """

    B: int
    W: int
    lam: int
    mu: float = 1.0
    workers: int | None = None

    def __post_init__(self) -> None:
        whole("MSGC", B=self.B, W=self.W, lam=self.lam)
        grace("MSGC", self.mu)
        if not 0 < self.B < self.W:
            raise ValueError(f"MSGC: B and W must satisfy 0 < B < W, got B = {self.B}, W = {self.W}; try W = B + 1")

    def check(self) -> None:
        if self.lam > self.count:
            raise ValueError(f"MSGC: lam must be at most the number of workers {self.count}, got {self.lam}")

    @property
    def delay(self) -> int:
        return self.W - 2 + self.B

    @property
    def load(self) -> float:
        n, private = self.count, self.W - 1
        if self.lam == n:
            return (private + self.B) / (n * private)
        return (self.lam + 1) * (private + self.B) / (n * (self.B + private * (self.lam + 1)))

    @property
    def messages(self) -> int:
        return self.W - 1 + self.B

    def fractions(self) -> tuple[float, ...]:
        n, private = self.count, self.W - 1
        if self.lam == n:
            return (1 / (n * private),) * (n * private)
        x = 1 / (n * (self.B + private * (self.lam + 1)))
        return ((self.lam + 1) * x,) * (n * private) + (x,) * (n * self.B)

    def holds(self, worker: int) -> tuple[int, ...]:
        own = tuple(self._private(worker, k) for k in range(self.W - 1))
        if self.lam == self.count:
            return own
        return own + tuple(self._shared(b, worker + k) for b in range(self.B) for k in range(self.lam + 1))

    def copes(self) -> str:
        return (
            f"in any {self.W} rounds {self.lam} workers late, each in one burst of {self.B}, or in any "
            f"{self.W - 1 + self.B} rounds {self.lam} workers, each {self.B} times"
        )

    def admits(self, past: Past, late: np.ndarray) -> bool:
        window = np.vstack((past.late[max(0, len(past.late) - self.delay) :], late))
        return (
            Arbitrary(self.B, self.W - 1 + self.B, self.lam).allows(window)
            or Bursty(self.B, self.W, self.lam).allows(window)
        )  # fmt: skip

    def tasks(self, past: Past) -> Mapping[int, tuple[Task, ...]]:
        now = len(past.late)
        tasks: dict[int, list[Task]] = {i: [] for i in range(self.count)}
        for slot in range(self.delay + 1):
            job = now - slot
            if job < 0:
                break
            owed = _owed(past.late[job:now], self.W - 1)
            for i in range(self.count):
                if slot < self.W - 1:
                    tasks[i].append(Task(job, self._private(i, slot)))
                elif owed[i]:
                    tasks[i].append(Task(job, self._private(i, owed[i][0])))
                elif self.lam < self.count:
                    row = code.cyclic(self.count, self.lam)[i]
                    tasks[i] += [
                        Task(job, self._shared(slot - self.W + 1, i + k), float(row[(i + k) % self.count]))
                        for k in range(self.lam + 1)
                    ]
        return {i: tuple(own) for i, own in tasks.items()}

    def weights(self, job: int, past: Past) -> Mapping[tuple[int, int], float] | None:
        late = past.late[job : job + self.delay + 1]
        private, found = self.W - 1, {}
        for slot in range(len(late)):
            owed = _owed(late[:slot], private)
            coded = np.array([slot >= private and not chunks for chunks in owed])
            for i in np.flatnonzero(~late[slot] & ~coded):
                found[job + slot, int(i)] = 1.0  # a D1 chunk, which comes exactly once
            if slot >= private and self.lam < self.count:
                missing = late[slot] | ~coded
                weights = code.decode(code.cyclic(self.count, self.lam), missing) if missing.sum() <= self.lam else None
                if weights is None:
                    return None
                found |= {(job + slot, int(i)): float(weights[i]) for i in np.flatnonzero(weights)}
        done = len(late) > self.delay or (self.lam == self.count and len(late) >= private)
        return None if not done or any(_owed(late, private)) else found

    def _private(self, worker: int, k: int) -> int:
        return worker * (self.W - 1) + k

    def _shared(self, group: int, position: int) -> int:
        return self.count * (self.W - 1 + group) + position % self.count


def _owed(late: np.ndarray, private: int) -> list[list[int]]:
    """For each worker its D1 chunks of a job that were tried and lost, oldest first; late (rounds since the job began, n)."""
    owed: list[list[int]] = [[] for _ in range(late.shape[1])]
    for slot, row in enumerate(late):
        for i, chunks in enumerate(owed):
            if slot < private:
                if row[i]:
                    chunks.append(slot)
            elif chunks and not row[i]:
                chunks.pop(0)
    return owed
