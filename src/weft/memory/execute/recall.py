"""Which calls of a planned step replay has to remember, and which results it may keep though the plan drops them.

A call that is remembered can be repeated, and holds what it reads if that cannot be made again: more is safer, less is leaner. A
plan counts what was carried into the step (a hook's notes of the last one) until the program lets go of it, and no longer: a
call that reads such a thing is remembered only if the plan may repeat it, or it may be asked for, and until then. Where that is
after the program has let go of it, the plan counts it for longer (`counted`).
"""

from __future__ import annotations

from dataclasses import replace

from weft.memory.record import Trace
from weft.memory.schedule import Schedule

__all__ = ["asked_for", "counted", "let_go", "never_read_again", "remembered"]


def remembered(trace: Trace, schedule: Schedule, room: int, cautious: bool) -> set[int]:
    """Operators whose calls are remembered: those that may have to run again, and, so that the step can go on online if it turns
    out to be another one, those of the forward pass, whose results users may hold on to; if `cautious`, all. None if nothing
    is dropped and there is `room`, in bytes beside the plan, for as much again: nothing will have to be."""
    found = _repeated(trace, schedule)
    if not found and room > trace.peak - trace.fixed:
        return found
    phases = ("forward", "backward") if cautious else ("forward",)
    # Not the readers of what cannot be made again (results of collectives): they would hold bytes that no plan counts.
    once = {v for op in trace.ops if not op.repeatable for v in op.makes if trace.values[v].category == "activation"}
    once.update(_going(trace))
    return found | {
        j for j, op in enumerate(trace.ops) if op.phase in phases and op.repeatable and once.isdisjoint(op.reads)
    }


def _repeated(trace: Trace, schedule: Schedule) -> set[int]:
    """Operators that may have to run again: those that the schedule repeats, and those that may be `asked_for`."""
    again = {a.index for a in schedule.actions if a.kind == "again"}
    return {j for j in again.union(asked_for(trace, schedule)) if trace.ops[j].repeatable}


def asked_for(trace: Trace, schedule: Schedule) -> dict[int, int]:
    """Operators without which something dropped could not be brought back if the step were left, or went on otherwise, while
    the user still refers to it; each with the last operator during which that is so."""
    values = trace.values
    found: dict[int, int] = {}
    last = {a.index: n for n, a in enumerate(schedule.actions) if a.kind == "drop"}
    back = {v: n for n, a in enumerate(schedule.actions) if a.kind == "again" for v, _ in a.places}
    lasting: dict[int, int] = {}  # value -> until when it may be asked for
    stack = [(v, values[v].dies) for v, n in last.items() if back.get(v, -1) < n]
    while stack:
        v, until = stack.pop()
        if values[v].born < 0 or lasting.get(v, -1) >= until:
            continue
        lasting[v] = until
        found[values[v].born] = max(until, found.get(values[v].born, until))
        # an input that lives as long is there, or has been dropped itself and is in this list
        stack += [(read, until) for read in trace.ops[values[v].born].reads if values[read].dies < until]
    return found


def let_go(trace: Trace, schedule: Schedule) -> dict[int, int]:
    """Calls that are `asked_for` and hold what was carried into the step and goes in its course, each with the last operator
    before which it may be wanted."""
    going, asked = _going(trace), asked_for(trace, schedule)
    found = {j: until for j, until in asked.items() if not going.keys().isdisjoint(trace.ops[j].reads)}
    at = 0
    for action in schedule.actions:
        if action.kind == "run":
            at = action.index + 1
        elif action.kind == "again" and action.index in found:
            found[action.index] = max(found[action.index], at)
    return found


def counted(trace: Trace, schedule: Schedule) -> Trace:
    """The trace, where what was carried in lives as long as a call holds it (`let_go`); the same one if that is no longer."""
    going, values, ops = _going(trace), list(trace.values), trace.ops
    for j, until in let_go(trace, schedule).items():
        for last in {going[v] for v in ops[j].reads if v in going and ops[j].repeatable}:
            values[last] = replace(values[last], dies=max(values[last].dies, until))
    return replace(trace, values=tuple(values)) if values != list(trace.values) else trace


def _going(trace: Trace) -> dict[int, int]:
    """Values carried into the step whose storages go in its course, each with the last value of that storage. No call holds
    gradients."""
    last: dict[int, int] = {}
    for v, value in enumerate(trace.values):
        if value.storage not in last or trace.values[last[value.storage]].dies < value.dies:
            last[value.storage] = v
    return {
        v: last[value.storage]
        for v, value in enumerate(trace.values)
        if value.born < 0 and value.category != "gradient" and trace.values[last[value.storage]].dies < len(trace.ops)
    }


def never_read_again(trace: Trace, schedule: Schedule, room: int) -> tuple[set[int], set[int]]:
    """Values that the plan drops for good though somebody (a local variable, mostly the loss) refers to them when the
    optimizer begins. Once it has changed the parameters they could not be brought back. The second set are those that are
    kept nevertheless: as many as fit into `room` bytes."""
    values, ops = trace.values, trace.ops
    start = next((j for j, op in enumerate(ops) if op.phase == "optimizer"), len(ops))
    state: dict[int, bool] = {}  # value -> there
    for action in schedule.actions:
        if action.kind == "drop":
            state[action.index] = False
        else:
            state.update((v, True) for v, _ in action.places)
    unread = {v for v, there in state.items() if not there and start <= values[v].dies + 1}
    moved = {action.index for action in schedule.actions if action.kind in ("save", "load", "move")}
    spared: set[int] = set()
    for v in sorted(unread, key=lambda v: values[v].nbytes):
        if values[v].nbytes <= room and v not in moved:
            spared.add(v)
            room -= values[v].nbytes
    return unread - spared, spared
