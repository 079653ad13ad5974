"""Running operators as they come within a budget: what is missing is brought back, room is made, what ran is remembered.

Per call   1. find the block of every argument (`Hold`, tied to its storage); a storage not met before is adopted
           2. `Core.begin`: missing inputs come back (`Online.again`), outputs get room; random operators' state is kept
           3. the operator runs
           4. `Core.end`; outputs are tied to their blocks
In place   Operators of the backward pass write over the gradient that they are given if nobody else has it (`in_place`).
First runs The workspace of an operator is not known before it has run: it runs under a cap (`first_runs`).

A block's recipe is a `Step` of the core with a `Call` as payload; neither holds a tensor, so that bytes die when the user's last
reference dies. Exceptions: parameters and inputs that a recipe reads live as long as the recipe; what the program has made and
nothing can make again lives as long as something that is gone would be made from it (`Leaves`).

Without recipe (they stay until they die, or are overwritten): what was there before, finished gradients, what the optimizer
makes, results of collectives, everything whose address is known outside (`numpy()`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any, final

import torch
from torch import Tensor

from weft.errors import BudgetError
from weft.memory.core import Block, Core, Step
from weft.memory.execute.backends import Backend, Hold, Owner, tie
from weft.memory.execute.calls import Call, Look, flat, require_bytes, shapes_only, take_apart
from weft.memory.execute.carrying_out import Bytes
from weft.memory.execute.executor import Executor
from weft.memory.execute.facts import Facts
from weft.memory.execute.first_runs import first_run
from weft.memory.execute.in_place import over_its_gradient
from weft.memory.execute.leaves import Leaves, hold_leaves, is_soft, made_from
from weft.memory.execute.random_state import about_to_draw, state_nbytes
from weft.memory.execute.sizes import SETTLED, Size, Sizes, signature
from weft.memory.execute.tape import Tape
from weft.memory.execute.unremembered import adopt_parts, opaque, run_once
from weft.memory.private import below, in_backward, storage_of
from weft.memory.record import Category
from weft.memory.tracing.operators import fills, moved_statistics
from weft.memory.tracing.state import state_to_come

__all__ = ["Online"]

CRUMBS = 20_000  # blocks of fewer bytes than this part of the budget are dropped last, ...
LARGEST_CRUMB = 4096  # ... if they have no more than these
_block = itemgetter(2)  # of a look


@final
class Online(Executor):
    """The program's side of a `Core`.

    Args:
        budget: bytes for everything: what is adopted, what operators make, workspace.
        policy: of the core.
        backend, device, owner: see `Executor`.
        gauge: measures and caps the workspace of an operator's first runs (`weft.memory.native.Ledger`); None where nothing can.
        sizes: what earlier runs have shown.

    Attributes:
        core: decides. bytes: carries it out.
        clock: measures operators. effects: while True nothing gets a recipe.
        tape: writes down the step, if it is set.
    """

    def __init__(
        self,
        budget: int,
        policy: Any,
        backend: Backend,
        device: torch.device,
        owner: Owner | None = None,
        gauge: Any = None,
        sizes: Sizes | None = None,
    ):
        super().__init__(backend, device, owner)
        self.leaves = Leaves(self._holds)
        self.bytes = Bytes(backend, self.leaves)
        self.core = Core(budget, policy, self.bytes, crumb=min(budget // CRUMBS, LARGEST_CRUMB))
        self.gauge = gauge
        self.sizes = sizes or Sizes()
        self.tape: Tape | None = None
        self._reserved: Block | None = None  # for the state that an optimizer is to make
        self._gone: list[Block] = []  # died while the core was at work
        self._busy = self._clearing = False
        self._single = device.type == "cpu"  # there are no tensors on other devices, or they do not matter
        self.clock = time.thread_time if device.type == "cpu" else time.perf_counter

    # -- storages -----------------------------------------------------------------------------------------------------

    def adopt(self, tensor: Tensor, kind: Category | None = None) -> Hold:
        """Take note of a storage that was there before; it stays until it dies. `kind` is what it is to the user."""
        hold = self.hold_of(tensor)
        if hold is None:
            require_bytes(tensor)
            storage = storage_of(tensor)
            counted = storage.nbytes() if storage.device.type == self.device.type else 0
            whole = tensor if tensor._base is None else tensor._base  # a weight is met first as its transpose
            leaf = whole.requires_grad and whole.is_leaf
            kind = kind or ("parameter" if leaf else "optimizer" if self.effects else "input")
            hold = tie(self.owner, storage, self.core.adopt(counted, inside=True), kind)
            if self.tape is not None:
                self.tape.meets(hold)
            if leaf:
                self.watch(whole)
        return hold

    def died(self, hold: Hold) -> None:
        """The last tensor over a storage is gone, and its bytes with it."""
        block = hold.block
        if block.read and block.resident and is_soft(block):
            self.core.doom(block)
        block.payload = None
        if block.step is None:
            block.read = False  # nothing that is gone needs it: that would have kept it alive
        if self.bytes.dropped:
            self.bytes.dropped.pop(block, None)
            self.leaves.died(block)
        if self.tape is not None:
            self.tape.died(hold, self._busy and not self._clearing)
        if hold.exposed:
            self.core.unpin(block)
        if self._busy:
            self._gone.append(block)
        elif self.core.leaves_lost or (block.read and block.step is None):
            self._at_work(lambda: self.core.release(block))  # before that, something may have to be made again
        else:
            self.core.release(block)
            if self.leaves.loose:
                with below():
                    self._clear()

    def _clear(self) -> None:
        """Tell the core of what died while it was at work, and let go of what need not be held any longer."""
        gone, loose = self._gone, self.leaves.loose
        self._busy = self._clearing = True  # who dies by that waits for its turn
        try:
            while gone or loose:
                if gone:
                    self.core.release(gone.pop())
                else:
                    loose.pop()
        finally:
            self._busy = self._clearing = False

    def _holds(self, hold: Hold) -> None:
        """A storage is held from now on, for what is gone."""
        if self.tape is not None:
            self.tape.keeps(hold)

    # -- one call -----------------------------------------------------------------------------------------------------

    def call(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator within the budget.

        Raises:
            BudgetError: it does not fit.
        """
        if facts.once:
            return run_once(self, facts, args, kwargs)
        if facts.over is not None:
            if (over := over_its_gradient(facts, args, kwargs)) is not None and self._may_go(args[0]):
                facts, kwargs = over
        try:
            plain, named, looks = take_apart(args, kwargs, self.owner, self.adopt)
        except (NotImplementedError, RuntimeError):
            return opaque(self, facts, args, kwargs)
        size = self.sizes.look_up(signature(facts, plain, named, looks), facts, args, kwargs)
        if not size.managed:
            return opaque(self, facts, args, kwargs)
        moves: Sequence[Hold] = ()
        reads = dict.fromkeys(map(_block, looks)) if facts.needs_bytes else {}
        if facts.statistics:
            moves, looks = self._move(facts, args, looks)
            for hold in moves:
                reads.pop(hold.block, None)
        holds = [block.payload for block in reads]  # what is overwritten has none afterwards
        call = Call(facts, plain, named, looks if reads else shapes_only(looks), self.device)
        makes: list[tuple[int, bool]] = []
        overwrites, written = self._overwritten(facts, args, kwargs, makes) if facts.written else ((), ())
        once = facts.effect or self.effects or len(overwrites) < len(written)
        repeatable = not once and hold_leaves(call, reads)
        draws = facts.random and facts.draws(args, kwargs)
        for nbytes in size.fresh or ():
            makes.append((nbytes, facts.dense))
        workspace = size.workspace + (state_nbytes(self.device) if draws and repeatable and self._single else 0)

        self._busy, core = True, self.core
        late = in_backward()
        try:
            step = core.begin(list(reads), makes, workspace, size.seconds, repeatable, overwrites, call, late)
        except BaseException:
            self._clear()
            raise
        try:
            if draws and repeatable:
                call.drawn = about_to_draw(args, kwargs, self.device)
            result, fresh = self._run(step, size, args, kwargs)
        except BaseException:
            core.abort(step)
            self._clear()
            raise
        core.end(step, size.seconds)
        if facts.empty:
            self._wait_for_content(fresh)
        if self.tape is not None:
            self.tape.ran(
                facts, holds, written, [block.payload for block in fresh], workspace=step.workspace, seconds=size.seconds,
                repeatable=not facts.effect and not facts.empty, random=draws, effects=self.effects,
                moves=moves,
            )  # fmt: skip
        self._busy = False
        if self._gone or self.leaves.loose:
            self._clear()
        return result

    def _run(
        self, step: Step, size: Size, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Block]]:
        """Run the operator of a step that has begun. Its result, and the blocks that are fresh."""
        call: Call = step.payload
        overwrites, repeatable, foreseen = step.overwrites, step.repeatable, size.fresh is not None
        if foreseen and size.runs >= SETTLED:
            result = self.execute(step, len(overwrites), call.facts, args, kwargs)
        else:
            result = first_run(self, step, len(overwrites), size, call.facts, args, kwargs)
        if overwrites:
            self._new_versions(step)
        if foreseen:
            fresh = self._bind(step, call, size, len(overwrites), result)
        else:
            fresh = self._bind_unforeseen(step, call, size, result)
        if repeatable and not step.repeatable:
            for made in step.makes:
                self.core.settle(made)
        return result, fresh

    def _new_versions(self, step: Step) -> None:
        """What an operator has overwritten shows its new blocks."""
        for old, position in step.overwrites:
            hold, block = old.payload, step.makes[position]
            block.payload, old.payload, hold.block = hold, None, block
            if old in self.leaves.wants:
                self.leaves.lost(old)

    def _bind_unforeseen(self, step: Step, call: Call, size: Size, result: Any) -> Sequence[Block]:
        """The same as `_bind` after a run that has told what it makes: its outputs lie in what was taken for workspace."""
        taken = step.workspace
        self.core.widen(step, 0)
        fresh = self._bind(step, call, size, len(step.overwrites), result)
        lain = sum(block.nbytes for block in fresh)
        step.workspace = max(0, taken - lain)
        if size.fresh is not None:
            size.workspace = max(0, size.workspace - lain)
        return fresh

    def _may_go(self, tensor: Tensor) -> bool:
        """Whether the bytes of a tensor may be written over: they can be made again, and nobody knows their address."""
        hold = self.hold_of(tensor)
        return hold is not None and hold.block.step is not None and hold.kind == "activation" and not hold.exposed

    def _overwritten(
        self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any], makes: list[tuple[int, bool]]
    ) -> tuple[list[tuple[Block, int]], list[Hold]]:
        """What a call writes: (old block, position in `makes`) of what has a recipe, and so becomes a new version; and all
        storages. What has no recipe changes as it is, after what was made from it has been cut off."""
        found: dict[Block, Hold] = {}
        for position, name in facts.written:
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in flat(value):
                hold = self.adopt(tensor)
                if hold.block.step is None and hold.block.read:
                    self.cut((hold.block,))
                if hold.unfilled is not None and fills(facts.func, tensor) and not hold.exposed:
                    self._filled(hold)
                found[hold.block] = hold
        overwrites = []
        for block in found:
            if block.step is not None:
                overwrites.append((block, len(makes)))
                makes.append((block.nbytes, facts.dense))
        return overwrites, list(found.values())

    def _wait_for_content(self, fresh: Sequence[Block]) -> None:
        """Blocks are empty: they stay, without recipe, until operators have filled them."""
        for block in fresh:
            if block.step is not None and type(block.payload) is Hold:
                block.payload.unfilled = block.step
                self.core.settle(block)

    def _filled(self, hold: Hold) -> None:
        """An operator is about to give a storage all its content: with what there is, it can be made again."""
        hold.block.step, hold.unfilled = hold.unfilled, None
        hold.block.evictable = True
        if self.tape is not None:
            self.tape.filled(hold)

    def _move(self, facts: Facts, args: Sequence[Any], looks: Sequence[Look]) -> tuple[list[Hold], list[Look]]:
        """Before running statistics move: what was made from them is made now. Returns those that do, and the call's looks: a
        repetition does not read them."""
        positions = moved_statistics(facts.func, args)
        holds = [self.adopt(args[position]) for position in positions]
        for position, hold in zip(positions, holds, strict=True):
            self.settle(args[position])
            if hold.block.read:
                self.cut((hold.block,))
        return holds, shapes_only(looks, positions)

    def execute(self, step: Step, num_over: int, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.backend.addresses:
            return facts.call(*args, **kwargs)
        places = [(block.nbytes, block.offset) for block in step.makes[num_over:]]
        return self.backend.run(places, (step.offset, step.workspace), facts.call, args, kwargs)

    def _bind(self, step: Step, call: Call, size: Size, at: int, result: Any) -> Sequence[Block]:
        """Tie what came out of an operator to the blocks that were made for it, from the one at `at` on; returns these."""
        made: Any = step.makes
        places, owner = [], self.owner
        start = at
        for place, output in enumerate((result,) if isinstance(result, Tensor) else flat(result)):
            try:
                storage = storage_of(output)
            except (NotImplementedError, RuntimeError):
                step.repeatable = False
                adopt_parts(self, output)
                continue
            hold = getattr(storage, "_weft_tie", None)
            if hold is not None and hold.owner is owner:
                continue  # a view, or what it wrote
            nbytes = storage.nbytes() if self._single or storage.device.type == self.device.type else 0
            if at < len(made) and made[at].nbytes == nbytes:
                block = made[at]
            else:
                size.fresh = None  # not what was foreseen: from now on it runs first
                block = self.core.make(step, nbytes, call.facts.dense)
                made = step.makes
                made.insert(at, made.pop())
            tie(owner, storage, block, "activation")
            if self.backend.addresses:
                self.backend.born(block, storage)
            places.append(place)
            at += 1
        call.places = places
        if self.backend.addresses:
            self.backend.bound(self.core.arena.free)
        fresh = made[start:at]
        if at < len(made):
            size.fresh = None
            for block in made[at:]:
                self.core.arena.remove(block)
                block.resident = block.alive = False
            del made[at:]
        elif size.fresh is None and not call.facts.varies:
            size.fresh = tuple(block.nbytes for block in fresh)
        return fresh

    # -- what the user does besides calling operators -----------------------------------------------------------------

    def expose(self, tensor: Tensor) -> None:
        """Somebody is about to know the address of a tensor's bytes: they stay there as long as they live."""
        hold = self.hold_of(tensor)
        if hold is not None:
            self._at_work(lambda: self.core.settle(hold.block))  # who knows the address may write
            self.pin(hold)

    def lend(self, tensor: Tensor, nbytes: int) -> None:
        """The owner of a tensor's bytes is about to give it `nbytes`, another number. What has been made from it is made now.

        Raises:
            BudgetError: there is no room for them, or for what comes back.
        """
        hold = self.adopt(tensor)
        hold.fickle |= not hold.lent and not hold.block.nbytes
        hold.lent = True
        if hold.block.step is None and hold.block.read:
            hold.fickle |= self.cut((hold.block,))
        if not nbytes and self.tape is not None:
            self.tape.died(hold, self._busy)
        self.resized(hold, nbytes)

    def resized(self, hold: Hold, nbytes: int) -> None:
        """A storage shows another block from now on, of `nbytes`, without recipe.

        Raises:
            BudgetError: there is no room for it.
        """
        old = hold.block
        if old.nbytes == nbytes:
            return
        if hold.exposed:  # addresses that somebody knows are none any more
            hold.exposed = False
            self._at_work(lambda: self.core.unpin(old))
        hold.unfilled = None
        hold.block = self.core.adopt(nbytes, hold, inside=True)
        old.payload = None
        self.core.release(old)

    def settle(self, tensor: Tensor, kind: Category | None = None) -> None:
        """A tensor's bytes come back and stay, without recipe. `kind`: what it is to the user from now on."""
        hold = self.adopt(tensor)
        hold.kind = kind or hold.kind
        if hold.block.step is not None:
            self._at_work(lambda: self.core.settle(hold.block))
            if hold.block.read:
                self.cut((hold.block,))

    def cut(self, leaves: Collection[Block]) -> bool:
        """Blocks without recipe are about to change: whatever was made from them, in however many steps, comes back and stays.
        Whether anything had to come back.

        What is recorded of them can no longer be repeated; whoever reads what it made keeps that alive (see `call`).
        """
        going = made_from(leaves, [hold.block for hold in self.owner.holds.values()])
        missing = not all(block.resident for block in going)
        for block in going:
            self._at_work(lambda block=block: self.core.settle(block))
        for block in leaves:
            block.read = False
        return missing

    def reserve(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep room for what the optimizer's first step will make and keep.

        Raises:
            BudgetError: there is none.
        """
        name = f"the state that {type(optimizer).__name__} will make"
        self._reserved = self.core.adopt(state_to_come(optimizer), name, inside=True)
        self._reserved.payload = None  # it has no bytes

    def spend(self) -> None:
        if self._reserved is not None:
            self.core.release(self._reserved)
            self._reserved = None

    def optimizing(self, yes: bool) -> None:
        """The optimizer's step begins or ends.

        Raises:
            BudgetError: what was made from what it may change, and is still referred to, does not fit.
        """
        self.effects = yes
        if yes:
            try:
                self.cut({h.block for h in self.owner.holds.values() if h.block.step is None and h.block.read})
            except BudgetError as error:
                what = (
                    "whatever was made from the parameters and is still referred to has to be there when they change; delete or "
                    f"copy away what the loop collects, before optimizer.step(): {error.what}"
                )
                raise BudgetError(error.budget, 0, what) from None

    def skip_optimizer(self) -> bool:
        return False

    def pin(self, hold: Hold) -> None:
        if not hold.exposed:
            hold.exposed = True
            self._at_work(lambda: self.core.pin(hold.block))

    def _at_work(self, work: Callable[[], None]) -> None:
        self._busy = True
        try:
            with below():
                work()
        finally:
            self._clear()

    @property
    def begun(self) -> bool:
        return self.tape is None or self.tape.num_ops > 0

    midway = False  # nobody knows

    def all_fits(self) -> bool:
        """Whether everything that is alive may be there at once."""
        return self._alive() <= self.core.budget

    def _alive(self) -> int:
        """Bytes of everything that is alive, there or not."""
        return sum(hold.block.nbytes for hold in list(self.owner.holds.values()))

    def rest(self) -> None:
        """Between two steps: everything that is alive is there when this returns, and needs no recipe.

        Raises:
            BudgetError: that does not fit.
        """
        for hold in list(self.owner.holds.values()):
            block = hold.block
            if block.step is not None and block.alive:  # it may have been held for one that is back
                self._at_work(lambda block=block: self.core.settle(block))

    def hand_over(self) -> None:
        """Between two steps: everything that is alive is there when this returns, and somebody else executes from now on.

        Raises:
            BudgetError: that does not fit.
        """
        self.rest()
        room = self.core.budget - self._alive()
        for hold in self.owner.holds.values():
            self._leave(hold, room)  # or it stays in the arena, which outlives us
        self._end()

    def _leave(self, hold: Hold, room: int) -> None:
        storage = hold()
        if storage is not None and self.backend.addresses:
            self.backend.leave(storage, room)

    def leave(self) -> None:
        """Nothing is managed any more; what lies in an arena moves to torch's own memory."""
        self.bytes.dropped.clear()
        self._gone = []
        for hold in self.owner.holds.values():
            self._leave(hold, sys.maxsize)
        self.owner.holds.clear()
        self._end()

    def _end(self) -> None:
        self.backend.close()
        self.leaves.clear()
        # they know each other: apart, they and all that recipes keep are freed at once
        del self.core, self.bytes, self.leaves
