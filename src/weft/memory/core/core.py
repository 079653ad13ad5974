"""Running operators within a fixed number of bytes: dropping, rebuilding, placing. The one policy core of weft.

`Core` is told of every operator before and after it runs (`begin`, `end`) and of every block that nobody refers to any more
(`release`). It brings back what the operator reads, makes room for what it makes, and decides what to give up for
that. It does no I/O: a `Machine` carries its decisions out. The simulator drives it with a machine that only writes
them down, online execution with one that moves bytes; under the same costs both decide alike.

Bring back  The missing inputs of an operator need steps, whose missing inputs need further steps: a sub-graph of the program.
            Its steps run in the order in which they first ran, which is an order they can run in, and in which whoever reads
            an overwritten block comes before the step that overwrites it. Inputs of later steps stay pinned. What
            nobody refers to is dropped right after its last use in the sub-graph; unless something that is wanted, and still
            gone, is made from it: then it may stay, as long as there is room.                               `_bring_back`
In place    When f overwrites v0 by v1, v0 keeps its recipe and loses its bytes, v1 takes its address and has recipe f(v0, ..).
            What was recorded as made from v0 still is. To rebuild v1, v0 is rebuilt in a scratch block and f applied to that.
Effects     A block that is overwritten and has no recipe (a parameter, by the optimizer) is lost for good: what is dropped,
            still wanted, and built from it comes back before that, and stays.                              `rescue`
Make room   The policy drops blocks until the new one fits. If enough bytes are free, but not together, blocks are pushed
            together instead (memory moves several times faster than most operators compute).               `_room`
Source      Zhang et al., "Coop: Memory is not a Commodity", NeurIPS 2023, arXiv:2311.00591. Moving blocks is ours.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, final

from weft.errors import BudgetError
from weft.memory.core.arena import Arena, Space
from weft.memory.core.blocks import Block, Gone, Step, found, lost, missing_steps, overwritten, rebuildable
from weft.memory.core.machine import Lower, Machine
from weft.memory.core.policy import POLICIES, Policy, drop_greedily
from weft.names import pick

__all__ = ["MOVE_RATE", "Core"]

MOVE_RATE = (
    4e9  # bytes per second at which a block moves to another address; one core copies more, and reads and writes
)


@final
class Core:
    """Keeps the blocks of a running program within `budget` bytes.

    Args:
        budget: bytes for everything that is put here; parameters and whatever else is `adopt`ed outside does not count, so
            give what they leave.
        policy: one of `POLICIES` or its name.
        machine: carries the decisions out.
        arena: memory to work on; made by the policy if None.
        align: addresses and sizes in an arena are multiples of this.
        moves: blocks may be pushed together when enough bytes are free but not in one place.
        small: see `Arena`.
        crumb: blocks of fewer bytes are late (see `Block`): they make no room. The published methods know none.

    Attributes:
        num_steps: that have begun; the `order` of the next one.
        clock: seconds of all steps so far, repeated ones included: the time that the policies know.
        searches: how often something did not fit. candidates: blocks that the published method scores in these searches.
        scored: blocks that were scored. evictions, repeats: blocks dropped to make room, steps run again.
        repeated_seconds: what those cost. moved_bytes: pushed together.
        fragmentation: mean over searches of the share of the arena that is still free when room has been made.
        lower: of the machine, if there is a lower tier.
        leaves_lost: something without recipe is gone: not every recipe can be followed.
    """

    __slots__ = (
        "_begun",
        "_doomed",
        "_dropped",
        "_exposed",
        "_free_sum",
        "_placing",
        "arena",
        "budget",
        "candidates",
        "clock",
        "crumb",
        "evictions",
        "leaves_lost",
        "lower",
        "machine",
        "moved_bytes",
        "moves",
        "num_steps",
        "policy",
        "repeated_seconds",
        "repeats",
        "scored",
        "searches",
    )

    def __init__(
        self,
        budget: int,
        policy: Policy | str,
        machine: Machine,
        *,
        arena: Space | None = None,
        align: int = 64,
        moves: bool = True,
        small: int | None = None,
        crumb: int = 0,
    ):
        self.policy = pick(policy, POLICIES, "policy") if isinstance(policy, str) else policy
        self.arena = self.policy.space(budget, align, small) if arena is None else arena
        self.budget, self.machine, self.moves, self.crumb = budget, machine, moves, crumb
        self.lower: Lower | None = None
        self.clock = 0.0
        self.searches = self.candidates = self.scored = self.evictions = self.repeats = self.moved_bytes = 0
        self.repeated_seconds = self._free_sum = 0.0
        self.num_steps = 0
        self._begun: list[Step] = []
        self._dropped: dict[Block, None] = {}  # not there, but somebody refers to them
        self._exposed: dict[Block, int] = {}  # pinned by `pin`: must not move either
        self._placing: Sequence[Block] = ()  # have room, but no bytes yet
        self._doomed: set[Block] = set()  # about to be overwritten, and without recipe
        self.leaves_lost = False

    @property
    def fragmentation(self) -> float:
        """Mean over searches of the share of the arena that is still free when room has been made: of no use to anyone."""
        return self._free_sum / (self.searches * max(self.arena.size, 1)) if self.searches else 0.0

    # -- what a program does ------------------------------------------------------------------------------------------

    def adopt(self, nbytes: int, payload: Any = None, *, inside: bool = False) -> Block:
        """A block that no step makes: a parameter, an input. It stays until released.

        Args:
            inside: it takes its bytes from the budget; else they are held elsewhere.
        """
        block = Block(nbytes)
        block.payload = payload
        if inside:
            self.put(block)
        return block

    def put(self, block: Block, step: Step | None = None) -> None:
        """A block takes its bytes from the budget, for `step` if it is one's.

        Raises:
            BudgetError: there is no room.
        """
        if not self.arena.put(block):
            self._room(block, step)

    def begin(
        self,
        reads: Sequence[Block],
        makes: Iterable[tuple[int, bool]] = (),
        workspace: int = 0,
        seconds: float = 0.0,
        repeatable: bool = True,
        overwrites: Sequence[tuple[Block, int]] = (),
        payload: Any = None,
        late: bool = False,
    ) -> Step:
        """An operator is about to run: its reads are there when this returns, and everything it makes has room.

        Args:
            reads: blocks, each once, those it overwrites included.
            makes: (bytes, dense) for each output; one that is not known yet can be added by `make`.
            workspace: bytes it takes and gives back; their address is `offset` of the step.
            seconds: its cost; may be given to `end`.
            repeatable: it may run again and then gives the same bits.
            overwrites: (block, position in `makes`): that output is written over that block.
            payload: becomes `payload` of the step before anything else happens.
            late: a backward pass runs it: what it makes is dropped after all else.
        Returns:
            the step; `makes` are its new blocks. Pass it to `end`, or to `abort` if the operator raised.
        Raises:
            BudgetError: there is no room, or a read is gone for good; nothing is pinned then.
        """
        step = Step(reads, workspace, seconds, repeatable, overwrites, self.num_steps)
        step.payload, step.late = payload, late
        self.num_steps += 1
        missing = False
        for block in reads:
            block.pins += 1
            if not block.resident:
                missing = True
        made: list[Block] = []
        step.makes = made
        try:
            if missing:
                self._bring_back(reads)
            if overwrites:
                for block, _ in overwrites:
                    if block.step is None:
                        step.repeatable = False
                self.rescue([old for old, _ in overwrites])
            self._placing = made
            put = self.arena.put
            for nbytes, dense in makes:
                block = self._output(step, nbytes, dense)
                made.append(block)
                if not (overwrites and overwritten(step, len(made) - 1)) and not put(block):
                    self._room(block, step)
            if workspace:
                self._take_scratch(step)
            for old, position in overwrites:
                made[position].offset = old.offset  # only now: making room may have moved it
        except BaseException:
            self._let_go(step)
            raise
        self._placing = ()
        self._begun.append(step)
        return step

    def make(self, step: Step, nbytes: int, dense: bool = False) -> Block:
        """One more output of a step that has begun and not ended, for programs that learn sizes by running.

        Raises:
            BudgetError: there is no room.
        """
        block = self._output(step, nbytes, dense)
        self.put(block, step)
        step.makes = [*step.makes, block]
        return block

    def _output(self, step: Step, nbytes: int, dense: bool) -> Block:
        """A block that a step is to make; it stays while the step runs."""
        block = Block(nbytes, step.seconds, step if step.repeatable else None, dense)
        block.pins, block.late = 1, self.late(step, nbytes)
        return block

    def late(self, step: Step, nbytes: int) -> bool:
        """Whether an output of so many bytes is dropped after all that is not."""
        return step.late or nbytes < self.crumb

    def widen(self, step: Step, workspace: int) -> None:
        """A step that has begun takes another workspace than it was begun with; none once it only tells what it has made.

        Raises:
            BudgetError: there is no room; `abort` it then.
        """
        self._give_scratch(step)
        step.workspace = workspace
        if workspace:
            self._take_scratch(step)

    def end(self, step: Step, seconds: float | None = None) -> None:
        """The operator has run."""
        if seconds is not None:
            step.seconds = seconds
        clock = self.clock  # last uses are stamped with the start: what was used just now is not used infinitely lately
        self.clock = clock + step.seconds
        self._begun.remove(step)
        if step.scratch is not None:
            self._give_scratch(step)
        made = step.makes
        if step.repeatable:
            step.outputs = [weakref.ref(block) for block in made]
            step.sizes = [block.nbytes for block in made]
            for block in step.reads:
                block.read = True
        overwrites = step.overwrites
        for old, position in overwrites:
            self._end_version(old, made[position])
        for block in step.reads:
            block.last = clock
            block.pins -= 1
            if not block.alive and not block.pins:
                self._unused(block)
        for block in made:
            block.last = clock
            block.pins -= 1
            if not block.alive and not block.pins:
                self._unused(block)
        step.makes = ()
        if overwrites and self._doomed:
            self._doomed.difference_update(old for old, _ in overwrites)

    def abort(self, step: Step) -> None:
        """The operator raised: its outputs are gone, its reads are as it left them."""
        self._begun.remove(step)
        self._let_go(step)

    def release(self, block: Block) -> None:
        """The last reference to `block` is gone. Its bytes are given back at once (by the caller, when this returns), or by
        `Machine.drop` as soon as it is no longer pinned. It may come back, for a while, to rebuild others.

        What has no recipe and was read by operators that can be repeated (an input, the result of a collective) is a leaf of
        recipes: its bytes must still be there when this is called, since what was dropped and needs them comes back first.

        Raises:
            BudgetError: it cannot be made again, and what was made from it and dropped does not fit.
        """
        block.alive = False
        doomed = block in self._doomed
        self._doomed.discard(block)
        if not block.resident:
            self._no_longer_missed(block)
        elif not block.pins:
            if not doomed:
                self._part_with(block)
            self.arena.remove(block)
            block.resident = False
            if block.read and block.step is not None:
                lost(block.step)

    def doom(self, block: Block) -> None:
        """The bytes of `block` are gone already; `release` will follow. Nothing that was dropped is made from it (the caller has
        held it as long as something was), and what would be is not dropped any more."""
        self.leaves_lost = True
        self._doomed.add(block)

    def rescue(self, blocks: Iterable[Block]) -> None:
        """Blocks are about to be overwritten or given back. If they cannot be made again, whatever somebody refers to, is not
        there, and is built from them comes back now and is not dropped again.

        Raises:
            BudgetError: that does not fit.
        """
        going = [block for block in blocks if block.read and block.resident]
        if not (self.leaves_lost or any(block.step is None for block in going)):
            return
        for block in sorted(going, key=_age):  # whether one can be made again may hang on one before it
            if block.step is None or not rebuildable(block, self._doomed):
                self.leaves_lost = True
                self._doomed.add(block)
        if self._doomed.isdisjoint(going):
            return
        # one that is pinned and not there is on its way back already
        needed = [block for block in self._dropped if not block.pins and not rebuildable(block, self._doomed)]
        for block in needed:
            block.pins += 1
        try:
            self._bring_back(needed)
        except BaseException:
            self._doomed.difference_update(going)
            raise
        finally:
            self._unpin(needed)

    def _recoverable(self, block: Block) -> bool:
        """If a block's bytes went, they could be made again."""
        return block.step is not None and (not self.leaves_lost or rebuildable(block, self._doomed))

    def ensure(self, block: Block) -> None:
        """Bring a block back if it is not there.

        Raises:
            BudgetError: there is no room, or it cannot be made again.
        """
        if not block.resident:
            block.pins += 1
            try:
                self._bring_back((block,))
            finally:
                self._unpin((block,))

    def pin(self, block: Block) -> None:
        """Bring a block back; it neither goes nor moves until `unpin`: somebody has its address."""
        self.ensure(block)
        block.pins += 1
        self._exposed[block] = self._exposed.get(block, 0) + 1

    def unpin(self, block: Block) -> None:
        """Undo one `pin`."""
        if self._exposed[block] == 1:
            del self._exposed[block]
        else:
            self._exposed[block] -= 1
        self._unpin((block,))

    def settle(self, block: Block) -> None:
        """Bring a block back and forget its recipe: it stays until released. For results that outlive a step (gradients,
        hidden states carried on), whose recipes would grow for ever."""
        self.ensure(block)
        block.evictable, block.step = False, None

    def evict(self, block: Block) -> bool:
        """Drop a block to make room (policies call this). False if its recipe cannot be followed any more; then it stays."""
        sent = self.lower is not None and block.alive and self.lower(block)
        if not sent and not self._recoverable(block):
            block.evictable = False
            return False
        self.evictions += 1
        if block.alive:
            self._missed(block)
        self._drop(block)
        return True

    def fits(self, block: Block) -> bool:
        """Put a block into the arena, pushing others together if that alone makes room for it."""
        return self.arena.put(block) or (self.moves and self._slide(block) and self.arena.put(block))

    # -- room ---------------------------------------------------------------------------------------------------------

    def _room(self, block: Block, step: Step | None) -> None:
        """Put `block`, which does not fit, into the arena.

        Raises:
            BudgetError: nothing that may be dropped or moved makes room for it.
        """
        self.searches += 1
        # last resort: every long enough stretch has a piece that must stay; free bytes anywhere, then push together
        if (
            (self.moves and self._slide(block) and self.arena.put(block))
            or self.policy.make_room(self, block)
            or (self.moves and drop_greedily(self, False, lambda: self.fits(block)))
            or (self.lower is not None and self._send(block))
        ):
            self._free_sum += self.arena.free
            return
        stuck = self.arena.used - sum(b.room for b in self.arena.blocks() if b.evictable and not b.pins)
        raise BudgetError(
            self.budget,
            0,
            f"{self.machine.describe(step, block)} needs {block.nbytes:,} bytes; {self.arena.free:,} are free, and {stuck:,} "
            "belong to what it uses or to what cannot be made again",
        )

    def _send(self, block: Block) -> bool:
        """What cannot be made again goes to the lower tier, the largest first, until `block` fits."""
        stuck = [b for b in self.lower.blocks() if b.resident and not b.evictable and not b.pins]
        largest_first = sorted(stuck, key=lambda b: -b.room)
        return any(self.lower(other) and self.evict(other) and self.fits(block) for other in largest_first)

    def _slide(self, block: Block) -> bool:
        """Push blocks together if enough bytes are free for `block` but not in one place."""
        arena = self.arena
        if not isinstance(arena, Arena):
            return False
        need = arena.rounded(block.nbytes)
        if arena.free < need:
            return False
        used = set(self._exposed)
        for step in self._begun:
            used.update(step.reads, step.makes, (step.scratch,))
        moved = arena.slide(need, lambda other: other in used or other.piece is None)
        for other, old_offset in moved or ():
            if other not in self._placing:  # else there are no bytes yet
                self.moved_bytes += other.nbytes
                self.machine.move(other, old_offset)
        return moved is not None

    def _drop(self, block: Block) -> None:
        self.machine.drop(block)
        self.arena.remove(block)
        block.resident = False
        if block.step is not None:
            lost(block.step)

    def _unpin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.pins -= 1
            if not block.alive and not block.pins:
                self._unused(block)

    def _unused(self, block: Block) -> None:
        """Nobody refers to `block` and nothing is reading it: it goes, unless something that is gone would be made from it."""
        if block.resident and not (block.wanted and block.evictable) and block not in self._doomed:
            self._part_with(block)
            self._drop(block)

    def _part_with(self, block: Block) -> None:
        """The bytes of `block` are about to go for good, if they cannot be made again."""
        if block.read and (block.step is None or self.leaves_lost):
            self.rescue((block,))
            self._doomed.discard(block)

    def _missed(self, block: Block) -> None:
        """Somebody refers to `block`, and it is about to go."""
        self._dropped[block] = None
        for read in block.step.reads:
            read.wanted += 1

    def _no_longer_missed(self, block: Block) -> None:
        """`block` is back, or nobody refers to it any more: what was kept because it is made from that may go."""
        if block in self._dropped:
            del self._dropped[block]
            for read in block.step.reads:
                read.wanted -= 1
                if not read.wanted and not read.alive and not read.pins:
                    self._unused(read)

    def _take_scratch(self, step: Step) -> None:
        block = step.scratch = Block(step.workspace, dense=step.dense)
        block.pins = 1
        self.put(block, step)
        step.offset = block.offset

    def _give_scratch(self, step: Step) -> None:
        block = step.scratch
        if block is not None:
            self.arena.remove(block)
            step.scratch, step.offset = None, -1

    def _let_go(self, step: Step) -> None:
        """Undo `begin`."""
        self._give_scratch(step)
        for block in step.makes:
            if block.room:
                self.arena.remove(block)
            block.resident = block.alive = False
        step.makes = ()
        self._unpin(step.reads)
        self._doomed.difference_update(old for old, _ in step.overwrites)

    # -- bringing back ------------------------------------------------------------------------------------------------

    def _bring_back(self, wanted: Sequence[Block]) -> None:
        """Rebuild those of `wanted` (pinned by the caller) that are not there.

        Raises:
            BudgetError: there is no room, or something in their way is gone and has no recipe.
        """
        try:
            steps = missing_steps(wanted)
        except Gone as gone:
            (block,) = gone.args
            who = f"{self.machine.describe(None, block)} ({block.nbytes:,} bytes)"
            why = "its bytes are gone and it cannot be made again (it was overwritten, or came from outside)"
            raise BudgetError(self.budget, 0, f"{who} is needed again, but {why}") from None
        pinned = [read for step in steps for read in step.reads]
        for block in pinned:
            block.pins += 1
        done = 0
        try:
            for step in steps:
                if _serves(step):
                    if not all(read.resident for read in step.reads):
                        self._bring_back(step.reads)
                    self._again(step)
                self._unpin(step.reads)  # may rescue, which may have run the next steps, and overwritten what they read
                done += len(step.reads)
        except BaseException:
            self._unpin(pinned[done:])
            raise

    def _again(self, step: Step) -> None:
        """Run a step again, all of whose reads are there."""
        if len(step.outputs) > 1:
            self._give_up_copies(step)
        makes: list[Block] = []  # with the copies
        placed: list[Block] = []
        self._placing = makes
        try:
            for position, reference in enumerate(step.outputs):
                block = reference()
                if block is None or block.resident or block.step is None:  # it stays, or nobody wants it
                    block = Block(step.sizes[position], dense=step.dense)
                block.pins += 1
                makes.append(block)
                if not overwritten(step, position) and not self.arena.put(block):
                    self._room(block, step)
            if step.workspace:
                self._take_scratch(step)
            for block in makes:
                if block.step is not None and not overwritten(step, len(placed)):
                    self.machine.place(block)
                placed.append(block)
            for old, position in step.overwrites:
                makes[position].offset = old.offset  # only now: making room may have moved it
            step.makes = [block if block.step is not None else None for block in makes]
            step.places = [block.offset for block in makes]
            self.machine.again(step)
        except BaseException:
            step.makes = step.places = ()
            self._give_scratch(step)
            for position, block in enumerate(makes):
                block.pins -= 1
                if not overwritten(step, position):
                    if block.step is not None and position < len(placed):
                        self.machine.drop(block)
                    self.arena.remove(block)
            raise
        self._has_run_again(step, makes)

    def _give_up_copies(self, step: Step) -> None:
        """What is there of a step's outputs would come a second time: its bytes serve better for the first."""
        for reference in step.outputs:
            block = reference()
            if block is not None and block.resident and block.evictable and not block.pins:
                if block.alive:
                    self._missed(block)
                self._drop(block)

    def _has_run_again(self, step: Step, makes: Sequence[Block]) -> None:
        self.repeats += 1
        self.repeated_seconds += step.seconds
        clock = self.clock
        self.clock = clock + step.seconds
        self._give_scratch(step)
        step.makes = step.places = self._placing = ()
        found(step)
        for old, position in step.overwrites:
            self._end_version(old, makes[position])
        for block in makes:
            if block.step is None:
                if block.room:
                    self.arena.remove(block)
            else:
                block.resident, block.last = True, clock
                self._no_longer_missed(block)
        self._unpin(makes)  # drops what nobody wants
        for block in step.reads:
            block.last = clock

    def _end_version(self, old: Block, new: Block) -> None:
        """`old` has been overwritten: `new` has its bytes."""
        self.arena.hand_over(old, new)
        old.resident = old.alive = False
        if old.step is not None:
            lost(old.step)


def _age(block: Block) -> int:
    """Number of the step that made a block, -1 for a leaf."""
    return -1 if block.step is None else block.step.order


def _serves(step: Step) -> bool:
    """An output of `step` is needed (pinned), and not there."""
    return any(block is not None and block.pins and not block.resident for block in (ref() for ref in step.outputs))
