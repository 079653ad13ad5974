"""Who sends to whom, and what that costs (n ranks, alpha seconds a message, beta bytes a second, D dense and m coded bytes).

    Ring            all-reduce of one sum: linear codecs          2(n-1) alpha + 2(n-1)/n D/beta
    AllGather       everybody gets every message                  (n-1) alpha + (n-1) m/beta
    ScatterGather   each rank owns a segment, combines, encodes it again and all-gathers   2(n-1) alpha + (n-1)/n (m + back)/beta
    Star            to one server and back                        2 alpha + (n-1)(m + back)/beta at the root's link
    Gossip          with neighbours only, by a doubly stochastic matrix; ranks differ afterwards
    Peer            like AllGather, but each rank combines for itself (its own message is special); ranks differ afterwards

All of these are `hops` alpha + `wire` / beta. From Partial to Shard the first half of ScatterGather does, see segments.py.

`choose` picks the one that a codec and a rule need where nothing is said. All but Gossip and Peer leave the ranks bit-identical.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

from weft.comm.codec import Codec, LinearCodec, Spec
from weft.comm.codecs.plain import Identity
from weft.comm.combine import Combine
from weft.comm.memory import Memory
from weft.comm.rules.mean import Mean

__all__ = ["AllGather", "Gossip", "Peer", "Ring", "ScatterGather", "Star", "Topology", "choose"]


class Topology(abc.ABC):
    """A way for messages to travel. Frozen options, no state."""

    def cost(self, nbytes: float, ranks: int, alpha: float, beta: float) -> float:
        """Seconds for messages of `nbytes` bytes from each of n ranks, over links of alpha seconds and beta bytes a second."""
        return self.hops(ranks) * alpha + self.wire(nbytes, ranks) / beta

    @abc.abstractmethod
    def hops(self, ranks: int) -> int:
        """Latencies one after the other."""

    @abc.abstractmethod
    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        """Bytes over the busiest rank's link.

        Args:
            nbytes: of a rank's messages.
            back: of the combined result's, where that is a leg of its own; None for as many.
        """

    def leg_back(self, codec: Codec) -> tuple[Codec, Memory | None] | None:
        """How results are coded on the way back, given the exchange's codec, and the memory there; None: as they are, or not."""
        return None

    def back(self, spec: Spec, nbytes: float) -> float:
        """Bytes of the combined result of one coded tensor, whose message has `nbytes`."""
        return nbytes


@final
@dataclass(frozen=True)
class Ring(Topology):
    """All-reduce: partial sums go round once, the result goes round again. For codes that may be added on the wire.

    >>> Ring().cost(4e6, 4, 1e-4, 1e9)
    0.0066
    """

    def hops(self, ranks: int) -> int:
        return 2 * (ranks - 1)

    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        return 2 * (ranks - 1) / ranks * nbytes


@final
@dataclass(frozen=True)
class AllGather(Topology):
    """Every message to every rank, which decodes and adds in rank order. Its volume grows with n: see `crossover`."""

    def hops(self, ranks: int) -> int:
        return ranks - 1

    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        return (ranks - 1) * nbytes

    @staticmethod
    def crossover(dense: float, coded: float) -> float:
        """The number of ranks from which an all-gather of `coded` bytes sends more than a ring of `dense` bytes.

        (n - 1) m >= 2 (n - 1)/n D  from  n = 2 D/m  on.

        >>> AllGather.crossover(dense=26e6, coded=0.52e6)
        100.0
        """
        return 2 * dense / coded


@final
@dataclass(frozen=True)
class ScatterGather(Topology):
    """Rank r owns segment r of every tensor: it combines the ranks' messages for it and sends the result, encoded again, to all.

    Attributes:
        down: codec of the second leg; None for that of the first.
        memory: what the owner keeps of what it did not send on (error feedback at the owner); None for nothing.
    """

    down: Codec | None = None
    memory: Memory | None = None

    def hops(self, ranks: int) -> int:
        return 2 * (ranks - 1)

    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        return (ranks - 1) / ranks * (nbytes + (nbytes if back is None else back))

    def leg_back(self, codec: Codec) -> tuple[Codec, Memory | None] | None:
        return self.down or codec, self.memory

    def back(self, spec: Spec, nbytes: float) -> float:
        return nbytes if self.down is None else self.down.nbytes(spec, self.down.default(spec))


@final
@dataclass(frozen=True)
class Star(Topology):
    """Every message to one server, the combined one back down.

    Attributes:
        root: rank of the server within the group.
        down: codec of the way back; None sends float32.
        memory: what the server keeps of what it did not send; None for nothing.
    """

    root: int = 0
    down: Codec | None = None
    memory: Memory | None = None

    def __post_init__(self) -> None:
        if self.root < 0:
            raise ValueError(f"Star: root must be a rank >= 0, got {self.root}")

    def hops(self, ranks: int) -> int:
        return 2

    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        return (ranks - 1) * (nbytes + (nbytes if back is None else back))

    def leg_back(self, codec: Codec) -> tuple[Codec, Memory | None] | None:
        return None if self.down is None else (self.down, self.memory)

    def back(self, spec: Spec, nbytes: float) -> float:
        down = self.down or Identity()
        return down.nbytes(spec, down.default(spec))


@final
@dataclass(frozen=True)
class Gossip(Topology):
    """Average with neighbours: rank i delivers sum_j weights[i][j] message_j and sends only where weights[j][i] is not 0.

    Attributes:
        weights: n rows of n numbers >= 0; every row and every column sums to one, so that the mean over ranks is kept.
    """

    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        n = len(self.weights)
        if any(len(row) != n for row in self.weights):
            raise ValueError(
                f"Gossip: weights must be a square table, got rows of {[len(row) for row in self.weights]}"
            )
        for what, sums in (("row", map(sum, self.weights)), ("column", map(sum, zip(*self.weights, strict=True)))):
            for number, total in enumerate(sums):
                if abs(total - 1) > 1e-9:
                    raise ValueError(f"Gossip: every {what} of weights must sum to 1, got {total} in {what} {number}")
        if any(weight < 0 for row in self.weights for weight in row):
            raise ValueError("Gossip: weights must be >= 0")

    @property
    def degree(self) -> int:
        """Messages that the busiest rank sends."""
        n = len(self.weights)
        return max((sum(1 for j in range(n) if j != i and self.weights[j][i] > 0) for i in range(n)), default=0)

    def hops(self, ranks: int) -> int:
        return self.degree

    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        return self.degree * nbytes


@final
@dataclass(frozen=True)
class Peer(Topology):
    """All to all; each rank combines with its own message as the reference (`Info.own`)."""

    def hops(self, ranks: int) -> int:
        return ranks - 1

    def wire(self, nbytes: float, ranks: int, back: float | None = None) -> float:
        return (ranks - 1) * nbytes


def choose(codec: Codec, combine: Combine) -> Topology:
    """What fits where nothing is said: a ring if messages may be added on the wire and the mean is wanted, else an all-gather.

    An all-gather also where messages could be added but the rule must see them one by one (robust rules).
    """
    return Ring() if isinstance(codec, LinearCodec) and isinstance(combine, Mean) else AllGather()
