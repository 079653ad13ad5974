"""Robust centres as weights: geometric median, centred clipping, the norm-equalised mean.

Problem    a point that few far messages cannot move far.
Method     every point in play is z = X^T c, so |x_i - z|^2 = K_ii - 2 (K c)_i + c^T K c, and each method walks in c:
           GeometricMedian       Weiszfeld: c_i ~ 1 / max(nu, |x_i - z|), from the mean of the nearer half    `nearer_half`
                                 which does not get to a message in time; where one is the median it is known    `at_messages`
           CenteredClip          c <- c + 1/n sum_i min(1, tau / |x_i - z|) (e_i - c)
           NormEqualisedMean     c_i = median norm / (n |x_i|): no geometry at all, the ablation of all the others
Guarantee  GeometricMedian: minimises sum |x_i - z|, breaks down at n/2 faulty messages only, however far they lie: start, floor
           and end are made from distances among the nearer half. CenteredClip: each message moves the centre by at most tau/n a
           walk.
Source     Weiszfeld 1937, Pillutla et al. (RFA), arXiv:1912.13445; Karimireddy et al., arXiv:2012.10333.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.rules.by_gram import ByGram, distances

__all__ = ["CenteredClip", "GeometricMedian", "NormEqualisedMean"]

SAME = 3e-8  # of messages' norms: distances below are rounding


def _to_centre(gram: Tensor, centre: Tensor) -> Tensor:
    """|x_i - X^T c| for coefficients c (n,)."""
    image = gram @ centre
    return (gram.diagonal() - 2 * image + centre @ image).clamp(min=0.0).sqrt()


def _enough(rule: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{rule}: no message to combine")


@final
@dataclass(frozen=True)
class GeometricMedian(ByGram):
    """The point of least summed distance to the messages, by Weiszfeld's iteration.

    Attributes:
        iterations: at most so many; it ends when the summed distance falls by less than 1e-12 of itself, and that of the nearer
            half, which nobody far away hides, by less than 1e-6.
        nu: distances below count as nu, in the messages' own unit. None: 1e-8 of the nearer half's radius. ByzFL: 0.1.
        start: "near", the mean of the nearer half, or "zero" as in ByzFL (3 iterations).
    """

    iterations: int = 100
    nu: float | None = None
    start: str = "near"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"GeometricMedian: iterations must be 1 or more, got {self.iterations}")
        if self.nu is not None and not self.nu > 0:
            raise ValueError(f"GeometricMedian: nu must be above 0, got {self.nu}; None takes it from the messages")
        if self.start not in ("near", "zero"):
            raise ValueError(f"GeometricMedian: start must be 'near' or 'zero', got {self.start!r}")

    def check(self, count: int, faulty: int) -> None:
        _enough("GeometricMedian", count)

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        count = len(gram)
        half, radius = nearer_half(gram)
        centre = torch.zeros(count, dtype=torch.float64)
        if self.start == "near":
            centre[half] = 1.0 / len(half)
            if len(found := at_messages(gram)):
                return torch.zeros_like(centre).index_fill_(0, found, 1.0 / len(found))
        least = self.nu if self.nu is not None else max(1e-8 * radius, torch.finfo(torch.float64).tiny ** 0.5)
        away = _to_centre(gram, centre)
        before = before_near = float("inf")
        for _ in range(self.iterations):
            pull = 1.0 / away.clamp(min=least)
            centre = pull / pull.sum()
            away = _to_centre(gram, centre)
            total, near = float(away.sum()), float(away.sort().values[: len(half)].sum())
            settled = before - total <= 1e-12 * total and abs(before_near - near) <= 1e-6 * near
            if settled and self.start == "near":
                break
            before, before_near = total, near
        return centre


def at_messages(gram: Tensor) -> Tensor:
    """Numbers of the messages that lie at a geometric median of all; few or none as a rule, the two middle ones on a line.

    x_k does if the unit vectors from it to messages elsewhere sum to no more than the number of those that lie where it does.
    """
    square = gram.diagonal()
    apart = distances(gram).sqrt()
    elsewhere = apart > SAME * (square[:, None] + square[None, :]).sqrt()
    pull = torch.where(elsewhere, 1.0 / apart, 0.0)
    total = pull.sum(1)
    summed = ((pull @ gram) * pull).sum(1) - 2 * (pull * gram).sum(1) * total + square * total.square()
    here = (~elsewhere).sum(1)
    return (summed <= (here * (1 + 1e-6)).square()).nonzero().flatten()


def nearer_half(gram: Tensor) -> tuple[Tensor, float]:
    """Numbers of the floor(n/2) + 1 messages around the one whose median distance is least, and that distance.

    While fewer than half the messages are faulty it is at most the honest ones' diameter, and one of the numbers is honest.
    """
    order = distances(gram).sqrt().sort(dim=1, stable=True)
    middle = len(gram) // 2
    near = order.values[:, : middle + 1]
    radii, sums = near[:, middle].tolist(), near.sum(1).tolist()
    best = min(range(len(radii)), key=lambda number: (radii[number], sums[number]))  # two often share a radius: theirs
    return order.indices[best, : middle + 1], radii[best]


@final
@dataclass(frozen=True)
class CenteredClip(ByGram):
    """The mean of the messages, each pulled to within `tau` of a centre that is moved there, again and again.

    Attributes:
        tau: radius in the messages' own unit; None takes the median distance to the centre, anew each time.
        iterations: walks, >= 1.
        start: "medoid" (the message of least summed distance to the others) or "zero" (ByzFL's first call; it then starts from
            its last result, which a rule without state does not have).
    """

    tau: float | None = None
    iterations: int = 3
    start: str = "medoid"

    def __post_init__(self) -> None:
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"CenteredClip: tau must be above 0, got {self.tau}; None takes the median distance")
        if self.iterations < 1:
            raise ValueError(f"CenteredClip: iterations must be 1 or more, got {self.iterations}")
        if self.start not in ("medoid", "zero"):
            raise ValueError(f"CenteredClip: start must be 'medoid' or 'zero', got {self.start!r}")

    def check(self, count: int, faulty: int) -> None:
        _enough("CenteredClip", count)

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        count = len(gram)
        centre = torch.zeros(count, dtype=torch.float64)
        if self.start == "medoid":
            centre[int(distances(gram).sqrt().sum(1).sort(stable=True).indices[0])] = 1.0
        for _ in range(self.iterations):
            away = _to_centre(gram, centre)
            radius = self.tau if self.tau is not None else float(away.median())
            share = torch.where(away <= radius, 1.0, radius / away)
            centre = centre + (share - share.sum() * centre) / count
        return centre


@final
@dataclass(frozen=True)
class NormEqualisedMean(ByGram):
    """The mean of the messages, each scaled to their median norm; messages of norm 0 stay 0."""

    def check(self, count: int, faulty: int) -> None:
        _enough("NormEqualisedMean", count)

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        norms = gram.diagonal().clamp(min=0.0).sqrt()
        return torch.where(norms > 0, norms.quantile(0.5) / norms, 0.0) / len(gram)
