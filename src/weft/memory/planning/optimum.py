"""The cheapest schedule of a small step within a budget, by integer programming.

Problem    which operators to repeat before which operator of the program, so that never more than the budget is there.
Model      stage t ends with operator t of the program (stage n with none); before it, operators k < t may be repeated, in the
           order of the program, at most once each: *slots* (t, k), the last of which is (t, t) itself.
Variables  E[t, k] in {0, 1}     slot (t, k) is used; E[t, t] = 1
           Y[t, k, v] in [0, 1]  value v is there when slot (t, k) begins; for given E the least feasible Y is integral
Objective  min  sum over k < t of seconds[k] E[t, k]
subject to Y[next, v] <= Y[t, k, v] + E[t, k] (if k makes v)         nothing comes from nowhere            `_Model._flow`
           Y[next, v] <= 1 - E[t, k]          (if k overwrites v)    repeating consumes what it overwrites  `_Model._flow`
           Y[t, k, u] >= E[t, k]              (if k reads u)         inputs are there                       `_Model._reads`
           sum of bytes[v] Y[t, k, v] + own[k] E[t, k] <= budget     own: all that k makes, its workspace   `_Model._room`
           Y[t + 1, 0, v] = 0 (if v dies with t), = 1 (if v may not be dropped, or outlives the step,
                                or is the program's still and could not be made again till it dies)         `_Model._bounds`
Guarantee  optimal among schedules that repeat in the order of the program and no operator twice between two of the program.
Source     Jain et al., "Checkmate", MLSys 2020 (arXiv:1910.02653): the same stages; the slots replace its products of
           variables, and take in workspace, several outputs, deaths and writing in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from weft.errors import BudgetError
from weft.memory.planning.shape import recipes
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule

__all__ = ["LARGEST", "optimum"]

LARGEST = 25  # operators; the number of variables grows with the cube


def optimum(trace: Trace, budget: int, nodes: int | None = None) -> Schedule:
    """The cheapest schedule of a step of at most `LARGEST` operators, without addresses.

    Args:
        budget: bytes for everything that is there at once, as `check` counts them.
        nodes: give up after so many nodes of branch and bound.
    Raises:
        BudgetError: no schedule of this form fits.
        ValueError: the step has too many operators.
        RuntimeError: `nodes` did not suffice.
    """
    if len(trace.ops) > LARGEST:
        raise ValueError(f"optimum: at most {LARGEST} operators, got {len(trace.ops)}; use weft.memory.plan")
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import

    model = _Model(trace, budget)
    matrix, low, high = model.rows()
    done = milp(
        model.cost,
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(model.least, model.most),
        integrality=model.whole,
        options={} if nodes is None else {"node_limit": nodes},
    )
    if done.status == 2:
        raise BudgetError(budget, 0, "no order of dropping and recomputing fits; this is exact")
    if done.x is None or done.status != 0:
        raise RuntimeError(f"optimum: the solver stopped without an answer ({done.message}); give it more nodes")
    return _schedule(trace, {slot for slot, n in model.used.items() if done.x[n] > 0.5})


@final
class _Model:
    """Variables by number, and the rows of the programme."""

    def __init__(self, trace: Trace, budget: int):
        self.trace, self.budget = trace, budget
        self.end = end = len(trace.ops)
        self.free = [value.category == "activation" for value in trace.values]
        self.stays = _staying(trace, self.free)
        # slots in time: (stage, operator); the stage after the last operator only repeats
        self.slots = [(t, k) for t in range(end + 1) for k in range(min(t, end - 1) + 1) if k == t or self._again(k)]
        self.slots.append((end, end))  # the end: what outlives the step is there
        self.used = {slot: n for n, slot in enumerate(slot for slot in self.slots if slot != (end, end))}
        count = len(self.used)
        self.there: list[dict[int, int]] = []
        for t, _ in self.slots:
            alive = [v for v, value in enumerate(trace.values) if value.born < t]
            self.there.append({v: count + n for n, v in enumerate(alive)})
            count += len(alive)
        self.cost, self.least, self.most = np.zeros(count), np.zeros(count), np.ones(count)
        self.whole = np.zeros(count)
        for (t, k), n in self.used.items():
            self.whole[n] = 1
            if k == t:
                self.least[n] = 1
            else:
                self.cost[n] = trace.ops[k].seconds
        self._bounds()

    def _again(self, k: int) -> bool:
        op = self.trace.ops[k]
        return op.repeatable and all(self.free[v] for v in op.makes)

    def _bounds(self) -> None:
        for (t, k), there in zip(self.slots, self.there, strict=True):
            for v, n in there.items():
                value = self.trace.values[v]
                if not self.free[v]:
                    self.least[n] = self.most[n] = float(t <= value.dies)
                elif (v in self.stays and t <= value.dies) or (
                    (t, k) == (self.end, self.end) and value.dies >= self.end
                ):
                    self.least[n] = 1
                elif value.dies == t - 1 and (t, k) == self._first(t):
                    self.most[n] = 0

    def _first(self, t: int) -> tuple[int, int]:
        return next(slot for slot in self.slots if slot[0] == t)

    def rows(self) -> tuple[object, np.ndarray, np.ndarray]:
        """All constraints as (sparse matrix, low, high)."""
        from scipy.sparse import coo_array

        rows, columns, numbers, low, high = [], [], [], [], []
        for terms, least, most in [*self._flow(), *self._reads(), *self._room()]:
            for column, number in terms:
                rows.append(len(low))
                columns.append(column)
                numbers.append(number)
            low.append(least)
            high.append(most)
        shape = (len(low), len(self.cost))
        return coo_array((numbers, (rows, columns)), shape=shape).tocsr(), np.array(low), np.array(high)

    def _flow(self) -> list[tuple[list[tuple[int, float]], float, float]]:
        found = []
        for place, slot in enumerate(self.slots[:-1]):
            now, then, op = self.there[place], self.there[place + 1], self.trace.ops[slot[1]]
            gone = {old for old, _ in op.overwrites}
            for v, n in then.items():
                terms = [(n, 1.0)]
                if v in now:
                    terms.append((now[v], -1.0))
                if v in op.makes:
                    terms.append((self.used[slot], -1.0))
                if self.free[v]:
                    found.append((terms, -np.inf, 0.0))
                if v in gone and self.free[v]:
                    found.append(([(n, 1.0), (self.used[slot], 1.0)], -np.inf, 1.0))
        return found

    def _reads(self) -> list[tuple[list[tuple[int, float]], float, float]]:
        return [
            ([(there[u], 1.0), (self.used[slot], -1.0)], 0.0, np.inf)
            for slot, there in zip(self.slots[:-1], self.there, strict=False)
            for u in self.trace.ops[slot[1]].reads
        ]

    def _room(self) -> list[tuple[list[tuple[int, float]], float, float]]:
        values, found = self.trace.values, []
        for slot, there in zip(self.slots, self.there, strict=True):
            terms = [(n, float(values[v].nbytes)) for v, n in there.items()]
            if slot in self.used:
                op = self.trace.ops[slot[1]]
                fresh = set(op.makes) - {new for _, new in op.overwrites}
                terms.append((self.used[slot], float(sum(values[v].nbytes for v in fresh) + op.workspace)))
            found.append((terms, -np.inf, float(self.budget)))
        return found


def _schedule(trace: Trace, used: set[tuple[int, int]]) -> Schedule:
    """The actions of the slots in use; everything is dropped as soon as nothing reads it before it is made again."""
    end, order = len(trace.ops), sorted(used)
    free = [value.category == "activation" for value in trace.values]
    stays = _staying(trace, free)
    actions: list[Action] = []
    there: set[int] = {v for v, value in enumerate(trace.values) if value.born < 0}
    for place, (t, k) in enumerate(order):
        op = trace.ops[k]
        actions.append(Action("run" if k == t else "again", k))
        there.update(op.makes)
        there.difference_update(old for old, _ in op.overwrites)
        if k == t:
            there.difference_update(v for v in there.copy() if trace.values[v].dies == t)
        lasting = {v for v in stays if trace.values[v].dies > t}
        idle = [v for v in sorted(there - lasting) if free[v] and not _wanted(trace, v, order[place + 1 :], end)]
        actions += [Action("drop", v) for v in idle]
        there.difference_update(idle)
    return Schedule(tuple(actions))


def _staying(trace: Trace, free: Sequence[bool]) -> set[int]:
    """Values that the program would not get back until they die, if they went."""
    rebuildable = recipes(trace, free)[1]
    return {v for v, value in enumerate(trace.values) if free[v] and rebuildable[v] < min(value.dies, len(trace.ops))}


def _wanted(trace: Trace, v: int, later: Sequence[tuple[int, int]], end: int) -> bool:
    """Whether something reads `v`, or the step ends with it, before it dies or is made again."""
    for t, k in later:
        if v in trace.ops[k].reads:
            return True
        if v in trace.ops[k].makes or (k == t and trace.values[v].dies == t):
            return False
    return trace.values[v].dies >= end
