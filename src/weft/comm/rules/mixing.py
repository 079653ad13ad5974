"""Mix first, then aggregate: nearest-neighbour mixing and bucketing before any other rule.

Problem    where honest workers' data differ, a robust rule throws honest messages out with the faulty ones.
Method     NNM        replace each message by the mean of its n - f nearest, itself included: M = A X
           Bucketing  shuffle, replace s messages by their mean: n/s messages, each of s times less spread
           Messages that are not finite are left out before, and fewer may then be faulty, to the inner rule too.
           The inner rule sees M. If it reads the Gram matrix, that of M is A K A^T, so that nothing of size d is made and the
           whole is one row, inner(A K A^T) A; if it goes entry by entry, M is made and given to it   `ByGram.row`, `finish`
Guarantee  NNM makes any (f, kappa)-robust rule's error O(f/n) of the spread, which is optimal; Bucketing needs n > 2 f s.
Source     Allouah et al., Fixing by mixing, arXiv:2302.01772; Karimireddy et al., arXiv:2006.09365.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Combine, Info
from weft.comm.rules.by_gram import ByGram, check_enough, check_faulty, distances
from weft.comm.rules.mean import Mean

__all__ = ["NNM", "Bucketing"]


def _through(inner: Combine, mix: Tensor, gram: Tensor) -> Tensor:
    """Weights of the whole, given the mixing matrix (m, n): a row (n,), or `mix` itself for a rule that goes entry by entry."""
    if inner.needs == "elementwise":
        return mix
    return inner.weights(Info(len(mix), mix @ gram @ mix.T if inner.needs == "gram" else None)) @ mix


def _finish(inner: Combine, mixed: Tensor) -> Tensor:
    return inner.elementwise(mixed) if inner.needs == "elementwise" else inner.finish(mixed)


def _check_inner(rule: str, inner: Combine) -> None:
    if inner.needs == "arrivals":
        raise ValueError(f"{rule}: the inner rule {type(inner).__name__} weighs senders, which are mixed here")


@final
@dataclass(frozen=True)
class NNM(ByGram):
    """Nearest-neighbour mixing, then `inner`: `NNM(3, TrimmedMean(3))`. n >= 2f + 1."""

    f: int = 0
    inner: Combine = field(default_factory=Mean)

    def __post_init__(self) -> None:
        check_faulty("NNM", self.f)
        _check_inner("NNM", self.inner)

    def check(self, count: int, faulty: int) -> None:
        check_enough("NNM", count, 2 * faulty + 1, faulty)

    def mix(self, gram: Tensor, faulty: int) -> Tensor:
        """The mixing matrix (n, n): row i has 1/(n - f) at the n - f messages nearest to i."""
        square = distances(gram)
        square.fill_diagonal_(-1.0)  # a message is its own nearest, also among equals
        near = square.sort(dim=1, stable=True).indices[:, : len(gram) - faulty]
        return torch.zeros_like(square).scatter_(1, near, 1.0 / near.shape[1])

    def among(self, count: int, broken: int) -> NNM:
        return replace(self, f=max(self.f - broken, 0), inner=self.inner.among(count, broken))

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        return _through(self.inner, self.mix(gram, faulty), gram)

    def finish(self, mixed: Tensor) -> Tensor:
        return _finish(self.inner, mixed)


@final
@dataclass(frozen=True)
class Bucketing(ByGram):
    """Means of `s` messages drawn at random, then `inner`, whose f counts buckets: at most as many as there are faulty messages.

    The shuffle must be new each step and the same on every rank, and a rule has no state: messages are put in the order of a
    hash of (seed, their squared norm), which no message shares with its own last one.
    """

    s: int = 2
    inner: Combine = field(default_factory=Mean)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.s < 1:
            raise ValueError(f"Bucketing: s must be 1 or more, got {self.s}; it is the number of messages in a bucket")
        _check_inner("Bucketing", self.inner)

    def check(self, count: int, faulty: int) -> None:
        if count < 1:
            raise ValueError("Bucketing: no message to combine")

    def among(self, count: int, broken: int) -> Bucketing:
        return replace(self, inner=self.inner.among(-(-count // self.s), broken))  # each lies in one bucket at most

    def mix(self, gram: Tensor) -> Tensor:
        """The mixing matrix (ceil(n/s), n)."""
        keys = [zlib.crc32(struct.pack("<qd", self.seed, square)) for square in gram.diagonal().tolist()]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        buckets = [order[start : start + self.s] for start in range(0, len(order), self.s)]
        mix = torch.zeros(len(buckets), len(order), dtype=torch.float64)
        for number, bucket in enumerate(buckets):
            mix[number, bucket] = 1.0 / len(bucket)
        return mix

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        return _through(self.inner, self.mix(gram), gram)

    def finish(self, mixed: Tensor) -> Tensor:
        return _finish(self.inner, mixed)
