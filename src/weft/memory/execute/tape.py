"""The trace of a step, written while the step runs online: what a plan for the following steps is made from.

Operators and values are numbered as `weft.memory.tracing` does: every call but views is an operator. Seconds and workspace
are those that the executor has measured. What is carried into the step and met by none of its operators takes bytes too. If it
stays (frozen or other models), it comes last among the values; if it goes (the last step's outputs in a variable, its gradients),
it counts as workspace of the operators until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, final

from weft.memory.execute.backends import Hold
from weft.memory.execute.facts import Facts
from weft.memory.private import alone, in_backward
from weft.memory.record import Category, Op, Phase, Trace, Value

__all__ = ["Tape", "joined"]


@dataclass(slots=True)
class _Draft:
    """A `Value` being written."""

    nbytes: int
    storage: int
    born: int
    hold: Hold | None  # says what it is to the user; None once that is known: it leads to its recipe
    dies: int = -2  # -2: still there
    category: Category = "activation"


@final
class Tape:
    """Writes down one step. The executor calls `ran` after each operator and `died` for each storage that dies.

    Args:
        holds: of everything that is there when the step begins.

    Attributes:
        carried: bytes of it.
    """

    def __init__(self, holds: Iterable[Hold] = ()) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._values: list[_Draft] = []
        self._now: dict[int, int] = {}  # id of a living hold -> number of its present value
        self._pending: list[int] = []  # values that died in the call under way
        self._num_storages = 0
        self._lent: set[int] = set()  # storages that are gone and that their owner had emptied
        self._sent: set[int] = set()  # values that a collective was given
        self._moved: set[int] = set()  # running statistics
        self._filled: set[int] = set()  # operators that made something empty, which another one has filled
        self._kept: dict[int, Hold] = {}  # by number: what recipes keep, however long the program wants it
        # there, and met by no operator so far; without what only recipes of the last step keep
        self._idle = {id(hold): hold for hold in holds if (storage := hold()) is not None and not alone(storage)}
        self._passed: list[tuple[int, int]] = []  # (last operator, bytes) of what went before any operator met it
        self.carried = sum(hold.block.nbytes for hold in self._idle.values())

    @property
    def num_ops(self) -> int:
        """Operators so far."""
        return len(self._rows)

    def ran(
        self,
        facts: Facts,
        reads: Sequence[Hold],
        written: Sequence[Hold],
        fresh: Sequence[Hold],
        *,
        workspace: int,
        seconds: float,
        repeatable: bool,
        random: bool,
        effects: bool,
        moves: Sequence[Hold] = (),
    ) -> None:
        """An operator has run: it read and wrote these storages, and made `fresh` ones. It `moves` running statistics; who else
        reads them cannot be repeated."""
        if self._kept:
            self._notice()
        index = len(self._rows)
        # storages in which their owner has just made room: as good as new
        filled = [hold for hold in written if hold.lent and id(hold) not in self._now]
        new = set(map(id, filled))
        read = dict.fromkeys(self._number(hold) for hold in reads if id(hold) not in new)
        moved = [self._number(hold) for hold in moves]
        self._moved.update(moved)
        if facts.in_flight:
            self._sent.update(read)
        overwrites = []
        for hold in dict.fromkeys(written):
            if id(hold) in new:
                continue
            old = self._number(hold)
            draft = self._values[old]
            draft.dies, draft.category, draft.hold = index, _kind(hold), None
            self._now[id(hold)] = after = len(self._values)
            self._values.append(_Draft(draft.nbytes, draft.storage, index, hold))
            overwrites.append((old, after))
        read.update(dict.fromkeys(old for old, _ in overwrites))
        makes = [after for _, after in overwrites] + [self._begin(hold, index) for hold in (*fresh, *filled)]
        repeatable = repeatable and not filled and not any(hold.lent for hold in reads)
        phase: Phase = "optimizer" if effects else "backward" if in_backward() else "forward"
        self._rows.append(
            (
                facts, phase, tuple(dict.fromkeys((*moved, *read))), tuple(makes), tuple(overwrites), workspace, seconds,
                repeatable, random, read,
            )
        )  # fmt: skip
        for number in self._pending:
            self._values[number].dies = len(self._rows) - 1
        self._pending.clear()

    def filled(self, hold: Hold) -> None:
        """What was made empty is about to be given all its content by an operator."""
        if (number := self._now.get(id(hold))) is not None:
            self._filled.add(self._values[number].born)

    def meets(self, hold: Hold) -> None:
        """A storage is there that nobody had told of."""
        self._idle[id(hold)] = hold

    def keeps(self, hold: Hold) -> None:
        """A recipe keeps a storage that cannot be made again. A plan counts its bytes only as long as the program has it."""
        if hold.kind == "activation":
            self._kept[self._number(hold)] = hold

    def _notice(self) -> None:
        """Which of the storages that recipes keep nobody else has any more."""
        for number, hold in list(self._kept.items()):
            storage = hold()
            if storage is None or self._now.get(id(hold)) != number:
                del self._kept[number]
            elif alone(storage):
                del self._kept[number]
                self.died(hold, False)

    def died(self, hold: Hold, running: bool) -> None:
        """The last reference to a storage is gone; `running`: while an operator runs."""
        number = self._now.pop(id(hold), None)
        if number is None:
            if self._idle.pop(id(hold), None) is not None and self._rows:
                self._passed.append((len(self._rows) - (not running), hold.block.nbytes))
            return
        draft = self._values[number]
        draft.category, draft.hold = _kind(hold), None
        if hold.lent:
            self._lent.add(draft.storage)
        if running:
            self._pending.append(number)
        else:
            draft.dies = len(self._rows) - 1

    def _begin(self, hold: Hold, born: int) -> int:
        number = len(self._values)
        self._idle.pop(id(hold), None)
        self._values.append(_Draft(hold.block.nbytes, self._num_storages, born, hold))
        self._num_storages += 1
        self._now[id(hold)] = number
        return number

    def _number(self, hold: Hold) -> int:
        number = self._now.get(id(hold))
        return self._begin(hold, -1) if number is None else number

    def trace(self, device: str, model: str) -> Trace:
        """What was written, ended here."""
        end, kinds = len(self._rows), {}
        idle = [hold for hold in self._idle.values() if hold.block.nbytes]
        drafts = [*self._values, *(_Draft(h.block.nbytes, self._num_storages + n, -1, h) for n, h in enumerate(idle))]
        beside = [0] * (end + 1)  # bytes of what has passed, while each operator ran
        for last, nbytes in self._passed:
            beside[min(last, end)] += nbytes
        beside = list(accumulate(reversed(beside)))[::-1]
        lent = self._lent.union(draft.storage for draft in drafts if draft.hold is not None and draft.hold.lent)
        for draft in drafts:
            if draft.dies == -2:
                draft.dies = end
            if draft.hold is not None:
                draft.category = _kind(draft.hold)
            if draft.category == "activation" and draft.born < 0:
                draft.category = "input"
            if draft.category != "activation":
                kinds.setdefault(draft.storage, draft.category)
        values = tuple(
            Value(d.nbytes, d.storage, kinds.get(d.storage, "activation"), "", d.born, d.dies) for d in drafts
        )
        fixed = [value.category != "activation" for value in values]
        ops = tuple(
            Op(
                facts.name, "", phase, reads, makes, overwrites, workspace + beside[index], seconds,
                repeatable=(repeatable or index in self._filled)
                and not any(fixed[old] for old, _ in overwrites)
                and self._sent.isdisjoint(makes)  # it may not go while others read it
                and not any(values[v].category == "input" for v in makes)  # who knows the address may write
                and self._moved.isdisjoint(leans_on)
                and not any(drafts[v].storage in lent for v in leans_on),  # known when its owner empties it, later perhaps
                random=random, dense=facts.dense,
            )
            for index, (
                facts, phase, reads, makes, overwrites, workspace, seconds, repeatable, random, leans_on
            ) in enumerate(self._rows)
        )  # fmt: skip
        return Trace(ops, values, device, model, measured=True)


def joined(one: Trace, other: Trace) -> Trace:
    """`one`, but with the bytes of the larger of two steps that did the same, on batches of different sizes perhaps."""
    met = 1 + max((v for op in one.ops for v in (*op.reads, *op.makes)), default=-1)  # those after it are only there
    values = tuple(
        replace(a, nbytes=max(a.nbytes, b.nbytes)) for a, b in zip(one.values[:met], other.values[:met], strict=True)
    )
    ops = tuple(replace(a, workspace=max(a.workspace, b.workspace)) for a, b in zip(one.ops, other.ops, strict=True))
    return replace(one, ops=ops, values=values + one.values[met:])


def _kind(hold: Hold) -> Category:
    """What a storage is to a plan: an activation whose address is known outside stays where it is, like an input."""
    return "input" if hold.exposed and hold.kind == "activation" else hold.kind
