"""Krum and its kin: keep messages that have many others close by.

Problem    n messages, at most f of them anything at all; the others scatter around the true gradient.
Method     score(i) = sum of |x_i - x_j|^2 over the n - f - spare nearest others j                     `ranking`
           Krum       the message of least score
           MultiKrum  the mean of the m messages of least score
           Bulyan     n - 2f messages taken one by one by Krum, scores made anew each time; then, entry by entry, the mean of
                      the n - 4f values nearest to their median                                        `Bulyan.finish`
Guarantee  Krum: n >= 2f + 3 (with the paper's spare = 2) bounds the angle to the true gradient by the spread of the honest ones;
           Bulyan: n >= 4f + 3 does so per entry. Ties go to the message nearer to all, then to the one that stands first.
Source     Blanchard et al., NeurIPS 2017; El Mhamdi et al., The hidden vulnerability, arXiv:1802.07927.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from weft.comm.rules.by_gram import ByGram, check_enough, check_faulty, distances
from weft.comm.rules.sorting import mean_near_median

__all__ = ["Bulyan", "Krum", "MultiKrum"]


def ranking(square: Tensor, neighbours: int) -> Tensor:
    """Numbers (n,) from best to worst by the sum of the `neighbours` smallest squared distances (n, n) to others.

    With a single neighbour counted, two that are each other's nearest are always equal: then the summed distance to all tells.
    """
    away = square + torch.diag(torch.full((len(square),), torch.inf, dtype=square.dtype))
    score = away.sort(dim=1).values[:, :neighbours].sum(1)
    second = square.sum(1).sort(stable=True).indices
    return second[score[second].sort(stable=True).indices]


def _least(faulty: int, spare: int) -> int:
    """How many messages Krum needs."""
    return 2 * faulty + 3 if spare == 2 else max(2 * faulty + 1, faulty + spare + 1)


@final
@dataclass(frozen=True)
class Krum(ByGram):
    """The one message with the least sum of squared distances to its nearest others.

    Attributes:
        f: faulty messages, n >= 2f + 3.
        spare: nearest others counted are n - f - spare: 2 in the paper, 1 in ByzFL (which then allows n >= 2f + 1).
    """

    f: int = 0
    spare: int = 2

    def __post_init__(self) -> None:
        check_faulty("Krum", self.f)
        if self.spare not in (1, 2):
            raise ValueError(f"Krum: spare must be 2 (the paper) or 1 (ByzFL), got {self.spare}")

    def check(self, count: int, faulty: int) -> None:
        check_enough("Krum", count, _least(faulty, self.spare), faulty)

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        chosen = torch.zeros(len(gram), dtype=torch.float64)
        chosen[ranking(distances(gram), len(gram) - faulty - self.spare)[0]] = 1.0
        return chosen


@final
@dataclass(frozen=True)
class MultiKrum(ByGram):
    """The mean of the `m` messages of least Krum score, m <= n - f; m = None takes n - f. `f`, `spare` as in Krum."""

    f: int = 0
    m: int | None = None
    spare: int = 2

    def __post_init__(self) -> None:
        check_faulty("MultiKrum", self.f)
        if self.m is not None and self.m < 1:
            raise ValueError(f"MultiKrum: m must be 1 or more, got {self.m}; None takes n - f")
        if self.spare not in (1, 2):
            raise ValueError(f"MultiKrum: spare must be 2 (the paper) or 1 (ByzFL), got {self.spare}")

    def check(self, count: int, faulty: int) -> None:
        check_enough("MultiKrum", count, _least(faulty, self.spare), faulty)
        if self.m is not None and self.m > count - faulty:
            raise ValueError(
                f"MultiKrum: m must be at most n - f = {count - faulty}, got {self.m}: more would hold a faulty message"
            )

    def among(self, count: int, broken: int) -> MultiKrum:
        f = max(self.f - broken, 0)
        return replace(self, f=f, m=None if self.m is None else max(1, min(self.m, count - f)))

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        kept = self.m or len(gram) - faulty
        chosen = torch.zeros(len(gram), dtype=torch.float64)
        chosen[ranking(distances(gram), len(gram) - faulty - self.spare)[:kept]] = 1.0 / kept
        return chosen


@final
@dataclass(frozen=True)
class Bulyan(ByGram):
    """Krum n - 2f times, then the mean of the values nearest to each entry's median. n >= 4f + 3."""

    f: int = 0

    def __post_init__(self) -> None:
        check_faulty("Bulyan", self.f)

    def check(self, count: int, faulty: int) -> None:
        check_enough("Bulyan", count, 4 * faulty + 3, faulty)

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        square = distances(gram)
        left = list(range(len(gram)))
        picked = []
        for _ in range(len(gram) - 2 * faulty):
            part = square[left][:, left]
            near = max(len(left) - faulty - 2, 1)  # of the last 2f + 1 messages too few are left for f = 1
            best = ranking(part, near)[0]
            picked.append(left.pop(int(best)))
        return torch.eye(len(gram), dtype=torch.float64)[sorted(picked)]

    def finish(self, mixed: Tensor) -> Tensor:
        return mean_near_median(mixed, 2 * self.f)  # of the n - 2f picked, n - 4f stay
