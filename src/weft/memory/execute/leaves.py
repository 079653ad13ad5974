"""What nothing can make again, held while something that is gone would be made from it, and no longer.

A *leaf* is a block without recipe. Parameters, buffers and inputs live as long as the step anyway: recipes hold them (`Call`).
Other leaves the program makes in its course: results of collectives, and whatever is made from ZeRO-3's gathered weights. If
recipes held those too, next to nothing would ever die: a gradient leans on the one before it, and so back to the loss. So a
recipe that leans on such a leaf, in however many steps, is *soft*, and holds nothing by itself.

Demand     wanted     a block that is gone, and somebody refers to it; and what due steps read
           due        the step of a wanted block that is not there
           there      its bytes are, and a storage of the program's shows them (those that only recipes want may go any time)
Invariant  each soft block that is wanted is there and held by us, or its step is due. So, by induction along the recipes,
           everything wanted can be made again: what ends a recipe is a leaf that is held. Nothing else is held.
Keeping it the core drops only what can be made again (`rebuildable`): at this moment every leaf of it is alive, and is held
           from then on. A leaf that nobody wants dies with its last user; what was made from it can be dropped no more.
Cost       that of the steps that would run again, when something is dropped; nothing for recipes that are not soft.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import final

import torch

from weft.memory.core import Block, Step
from weft.memory.core.blocks import BY_ORDER
from weft.memory.execute.backends import Hold, shown
from weft.memory.execute.calls import Call

__all__ = ["Leaves", "hold_leaves", "is_soft", "made_from"]


def is_soft(block: Block) -> bool:
    """Whether the recipe of a block leans on something that only we could keep alive; or whether it is such a thing itself."""
    if block.step is not None:
        return block.step.payload.soft
    return type(block.payload) is not Hold or block.payload.kind == "activation"


def hold_leaves(call: Call, reads: Iterable[Block]) -> bool:
    """Whether a call may be repeated, going by what it reads: gradients and fickle bytes change where we do not see it. If so, it
    holds what cannot be made again, or is soft where we would have to (`Leaves`)."""
    keep: list[torch.UntypedStorage] | None = None
    soft = False
    for block in reads:
        maker = block.step
        if maker is not None:
            soft = soft or maker.payload.soft
            continue
        hold = block.payload
        if hold.kind == "gradient" or hold.fickle:
            return False
        if hold.kind == "activation":
            soft = True
        elif keep is None:
            keep = [hold()]
        else:
            keep.append(hold())
    call.keep, call.soft = keep, soft
    return True


def made_from(leaves: Collection[Block], alive: Sequence[Block]) -> list[Block]:
    """Those of the blocks `alive` that were made from leaves, in however many steps, as far as recipes go."""
    reached: set[Step] = set()
    stack = [block.step for block in alive if block.step is not None]
    while stack:
        step = stack.pop()
        if step not in reached:
            reached.add(step)
            stack.extend([read.step for read in step.reads if read.step is not None])
    stale: set[Step] = set()
    for step in sorted(reached, key=BY_ORDER):
        if any(read in leaves or read.step in stale for read in step.reads):
            stale.add(step)
    return [block for block in alive if block.step in stale]


@final
class Leaves:
    """Counts who wants what, and holds what must not die.

    Args:
        note: called with the tie of each storage that is held from now on.

    Attributes:
        held: wanted blocks that are there, and their storages.
        missed: blocks that are gone, and somebody refers to them.
        wants: for each wanted block, by how many due steps, and once if it is missed.
        due: for each due step, how many of its outputs want it, and the soft blocks that it reads.
        loose: storages that need not be held any longer. The executor lets go of them when its core is not at work: who dies by
            that would come back here.
    """

    __slots__ = ("_steps", "due", "held", "loose", "missed", "note", "wants")

    def __init__(self, note: Callable[[Hold], None] = lambda hold: None):
        self.note = note
        self.held: dict[Block, torch.UntypedStorage] = {}
        self.missed: set[Block] = set()
        self.wants: dict[Block, int] = {}
        self.due: dict[Step, tuple[int, list[Block]]] = {}
        self.loose: list[torch.UntypedStorage] = []
        self._steps: dict[Block, Step] = {}  # of the wanted blocks that are not there: what is due for them

    def gone(self, block: Block) -> None:
        """A block with a soft recipe is being dropped, and a storage of the program's shows it."""
        if block not in self.missed:
            self.missed.add(block)
            if block in self.wants:
                self.lost(block)
            self._want([block])

    def back(self, block: Block) -> None:
        """A block's bytes are there again, in a storage of the program's."""
        if block in self.missed:
            self.missed.remove(block)
            freed = self._no_longer_due(block)
            self.wants[block] -= 1
            if self.wants[block]:
                self._hold(block)
            else:
                del self.wants[block]
            self._unwant(freed)

    def died(self, block: Block) -> None:
        """Nobody refers to a block any more."""
        if block in self.missed:
            self.missed.remove(block)
            self._unwant([block])

    def lost(self, block: Block) -> None:
        """A wanted block that was there is not any more: dropped, or overwritten."""
        self.loose.append(self.held.pop(block))
        self._want(self._due(block))

    def clear(self) -> None:
        """Nothing is to be made again any more."""
        self.wants.clear()
        self.due.clear()
        self._steps.clear()
        self.missed.clear()
        self.held.clear()
        self.loose.clear()

    def _want(self, blocks: list[Block]) -> None:
        """Each of these blocks is wanted once more."""
        stack = [*blocks]
        while stack:
            block = stack.pop()
            self.wants[block] = count = self.wants.get(block, 0) + 1
            if count == 1:
                if type(block.payload) is Hold and block not in self.missed:
                    self._hold(block)
                else:
                    stack += self._due(block)

    def _unwant(self, blocks: list[Block]) -> None:
        """Each of these blocks is wanted once less."""
        stack = [*blocks]
        while stack:
            block = stack.pop()
            self.wants[block] -= 1
            if not self.wants[block]:
                del self.wants[block]
                if block in self.held:
                    self.loose.append(self.held.pop(block))
                else:
                    stack += self._no_longer_due(block)

    def _hold(self, block: Block) -> None:
        hold = block.payload
        self.held[block] = shown(block)
        self.note(hold)

    def _due(self, block: Block) -> list[Block]:
        """The step of a wanted block that is not there is due; what becomes wanted by that."""
        step = block.step
        assert step is not None, f"{block} is wanted and gone for good"
        self._steps[block] = step
        count, reads = self.due.get(step) or (0, [read for read in step.reads if is_soft(read)])
        self.due[step] = count + 1, reads
        return [] if count else reads

    def _no_longer_due(self, block: Block) -> list[Block]:
        """A block is there, or not wanted any more; what is wanted less by that."""
        step = self._steps.pop(block)
        count, reads = self.due[step]
        if count > 1:
            self.due[step] = count - 1, reads
            return []
        del self.due[step]
        return reads
