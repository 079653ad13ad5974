"""What a trace says once and for all about planning it: the constants of `Retention`.

Which bytes planning decides about, where they are needed, how late they can be made again and what making them again takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import final

import numpy as np

from weft.memory.planning.packing import inside, outside_bytes
from weft.memory.record import Trace

__all__ = ["Shape", "recipes"]

NEVER = -2  # no stage: before everything


def recipes(trace: Trace, free: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Per value, the operator that makes it again (-1 if none can) and the last stage at which it may (`NEVER`): until then each
    input lives, or can be rebuilt itself. `free`: values whose bytes planning decides about."""
    end, ops = len(trace.ops), trace.ops
    again = [op.repeatable and all(free[v] for v in op.makes) for op in ops]
    recipe = [value.born if value.born >= 0 and again[value.born] else -1 for value in trace.values]
    rebuildable, reach = [NEVER] * len(recipe), [min(value.dies, end) for value in trace.values]
    for v, op in enumerate(recipe):  # inputs have smaller numbers than what is made of them
        if op >= 0 and free[v]:
            rebuildable[v] = min((reach[u] for u in ops[op].reads), default=end)
            reach[v] = max(reach[v], rebuildable[v])
    return recipe, rebuildable


@final
class Shape:
    """What a trace says once and for all, in the form that `Retention` needs.

    Args:
        arena: count for an arena of fixed size: what lies outside of it counts at its most throughout the step, and planning
            decides only about what lies inside. Otherwise bytes are counted as they come and go.
        align: bytes are rounded up to multiples of this.

    Attributes:
        end: number of operators, and the stage after the last one.
        bytes, born, dies, recipe: per value; recipe is the operator that makes it again, -1 if none can.
        free: values whose bytes planning decides about: activations. All others are there from birth to death.
        uses: stages at which the program needs a free value (`end`: it outlives the step). What it refers to and could not get
            back until its death is needed until then, though nobody may read it.
        inputs: per operator, the free values it reads; `made` the free values it makes. `inputs[end]` outlive the step.
        demands: per stage, the free values that the program needs there: `inputs`, and what is needed to its death.
        own: bytes that an operator adds while it runs: what it makes and its workspace.
        chain: per operator, what its repetition repeats: itself, last, and before it whatever only feeds it; `needs`, `burst`
            and `effort` are the free values that such a chain reads, the bytes it adds while it runs, its seconds.
        outside: bytes that lie outside the arena, at most.
        rebuildable: the last stage at which a value may be rebuilt.
    """

    def __init__(self, trace: Trace, *, arena: bool = False, align: int = 1):
        self.trace = trace
        self.end = end = len(trace.ops)
        values = trace.values
        within = inside(trace)
        self.bytes = [-(-value.nbytes // align) * align for value in values]
        self.born = [value.born for value in values]
        self.dies = [min(value.dies, end) for value in values]
        self.free = [
            value.category == "activation" and (here or not arena) for value, here in zip(values, within, strict=True)
        ]
        self.seconds = [op.seconds for op in trace.ops]
        self.inputs = [tuple(v for v in op.reads if self.free[v]) for op in trace.ops]
        self.made = [tuple(v for v in op.makes if self.free[v]) for op in trace.ops]
        fresh = [set(op.makes) - {new for _, new in op.overwrites} for op in trace.ops]
        self.own = [
            sum(self.bytes[v] for v in made if within[v] or not arena) - (-op.workspace // align) * align
            for made, op in zip(fresh, trace.ops, strict=True)
        ]
        self.overwritten = {old for op in trace.ops for old, _ in op.overwrites}
        # what the user has after the step is read by an operator of ours after the last one
        self.inputs.append(tuple(v for v, dies in enumerate(self.dies) if self.free[v] and dies >= end))
        self.made.append(())
        self.own.append(0)
        self.recipe, self.rebuildable = recipes(trace, self.free)
        self.uses: list[tuple[int, ...]] = [tuple(stages) for stages in trace.readers]
        demands = [list(inputs) for inputs in self.inputs]
        for v, dies in enumerate(self.dies):
            if (
                self.free[v]
                and dies > max((self.born[v], *self.uses[v]))
                and (dies >= end or self.rebuildable[v] < dies)
            ):
                self.uses[v] = (*self.uses[v], dies)
                if dies < end:
                    demands[dies].append(v)
        self.demands = [tuple(values) for values in demands]
        self._chains()
        self.fixed = np.zeros(end + 1, np.int64)  # bytes that are there when a stage begins, whatever is planned
        for v in range(len(values)):
            if not self.free[v] and (within[v] or not arena):
                self.fixed[max(self.born[v] + 1, 0) : self.dies[v] + 1] += self.bytes[v]
        self.outside = outside_bytes(trace, within) if arena else 0
        self.fixed += self.outside

    def _chains(self) -> None:
        """Operators whose results one other operator alone reads are repeated with it and never by themselves: half the work.
        Not those whose results outlive what they are made from: while these are there, more can be rebuilt than through them."""
        ops, readers = self.trace.ops, self.trace.readers
        shared = {v for v in self.overwritten if len(readers[v]) > 1}  # their readers keep their places in the order
        self.chain: list[tuple[int, ...]] = []
        self.needs: list[tuple[int, ...]] = []
        self.burst: list[int] = []
        self.early: list[frozenset[int]] = []  # of `needs`, those that the last of the chain does not read
        self.readers: list[dict[int, int]] = []  # `needs`, each with the operator
        self.effort: list[float] = []
        self._bursts: dict[tuple[int, frozenset[int]], int] = {}  # what `burst_without` has found
        sole: dict[int, int] = {}  # operator -> the only one that reads what it makes
        for i, op in enumerate(ops):
            found = {j for v in op.makes for j in self.uses[v]} if all(self.free[v] for v in op.makes) else set()
            lasts = any(self.dies[v] > self.rebuildable[v] for v in op.makes)
            if len(found) == 1 and op.repeatable and not lasts and not shared.intersection(op.reads):
                sole[i] = found.pop()
        for i in range(len(ops)):
            feeders = {self.born[v] for v in self.inputs[i] if sole.get(self.born[v]) == i}
            chain = sorted({j for feeder in feeders for j in self.chain[feeder]})
            inside = {v for j in chain for v in self.made[j]}
            self.chain.append((*chain, i))
            self.needs.append(tuple({v: None for j in (*chain, i) for v in self.inputs[j] if v not in inside}))
            self.effort.append(sum(self.seconds[j] for j in (*chain, i)))
            self.burst.append(self._burst(self.chain[-1], inside, ()))
            self.early.append(frozenset(self.needs[-1]) - frozenset(self.inputs[i]))
            self.readers.append(dict.fromkeys(self.needs[-1], i))
        self.needs.append(self.inputs[-1])

    def _burst(self, chain: tuple[int, ...], inside: set[int], gone: Collection[int]) -> int:
        """Bytes that `chain` adds at most to what was there, if each of `gone` goes after its last reader in the chain."""
        last = {u: j for j in chain for u in self.inputs[j]}
        now = most = 0
        for j in chain:
            most = max(most, now + self.own[j])
            now += sum(self.bytes[v] for v in self.made[j] if v in inside and v in last)
            now -= sum(self.bytes[v] for v in self.inputs[j] if last[v] == j and (v in inside or v in gone))
        return most

    def burst_without(self, op: int, gone: Collection[int]) -> int:
        """`burst` of an operator's chain when the inputs `gone` may go as soon as the chain has read them."""
        early = self.early[op].intersection(gone)
        if not early:
            return self.burst[op]
        found = self._bursts.get((op, early))
        if found is None:
            chain = self.chain[op]
            found = self._bursts[op, early] = self._burst(chain, {v for j in chain[:-1] for v in self.made[j]}, early)
        return found

    def keepable(self, v: int, start: int, stop: int) -> bool:
        """Whether `v` can stay between its demands at stages `start` and `stop`."""
        dies = self.dies[v]
        return stop <= dies or (start > dies and v not in self.overwritten)
