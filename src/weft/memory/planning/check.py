"""Carry a schedule out on sets of numbers: the plain judge of every planner, of the simulator and of replay.

Problem    does a `Schedule` run the step of a `Trace`, and what does it cost in bytes and seconds?
Method     one pass over the actions, one rule per kind of action, `_Judge._run`, `_again`, `_drop`, `_save`, `_load`, `_move`:
           a set of values that are there, with their addresses; nothing is searched, guessed or repaired.
Bytes      while an operator runs:  all values that are there + all it makes (contents of overwritten storages only once, and
           of a repetition also what it makes needlessly) + its workspace.
Seconds    a clock of the device and one of the link to the lower tier (`Tier`). A copy begins when both are ready, and the
           device waits for a save when it drops the value, for a load when it reads it: per window max(compute, transfer).
           Where copies do not overlap fully (`Tier.overlap`), a part of each is the device's own time. So is every move of a
           value within the arena, at `MOVE_RATE`.
Guarantee  what passes has every operator of the step exactly once and in order, each with its inputs at hand, ends with exactly
           the values that outlive the step, and never puts two things at one address.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from weft.cluster.device import Tier
from weft.memory.arguments import expect
from weft.memory.core.core import MOVE_RATE
from weft.memory.planning.shape import recipes
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule

__all__ = ["Checked", "Tier", "check"]


@final
@dataclass(frozen=True, slots=True)
class Checked:
    """What a schedule costs.

    Attributes:
        peak: most bytes there at any moment, counted without gaps: parameters, inputs, activations, workspace.
        reserved: bytes that the step needs: the arena and the most that is outside of it at any moment; `peak` without one.
        seconds: of the step: operators, repetitions, moves within the arena, and waiting for copies.
        overhead: seconds / seconds of the step as traced, less 1.
        repeated_seconds: operators' repetitions alone; `repeated` is how many there are.
        waited_seconds: waiting for copies to and from the lower tier.
        waits: the same for each operator, just before it; one more for after the last.
        saved_bytes, loaded_bytes: copied to the lower tier, and back.
        held_bytes: most bytes in the lower tier at any moment.
        moved_bytes: copied from one address of the arena to another.
        live: for each operator, the most bytes there while it runs, or what is repeated and loaded just before it.
        at: index of the action at the peak.
    """

    peak: int
    reserved: int
    seconds: float
    overhead: float
    repeated_seconds: float
    repeated: int
    waited_seconds: float
    waits: tuple[float, ...]
    saved_bytes: int
    loaded_bytes: int
    held_bytes: int
    moved_bytes: int
    live: tuple[int, ...]
    at: int


def check(trace: Trace, schedule: Schedule, tiers: Sequence[Tier] | Tier | None = None) -> Checked:
    """Carry `schedule` out on paper and say what it costs.

    Args:
        trace: the step; for the schedule of a plan `plan.trace`, where results lie over gradients (`Trace.as_run`).
        schedule: what is to be judged.
        tiers: the lower tier that "save" and "load" go to (one; a sequence may hold at most one for now).

    Raises:
        ValueError: the first action that cannot be done, by number and name: an operator missing, twice or out of order, a
            value that is read and not there, a repetition of what cannot be repeated, two things at one address, something
            outside the arena, a value dropped that is not there, or may not be dropped, or could not be brought back for a
            program that has it still; or, at the end, an operator that
            never ran, a value of the user's that is not there, a temporary that is left.
    """
    expect("check: trace", trace, Trace)
    expect("check: schedule", schedule, Schedule)
    several = list(tiers) if isinstance(tiers, Sequence) else [] if tiers is None else [tiers]
    for tier in several:
        expect("check: tiers", tier, Tier)
    if len(several) > 1:
        raise ValueError(f"check: one lower tier at a time, got {[tier.name for tier in several]}")
    judge = _Judge(trace, schedule, several[0] if several else None)
    try:
        for number, action in enumerate(schedule.actions):
            judge.act(number, action)
        return judge.verdict()
    except ValueError as error:
        if trace.as_run is trace:
            raise
        raise ValueError(
            f"{error}. If the schedule is that of a plan, judge it by plan.trace, the step as weft runs it"
        ) from None


class _Arena:
    """Address ranges in use, in order; refuses overlaps."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.starts: list[int] = []
        self.taken: dict[int, tuple[int, str]] = {}  # start -> (end, what)

    def take(self, start: int, nbytes: int, what: str) -> None:
        if nbytes == 0:
            return
        if start + nbytes > self.nbytes:
            raise ValueError(f"{what} at [{start}, {start + nbytes}) does not lie in the arena of {self.nbytes} bytes")
        place = bisect_left(self.starts, start)
        for near in self.starts[max(place - 1, 0) : place + 1]:
            end, other = self.taken[near]
            if near < start + nbytes and start < end:
                raise ValueError(f"{what} at [{start}, {start + nbytes}) overlaps {other} at [{near}, {end})")
        insort(self.starts, start)
        self.taken[start] = (start + nbytes, what)

    def free(self, start: int, nbytes: int) -> None:
        if nbytes:
            del self.starts[bisect_left(self.starts, start)], self.taken[start]


class _Judge:
    """The state of the step between two actions."""

    def __init__(self, trace: Trace, schedule: Schedule, tier: Tier | None):
        self.trace, self.schedule, self.tier = trace, schedule, tier
        self.end = len(trace.ops)
        self.next = 0  # operator that the program calls next
        self.arena = _Arena(schedule.arena)
        self.there: dict[int, int] = {
            v: -1 for v, value in enumerate(trace.values) if value.born < 0
        }  # value -> address
        self.bytes = sum(trace.values[v].nbytes for v in self.there)
        self.outside = self.bytes
        self.most_outside, self.peak, self.at = self.outside, self.bytes, -1
        self.live: list[int] = []
        self.lately = 0  # most bytes while anything ran since the last operator of the program ended
        self.dying: list[list[int]] = [[] for _ in range(self.end + 1)]
        for v, value in enumerate(trace.values):
            self.dying[min(max(value.dies, 0), self.end)].append(v)
        # time, and what the lower tier holds
        self.clock = self.link = self.repeated_seconds = self.waited = 0.0
        self.waits: list[float] = []
        self.told = 0.0  # how much of `waited` is in `waits`
        self.repeated = self.saved_bytes = self.loaded_bytes = self.held = self.most_held = self.moved_bytes = 0
        self.saved: dict[int, float] = {}  # value -> when its copy is complete
        self.coming: dict[int, float] = {}  # value -> when it is back
        self.last_load = {a.index: n for n, a in enumerate(schedule.actions) if a.kind == "load"}
        self.last_back = self.last_load.copy()
        for n, action in enumerate(schedule.actions):
            if action.kind == "again" and action.index < self.end:
                self.last_back.update((v, max(n, self.last_back.get(v, n))) for v in trace.ops[action.index].makes)
        self.rebuildable = recipes(trace, [value.category == "activation" for value in trace.values])[1]

    # -- actions ------------------------------------------------------------------------------------------------------

    def act(self, number: int, action: Action) -> None:
        rules = {
            "run": self._run,
            "again": self._again,
            "drop": self._drop,
            "save": self._save,
            "load": self._load,
            "move": self._move,
        }
        rule = rules.get(action.kind)
        try:
            if rule is None:
                raise ValueError(f"there is no such action; one of {', '.join(rules)}")
            limit = self.end if action.kind in ("run", "again") else len(self.trace.values)
            if not 0 <= action.index < limit:
                raise ValueError(f"there are only {limit}")
            rule(action, number)
        except ValueError as error:
            name = (
                f" ({self.trace.ops[action.index].name})"
                if action.kind in ("run", "again") and action.index < self.end
                else ""
            )
            raise ValueError(f"Schedule: action {number}, {action.kind} {action.index}{name}: {error}") from None

    def _run(self, action: Action, number: int) -> None:
        if action.index != self.next:
            raise ValueError(f"operator {self.next} is the next one of the program")
        self._execute(action, number)
        self.next += 1
        self.live.append(self.lately)
        self._tell()
        for v in self.dying[action.index]:
            if v in self.there:
                self._leave(v)
        self.lately = 0

    def _again(self, action: Action, number: int) -> None:
        if action.index >= self.next:
            raise ValueError("it has not run yet")
        if not self.trace.ops[action.index].repeatable:
            raise ValueError("it cannot be repeated")
        self._execute(action, number)
        self.repeated += 1
        self.repeated_seconds += self.trace.ops[action.index].seconds

    def _execute(self, action: Action, number: int) -> None:
        """Run an operator: all it reads must be there; what it makes and is there already is made aside and thrown away."""
        op, values = self.trace.ops[action.index], self.trace.values
        for v in op.reads:
            if v not in self.there:
                raise ValueError(f"value {v}, which it reads, is not there")
            self._wait(self.coming.pop(v, 0.0))
        places = self._places(action, op.makes)
        inherited = {new: old for old, new in op.overwrites}
        aside = []  # (address, bytes) given back when the operator ends
        for v in op.makes:
            if v in inherited:
                if places.get(v, -1) not in (-1, self.there[inherited[v]]):
                    raise ValueError(f"value {v} overwrites value {inherited[v]} and lies where that was, nowhere else")
            elif v in self.there:
                aside.append((places.get(v, -1), values[v].nbytes, f"a second value {v}"))
            else:
                self._come(v, places.get(v, -1))
        aside.append((action.workspace, op.workspace, "the workspace"))
        extra = outside = 0
        for address, nbytes, what in aside:
            extra += nbytes
            if address >= 0:
                self.arena.take(address, nbytes, what)
            else:
                outside += nbytes
        self._note(number, extra, outside)
        for address, nbytes, _ in aside:
            if address >= 0:
                self.arena.free(address, nbytes)
        for old, new in op.overwrites:
            address = self.there[old]
            self._leave(old)
            if new not in self.there:
                self._come(new, address)
        self.clock += op.seconds

    def _drop(self, action: Action, number: int) -> None:
        v, dies = action.index, min(self.trace.values[action.index].dies, self.end)
        self._droppable(v)
        if dies >= self.next and self.rebuildable[v] < dies and self.last_back.get(v, -1) < number:
            raise ValueError(f"the program has it until operator {dies}, and it could not be made again that late")
        self._wait(self.saved.get(v, 0.0))
        self._leave(v)

    def _save(self, action: Action, number: int) -> None:
        v, tier = action.index, self._lower()
        self._droppable(v)
        if v in self.saved:
            raise ValueError("it is in the lower tier already")
        self.saved[v] = self._copy(v, after=self.coming.get(v, 0.0))
        nbytes = self.trace.values[v].nbytes
        self.saved_bytes += nbytes
        self.held += nbytes
        self.most_held = max(self.most_held, self.held)
        if self.held > tier.capacity:
            raise ValueError(f"the lower tier ({tier.name}) would hold {self.held} bytes of its {tier.capacity:.0f}")

    def _load(self, action: Action, number: int) -> None:
        v = action.index
        self._lower()
        if v not in self.saved:
            raise ValueError("it was not saved")
        if v in self.there:
            raise ValueError("it is there")
        self._come(v, self._places(action, (v,)).get(v, -1))
        self._note(number)
        self.coming[v] = self._copy(v, after=self.saved[v])
        self.loaded_bytes += self.trace.values[v].nbytes
        if self.last_load[v] == number:
            self.held -= self.trace.values[v].nbytes

    def _move(self, action: Action, number: int) -> None:
        v, places = action.index, self._places(action, (action.index,))
        if self.there.get(v, -1) < 0 or v not in places:
            raise ValueError("only a value that lies in the arena can be moved, to an address that `places` gives")
        self._wait(self.coming.pop(v, 0.0))
        nbytes = self.trace.values[v].nbytes
        self._leave(v)  # first: the two ranges may overlap, as in memmove
        self._come(v, places[v])
        self.moved_bytes += nbytes
        self.clock += nbytes / MOVE_RATE

    # -- their parts --------------------------------------------------------------------------------------------------

    def _places(self, action: Action, allowed: Sequence[int]) -> dict[int, int]:
        for v, _ in action.places:
            if v not in allowed:
                raise ValueError(f"it gives a place to value {v}, which it does not make")
        return dict(action.places)

    def _come(self, v: int, address: int) -> None:
        nbytes = self.trace.values[v].nbytes
        if address >= 0:
            self.arena.take(address, nbytes, f"value {v}")
        else:
            self.outside += nbytes
        self.there[v] = address
        self.bytes += nbytes

    def _leave(self, v: int) -> None:
        nbytes, address = self.trace.values[v].nbytes, self.there.pop(v)
        self.coming.pop(v, None)
        if address >= 0:
            self.arena.free(address, nbytes)
        else:
            self.outside -= nbytes
        self.bytes -= nbytes

    def _note(self, number: int, extra: int = 0, outside: int = 0) -> None:
        now = self.bytes + extra
        self.lately = max(self.lately, now)
        self.most_outside = max(self.most_outside, self.outside + outside)
        if now > self.peak:
            self.peak, self.at = now, number

    def _droppable(self, v: int) -> None:
        if v not in self.there:
            raise ValueError("it is not there")
        if self.trace.values[v].category != "activation":
            raise ValueError(f"it is of category {self.trace.values[v].category}; only activations may go")

    def _lower(self) -> Tier:
        if self.tier is None:
            raise ValueError("no lower tier was given")
        return self.tier

    def _copy(self, v: int, after: float) -> float:
        """When a copy of `v` that is asked for now is complete."""
        tier = self._lower()
        seconds = tier.seconds(self.trace.values[v].nbytes)
        self._wait(self.clock + (1.0 - tier.hidden) * seconds)
        self.link = max(self.link, self.clock, after) + tier.hidden * seconds
        return self.link

    def _wait(self, until: float) -> None:
        if until > self.clock:
            self.waited += until - self.clock
            self.clock = until

    def _tell(self) -> None:
        self.waits.append(self.waited - self.told)
        self.told = self.waited

    def verdict(self) -> Checked:
        if self.next < self.end:
            raise ValueError(f"Schedule: operator {self.next} ({self.trace.ops[self.next].name}) never runs")
        for v, value in enumerate(self.trace.values):
            if value.dies >= self.end and v not in self.there:
                raise ValueError(
                    f"Schedule: value {v} ({value.name or value.category}) outlives the step and is not there"
                )
            if value.dies < self.end and v in self.there:
                raise ValueError(f"Schedule: a temporary is left at the end: value {v}, {value.nbytes} bytes; drop it")
        self._tell()
        eager = self.trace.seconds
        return Checked(
            peak=self.peak,
            reserved=self.schedule.arena + self.most_outside if self.schedule.arena else self.peak,
            seconds=self.clock,
            overhead=self.clock / eager - 1 if eager else 0.0,
            repeated_seconds=self.repeated_seconds,
            repeated=self.repeated,
            waited_seconds=self.waited,
            waits=tuple(self.waits),
            saved_bytes=self.saved_bytes,
            loaded_bytes=self.loaded_bytes,
            held_bytes=self.most_held,
            moved_bytes=self.moved_bytes,
            live=tuple(self.live),
            at=self.at,
        )
