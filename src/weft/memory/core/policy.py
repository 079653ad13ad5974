"""Which blocks to drop when a block finds no room: Coop's window, and the greedy DTR and DTE.

All price a block by what it would cost to bring back over how long nobody used it (see `blocks.price`):

    h(t) = price(t) / (now - last use of t)

    Coop   the stretch of neighbouring pieces with the least sum of h: what is dropped lies together     `Window`
    DTR    the block of least h / bytes, again and again until some free piece suffices                  `Greedy("bytes")`
    DTE    the block of least h / (bytes + free bytes beside it), likewise                               `Greedy("gap")`

Each may be *partitioned*: blocks with many operations per byte are kept at the right end of the arena, cheap ones at the left.
The pager is DTR over memory that can be remapped: bytes are counted, addresses do not matter.

Source     Coop: Zhang et al., NeurIPS 2023, arXiv:2311.00591. DTR: Kirisame et al., ICLR 2021, arXiv:2006.09616. DTE: Hu et al.,
           "MegTaiChi", ICS 2022, as OneFlow implements it.
"""

from __future__ import annotations

import abc
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from weft.memory.core.arena import MOMENT, Arena, PagedArena, Piece, Space
from weft.memory.core.blocks import Block, price

if TYPE_CHECKING:
    from weft.memory.core.core import Core

__all__ = ["POLICIES", "QUICK", "Greedy", "Policy", "Window"]

STRAINED = 0.6  # of all seconds so far, those of steps that ran again


@dataclass(frozen=True)
class Policy(abc.ABC):
    """How to make room. Holds options, never state.

    Attributes:
        partition: dense blocks right, cheap ones left.
        paged: memory can be remapped: bytes are counted, there are no addresses.
    """

    partition: bool = False
    paged: bool = False

    def space(self, nbytes: int, align: int = 64, small: int | None = None) -> Space:
        """The memory that this policy works on (see `Arena`)."""
        return PagedArena(nbytes, align) if self.paged else Arena(nbytes, align, self.partition, small)

    @abc.abstractmethod
    def make_room(self, core: Core, block: Block) -> bool:
        """Drop blocks (`core.evict`) until `block` is put into `core.arena`; False if that cannot be reached."""


@final
@dataclass(frozen=True)
class Window(Policy):
    """Coop: drop what lies in the cheapest stretch that is long enough."""

    def __post_init__(self) -> None:
        if self.paged:
            raise ValueError("Window: a window needs addresses; use Greedy on paged memory")

    def make_room(self, core: Core, block: Block) -> bool:
        arena, now = core.arena, core.clock
        assert isinstance(arena, Arena)
        while True:
            victims, seen, priced = arena.window(arena.rounded(block.nbytes), price, now)
            core.candidates += seen
            core.scored += priced
            if victims is None:
                return False
            for victim in victims:
                core.evict(victim)  # one that turns out to have lost its recipe stays, and is fixed from now on
            if arena.put(block):
                return True


@final
@dataclass(frozen=True)
class Greedy(Policy):
    """DTR and DTE: drop the block of least h over size, until the new block fits somewhere.

    The published methods score every block before every drop, and `core.candidates` counts that. Within one search prices only
    rise (each drop makes its neighbours dearer), so that a heap whose top is scored again finds the same blocks; where sizes
    grow (DTE, beside a new gap) the neighbours enter it once more. `core.scored` counts the prices worked out.

    Attributes:
        size: what h is divided by: the block's "bytes" (DTR), or "gap", its bytes and the free ones beside it (DTE).
        ahead: share of the memory that is to be free after a search: fewer searches, nearly the same drops. Only blocks of no
            more bytes than that go for it, and none that is late: where blocks are large there are few searches. None goes in
            a program that is `STRAINED`: it might not fit with less memory.
    """

    size: Literal["bytes", "gap"] = "bytes"
    ahead: float = 0.0

    def make_room(self, core: Core, block: Block) -> bool:
        strained = core.repeated_seconds > STRAINED * core.clock
        spare = 0 if strained else int(self.ahead * core.arena.size)
        return drop_greedily(core, self.size == "gap", lambda: core.fits(block), spare)


def drop_greedily(core: Core, gaps: bool, done: Callable[[], bool], spare: int = 0) -> bool:
    """Drop the block of least h / size until `done()`; False if nothing is left to drop. `gaps` adds free neighbours to sizes.
    Go on while fewer than `spare` bytes are free, and the next block is a small one."""
    arena, now, is_done = core.arena, core.clock, False

    def score(candidate: Block, seconds: float) -> float:
        size = candidate.room + arena.beside(candidate) if gaps else candidate.room
        return seconds / (((now - candidate.last) or MOMENT) * size)

    candidates = [block for block in arena.blocks() if block.evictable and not block.pins]
    # a price is at least the block's own seconds: where that alone is too much, it is never worked out
    if gaps:
        heap = [(score(block, block.seconds), number, block) for number, block in enumerate(candidates)]
    else:  # the same without the calls
        heap = [
            (block.seconds / (((now - block.last) or MOMENT) * block.room), number, block)
            for number, block in enumerate(candidates)
        ]
    left = fresh = len(heap)
    heapq.heapify(heap)
    while heap:
        old, number, candidate = heapq.heappop(heap)
        if not candidate.resident or not candidate.evictable:
            continue
        value = score(candidate, price(candidate))
        core.scored += 1
        if value > old:
            heapq.heappush(heap, (value, number, candidate))
            continue
        if is_done and (candidate.room > spare or candidate.late):
            break
        core.candidates += left
        left -= 1
        neighbours = list(_occupied_beside(candidate.piece)) if gaps and candidate.piece is not None else []
        if not core.evict(candidate):
            continue
        is_done = is_done or done()
        if is_done and arena.free >= spare:
            break
        for other in neighbours:
            if other.evictable and not other.pins:
                fresh += 1
                heapq.heappush(heap, (score(other, other.seconds), fresh, other))
    return is_done


def _occupied_beside(piece: Piece) -> Iterator[Block]:
    """The blocks left and right of a piece, or of the gap beside it."""
    for side in ("left", "right"):
        other = getattr(piece, side)
        if other is not None and other.block is None:
            other = getattr(other, side)
        if other is not None and other.block is not None:
            yield other.block


POLICIES: dict[str, Policy] = {
    "coop": Window(),
    "coop-partition": Window(partition=True),
    "dtr": Greedy(),
    "dtr-partition": Greedy(partition=True),
    "dte": Greedy(size="gap"),
    "dte-partition": Greedy(size="gap", partition=True),
    "pager": Greedy(paged=True),
}
QUICK = Greedy(paged=True, ahead=0.01)  # the pager with an eighth of the searches: where deciding may not take long
