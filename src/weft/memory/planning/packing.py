"""Addresses in the arena for a schedule whose order is known.

Problem    rectangles of given heights (bytes) over given times (from the action that brings something to the one that takes it
           away) get addresses so that no two overlap and the highest end is low: dynamic storage allocation, NP-hard.
Method     first fit: in some order, each rectangle gets the lowest address free during its whole time       `first_fit`
           orders: by bytes and then by beginning or time, by the most bytes that are there at once with it, by bytes x
           time; then, in the best of these, rectangles that stick out move to the front, or a random way there, and all
           are placed again ("squeaky wheel"), a bounded number of times                                  `pack`
           what then still ends above the arena is moved while the step runs                           `moving`
Guarantee  `place` never overlaps (`check` sees to it); the height is at least the most bytes at any moment, `load`.
Source     first fit by size: Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020
           (arXiv:2001.03288); squeaky wheel: Joslin and Clements, JAIR 10, 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from weft.memory.planning.moving import Move, keep_below
from weft.memory.planning.ranges import most_between
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule

__all__ = ["Boxes", "boxes", "first_fit", "inside", "load", "outside_bytes", "pack", "place"]


@final
@dataclass(frozen=True)
class Boxes:
    """What needs addresses: parallel arrays. Box b takes `nbytes[b]` from action `first[b]` to action `last[b]`, both included.

    `where[a]` lists for action a the (value or -1 for workspace, box) that it brings.
    """

    nbytes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    where: tuple[tuple[tuple[int, int], ...], ...]


def inside(trace: Trace) -> list[bool]:
    """For each value, whether it lies in the arena: what the step makes and, unless a gradient, does not leave to the user."""
    end = len(trace.ops)
    before = {value.storage for value in trace.values if value.born < 0}
    stays = {value.storage for value in trace.values if value.dies >= end and value.category != "gradient"}
    return [value.nbytes > 0 and value.storage not in before and value.storage not in stays for value in trace.values]


def outside_bytes(trace: Trace, within: Sequence[bool]) -> int:
    """Most bytes at any moment that do not lie in the arena."""
    change = np.zeros(len(trace.ops) + 2, np.int64)
    successors = {new for op in trace.ops for _, new in op.overwrites}
    for v, value in enumerate(trace.values):
        if not within[v]:
            begin = value.born + 1 if v in successors else value.born
            change[max(begin, 0)] += value.nbytes
            change[min(value.dies, len(trace.ops)) + 1] -= value.nbytes
    return int(change[:-1].cumsum().max(initial=0))


def boxes(trace: Trace, schedule: Schedule, align: int = 64) -> Boxes:
    """The boxes of a schedule, bytes rounded up to `align`. A value overwritten in place and its successor are one box."""
    lies = inside(trace)
    dying: list[list[int]] = [[] for _ in range(len(trace.ops) + 1)]
    for v, value in enumerate(trace.values):
        dying[max(min(value.dies, len(trace.ops)), 0)].append(v)
    sizes: list[int] = []
    first: list[int] = []
    last: list[int] = []
    there: dict[int, int] = {}
    where: list[tuple[tuple[int, int], ...]] = []

    def come(nbytes: int, now: int) -> int:
        sizes.append(-(-nbytes // align) * align)
        first.append(now)
        last.append(now)
        return len(sizes) - 1

    for now, action in enumerate(schedule.actions):
        found: list[tuple[int, int]] = []
        if action.kind in ("run", "again"):
            op = trace.ops[action.index]
            successor = {new: old for old, new in op.overwrites}
            for v in op.makes:
                if not lies[v]:
                    continue
                if v in successor:
                    box = there.pop(successor[v])
                    last[box] = now
                    there.setdefault(v, box)
                elif v in there:
                    box = come(trace.values[v].nbytes, now)  # a second one, thrown away
                else:
                    box = there[v] = come(trace.values[v].nbytes, now)
                found.append((v, box))
            if op.workspace:
                found.append((-1, come(op.workspace, now)))
            if action.kind == "run":
                for v in dying[action.index]:
                    if v in there:
                        last[there.pop(v)] = now
        elif action.kind == "drop" and action.index in there:
            last[there.pop(action.index)] = now - 1
        elif action.kind == "load" and lies[action.index]:
            there[action.index] = come(trace.values[action.index].nbytes, now)
            found.append((action.index, there[action.index]))
        where.append(tuple(found))
    for box in there.values():
        last[box] = len(schedule.actions)
    return Boxes(np.array(sizes, np.int64), np.array(first, np.int64), np.array(last, np.int64), tuple(where))


def load(found: Boxes) -> int:
    """Most bytes in boxes at any moment: no packing is lower."""
    return int(_crowd(found).max()) if len(found.nbytes) else 0


def first_fit(found: Boxes, order: Sequence[int], most: int = 2**62) -> np.ndarray | None:
    """Addresses when each box in turn takes the lowest that is free during its whole time; None if one would end above `most`."""
    count = len(order)
    table = np.empty((4, count), np.int64)  # of the boxes that have a place, by address: first, last, low, high
    result = np.zeros(len(found.nbytes), np.int64)
    sizes, begins, ends = found.nbytes.tolist(), found.first.tolist(), found.last.tolist()
    for n, box in enumerate(order):
        nbytes, begin, end = sizes[box], begins[box], ends[box]
        first, last, low, high = table[:, :n]
        near = ((first <= end) & (last >= begin)).nonzero()[0]
        at = 0
        if len(near):
            starts, tops = low[near], np.maximum.accumulate(high[near])
            room = np.empty(len(near), np.int64)
            room[0], room[1:] = starts[0], starts[1:] - tops[:-1]
            fits = int((room >= nbytes).argmax())
            if room[fits] < nbytes:
                at = int(tops[-1])
            elif fits:
                at = int(tops[fits - 1])
        if at + nbytes > most:
            return None
        result[box] = at
        place = int(low.searchsorted(at, "right"))
        table[:, place + 1 : n + 1] = table[:, place:n]
        table[:, place] = begin, end, at, at + nbytes
    return result


def height(found: Boxes, addresses: np.ndarray) -> int:
    """Where the highest box ends."""
    return int((addresses + found.nbytes).max(initial=0))


def pack(found: Boxes, enough: int = 0, tries: int = 24) -> tuple[np.ndarray, int]:
    """Addresses, and where the highest box ends; stops looking for better once that is at most max(`enough`, load)."""
    count = len(found.nbytes)
    if not count:
        return np.zeros(0, np.int64), 0
    crowd = _crowd(found)
    enough = max(enough, int(crowd.max()))
    time = found.last - found.first + 1
    orders = [
        np.lexsort((found.first, -found.nbytes)),
        np.lexsort((found.first, -time, -found.nbytes)),
        np.lexsort((-found.nbytes, -time, -crowd)),
        np.lexsort((-time, -found.nbytes, -crowd)),
        np.lexsort((found.first, -found.nbytes * time)),
    ]
    draw = np.random.default_rng(0)
    best, order, top = np.zeros(count, np.int64), orders[0], 2**62
    for attempt in range(max(tries, 1)):
        if attempt < len(orders):
            trial = orders[attempt]
        else:
            squeaks = (best + found.nbytes > enough)[order]
            pull = draw.random(count) ** (attempt % 4) if attempt % 4 else 1e-9
            rank = np.arange(1, count + 1) * np.where(squeaks, pull, 1.0)
            trial = order[np.argsort(rank, kind="stable")]
        addresses = first_fit(found, trial.tolist(), top if attempt >= len(orders) else top - 1)
        if addresses is not None:
            best, order, top = addresses, trial, height(found, addresses)
        if top <= enough:
            break
    return best, top


def _crowd(found: Boxes) -> np.ndarray:
    """For each box, the most bytes in boxes at any moment of its time."""
    change = np.zeros(int(found.last.max()) + 2, np.int64)
    np.add.at(change, found.first, found.nbytes)
    np.add.at(change, found.last + 1, -found.nbytes)
    return most_between(change.cumsum(), found.first, found.last + 1)


def place(trace: Trace, schedule: Schedule, room: int = 0, align: int = 64, tries: int = 24) -> tuple[Schedule, int]:
    """`schedule` with an address for everything that lies in the arena, and with moves where only these keep it within `room`.

    Args:
        room: bytes of the arena that are enough; with less than `load`, it is as small as can be without moves.
    Returns:
        it, and the bytes of the arena that it would take without moves.
    """
    found = boxes(trace, schedule, align)
    room -= room % align  # values move to the upper ends of holes too
    packed, top = pack(found, room, tries)
    arena, moves = top, []
    # while a value is copied to a lower tier it has to stay where it is
    if top > room >= load(found) and not any(action.kind == "save" for action in schedule.actions):
        packed, moves = keep_below(found, packed, room)
        arena = room
    addresses, lives, actions = packed.tolist(), [-1] * len(packed), []
    coming = iter([*moves, Move(len(schedule.actions), -1, 0)])
    move = next(coming)
    for now, (action, brought) in enumerate(zip(schedule.actions, found.where, strict=True)):
        while move.action == now:
            addresses[move.box] = move.address
            actions.append(Action("move", lives[move.box], ((lives[move.box], move.address),)))
            move = next(coming)
        for v, box in brought:
            lives[box] = v
        places = tuple((v, addresses[box]) for v, box in brought if v >= 0)
        workspace = next((addresses[box] for v, box in brought if v < 0), -1)
        actions.append(Action(action.kind, action.index, places, workspace))
    return Schedule(tuple(actions), arena), top
