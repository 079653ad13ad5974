"""Addresses that change while a step runs, for schedules whose bytes fit and for which no fixed addresses are found.

Problem    boxes (see `packing`) that together never take more than `room` bytes, and a packing of them that ends above it: give
           them addresses below `room`, which may change between two actions; what is moved costs time.
Method     `keep_below` takes that of two ways which copies fewer bytes.
           `_hop`   what the packing has below `room` stays there. Each other box goes from hole to hole: always to the one in
                    which it can stay longest, free already while it lies in the one before.
           `_Row`   one pass through time. A box that comes gets the address that it has in the packing, if that is below `room`
                    and free; else the hole that is in the way of nobody for longest; else the stretch of neighbours of the
                    fewest bytes is pushed together to the left.
Guarantee  the second way always succeeds: bytes that are free somewhere are free together after pushing. No move needs bytes
           other than those that the box leaves and those that are free.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

if TYPE_CHECKING:
    from weft.memory.planning.packing import Boxes

__all__ = ["Move", "keep_below"]

NEVER = 2**62
MOST = 500  # boxes above `room` for which holes are looked for one by one


class Move(NamedTuple):
    """Just before `action`, `box` is copied to `address`."""

    action: int
    box: int
    address: int


def keep_below(found: Boxes, packed: np.ndarray, room: int) -> tuple[np.ndarray, list[Move]]:
    """The address at which each box comes, and all moves in order, given the addresses of a packing that may end above `room`.

    Args:
        room: bytes, at least `load(found)`.
    """
    row = _Row(found, packed, room)
    for box in row.order.tolist():
        row.come(box)
    ways = [(row.came, row.moves), *([hops] if (hops := _hop(found, packed, room)) is not None else [])]
    return min(ways, key=lambda way: sum(int(found.nbytes[move.box]) for move in way[1]))


def _hop(found: Boxes, packed: np.ndarray, room: int) -> tuple[np.ndarray, list[Move]] | None:
    """Move only what lies above `room`, the largest first; None if that is too much, or if at some moment no hole suffices."""
    stays = packed + found.nbytes <= room
    if (~stays).sum() > MOST:
        return None
    taken = np.stack((found.first, found.last, packed, packed + found.nbytes))[:, stays]  # first, last, low, high
    came, moves = packed.copy(), []
    for box in np.argsort(-found.nbytes * ~stays, kind="stable")[: (~stays).sum()].tolist():
        begin, end, nbytes = int(found.first[box]), int(found.last[box]), int(found.nbytes[box])
        now, free_from = begin, begin
        while now <= end:
            first, _, low, high = taken[:, (taken[1] >= free_from) & (taken[0] <= end)]
            there = first <= now
            order = np.argsort(low[there])
            at, until = _longest(_gaps(low[there][order], high[there][order], room), nbytes, low, high, first)
            if until <= now:
                return None
            stop = min(until - 1, end)
            taken = np.concatenate((taken, [[free_from], [stop], [at], [at + nbytes]]), axis=1)
            if now == begin:
                came[box] = at
            else:
                moves.append(Move(now, box, at))
            now, free_from = stop + 1, stop  # it is copied while it is in both places
    return came, sorted(moves)


def _gaps(low: np.ndarray, high: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each gap begins and ends, before, between and behind ranges in order of `low`, which may overlap."""
    return np.concatenate(([0], np.maximum.accumulate(high))), np.append(low, room)


def _longest(
    gaps: tuple[np.ndarray, np.ndarray], nbytes: int, low: np.ndarray, high: np.ndarray, first: np.ndarray
) -> tuple[int, int]:
    """At an end of one of `gaps`, the address where `nbytes` stay longest out of the way of ranges that begin at `first`.

    Returns:
        it, and when the first of them comes; -1 for that if no gap is long enough.
    """
    fits = gaps[1] - gaps[0] >= nbytes
    places = np.concatenate((gaps[0][fits], gaps[1][fits] - nbytes))
    if not len(places):
        return 0, -1
    meets = (low < places[:, None] + nbytes) & (high > places[:, None])
    until = np.where(meets, first, NEVER).min(axis=1, initial=NEVER)
    best = int(until.argmax())
    return int(places[best]), int(until[best])


@final
class _Row:
    """Who lies where at one moment, by address: `starts[k]` is where `boxes[k]` begins."""

    def __init__(self, found: Boxes, packed: np.ndarray, room: int):
        self.room, self.packed = room, packed
        self.nbytes, self.first = found.nbytes, found.first
        self.last: list[int] = found.last.tolist()  # asked for one by one
        self.starts: list[int] = []
        self.boxes: list[int] = []
        self.came = np.zeros(len(packed), np.int64)
        self.moves: list[Move] = []
        self.order = np.lexsort((-self.nbytes, self.first))  # in time; of one action, the largest first
        self._begins = self.first[self.order]
        self._at_home = (packed + self.nbytes <= room)[self.order]
        self._soonest = -1  # somebody who lies here may have gone after this action

    def come(self, box: int) -> None:
        """The next box in time gets an address."""
        now, nbytes, home = int(self.first[box]), int(self.nbytes[box]), int(self.packed[box])
        if self._soonest < now:
            self._leave(now)
        place = bisect_right(self.starts, home)
        free = (place == 0 or self.starts[place - 1] + self.nbytes[self.boxes[place - 1]] <= home) and (
            home + nbytes <= (self.starts[place] if place < len(self.starts) else self.room)
        )
        at = home if free else self._hole(box)
        if at is None:
            at = self._push(nbytes, now)
        place = bisect_right(self.starts, at)
        self.starts.insert(place, at)
        self.boxes.insert(place, box)
        self.came[box] = at
        self._soonest = min(self._soonest, self.last[box])

    def _leave(self, now: int) -> None:
        last = self.last
        stays = [last[box] >= now for box in self.boxes]
        self.starts, self.boxes = list(compress(self.starts, stays)), list(compress(self.boxes, stays))
        self._soonest = min(map(last.__getitem__, self.boxes), default=now)

    def _ranges(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.array(self.starts, np.int64)
        return starts, starts + self.nbytes[self.boxes]

    def _hole(self, box: int) -> int | None:
        """Where `box` is in the way of those who come later for as long as can be avoided; None if there is no hole for it."""
        span = slice(*np.searchsorted(self._begins, (self.first[box], self.last[box]), "right"))
        coming = self.order[span][self._at_home[span]]
        home, first = self.packed[coming], self.first[coming]
        gaps = _gaps(*self._ranges(), self.room)
        at, until = _longest(gaps, int(self.nbytes[box]), home, home + self.nbytes[coming], first)
        return at if until >= 0 else None

    def _push(self, nbytes: int, now: int) -> int:
        """Push neighbours together so that `nbytes` are free behind them; returns where."""
        low, high = _gaps(*self._ranges(), self.room)
        free, held = (np.concatenate(([0], np.cumsum(sizes))) for sizes in (high - low, self.nbytes[self.boxes]))
        begin = np.arange(len(low))
        end = np.searchsorted(free, free[:-1] + nbytes)  # gaps [begin, end) have it together
        begin, end = begin[end < len(free)], end[end < len(free)]
        best = (held[end - 1] - held[begin]).argmin()
        at = int(low[begin[best]])
        for k in range(int(begin[best]), int(end[best]) - 1):
            box = self.boxes[k]
            self.starts[k] = at
            if self.first[box] < now:
                self.moves.append(Move(now, box, at))
            else:
                self.came[box] = at  # it comes by the same action, and has no bytes yet
            at += int(self.nbytes[box])
        return at
