"""What a schedule has done before an operator runs, on the bytes of the step under way: drop, again, move, save, load.

`Actions.doing` turns each action of a plan into a function, once; a replayed step calls these and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch

from weft.memory.core import Block
from weft.memory.execute.backends import Backend, Hold, Places, shown
from weft.memory.execute.calls import Call
from weft.memory.execute.recall import asked_for
from weft.memory.execute.shelf import Shelf
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule

__all__ = ["Actions", "Deviation"]


class Deviation(Exception):
    """The program does something else than the trace says."""


@final
class Actions:
    """Carries out the actions of a plan.

    Args:
        trace, schedule: the plan.
        backend: holds the bytes.
        shelf: the lower tier.
        spared: values that are kept though the plan drops them.

    Attributes:
        blocks: of the trace's values, as far as they have been made in this step.
        calls: of the trace's operators, as far as they are remembered.
        dropped: not there, but a storage of the user's shows them.
        repeats: operators run again so far.
    """

    def __init__(self, trace: Trace, schedule: Schedule, backend: Backend, shelf: Shelf, spared: set[int]):
        self.trace, self.backend, self.shelf, self.spared = trace, backend, shelf, spared
        self._last_load = {action.index: action for action in schedule.actions if action.kind == "load"}
        kept = asked_for(trace, schedule)
        self._last_again = {a.index: a for a in schedule.actions if a.kind == "again" and a.index not in kept}
        self.dropped: dict[Block, None] = {}
        self.repeats = 0
        self.begin()

    def begin(self) -> None:
        """A step begins: what the last one knew is forgotten."""
        self.blocks: list[Block | None] = [None] * len(self.trace.values)
        self.calls: list[Call | None] = [None] * len(self.trace.ops)
        self.dropped.clear()
        self.shelf.clear()

    def doing(self, action: Action) -> Callable[[], None]:
        """What carries an action out."""
        v = action.index
        if action.kind == "drop":
            return partial(self._spare if v in self.spared else self._drop, v)
        if action.kind == "again":
            return self._repeating(action)
        if action.kind == "move":
            ((_, offset),) = action.places
            return partial(self._move, v, offset)
        if action.kind == "save":
            return partial(self._save, v)
        return partial(self._load, v, dict(action.places).get(v, -1), self._last_load[v] is action)

    def fetching(self, action: Action) -> Callable[[], None]:
        """What begins to carry a load out, where it may take its time."""
        return partial(self._fetch, action.index)

    def letting_go(self, j: int) -> Callable[[], None]:
        """What lets go of all that the call of operator j holds."""

        def let_go() -> None:
            if (call := self.calls[j]) is not None:
                call.keep = None

        return let_go

    # -- dropping and moving ------------------------------------------------------------------------------------------

    def _drop(self, v: int) -> None:
        block = self.blocks[v]
        if block is None or not block.resident:
            return
        self.shelf.saved(block)
        if type(block.payload) is Hold:
            if block.payload.exposed:
                return  # somebody has its address
            self.dropped[block] = None
        self.backend.drop(block)
        block.resident = False

    def _spare(self, v: int) -> None:
        """Keep what the plan drops; where it lies others are to lie."""
        block = self.blocks[v]
        if self.backend.addresses and block is not None and block.resident:
            self.backend.leave(shown(block))
            block.offset = -1

    def _move(self, v: int, offset: int) -> None:
        block = self.blocks[v]
        if block is None or not block.resident or (type(block.payload) is Hold and block.payload.exposed):
            return
        block.offset = offset
        self.backend.move(block)

    # -- running again ------------------------------------------------------------------------------------------------

    def _repeating(self, action: Action) -> Callable[[], None]:
        op, places = self.trace.ops[action.index], dict(action.places)
        inherited = {new for _, new in op.overwrites}
        fresh = tuple(places.get(v) for v in op.makes if v not in inherited)
        offsets = tuple((self.trace.values[v].nbytes, places.get(v, -1)) for v in op.makes if v not in inherited)
        over = tuple(new in places for _, new in op.overwrites)
        last = self._last_again.get(action.index) is action

        def repeat() -> None:
            self._again(action.index, fresh, over, offsets, (action.workspace, op.workspace))
            if last:
                self.calls[action.index].keep = None

        return repeat

    def _again(
        self, j: int, fresh: Sequence[int | None], over: Sequence[bool], places: Places, workspace: tuple[int, int]
    ) -> None:
        """Run operator j again. `fresh`: for each fresh output its address, None to throw it away; `over`: for each storage
        that it writes, whether its new contents are to come back."""
        call = self.calls[j]
        if call is None or len(call.over) != len(over) or len(call.made) != len(fresh):
            raise Deviation(f"operator {j} of the plan was another one")
        for look in call.looks:
            if look[2] is not None and look[2].payload is None:
                raise Deviation(f"what {call.facts.name} needs to run again is not there")
        self.repeats += 1
        made = call.again(self.backend.run, places, workspace)
        for (old, new), comes in zip(call.over, over, strict=True):
            scratch, old.payload, old.resident = old.payload, None, False
            if comes:
                self._back(new, scratch, old.offset)
        for block, storage, offset in zip(call.made, made, fresh, strict=True):
            if offset is not None:
                self._back(block, storage, offset)
        self.backend.bound()

    def _back(self, block: Block, storage: torch.UntypedStorage, offset: int) -> None:
        if block.resident:
            return
        block.offset = offset
        self.backend.back(block, storage)
        block.resident = True
        self.dropped.pop(block, None)

    # -- the lower tier -----------------------------------------------------------------------------------------------

    def _save(self, v: int) -> None:
        block = self.blocks[v]
        if block is not None and block.resident:
            self.shelf.save(block, shown(block))

    def _fetch(self, v: int) -> None:
        block = self.blocks[v]
        if block in self.shelf and block.alive:
            self.shelf.fetch(block)

    def _load(self, v: int, offset: int, last: bool) -> None:
        block = self.blocks[v]
        if block in self.shelf:
            if block.alive:  # else nobody refers to it any more
                self._back(block, self.shelf.load(block, partial(self._empty, offset)), offset)
                self.backend.bound()
            if last:
                self.shelf.forget(block)

    def _empty(self, offset: int, nbytes: int, **options: Any) -> torch.Tensor:
        """`torch.empty`, at an address: bytes need not be copied there."""
        return self.backend.run([(nbytes, offset)], (-1, 0), torch.empty, (nbytes,), options)

    def load_all(self) -> None:
        """Bring back whatever the lower tier has of what is not there."""
        for block in list(self.dropped):
            if block in self.shelf:
                self._back(block, self.shelf.load(block), -1)
                self.shelf.forget(block)
