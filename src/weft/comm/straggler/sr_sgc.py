"""Sequential gradient coding by selective repetition (SR-SGC): a weaker code, and a second chance B rounds later.

Base       an (n, s)-GC code with s = ceil(B lam / (W - 1 + B)), about B/(W - 1 + B) of what GC needs for lam late workers
Round t    v = number of workers that delivered nothing for job t - B in round t - B. If v > s, the first v - s of them, those
           that were late before those that were busy repeating, compute their task of job t - B again instead of job t's  `redo`
Decoding   job t - B when n - s results of rounds t - B and t together are in; T = B
Copes      with (B, W, lam)-bursty lateness, B | W - 1, and with s late workers per round. A round in which at most s workers
           deliver nothing for its own job is decoded at once and leaves no trace, so it is not counted in a burst   `admits`

Source: Krishnan, Ebrahimi, Khisti, arXiv:2211.13802, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from weft.comm.straggler import code
from weft.comm.straggler.lateness import Bursty
from weft.comm.straggler.scheme import Past, Scheme, grace, whole
from weft.comm.wait import Task

__all__ = ["SRSGC"]


@final
@dataclass(frozen=True)
class SRSGC(Scheme):
    """Selective repetition for (B, W, lam)-bursty lateness.

    Attributes:
        B: longest burst in rounds, >= 1; also the delay T.
        W: window in rounds, B | W - 1, W > 1.
        lam: distinct late workers in a window, 0 <= lam <= n.
        mu: how much longer than the fastest worker a round lasts before somebody counts as late.
    """

    B: int
    W: int
    lam: int
    mu: float = 1.0
    workers: int | None = None

    def __post_init__(self) -> None:
        whole("SRSGC", B=self.B, W=self.W, lam=self.lam)
        grace("SRSGC", self.mu)
        if self.B < 1 or self.W < 2 or (self.W - 1) % self.B:
            raise ValueError(
                f"SRSGC: B must be >= 1 and divide W - 1 >= 1, got B = {self.B}, W = {self.W}; try W = B + 1"
            )

    def check(self) -> None:
        if self.lam > self.count or self.s >= self.count:
            raise ValueError(
                f"SRSGC: lam must be at most the number of workers {self.count}, and s = ceil(B lam/(W - 1 + B)) below it, "
                f"got lam = {self.lam}, s = {self.s}"
            )

    @property
    def s(self) -> int:
        """Late workers that the base code copes with."""
        return -(-self.B * self.lam // (self.W - 1 + self.B))

    @property
    def delay(self) -> int:
        return self.B

    @property
    def load(self) -> float:
        return (self.s + 1) / self.count

    @property
    def memory(self) -> int:
        return max(self.W, 2 * self.B) + 1

    def fractions(self) -> tuple[float, ...]:
        return (1 / self.count,) * self.count

    def holds(self, worker: int) -> tuple[int, ...]:
        return tuple((worker + k) % self.count for k in range(self.s + 1))

    def copes(self) -> str:
        return (
            f"({self.B}, {self.W}, {self.lam})-bursty lateness (in any {self.W} rounds {self.lam} workers, each in one burst of "
            f"{self.B}) or {self.s} late workers in every round"
        )

    def redo(self, past: Past) -> np.ndarray:
        chosen = np.zeros(self.count, dtype=bool)
        job = len(past.late) - self.B
        if job >= 0:
            late, busy = past.late[job], past.redo[job] & ~past.late[job]
            missing = np.concatenate((np.flatnonzero(late), np.flatnonzero(busy)))
            chosen[missing[: max(0, len(missing) - self.s)]] = True
        return chosen

    def admits(self, past: Past, late: np.ndarray) -> bool:
        redo = self.redo(past)
        if (redo & late).any():
            return False  # job t - B would be lost
        if (late | redo).sum() <= self.s:
            return True
        recent = slice(max(0, len(past.late) - self.W + 1), None)
        counted = past.late[recent] & ((past.late[recent] | past.redo[recent]).sum(1, keepdims=True) > self.s)
        return Bursty(self.B, self.W, self.lam).allows(np.vstack((counted, late)))

    def tasks(self, past: Past) -> Mapping[int, tuple[Task, ...]]:
        job, redo, matrix = len(past.late), self.redo(past), code.cyclic(self.count, self.s)
        return {
            i: tuple(Task(job - self.B if redo[i] else job, chunk, float(matrix[i, chunk])) for chunk in self.holds(i))
            for i in range(self.count)
        }

    def weights(self, job: int, past: Past) -> Mapping[tuple[int, int], float] | None:
        rounds = np.where(past.late[job] | past.redo[job], -1, job)
        if len(past.late) > job + self.B:
            again = past.redo[job + self.B] & ~past.late[job + self.B]
            rounds[again] = job + self.B
        missing = rounds < 0
        if missing.sum() > self.s:
            return None
        found = code.decode(code.cyclic(self.count, self.s), missing)
        return None if found is None else {(int(rounds[i]), int(i)): float(found[i]) for i in np.flatnonzero(found)}
