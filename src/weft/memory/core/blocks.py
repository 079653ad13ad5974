"""What a rematerialisation policy knows of memory: blocks of bytes, the steps that make them, what a rebuild would cost.

A `Block` is one content of one allocation; its recipe is the `Step` that made it. Steps hold the blocks that they read,
blocks hold the step that made them, and a step knows its outputs only weakly: so a recipe lives exactly as long as something
that may be wanted again is built from it, and dies without any bookkeeping.

Problem    the seconds it would take to bring block t back, were it dropped: its own step and every step before it
           whose outputs are gone; and dropping t makes what was built from it, and is gone too, dearer.
Method     steps with outputs that are gone form components, kept by union-find: a step that loses an output joins the
           components of its inputs (`lost`); one that has run again leaves, by subtracting its own seconds (`found`: the split
           is approximate, as in DTR). Then
               price(t) = c(t) + sum over the components beside t of C(component)                        `price`
           What a backward pass has made is `LATE` times as dear (ours): it is read soon and for the last time, and making a
           gradient again takes the pass up to it, with all that this reads at once, which the components do not see.
Source     Kirisame et al., "Dynamic Tensor Rematerialization", ICLR 2021, arXiv:2006.09616, section 4 and appendix C; the
           components count steps, not tensors, so that two outputs of one step do not cost it twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any, final

__all__ = [
    "BY_ORDER",
    "Block",
    "Gone",
    "Node",
    "Step",
    "find",
    "found",
    "lost",
    "missing_steps",
    "overwritten",
    "price",
    "rebuildable",
]

BY_ORDER = attrgetter("order")
LATE = 1e15  # beyond the ratio of any two times since a last use


@final
class Node:
    """A node of the union-find forest; `seconds` counts at a root only."""

    __slots__ = ("above", "seconds")

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.above: Node | None = None


def find(node: Node) -> Node:
    """The root of a node's component; halves the path on the way."""
    above = node.above
    while above is not None:
        if above.above is not None:
            node.above = above.above
        node, above = above, above.above
    return node


@final
class Block:
    """One content of one allocation.

    Attributes:
        nbytes: as asked for. seconds: of the step that made it.
        step: its recipe; None if it cannot be made again (a parameter, an input, the result of an effect).
        offset: its address in the arena in bytes; -1 while it has none.
        resident: its bytes are there.
        pins: it must stay there while this is above zero (an operator is reading it, a pointer to it is out).
        evictable: a policy may drop it. Small blocks and those without recipe are not.
        dense: many operations per byte went into it.
        alive: the user, or autograd, still refers to it; a block that is not is kept only as part of recipes.
        read: a recorded step reads it.
        last: the clock at its last use, in seconds.
        late: dropped last: a backward pass has made it, or it is too small to make room.
        wanted: how many blocks that somebody refers to are gone and would be made from this one.
        room: bytes that it takes in the arena, rounded up. piece: where (the arena's own).
        payload: the executor's own.
    """

    __slots__ = (
        "__weakref__",
        "alive",
        "dense",
        "evictable",
        "last",
        "late",
        "nbytes",
        "offset",
        "payload",
        "piece",
        "pins",
        "read",
        "resident",
        "room",
        "seconds",
        "step",
        "wanted",
    )

    def __init__(self, nbytes: int, seconds: float = 0.0, step: Step | None = None, dense: bool = False):
        self.nbytes = nbytes
        self.seconds = seconds
        self.step = step
        self.dense = dense
        self.offset = -1
        self.resident = True
        self.pins = 0
        self.evictable = step is not None
        self.alive = True
        self.read = False
        self.last = 0.0
        self.late = False
        self.wanted = 0
        self.room = 0
        self.piece: Any = None
        self.payload: Any = None

    def __repr__(self) -> str:
        state = ("resident" if self.resident else "dropped") + (", alive" if self.alive else "")
        pins = f", {self.pins} pins" if self.pins else ""
        return f"Block({self.nbytes} bytes at {self.offset}, {state}{pins}, {self.payload!r})"


@final
class Step:
    """One operator call that was recorded, and the recipe of its outputs.

    Attributes:
        reads: blocks it needs, those it overwrites included.
        makes: while it runs, the block of each output, or None if this output is thrown away; else ().
        places: while it runs again, the address of each output, those thrown away included; else ().
        outputs: the blocks it made when it first ran, weakly. sizes: their bytes.
        overwrites: (block in `reads`, position in `makes`): that output is written over that block.
        workspace: bytes it takes and gives back. offset: where they are while it runs, -1 if there are none.
        seconds: its cost. repeatable: it may run again. dense: of its outputs, for its workspace. late: see `Block`.
        order: number of the call.
        node: its component if an output of it is gone, else None.
        payload: the executor's own.
    """

    __slots__ = (
        "__weakref__",
        "dense",
        "late",
        "makes",
        "node",
        "offset",
        "order",
        "outputs",
        "overwrites",
        "payload",
        "places",
        "reads",
        "repeatable",
        "scratch",
        "seconds",
        "sizes",
        "workspace",
    )

    def __init__(
        self,
        reads: Sequence[Block],
        workspace: int,
        seconds: float,
        repeatable: bool,
        overwrites: Sequence[tuple[Block, int]],
        order: int,
    ):
        self.reads = reads
        self.workspace = workspace
        self.seconds = seconds
        self.repeatable = repeatable
        self.overwrites = overwrites
        self.order = order
        self.makes: Sequence[Block | None] = ()
        self.places: Sequence[int] = ()
        self.outputs: Sequence[weakref.ref[Block]] = ()
        self.sizes: Sequence[int] = ()
        self.dense = self.late = False
        self.offset = -1
        self.scratch: Block | None = None  # its workspace
        self.node: Node | None = None
        self.payload: Any = None

    def __repr__(self) -> str:
        return f"Step({self.order}, {len(self.reads)} reads, {self.seconds:.2g} s, {self.payload!r})"


def missing_steps(wanted: Iterable[Block]) -> list[Step]:
    """The steps that must run again for `wanted` to be there, in the order of the program.

    Raises:
        Gone: something in their way is gone and has no recipe.
    """
    steps: set[Step] = set()
    stack = [block for block in wanted if not block.resident]
    while stack:
        block = stack.pop()
        step = block.step
        if step is None:
            raise Gone(block)
        if step not in steps:
            steps.add(step)
            stack.extend([read for read in step.reads if not read.resident])
    return sorted(steps, key=BY_ORDER)


class Gone(Exception):
    """A block is needed that is gone for good; the only argument."""


def rebuildable(block: Block, doomed: Collection[Block]) -> bool:
    """Every leaf of a block's recipe is there, and not about to go (`doomed`)."""
    if block.step is None:
        return False
    seen, stack = {block.step}, [block.step]
    while stack:
        for read in stack.pop().reads:
            if read in doomed:
                return False
            if not read.resident:
                if read.step is None:
                    return False
                if read.step not in seen:
                    seen.add(read.step)
                    stack.append(read.step)
    return True


def overwritten(step: Step, position: int) -> Block | None:
    """What the output at `position` is written over, if it is."""
    for old, at in step.overwrites:
        if at == position:
            return old
    return None


def lost(step: Step) -> None:
    """An output of `step` is gone: it joins the components of those of its inputs that are gone."""
    if step.node is not None:
        return
    root = step.node = Node(step.seconds)
    for block in step.reads:
        if not block.resident and block.step is not None and block.step.node is not None:
            other = find(block.step.node)
            if other is not root:
                other.seconds += root.seconds
                root.above = other
                root = other


def found(step: Step) -> None:
    """`step` has run again and its outputs are there: it leaves its component."""
    if step.node is not None:
        find(step.node).seconds -= step.seconds
        step.node = None


def price(block: Block) -> float:
    """Seconds to count against dropping a resident block that has a recipe: its step's and those of the components beside it,
    `LATE` times these if it is late."""
    return _beside(block) * LATE if block.late else _beside(block)


def _beside(block: Block) -> float:
    step = block.step
    assert step is not None, "a block without recipe has no price"
    node = step.node
    if node is None:
        for read in step.reads:
            if not read.resident:
                break
        else:  # most blocks: nothing is gone around them
            return step.seconds
    total, roots = step.seconds, None
    if node is not None:  # another output of the step is gone: the component counts the step itself
        root = find(node)
        total, roots = root.seconds, [root]
    for read in step.reads:
        if not read.resident and read.step is not None:
            node = read.step.node
            if node is not None:
                root = find(node)
                if roots is None:
                    roots = [root]
                elif root in roots:
                    continue
                else:
                    roots.append(root)
                total += root.seconds
    return total
