"""Schedules drawn at random: whatever may be dropped is dropped now and then, and brought back when it is read."""

from __future__ import annotations

import random

from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule


def random_schedule(trace: Trace, seed: int, chance: float) -> Schedule:
    """A legal schedule of `trace` that drops each droppable value with probability `chance` after each operator."""
    chooser = random.Random(seed)
    actions: list[Action] = []
    there = {v for v, value in enumerate(trace.values) if value.born < 0}
    ready: dict[int, bool] = {}

    def can_return(value: int) -> bool:
        """Whether a value can be made again from what always stays."""
        if value not in ready:
            born = trace.values[value].born
            op = trace.ops[born] if born >= 0 else None
            ready[value] = op is not None and op.repeatable and all(stays(v) or can_return(v) for v in op.reads)
        return ready[value]

    def stays(value: int) -> bool:
        return trace.values[value].category != "activation" or trace.values[value].dies >= len(trace.ops)

    def bring(value: int, extra: list[int]) -> None:
        if value in there:
            return
        op = trace.ops[trace.values[value].born]
        for source in op.reads:
            bring(source, extra)
        actions.append(Action("again", trace.values[value].born))
        for made in op.makes:
            if made not in there:
                there.add(made)
                extra.append(made)

    for index, op in enumerate(trace.ops):
        extra: list[int] = []
        for value in op.reads:
            bring(value, extra)
        actions.append(Action("run", index))
        there |= set(op.makes)
        for value in list(there):
            if trace.values[value].dies <= index:
                there.discard(value)
                if value in extra and trace.values[value].dies < index:
                    actions.append(Action("drop", value))
            elif not stays(value) and can_return(value) and chooser.random() < chance:
                actions.append(Action("drop", value))
                there.discard(value)
    return Schedule(tuple(actions))
