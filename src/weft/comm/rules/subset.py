"""Average a subset: minimum-diameter averaging (server), nearest to the own message (peers without a server).

Problem    throw away as many messages as may be faulty, namely those that stand apart.
Method     MDA            the n - f messages of least diameter. At diameter D the pairs farther apart than D must lose one of
                          two: a vertex cover of at most f. The least such D by bisection over the distances, all covers of size
                          f by branching on a pair (2^f at most, far less as a rule)                     `covers`
           NearestToOwn   the messages nearest to the receiver's own one, the only one it can trust (MoNNA)
Guarantee  MDA: no n - f messages have a smaller diameter. Where a few pairs decide it and more may go, those of most summed
           distance go first; of several such subsets that of least summed squared distance is taken.
           NearestToOwn: the own message is always kept; a message that is not finite counts as infinitely far.
Source     El Mhamdi et al., arXiv:1905.03853; Farhadkhani et al. (MoNNA), arXiv:2209.10931.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weft.comm.combine import Combine, Info, wide
from weft.comm.gram import TINY, weighted
from weft.comm.rules.by_gram import ByGram, check_enough, check_faulty, distances, without_broken

__all__ = ["MDA", "NearestToOwn", "distances_to", "nearest"]

BLOCK = 16384  # columns: a block of differences stays in cache


def covers(far: list[set[int]], budget: int, removed: frozenset[int] = frozenset()) -> Iterator[frozenset[int]]:
    """Every minimal way to remove at most `budget` vertices such that no edge is left; far[i] are the neighbours of i."""
    degrees = [0 if i in removed else len(far[i] - removed) for i in range(len(far))]
    vertex = max(range(len(far)), key=degrees.__getitem__, default=0)
    if not far or degrees[vertex] == 0:
        yield removed
        return
    if budget == 0:
        return
    yield from covers(far, budget - 1, removed | {vertex})
    rest = far[vertex] - removed
    if len(rest) <= budget:  # the vertex stays, so all its neighbours go
        yield from covers(far, budget - len(rest), removed | rest)


@final
@dataclass(frozen=True)
class MDA(ByGram):
    """The mean of the n - f messages of least diameter; n >= 2f + 1. Exponential in f at worst: fine up to f of about 12."""

    f: int = 0

    def __post_init__(self) -> None:
        check_faulty("MDA", self.f)

    def check(self, count: int, faulty: int) -> None:
        check_enough("MDA", count, 2 * faulty + 1, faulty)

    def row(self, gram: Tensor, faulty: int) -> Tensor:
        square, count = distances(gram), len(gram)
        values = torch.cat([square.flatten().unique(), square.new_zeros(1)]).unique().tolist()

        def far(limit: float) -> list[set[int]]:
            return [set((row > limit).nonzero().flatten().tolist()) for row in square]

        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high) // 2
            if next(covers(far(values[middle]), faulty), None) is not None:
                high = middle
            else:
                low = middle + 1
        best: tuple[float, list[int]] | None = None
        for removed in covers(far(values[low]), faulty):
            kept = self._fill([i for i in range(count) if i not in removed], square, count - faulty)
            spread = float(square[kept][:, kept].sum())
            if best is None or (spread, kept) < best:
                best = (spread, kept)
        assert best is not None
        chosen = torch.zeros(count, dtype=torch.float64)
        chosen[best[1]] = 1.0 / len(best[1])
        return chosen

    @staticmethod
    def _fill(kept: list[int], square: Tensor, size: int) -> list[int]:
        """A cover smaller than f leaves too many: drop those with most summed distance, one by one."""
        while len(kept) > size:
            sums = square[kept][:, kept].sum(1)
            kept.pop(len(kept) - 1 - int(sums.flip(0).argmax()))
        return kept


def distances_to(own: Tensor, stack: Tensor) -> Tensor:
    """|x_i - own|^2 in float64, (n,), for messages (n, d): differences first, by blocks, so that no digits cancel.

    A message that is not finite is infinitely far; one whose squares leave the messages' own type is looked at in float64.
    """
    total = _squares(stack, own)
    if stack.dtype != torch.float64:
        odd = (~torch.isfinite(total) | (total < TINY * stack.shape[1])).nonzero().flatten().tolist()
        for number in odd:
            if stack[number].data_ptr() != own.data_ptr():
                total[number] = _squares(stack[number : number + 1].double(), own.double())[0]
    return torch.nan_to_num(total, torch.inf, torch.inf)


def _squares(stack: Tensor, own: Tensor) -> Tensor:
    total = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    dtype = torch.float32 if stack.dtype.itemsize < 4 else stack.dtype
    for start in range(0, stack.shape[1], BLOCK):
        apart = stack[:, start : start + BLOCK].to(dtype) - own[start : start + BLOCK].to(dtype)
        total += torch.linalg.vector_norm(apart, dim=1).double().square()
    return total


def nearest(square: Tensor, own: int, keep: int) -> list[int]:
    """Numbers of the `keep` messages nearest to message `own`, itself first, given squared distances (n,); ties: the lower."""
    square = square.clone()
    square[own] = -1.0
    order = square.sort(stable=True).indices[:keep].tolist()
    return [number for number in order if torch.isfinite(square[number])]


@final
@dataclass(frozen=True)
class NearestToOwn(Combine):
    """MoNNA's rule: the mean of the messages nearest to the receiver's own.

    Attributes:
        f: faulty senders among the n messages given, the own one included.
        keep: how many are averaged, the own one included. None: n - f. With the first n' - f of n' senders at hand, as in
            MoNNA, that is n' - 2f; with all of them it is ByzFL's variant.
    """

    f: int = 0
    keep: int | None = None
    needs = "gram"

    def __post_init__(self) -> None:
        check_faulty("NearestToOwn", self.f)
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"NearestToOwn: keep must be 1 or more, got {self.keep}; None keeps all but f")

    def kept(self, count: int) -> int:
        """How many of `count` messages at hand are averaged, at least the own one."""
        return min(count, self.keep) if self.keep is not None else max(count - self.f, 1)

    def weights(self, info: Info) -> Tensor:
        if info.gram is None or not 0 <= info.own < info.count:
            raise ValueError(
                f"NearestToOwn: needs the inner products and the own message's number, got own = {info.own}"
            )
        gram = info.gram.detach().to("cpu", torch.float64)
        row = gram[info.own]
        return self._row(gram.diagonal() + row[info.own] - 2 * row, info.own)

    def _row(self, square: Tensor, own: int) -> Tensor:
        if not bool(torch.isfinite(square[own])):
            raise ValueError("NearestToOwn: the own message is not finite; skip this step")
        without_broken("NearestToOwn", torch.isfinite(square))
        members = nearest(torch.nan_to_num(square, torch.inf, torch.inf), own, self.kept(len(square)))
        chosen = torch.zeros(len(square), dtype=torch.float64)
        chosen[members] = 1.0 / len(members)
        return chosen

    def __call__(self, stack: Tensor, own: int = -1) -> Tensor:
        """The mean of the nearest for messages (n, d): two passes, no n x n matrix."""
        if stack.dtype.itemsize < 4 or stack.ndim != 2 or not stack.is_floating_point():
            return self(wide("NearestToOwn", stack), own).to(stack.dtype)
        if not 0 <= own < len(stack):
            raise ValueError(f"NearestToOwn: own must be the number of a message in 0..{len(stack) - 1}, got {own}")
        return weighted(self._row(distances_to(stack[own], stack).cpu(), own), stack)
