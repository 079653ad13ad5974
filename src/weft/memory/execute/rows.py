"""A plan as rows, one per operator: what is done before it, where what it makes belongs, and what has to be remembered of it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

from weft.memory.execute.actions import Actions
from weft.memory.execute.backends import Places
from weft.memory.execute.facts import Facts
from weft.memory.execute.recall import let_go
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule

__all__ = ["Row", "rows"]


@dataclass(slots=True, eq=False)
class Row:
    """One operator of the trace, and what is to be done before it."""

    name: str
    makes: tuple[int, ...]  # fresh values, in order
    overwrites: tuple[tuple[int, int], ...]
    places: Places  # of the fresh values
    workspace: tuple[int, int]  # address and bytes
    remember: bool  # the call may be repeated
    bind: bool  # what it makes may go, or is read by calls that may be repeated
    made: int  # bytes of the fresh values
    open: bool  # the program may have it make more than planned: it reads what that has brought along, or nothing
    facts: Facts | None = None  # once seen
    before: list[Callable[[], None]] = field(default_factory=list)


def rows(
    trace: Trace, schedule: Schedule, actions: Actions, remember: Set[int], addresses: bool
) -> tuple[list[Row], list[Callable[[], None]]]:
    """The rows, and what is done after the last operator.

    Args:
        actions: carries out what the schedule says.
        remember: operators whose calls are remembered.
        addresses: bytes have addresses. Else a load may begin where the schedule has it and end before its first reader.
    """
    bound = {v for j in remember for v in (*trace.ops[j].reads, *trace.ops[j].makes)}
    bound.update(a.index for a in schedule.actions if a.kind in ("drop", "move", "save", "load"))
    found: list[Row] = []
    waiting: list[Callable[[], None]] = []
    coming: dict[int, Action] = {}  # value -> the load that has begun, and is complete before its first reader runs
    for action in schedule.actions:
        if action.kind == "load" and not addresses:
            waiting.append(actions.fetching(action))
            coming[action.index] = action
            continue
        wanted = trace.ops[action.index].reads if action.kind in ("run", "again") else (action.index,)
        waiting += [actions.doing(coming.pop(v)) for v in wanted if v in coming]
        if action.kind == "run":
            row = _row(trace, action, remember)
            row.bind = addresses or not bound.isdisjoint(trace.ops[action.index].makes) or _lasts(trace, row)
            row.before, waiting = waiting, []
            found.append(row)
        else:
            waiting.append(actions.doing(action))
    for j, last in let_go(trace, schedule).items():
        if last + 1 < len(found):  # else when the step ends
            found[last + 1].before.insert(0, actions.letting_go(j))
    return found, waiting + [actions.doing(action) for action in coming.values()]


def _row(trace: Trace, action: Action, remember: Set[int]) -> Row:
    op, places = trace.ops[action.index], dict(action.places)
    inherited = {new for _, new in op.overwrites}
    fresh = tuple(v for v in op.makes if v not in inherited)
    where = tuple((trace.values[v].nbytes, places.get(v, -1)) for v in fresh)
    reads = [trace.values[v] for v in op.reads]
    from_outside = not reads or any(value.born < 0 and value.category == "input" for value in reads)
    workspace, remembered = (action.workspace, op.workspace), action.index in remember
    made, is_open = sum(nbytes for nbytes, _ in where), bool(fresh) and from_outside
    return Row(op.name, fresh, op.overwrites, where, workspace, remembered, False, made, is_open)


def _lasts(trace: Trace, row: Row) -> bool:
    """Whether something that an operator makes outlives the step."""
    return any(trace.values[v].dies >= len(trace.ops) for v in row.makes)
