"""A machine that holds contents at addresses, and a program that runs a trace on it: what online execution would see.

The content of a block is a number made from the operator and the contents it read: equal numbers, equal bits. Every content
has a range of addresses (or a count of bytes), two at one address are an error, and what was dropped is forgotten.
"""

from __future__ import annotations

from weft.memory.core import POLICIES, Arena, Block, Core, Step
from weft.memory.record import Trace


class Live:
    """Carries a core's decisions out; `events` is what it was asked, in words that a schedule can be compared with."""

    def __init__(self, trace: Trace, paged: bool):
        self.trace, self.paged = trace, paged
        self.bytes: dict[Block, int] = {}  # block -> content
        self.at: dict[Block, int] = {}  # block -> address, of those that have one
        self.events: list[tuple] = []
        self.core: Core | None = None

    def claim(self, block: Block, offset: int, nbytes: int) -> None:
        """Take a range of addresses."""
        if self.paged or block.room == 0:
            return
        for other, start in self.at.items():
            if start < offset + nbytes and offset < start + other.nbytes:
                raise AssertionError(f"{block} at {offset} overlaps {other} at {start}")
        assert offset >= 0 and offset + nbytes <= self.core.arena.size
        self.at[block] = offset

    def content(self, step: Step, position: int) -> int:
        """What an operator makes of what it reads now."""
        return hash((step.payload, position, *(self.bytes[block] for block in step.reads)))

    def ran(self, step: Step, kind: str) -> None:
        """An operator runs: every read must be there."""
        offsets = step.places if kind == "again" else [block.offset for block in step.makes]
        self.events.append((kind, step.payload, tuple(offsets), step.offset))
        new = [self.content(step, position) for position in range(len(step.makes))]
        for block, number in zip(step.makes, new, strict=True):
            if block is not None:
                self.bytes[block] = number
        for old, position in step.overwrites:
            del self.bytes[old]
            start, block = self.at.pop(old, None), step.makes[position]
            if start is not None and block is not None:
                assert block.offset == start
                self.at[block] = start

    def drop(self, block: Block) -> None:
        self.events.append(("drop", block.payload))
        self.bytes.pop(block, None)  # it may have been placed, and not been made
        self.at.pop(block, None)

    def place(self, block: Block) -> None:
        self.claim(block, block.offset, block.nbytes)

    def again(self, step: Step) -> None:
        self.ran(step, "again")

    def move(self, block: Block, old_offset: int) -> None:
        self.events.append(("move", block.payload, block.offset))
        assert self.at.pop(block) == old_offset
        self.claim(block, block.offset, block.nbytes)

    def describe(self, step: Step | None, block: Block) -> str:
        return "somebody"


def eager(trace: Trace) -> dict[int, int]:
    """The content of every value, nothing ever dropped."""
    found = {v: hash(("leaf", v)) for v, value in enumerate(trace.values) if value.born < 0}
    for index, op in enumerate(trace.ops):
        for position, v in enumerate(op.makes):
            found[v] = hash((index, position, *(found[r] for r in op.reads)))
    return found


def run_live(trace: Trace, budget: int, policy: str, **options) -> Live:
    """Run `trace` with an online core in `budget` bytes of arena; checks every content that the program reads."""
    machine = Live(trace, POLICIES[policy].paged)
    core = machine.core = Core(budget, policy, machine, **options)
    truth, values, end = eager(trace), trace.values, len(trace.ops)
    there: dict[int, Block] = {}
    for v, value in enumerate(values):
        if value.born < 0:
            there[v] = core.adopt(value.nbytes, v)
            machine.bytes[there[v]] = truth[v]
    for index, op in enumerate(trace.ops):
        dying = [v for v in there if values[v].dies == index]
        core.rescue([there[v] for v in (*dying, *(old for old, _ in op.overwrites))])
        sizes = [(values[v].nbytes, op.dense) for v in op.makes]
        over = [(there[old], op.makes.index(new)) for old, new in op.overwrites]
        step = core.begin([there[v] for v in op.reads], sizes, op.workspace, op.seconds, op.repeatable, over, index)
        for v in op.reads:
            assert machine.bytes[there[v]] == truth[v], f"operator {index} reads a wrong value {v}"
        for v, block in zip(op.makes, step.makes, strict=True):
            block.payload = v
            there[v] = block
            if values[v].category != "activation":
                block.step, block.evictable = None, False
            if v not in {new for _, new in op.overwrites}:
                machine.claim(block, block.offset, block.nbytes)
        machine.ran(step, "run")
        core.end(step)
        for old, _ in op.overwrites:
            del there[old]
        for v in [v for v in there if values[v].dies == index]:
            block = there.pop(v)
            core.release(block)
            machine.bytes.pop(block, None)
            machine.at.pop(block, None)
        assert core.arena.used <= core.arena.size
        tile(core)
    for v, block in there.items():
        core.ensure(block)
        assert machine.bytes[block] == truth[v]
    assert end == len(trace.ops)
    return machine


def tile(core: Core) -> None:
    """The core's arena is in order."""
    if isinstance(core.arena, Arena):
        tile_arena(core.arena)


def tile_arena(arena: Arena) -> None:
    """Pieces tile the arena, free ones do not touch, and the free list knows exactly the free ones."""
    at, before, free = 0, None, []
    for piece in arena.pieces():
        assert piece.offset == at and piece.left is before and piece.nbytes > 0
        if piece.block is None:
            assert before is None or before.block is not None, "two free pieces touch"
            free.append((piece.nbytes, piece.offset))
        elif piece.slots is None:
            assert (
                piece.block.piece is piece and piece.block.offset == piece.offset and piece.block.room == piece.nbytes
            )
        at, before = at + piece.nbytes, piece
    assert at == arena.size
    assert sorted(free) == [(nbytes, offset) for nbytes, offset, _ in arena.free_list()]
    assert arena.used == arena.size - sum(nbytes for nbytes, _ in free)
