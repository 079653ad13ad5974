"""Which values are there when: a plan for one step that can be changed a little and priced again quickly.

Problem    change one decision of a plan (keep this value between these two uses, or give it back and rebuild it) and know the
           new seconds and the new bytes at every operator without running the step again.
State      *stage* t is what happens from the end of operator t - 1 to the end of operator t: repetitions, then operator t; the
           stage after the last operator demands what outlives the step. Value v is *demanded* at the stages whose operator
           reads it (`Shape.uses`) and at those where a repetition reads it. Between two demands that follow each other, a *gap*,
           it is either kept or not; what is demanded and was not kept is rebuilt in that stage by repeating its operator,
           which demands the operator's inputs there. Gaps are all there is to decide; everything else follows from them.
Bytes      peak of stage t = base[t] + top[t]:  base is what is there when the stage begins, a sum over kept gaps;
           top is what the stage itself adds at most, found by carrying out its repetitions in order       `Retention._stage`
           when somebody asks for it, and for as many stages as he needs to know                    `excess_below`
Moves      `drop` and `keep` turn one gap, `send` gives it a `Trip` to the lower tier, with all that follows; a journal takes
           back what `undo` is asked to.
Source     retention intervals as decision variables: Bartan et al., "Moccasin", ICML 2023 (arXiv:2304.14463), there for a
           constraint solver; the incremental evaluation is ours.

Rules that keep a plan possible (all static, so a move never fails halfway):
    a gap in which the user's last reference dies cannot be kept: the bytes go whatever the plan says;
    an overwritten value cannot be kept after its death: repeating the overwriting operator consumes it;
    a value can be rebuilt up to stage `Shape.rebuildable`, and demanded as late or while it lives: its operator is repeatable
    and each input can be demanded that late too;
    what the program refers to stays if it could not be rebuilt until its death: another step may go on to read it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple, final

import numpy as np

from weft.memory.planning.shape import Shape
from weft.memory.schedule import Action, Schedule

__all__ = ["Retention", "Shape", "Trip"]


class Trip(NamedTuple):
    """A value goes to the lower tier and comes back within one gap of its demands (start, stop).

    Its copy is asked for when the operator of stage `leave` has run, its bytes go after that of stage `gone`, and it is asked
    for again when stage `back` begins: start <= leave <= gone < back <= stop.
    """

    start: int
    leave: int
    gone: int
    back: int
    stop: int


@final
class Retention:
    """A plan in progress. A new one keeps everything while it lives and is needed.

    Attributes:
        base, top: bytes per stage; `peaks()` brings `top` up to date and is their sum.
        seconds: of all repetitions.
        work: a count of elementary steps done so far; what searches are limited by, so that they are reproducible.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self.base = shape.fixed.copy()
        self._own = np.array(shape.own, np.int64)
        self.top = self._own.copy()
        self.seconds = 0.0
        self.work = 0
        number = len(shape.born)
        self.stages: list[list[int]] = [[] for _ in range(number)]  # per value: where it is demanded, in order
        self.reasons: list[dict[int, int]] = [{} for _ in range(number)]  # per value: stage -> how many readers there
        self.kept: list[set[int]] = [set() for _ in range(number)]  # per value: stages that it is kept until
        self.stays: list[set[int]] = [set() for _ in range(number)]  # per value: stages (or birth) that it is kept from
        self.again: list[dict[int, int]] = [
            {} for _ in range(shape.end + 1)
        ]  # per stage: operator -> values wanted of it
        self.busy: set[int] = set()  # stages that repeat anything
        self.fresh: list[tuple[int, int, int]] = []  # gaps kept since someone emptied this list: (value, from, until)
        self.trips: dict[int, Trip] = {}  # per value
        self.loads: list[list[int]] = [
            [] for _ in range(shape.end + 1)
        ]  # per stage: values that come back as it begins
        self._journal: list[tuple] = []
        self._dirty: set[int] = set()  # stages whose `top` has to be found again; none at any mark
        self._orders: dict[int, tuple[list[int], dict[int, int]]] = {}  # per stage: see `_order`
        for v, uses in enumerate(shape.uses):
            if shape.free[v]:
                self.stages[v] = list(uses)
                self.reasons[v] = dict.fromkeys(uses, 1)
                before = shape.born[v]
                for stage in uses:
                    self._hold(v, before, stage)
                    before = stage
        self._dirty.clear()
        self._journal.clear()

    def copy(self) -> Retention:
        """Another plan with the same decisions. What `undo` could take back here, it cannot there."""
        self._settle()
        new = object.__new__(Retention)
        new.shape, new.seconds, new.work = self.shape, self.seconds, 0
        new.base, new.top, new._own = self.base.copy(), self.top.copy(), self._own
        new.stages = [stages.copy() for stages in self.stages]
        new.reasons = [reasons.copy() for reasons in self.reasons]
        new.kept, new.stays = [stops.copy() for stops in self.kept], [starts.copy() for starts in self.stays]
        new.again, new.busy = [wanted.copy() for wanted in self.again], self.busy.copy()
        new.trips, new.loads = self.trips.copy(), [values.copy() for values in self.loads]
        new.fresh, new._journal, new._dirty, new._orders = [], [], set(), {}
        return new

    # -- looking ------------------------------------------------------------------------------------------------------

    def peaks(self) -> np.ndarray:
        """Most bytes in each stage."""
        self._settle()
        return self.base + self.top

    def excess(self, budget: int) -> np.ndarray:
        """Bytes above `budget` in each stage."""
        return np.maximum(self.peaks() - budget, 0)

    def excess_below(self, most: int, budget: int) -> np.ndarray | None:
        """The same if together they are less than `most`, else None: known as soon as some stages add up to that."""
        found = self.base + self.top - budget
        pending = sorted(self._dirty)
        if pending:
            found[pending] = (self.base + self._own)[pending] - budget  # at least
        np.maximum(found, 0, out=found)
        total = int(found.sum())
        for stage in pending:
            if total >= most:
                return None
            self._stage(stage)
            now = max(int(self.base[stage] + self.top[stage]) - budget, 0)
            total += now - int(found[stage])
            found[stage] = now
        return found if total < most else None

    def before(self, v: int, stage: int) -> int:
        """The demand (or birth) of `v` that precedes the one at `stage`."""
        place = bisect_left(self.stages[v], stage)
        return self.stages[v][place - 1] if place else self.shape.born[v]

    def is_kept(self, v: int, start: int, stop: int) -> bool:
        """Whether (start, stop) is a gap of `v` now, and kept."""
        return stop in self.kept[v] and start in self.stays[v] and self.before(v, stop) == start

    def rebuilt(self) -> list[tuple[int, int]]:
        """All (value, stage) where a demanded value is rebuilt and might be kept for instead, by stage."""
        made, reasons, kept, again = self.shape.made, self.reasons, self.kept, self.again
        return [
            (v, stage)
            for stage in sorted(self.busy)
            for op in again[stage]
            for v in made[op]
            if stage in reasons[v] and stage not in kept[v] and v not in self.trips
        ]

    def droppable(self, least: int) -> list[tuple[int, int, int]]:
        """Kept gaps (value, from, until) of values of at least `least` bytes that could be rebuilt instead."""
        shape, found = self.shape, []
        for v, stops in enumerate(self.kept):
            if stops and shape.bytes[v] >= least and v not in self.trips:
                last = shape.rebuildable[v]
                before = shape.born[v]
                for stop in self.stages[v]:
                    if stop in stops and stop <= last and (stop > before + 1 or before > shape.born[v]):
                        found.append((v, before, stop))
                    before = stop
        return found

    def price(self, v: int, stage: int, limit: int = 200) -> tuple[float, list[tuple[int, int]]]:
        """About what it takes to rebuild `v` at `stage`, given what is there then.

        Returns:
            seconds, infinite if more than `limit` operators would have to be looked at; and (value, stage) for each value that
            would be rebuilt at `stage` instead of at that later one, and be kept until then.
        """
        shape, again, loads = self.shape, self.again[stage], self.loads
        stages, kept, reasons = self.stages, self.kept, self.reasons
        recipe, effort, needs, rebuildable = shape.recipe, shape.effort, shape.needs, shape.rebuildable
        todo, seen, total, held = [v], {v}, 0.0, []
        while todo:
            op = recipe[todo.pop()]
            if op in again or ~op in seen:
                continue
            seen.add(~op)
            total += effort[op]
            self.work += 1
            for u in needs[op]:
                if u in seen or stage in reasons[u]:
                    continue
                seen.add(u)
                demands = stages[u]
                place = bisect_left(demands, stage)
                if place < len(demands):
                    stop = demands[place]
                    if stop in kept[u]:
                        continue
                    if u not in loads[stop] and shape.keepable(u, stage, stop):
                        held.append((u, stop))
                        total -= effort[recipe[u]]
                    todo.append(u)
                elif stage <= rebuildable[u]:
                    todo.append(u)
            if len(seen) > limit:
                return float("inf"), []
        return max(total, 0.0), held

    def adopt(self, schedule: Schedule) -> None:
        """Decide as `schedule` does what is there when an operator begins; rebuilding is put off until it is needed.

        Costs at most what the schedule costs; may take a little more memory at some stages, since values are held
        between two demands or not at all.
        """
        shape, end = self.shape, self.shape.end
        dying: list[list[int]] = [[] for _ in range(end + 1)]
        for v, dies in enumerate(shape.dies):
            dying[max(dies, 0)].append(v)
        there, stage, rebuilt = {v for v, born in enumerate(shape.born) if born < 0}, 0, set()
        for action in (*schedule.actions, Action("run", end)):
            if action.kind == "again":
                rebuilt.update(v for v in shape.made[action.index] if v not in there)
                there.update(shape.made[action.index])
            elif action.kind == "drop":
                there.discard(action.index)
            elif action.kind == "run":
                self._decide(stage, rebuilt)
                if stage < end:
                    there.update(shape.made[stage])
                    there.difference_update(old for old, _ in shape.trace.ops[stage].overwrites)
                    there.difference_update(dying[stage])
                stage, rebuilt = stage + 1, set()
            if action.kind == "again":
                there.difference_update(old for old, _ in shape.trace.ops[action.index].overwrites)

    def _decide(self, stage: int, rebuilt: set[int]) -> None:
        """Of what is demanded at `stage`, rebuild `rebuilt`, and keep the rest where that can be."""
        shape, seen = self.shape, set()
        todo = list(shape.demands[stage])
        while todo:
            v = todo.pop()
            if v in seen or stage not in self.reasons[v]:
                continue
            seen.add(v)
            kept = stage in self.kept[v]
            if kept and v in rebuilt and stage <= shape.rebuildable[v]:
                self.drop(v, stage)
            elif not kept and v not in rebuilt and shape.keepable(v, self.before(v, stage), stage):
                self.keep(v, stage)
            if stage not in self.kept[v]:
                todo += shape.needs[shape.recipe[v]]

    # -- moves --------------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """A moment to `undo` to."""
        self._settle()
        return len(self._journal)

    def forget(self) -> None:
        """No undoing beyond this moment."""
        self._settle()
        self._journal.clear()

    def drop(self, v: int, stop: int) -> None:
        """Do not keep `v` before its demand at `stop`; rebuild it there. It was kept, and `stop` <= rebuildable."""
        self._release(v, self.before(v, stop), stop)
        self._follow([(True, v, stop)])

    def keep(self, v: int, stop: int, most: float = float("inf")) -> bool:
        """Keep `v` until its demand at `stop`, where it was rebuilt; the gap must be keepable.

        Returns:
            False if that entails more than `most` changes: then it is half done, and has to be undone.
        """
        self._hold(v, self.before(v, stop), stop)
        return self._follow([(False, v, stop)], most)

    def send(self, v: int, trip: Trip) -> None:
        """Let `v`, kept in the gap from `trip.start` to `trip.stop`, go to the lower tier meanwhile. One trip per value."""
        self._release(v, trip.start, trip.stop)
        if trip.gone > trip.start:
            self._reason(v, trip.gone, 1)
            self._hold(v, trip.start, trip.gone)
        if trip.back < trip.stop:
            self._reason(v, trip.back, 1)
            self._hold(v, trip.back, trip.stop)
        self._journal.append((5, v, None, None))
        self._set_trip(v, trip)
        self._dirty.update((trip.gone, trip.back))
        self._follow([])

    def recall(self, v: int) -> None:
        """Keep `v` instead of sending it away."""
        todo: list[tuple[bool, int, int]] = []
        self._recall(v, todo)
        self._follow(todo)

    def _recall(self, v: int, todo: list[tuple[bool, int, int]]) -> None:
        trip, reasons = self.trips[v], self.reasons[v]
        before = trip.start
        rebuilt = set()
        for stage in [stage for stage in self.stages[v] if trip.start < stage <= trip.stop]:
            if stage in self.kept[v]:
                self._release(v, before, stage)
            elif stage != trip.back:
                rebuilt.add(stage)
            before = stage
        for stage in {trip.gone, trip.back} - {trip.start, trip.stop}:
            self._reason(v, stage, reasons[stage] - 1)
        before = trip.start
        for stage in [stage for stage in self.stages[v] if trip.start < stage <= trip.stop]:
            self._hold(v, before, stage)
            before = stage
        self._journal.append((5, v, trip, None))
        self._set_trip(v, None)
        self._dirty.update((trip.gone, trip.back))
        todo += [(False, v, stage) for stage in sorted(rebuilt)]

    def _set_trip(self, v: int, trip: Trip | None) -> None:
        if trip is None:
            self.loads[self.trips.pop(v).back].remove(v)
        else:
            self.trips[v] = trip
            insort(self.loads[trip.back], v)

    def _follow(self, todo: list[tuple[bool, int, int]], most: float = float("inf")) -> bool:
        """Begin (True) or cease (False) to rebuild values at stages, and all that this entails, unless that is too much."""
        shape, end = self.shape, self.work + most
        while todo:
            if self.work >= end:
                return False
            begin, v, stage = todo.pop()
            self.work += 1
            op, wanted = shape.recipe[v], self.again[stage]
            count = wanted.get(op, 0) + (1 if begin else -1)
            self._count(stage, op, count)
            if begin and count == 1:
                for u in shape.needs[op]:
                    self._demand(u, stage, todo)
            elif not begin and count == 0:
                for u in shape.needs[op]:
                    self._relieve(u, stage, todo)
        return True

    def _demand(self, u: int, stage: int, todo: list[tuple[bool, int, int]]) -> None:
        """One more reader of `u` at `stage`."""
        shape, reasons = self.shape, self.reasons[u]
        if stage in reasons:
            self._reason(u, stage, reasons[stage] + 1)
            return
        trip = self.trips.get(u)
        if trip is not None and trip.gone < stage < trip.back and stage > shape.rebuildable[u]:
            self._recall(u, todo)
        stages = self.stages[u]
        place = bisect_left(stages, stage)
        start = stages[place - 1] if place else shape.born[u]
        if place < len(stages):
            stop = stages[place]
            if stop in self.kept[u]:
                self._release(u, start, stop)
                self._reason(u, stage, 1)
                self._hold(u, start, stage)
                self._hold(u, stage, stop)
                return
            # it was rebuilt at `stop`: rebuild it here and keep it until then
            self._reason(u, stage, 1)
            if u not in self.loads[stop] and shape.keepable(u, stage, stop):
                self._hold(u, stage, stop)
                todo.append((False, u, stop))
            todo.append(
                (True, u, stage)
            )  # taken up first, so that inputs are asked for here before `stop` lets go of them
            return
        self._reason(u, stage, 1)
        if stage <= shape.rebuildable[u]:
            todo.append((True, u, stage))
        else:
            self._hold(u, start, stage)

    def _relieve(self, u: int, stage: int, todo: list[tuple[bool, int, int]]) -> None:
        """One reader of `u` at `stage` less."""
        reasons = self.reasons[u]
        if reasons[stage] > 1:
            self._reason(u, stage, reasons[stage] - 1)
            return
        stages = self.stages[u]
        place = bisect_left(stages, stage)
        start = stages[place - 1] if place else self.shape.born[u]
        stop = stages[place + 1] if place + 1 < len(stages) else None
        came = stage in self.kept[u]
        stayed = stop is not None and stop in self.kept[u]
        if came:
            self._release(u, start, stage)
        else:
            todo.append((False, u, stage))
        if stayed:
            self._release(u, stage, stop)
        self._reason(u, stage, 0)
        if stayed:
            if came or stop > self.shape.rebuildable[u]:
                self._hold(u, start, stop)
            else:
                todo.append((True, u, stop))  # taken up first, as in `_demand`

    # -- elementary changes, each with its inverse in the journal -------------------------------------------------------

    def _hold(self, v: int, start: int, stop: int) -> None:
        self.kept[v].add(stop)
        self.stays[v].add(start)
        self.base[start + 1 : stop + 1] += self.shape.bytes[v]
        self._touch(start, stop)
        self.fresh.append((v, start, stop))
        self._journal.append((0, v, start, stop))

    def _release(self, v: int, start: int, stop: int) -> None:
        self.kept[v].discard(stop)
        self.stays[v].discard(start)
        self.base[start + 1 : stop + 1] -= self.shape.bytes[v]
        self._touch(start, stop)
        self._journal.append((1, v, start, stop))

    def _touch(self, start: int, stop: int) -> None:
        if start >= 0 and self.again[start]:
            self._dirty.add(start)
        if self.again[stop]:
            self._dirty.add(stop)

    def _reason(self, v: int, stage: int, count: int) -> None:
        reasons = self.reasons[v]
        self._journal.append((2, v, stage, reasons.get(stage, 0)))
        self._set_reason(v, stage, count)

    def _set_reason(self, v: int, stage: int, count: int) -> None:
        reasons = self.reasons[v]
        if count and stage not in reasons:
            insort(self.stages[v], stage)
        if count:
            reasons[stage] = count
        else:
            del reasons[stage]
            del self.stages[v][bisect_left(self.stages[v], stage)]

    def _count(self, stage: int, op: int, count: int) -> None:
        self._journal.append((3, stage, op, self.again[stage].get(op, 0)))
        self._set_count(stage, op, count)
        self._dirty.add(stage)

    def _set_count(self, stage: int, op: int, count: int) -> None:
        wanted = self.again[stage]
        if count and op not in wanted:
            self.seconds += self.shape.effort[op]
            self._orders.pop(stage, None)
        elif not count and op in wanted:
            self.seconds -= self.shape.effort[op]
            self._orders.pop(stage, None)
        if count:
            wanted[op] = count
            self.busy.add(stage)
        else:
            wanted.pop(op, None)
            if not wanted:
                self.busy.discard(stage)

    def undo(self, mark: int) -> None:
        """Take back everything since `mark`."""
        journal = self._journal
        self._dirty.clear()
        while len(journal) > mark:
            kind, a, b, c = journal.pop()
            self.work += 1
            if kind == 0:
                self.kept[a].discard(c)
                self.stays[a].discard(b)
                self.base[b + 1 : c + 1] -= self.shape.bytes[a]
            elif kind == 1:
                self.kept[a].add(c)
                self.stays[a].add(b)
                self.base[b + 1 : c + 1] += self.shape.bytes[a]
                self.fresh.append((a, b, c))
            elif kind == 2:
                self._set_reason(a, b, c)
            elif kind == 3:
                self._set_count(a, b, c)
            elif kind == 4:
                self.top[a] = b
            else:
                self._set_trip(a, b)

    # -- one stage ----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        for stage in sorted(self._dirty):
            self._stage(stage)

    def _order(self, stage: int) -> tuple[list[int], dict[int, int]]:
        """The repetitions of a stage in order, and for each value that is demanded there its last reader (the stage itself
        for what the program reads)."""
        found = self._orders.get(stage)
        if found is None:
            order, last = sorted(self.again[stage]), {}
            for op in order:
                last.update(self.shape.readers[op])
            last.update(dict.fromkeys(self.shape.demands[stage], stage))
            found = self._orders[stage] = (order, last)
        return found

    def _stage(self, stage: int) -> None:
        """Find again what `stage` adds at most to what is there when it begins."""
        self._dirty.discard(stage)
        self._journal.append((4, stage, int(self.top[stage]), 0))
        shape, again, loads = self.shape, self.again[stage], self.loads[stage]
        size, recipe, stays, kept = shape.bytes, shape.recipe, self.stays, self.kept
        arrived = sum(size[v] for v in loads)
        if not again:
            self.top[stage] = arrived + shape.own[stage]
            return
        order, last = self._order(stage)
        self.work += len(order)
        change = dict.fromkeys(order, 0)  # bytes that a repetition leaves behind
        gone: dict[int, list[int]] = {}  # what may go when it has run
        for u, op in last.items():
            if stage not in kept[u] and recipe[u] in change and u not in loads:
                change[recipe[u]] += size[u]
            if op != stage and stage not in stays[u] and not (self.trips and self._leaves(u, stage)):
                change[op] -= size[u]
                gone.setdefault(op, []).append(u)
        now = most = arrived
        for op in order:
            most = max(most, now + (shape.burst_without(op, gone[op]) if op in gone else shape.burst[op]))
            now += change[op]
        self.top[stage] = max(most, now + shape.own[stage])

    # -- the plan as actions --------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """The plan as actions without addresses."""
        shape, actions = self.shape, []
        self._sent: dict[int, list[int]] = defaultdict(list)
        self._left: dict[int, list[int]] = defaultdict(list)
        for v, trip in sorted(self.trips.items()):
            self._sent[trip.leave].append(v)
            if trip.gone > trip.start:
                self._left[trip.gone].append(v)
        for stage in range(shape.end + 1):
            self._actions(stage, actions)
        return Schedule(tuple(actions))

    def _actions(self, stage: int, actions: list[Action]) -> None:
        """Repetitions of one stage, its operator, and what is dropped after each."""
        shape = self.shape
        links = [op for last in sorted(self.again[stage]) for op in shape.chain[last]]
        order = [*links, stage]
        last = {u: op for op in links for u in shape.inputs[op]} | dict.fromkeys(shape.demands[stage], stage)
        actions += [Action("load", v) for v in self.loads[stage]]
        for op in order if stage < shape.end else links:
            program = op == stage
            actions.append(Action("run" if program else "again", op))
            if program:
                actions += [Action("save", v) for v in self._sent[stage]]
            consumed = {old for old, _ in shape.trace.ops[op].overwrites}
            for v in shape.made[op]:
                if program:
                    unwanted = stage not in self.stays[v] and shape.dies[v] != stage
                else:
                    unwanted = v not in last and stage not in self.stays[v] and not self._passes(v, stage)
                if unwanted:
                    actions.append(Action("drop", v))
            for u in shape.inputs[op]:
                gone = u in consumed or (program and shape.dies[u] == stage) or self._leaves(u, stage)
                if last[u] == op and stage not in self.stays[u] and not gone:
                    actions.append(Action("drop", u))
            if program:
                actions += [Action("drop", v) for v in self._left[stage]]

    def _leaves(self, v: int, stage: int) -> bool:
        """Whether `v` goes to the lower tier at the end of `stage`, with no demand of its own there."""
        trip = self.trips.get(v)
        return trip is not None and trip.start < trip.gone == stage

    def _passes(self, v: int, stage: int) -> bool:
        """Whether `v`, not demanded at `stage`, is kept across it."""
        place = bisect_left(self.stages[v], stage)
        return place < len(self.stages[v]) and self.stages[v][place] in self.kept[v]
