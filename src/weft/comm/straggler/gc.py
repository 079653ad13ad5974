"""Codes within one round (T = 0): a job is decoded in the round in which it was computed.

    Uncoded(drop=0)    every worker computes 1/n; wait for all, or drop the last `drop` and scale up (a biased gradient)
    GC(s)              every worker computes (s + 1)/n and sends one coded sum; any n - s suffice

With `kind="repetition"` groups of s + 1 workers send plain sums of the same chunks, and one of each group suffices: far more
late sets than those of s workers. Nothing is lost by closing such a round early, so that mu is 0 unless told otherwise.

Source: Tandon, Lei, Dimakis, Karampatziakis, Gradient Coding, ICML 2017, arXiv:1612.03301.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from weft.comm.straggler import code
from weft.comm.straggler.scheme import Past, Scheme, grace, whole
from weft.comm.wait import Task

__all__ = ["GC", "Uncoded"]


@final
@dataclass(frozen=True)
class Uncoded(Scheme):
    """Wait for all but `drop` workers. With drop > 0 the result is n/(n - drop) times the sum over those that came: cheap, and
    biased towards the data of fast workers."""

    drop: int = 0
    mu: float = 0.0
    workers: int | None = None

    def __post_init__(self) -> None:
        whole("Uncoded", drop=self.drop)
        grace("Uncoded", self.mu)

    def check(self) -> None:
        if self.drop >= self.count:
            raise ValueError(
                f"Uncoded: drop must be below the number of workers {self.count}, got {self.drop}; nobody would be left"
            )

    @property
    def delay(self) -> int:
        return 0

    @property
    def load(self) -> float:
        return 1 / self.count

    def fractions(self) -> tuple[float, ...]:
        return (1 / self.count,) * self.count

    def holds(self, worker: int) -> tuple[int, ...]:
        return (worker,)

    def copes(self) -> str:
        return f"{self.drop} late workers in a round (dropped)" if self.drop else "no late worker"

    def admits(self, past: Past, late: np.ndarray) -> bool:
        return int(late.sum()) <= self.drop

    def tasks(self, past: Past) -> Mapping[int, tuple[Task, ...]]:
        return {worker: (Task(len(past.late), worker),) for worker in range(self.count)}

    def weights(self, job: int, past: Past) -> Mapping[tuple[int, int], float] | None:
        here = np.flatnonzero(~past.late[job])
        return {(job, int(worker)): self.count / len(here) for worker in here}


@final
@dataclass(frozen=True)
class GC(Scheme):
    """(n, s)-gradient coding: exact with any s workers late in every round, for s + 1 times the work.

    Attributes:
        s: late workers per round that are coped with, 0 <= s < n.
        kind: "cyclic" for every n; "repetition" needs (s + 1) | n, decodes with weights 0 and 1 and copes with more.
    """

    s: int
    kind: Literal["cyclic", "repetition"] = "cyclic"
    mu: float = 0.0
    workers: int | None = None

    def __post_init__(self) -> None:
        whole("GC", s=self.s)
        grace("GC", self.mu)
        if self.kind not in ("cyclic", "repetition"):
            raise ValueError(f'GC: kind must be "cyclic" or "repetition", got {self.kind!r}')

    def check(self) -> None:
        if self.s >= self.count:
            raise ValueError(
                f"GC: s must be below the number of workers {self.count}, got {self.s}; take s = n - 1 at most"
            )
        if self.kind == "repetition" and self.count % (self.s + 1):
            raise ValueError(
                f"GC: with kind='repetition' s + 1 must divide the number of workers {self.count}, got s = {self.s}; take "
                "another s or kind='cyclic'"
            )

    @property
    def delay(self) -> int:
        return 0

    @property
    def load(self) -> float:
        return (self.s + 1) / self.count

    def fractions(self) -> tuple[float, ...]:
        return (1 / self.count,) * self.count

    def matrix(self) -> np.ndarray:
        """C (n, n): worker i sends sum_j C[i, j] g_j."""
        return (code.repetition if self.kind == "repetition" else code.cyclic)(self.count, self.s)

    def holds(self, worker: int) -> tuple[int, ...]:
        first = worker - worker % (self.s + 1) if self.kind == "repetition" else worker
        return tuple((first + k) % self.count for k in range(self.s + 1))

    def copes(self) -> str:
        some = f"any {self.s} of {self.count} workers late in every round"
        return some + (" (or all but one of each group)" if self.kind == "repetition" else "")

    def admits(self, past: Past, late: np.ndarray) -> bool:
        if self.kind == "repetition":
            return not late.reshape(-1, self.s + 1).all(1).any()
        return int(late.sum()) <= self.s

    def tasks(self, past: Past) -> Mapping[int, tuple[Task, ...]]:
        job, matrix = len(past.late), self.matrix()
        return {
            worker: tuple(Task(job, chunk, float(matrix[worker, chunk])) for chunk in self.holds(worker))
            for worker in range(self.count)
        }

    def weights(self, job: int, past: Past) -> Mapping[tuple[int, int], float] | None:
        found = code.decode(self.matrix(), past.late[job])
        return None if found is None else {(job, int(i)): float(found[i]) for i in np.flatnonzero(found)}
