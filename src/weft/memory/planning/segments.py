"""Checkpoints at a few places, everything between them rebuilt when the way back comes to it.

Method     the operators before the moment of most bytes are cut into runs that leave equally many bytes for after it. What a
           run leaves for after that moment only is given up; what a later run reads is kept, so that a run can be rebuilt from
           there, once, as its parts are needed. The last run is kept. Of 2, 4, 8, ... runs `checkpoint` takes those
           whose plan is within the budget and cheapest, or else those of least bytes.
Source     Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", 2016 (arXiv:1604.06174), there for chains.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from weft.memory.planning.retention import Retention

__all__ = ["checkpoint"]

MOST = 128  # runs


def checkpoint(plan: Retention, budget: int, grain: int) -> None:
    """Turn a new plan, which keeps everything, into one with checkpoints.

    Args:
        grain: values of fewer bytes are kept.
    """
    waiting = _waiting(plan, grain)
    best, count = None, 0
    runs = 2
    while runs <= min(MOST, len(waiting)):
        mark = plan.mark()
        _cut(plan, waiting, runs)
        peak = int(plan.peaks().max())
        found = (max(peak - budget, 0), plan.seconds, peak)
        plan.undo(mark)
        if best is None or found < best:
            best, count = found, runs
        elif found[0] > 2 * best[0] and best[0]:
            break
        runs *= 2
    if count:
        _cut(plan, waiting, count)
    plan.forget()


def _waiting(plan: Retention, grain: int) -> list[tuple[int, int, int]]:
    """(value, from, until) of what is kept across the moment of most bytes and could be rebuilt, by birth."""
    turn = int(plan.peaks().argmax())
    gaps = [gap for gap in plan.droppable(grain) if gap[1] < turn <= gap[2]]
    return sorted(gaps, key=lambda gap: (plan.shape.born[gap[0]], gap[0]))


def _cut(plan: Retention, waiting: list[tuple[int, int, int]], runs: int) -> None:
    shape = plan.shape
    size = np.cumsum([shape.bytes[v] for v, *_ in waiting])
    cuts = np.searchsorted(size, size[-1] * np.arange(1, runs) / runs)
    ends = [shape.born[waiting[k][0]] for k in cuts.tolist()]  # the last operator of each run but the last
    for v, start, _ in reversed(waiting[: int(cuts[-1]) + 1]):
        run = bisect_left(ends, shape.born[v])
        if run < len(ends) and start <= ends[run]:
            stages = plan.stages[v]
            stop = stages[bisect_left(stages, start + 1)]  # earlier than it was, if what is made of it is rebuilt
            if stop in plan.kept[v] and stop <= shape.rebuildable[v]:
                plan.drop(v, stop)
