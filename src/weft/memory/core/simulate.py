"""A traced step run through the policy core on paper: what a budget would cost, and the schedule that pays it.

`simulate` gives each operator of a `Trace` to a `Core` as online execution would, with a machine that only writes down what it
is asked. Values that are there before the step (parameters, buffers, optimizer state, inputs) lie outside the arena; what
the step makes lies inside. Only activations can be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from weft.cluster.units import nbytes_of
from weft.errors import BudgetError
from weft.memory.arguments import expect
from weft.memory.core.blocks import Block, Step
from weft.memory.core.core import MOVE_RATE, Core
from weft.memory.core.policy import POLICIES, Policy
from weft.memory.record import Trace
from weft.memory.schedule import Action, Kind, Schedule
from weft.names import pick

__all__ = ["Simulation", "simulate"]


@final
@dataclass(frozen=True)
class Simulation:
    """What a step costs under a policy.

    Attributes:
        schedule: what was done, for `check` and for replay; None if it was not asked for.
        peak: most bytes at once, `Trace.fixed` included, sizes rounded as in the arena.
        seconds: of the step, recomputation and moves included.
        overhead: recomputation and moves over the step's own seconds.
        fragmentation: mean over searches of the share of the arena that is still free when room has been made.
        searches: how often something did not fit. candidates: blocks scored per search, as the published method does it.
        scored: blocks that were really scored per search.
        evictions, repeats: blocks dropped to make room; operators run again. moved_bytes: pushed together.
    """

    policy: str
    budget: int
    schedule: Schedule | None
    peak: int
    seconds: float
    overhead: float
    fragmentation: float
    candidates: float
    scored: float
    searches: int
    evictions: int
    repeats: int
    moved_bytes: int


def simulate(
    trace: Trace,
    budget: int | str,
    policy: Policy | str = "coop",
    *,
    gradients_outside: bool = False,
    moves: bool = True,
    small: int | None = None,
    log: bool = True,
) -> Simulation:
    """Run `trace` within `budget` bytes on paper.

    Args:
        budget: bytes for everything on the device, `Trace.fixed` included; or text with a unit ("6GiB").
        policy: a `Policy`, or the name of one of `POLICIES`.
        gradients_outside: gradients are held elsewhere, and count nothing.
        moves: blocks may be pushed together when enough bytes are free, but not in one place.
        small: bytes up to which a block is never dropped (see `Arena`).
        log: write the schedule.
    Raises:
        ValueError: an argument is not what it must be.
        BudgetError: the policy finds no way; another one, or `weft.memory.plan`, may.
    """
    expect("simulate: trace", trace, Trace)
    budget = nbytes_of(budget, "simulate: budget")
    chosen = policy if isinstance(policy, Policy) else pick(policy, POLICIES, "policy")
    name = policy if isinstance(policy, str) else type(policy).__name__
    if gradients_outside:
        trace = trace.without("gradient")
    fixed = _outside(trace)
    if fixed > budget:
        raise BudgetError(budget, 0, f"parameters, buffers, optimizer state and inputs alone take {fixed:,} bytes")
    machine = _Paper(trace) if log else _Nothing(trace)
    align = (1 if chosen.paged else 64) if trace.device == "cpu" else 512
    core = Core(budget - fixed, chosen, machine, align=align, moves=moves, small=small)
    try:
        _run(trace, core, machine)
    except BudgetError as error:
        raise BudgetError(budget, 0, f"{error.what}; {fixed:,} bytes are always taken") from None
    extra, searches = core.repeated_seconds + core.moved_bytes / MOVE_RATE, max(core.searches, 1)
    return Simulation(
        policy=name,
        budget=budget,
        schedule=Schedule(tuple(machine.actions), 0 if chosen.paged else core.arena.size) if log else None,
        peak=fixed + core.arena.most,
        seconds=trace.seconds + extra,
        overhead=extra / trace.seconds if trace.seconds else 0.0,
        fragmentation=core.fragmentation,
        candidates=core.candidates / searches,
        scored=core.scored / searches,
        searches=core.searches,
        evictions=core.evictions,
        repeats=core.repeats,
        moved_bytes=core.moved_bytes,
    )


def _run(trace: Trace, core: Core, machine: _Nothing) -> None:
    values, end = trace.values, len(trace.ops)
    there: dict[int, Block] = {}  # of the values that somebody refers to
    ends: list[list[int]] = [[] for _ in range(end)]
    for number, value in enumerate(values):
        inside = value.category == "activation"
        if value.born < 0:
            there[number] = core.adopt(value.nbytes, number)
        if value.dies < end and (inside or value.born >= 0):  # the other kinds are `fixed` until the end
            ends[value.dies].append(number)
    leaves = _leaves_by_end(trace, ends)
    begin, finish, release = core.begin, core.end, core.release
    for index, op in enumerate(trace.ops):
        makes = op.makes
        if (
            leaves[index] or op.overwrites
        ):  # their bytes go with this operator: what needs them must come back before it
            core.rescue([there[v] for v in (*leaves[index], *(old for old, _ in op.overwrites)) if v in there])
        step = begin(
            [there[v] for v in op.reads],
            [(values[v].nbytes, op.dense) for v in makes],
            op.workspace,
            op.seconds,
            op.repeatable,
            [(there[old], makes.index(new)) for old, new in op.overwrites] if op.overwrites else (),
            index,
        )
        made = step.makes
        for v, block in zip(makes, made, strict=True):
            block.payload = v
            there[v] = block
            if values[v].category != "activation":
                block.evictable, block.step = False, None
        machine.run(step)
        finish(step)
        for old, _ in op.overwrites:
            del there[old]
        for v in ends[index]:
            block = there.pop(v, None)
            if block is not None:
                release(block)
    for block in there.values():  # what outlives the step is there at its end
        core.ensure(block)


def _outside(trace: Trace) -> int:
    """Bytes that are there before the step, and what is written over them: `Trace.fixed`, and activations left from before,
    which die in the step; their bytes are not used again."""
    return sum({value.storage: value.nbytes for value in trace.values if value.born < 0}.values())


def _leaves_by_end(trace: Trace, ends: list[list[int]]) -> list[list[int]]:
    """By operator: the values made before it that it is the last to use, and that perhaps cannot be made again: those without
    recipe, and all from the moment when one of these has gone."""
    once = {v for v, value in enumerate(trace.values) if value.born < 0 or value.category != "activation"}
    gone, found = False, []
    for index, op in enumerate(trace.ops):
        if not op.repeatable or any(old in once for old, _ in op.overwrites):
            once.update(op.makes)
        gone = gone or any(v in once for v in ends[index]) or any(old in once for old, _ in op.overwrites)
        found.append([v for v in ends[index] if (gone or v in once) and trace.values[v].born < index])
    return found


class _Nothing:
    """A machine that does nothing."""

    actions: list[Action]

    def __init__(self, trace: Trace):
        self.trace = trace
        self.actions = []

    def run(self, step: Step) -> None: ...

    def drop(self, block: Block) -> None: ...

    def place(self, block: Block) -> None: ...

    def again(self, step: Step) -> None: ...

    def move(self, block: Block, old_offset: int) -> None: ...

    def describe(self, step: Step | None, block: Block) -> str:
        if step is not None:
            op = self.trace.ops[step.payload]
            return f"{op.name} in {op.module}" if op.module else op.name
        name = self.trace.values[block.payload].name
        return f"value {block.payload}" + (f" of {name}" if name else "")


@final
class _Paper(_Nothing):
    """A machine that writes down what it is asked. What is held outside the arena has no place."""

    def __init__(self, trace: Trace):
        super().__init__(trace)
        self.outside = {v.storage for v in trace.values if v.born < 0}

    def run(self, step: Step) -> None:
        self._ran("run", step, [block.offset for block in step.makes])

    def again(self, step: Step) -> None:
        self._ran("again", step, step.places)
        makes = self.trace.ops[step.payload].makes
        for v, reference in zip(makes, step.outputs, strict=True):
            if reference() is None:  # a value that nobody knows any more: for a schedule it came back
                self.actions.append(Action("drop", v))

    def _ran(self, kind: Kind, step: Step, offsets: Sequence[int]) -> None:
        numbers, values, outside = self.trace.ops[step.payload].makes, self.trace.values, self.outside
        places = [(v, at) for v, at in zip(numbers, offsets, strict=True) if values[v].storage not in outside]
        self.actions.append(Action(kind, step.payload, tuple(places), step.offset))

    def drop(self, block: Block) -> None:
        self.actions.append(Action("drop", block.payload))

    def move(self, block: Block, old_offset: int) -> None:
        self.actions.append(Action("move", block.payload, ((block.payload, block.offset),)))
