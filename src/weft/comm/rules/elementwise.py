"""Rules that go entry by entry: median, trimmed mean, mean around the median.

Problem    at each entry, n values of which at most f are anything at all.
Method     Median        the middle value (mean of the two for even n)
           TrimmedMean   the mean without the f smallest and the f largest
           Meamed        the mean of the n - f values nearest to the median
           The sorting lies in `sorting`. A message with an entry that is not finite is left out whole, named, and counted as
           one of the f; under `ScatterGather` each rank sees, and judges, its own segment only.
Guarantee  no entry of the result lies outside the honest values' range (Meamed: outside it by more than that range), n > 2f.
Source     Yin et al., arXiv:1803.01498; Xie et al., Generalized Byzantine-tolerant SGD, arXiv:1802.10116.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Combine
from weft.comm.rules import sorting
from weft.comm.rules.by_gram import check_enough, check_faulty, without_broken

__all__ = ["Meamed", "Median", "TrimmedMean"]


def _finite(rule: str, stack: Tensor) -> tuple[Tensor, int]:
    """The finite messages of (n, d), and how many were left out."""
    if len(stack) < 1:
        raise ValueError(f"{rule}: no message to combine")
    fine = torch.isfinite(stack.sum(1))  # one pass; a sum that overflows is looked at closely below
    if not bool(fine.all()):
        fine = torch.isfinite(stack).all(1)
    if bool(fine.all()):
        return stack, 0
    without_broken(rule, fine)
    return stack[fine], int((~fine).sum())


@final
@dataclass(frozen=True)
class Median(Combine):
    """The median of each entry."""

    needs = "elementwise"

    def elementwise(self, stack: Tensor) -> Tensor:
        return sorting.median(_finite("Median", stack)[0])


@final
@dataclass(frozen=True)
class TrimmedMean(Combine):
    """The mean of each entry without its f smallest and f largest values; n >= 2f + 1."""

    f: int = 0
    needs = "elementwise"

    def __post_init__(self) -> None:
        check_faulty("TrimmedMean", self.f)

    def elementwise(self, stack: Tensor) -> Tensor:
        check_enough("TrimmedMean", len(stack), 2 * self.f + 1, self.f)
        fine, broken = _finite("TrimmedMean", stack)
        return sorting.trimmed_mean(fine, max(self.f - broken, 0))


@final
@dataclass(frozen=True)
class Meamed(Combine):
    """The mean, at each entry, of the n - f values nearest to the median; n >= 2f + 1."""

    f: int = 0
    needs = "elementwise"

    def __post_init__(self) -> None:
        check_faulty("Meamed", self.f)

    def elementwise(self, stack: Tensor) -> Tensor:
        check_enough("Meamed", len(stack), 2 * self.f + 1, self.f)
        fine, broken = _finite("Meamed", stack)
        return sorting.mean_near_median(fine, max(self.f - broken, 0))
