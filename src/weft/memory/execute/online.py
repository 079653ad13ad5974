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

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from weft.memory.core import Block, Core, Step
from weft.memory.core.blocks import BY_ORDER
from weft.memory.execute.backends import Backend, Hold, Owner, tie
from weft.memory.execute.calls import Call, flat, geometry_of
from weft.memory.execute.facts import Facts
from weft.memory.execute.first_runs import first_run
from weft.memory.execute.in_place import over_its_gradient
from weft.memory.execute.leaves import Leaves, is_soft
from weft.memory.execute.random_state import about_to_draw, state_nbytes
from weft.memory.execute.sizes import SETTLED, Size, Sizes
from weft.memory.execute.tape import Tape
from weft.memory.private import below, storage_of
from weft.memory.record import Category
from weft.memory.tracing.operators import tensors_of, writes

__all__ = ["Online"]


@final
class Online:
    """The machine of a `Core`, and the program's side of it.

    Args:
        budget: bytes for everything: what is adopted, what operators make, workspace.
        policy: of the core.
        backend: holds the bytes.
        device: whose bytes are counted; tensors elsewhere are left alone.
        owner: whose ties they are; another executor of the same limit may have had them before.
        gauge: measures and caps the workspace of an operator's first runs (`weft.memory.native.Ledger`); None where nothing can.
        sizes: what earlier runs have shown.

    Attributes:
        core: decides.
        clock: measures operators. effects: while True nothing gets a recipe (the optimizer's step).
        tape: writes down the step, if it is set.
        watch: called with each leaf that wants a gradient when it is first met.
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
        self.core = Core(budget, policy, self)
        self.owner = owner or Owner()
        self.owner.executor = self
        self.backend = backend
        self.device = device
        self.gauge = gauge
        self.sizes = sizes or Sizes()
        self.effects = False
        self.watch: Callable[[Tensor], None] = lambda leaf: None
        self.tape: Tape | None = None
        self.leaves = Leaves(self._holds)
        self._gone: list[Block] = []  # died while the core was at work
        self._busy = self._clearing = False
        self._dropped: dict[Block, None] = {}  # not there, but a storage of the user's shows them
        self._single = device.type == "cpu"  # there are no tensors on other devices, or they do not matter
        self.clock = time.thread_time if device.type == "cpu" else time.perf_counter

    # -- storages -----------------------------------------------------------------------------------------------------

    def hold_of(self, tensor: Tensor) -> Hold | None:
        """Our tie to the bytes of a tensor, None if we never met them."""
        hold = getattr(storage_of(tensor), "_weft_tie", None)
        return hold if type(hold) is Hold and hold.owner is self.owner else None

    def adopt(self, tensor: Tensor, kind: Category | None = None) -> Hold:
        """Take note of a storage that was there before; it stays until it dies. `kind` is what it is to the user."""
        hold = self.hold_of(tensor)
        if hold is None:
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
        if self._dropped:
            self._dropped.pop(block, None)
            self.leaves.died(block)
        if self.tape is not None:
            self.tape.died(hold, self._busy and not self._clearing)
        if hold.exposed:
            self.core.unpin(block)
        if self._busy:
            self._gone.append(block)
        else:
            self.core.release(block)
            if self.leaves.loose:
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
        """Run an operator within the budget."""
        if facts.in_flight:
            return self._communicate(facts, args, kwargs)
        if facts.regeometry:
            return self._regeometry(facts, args, kwargs)
        if facts.over is not None:
            if (over := over_its_gradient(facts, args, kwargs)) is not None and self._may_go(args[0]):
                facts, kwargs = over
        looks: list[Any] = []
        reads: dict[Block, Hold] = {}
        shapes: list[Any] = []  # geometry of the tensors, part of the signature
        owner = self.owner
        plain = list(args)  # what is not a tensor, the rest of it
        for position, value in enumerate(args):
            if isinstance(value, Tensor):
                plain[position] = None
                try:
                    storage = storage_of(value)
                    hold = storage._weft_tie  # type: ignore[attr-defined]
                    if hold.owner is not owner:
                        hold = self.adopt(value)
                except AttributeError:
                    hold = self.adopt(value)
                except (NotImplementedError, RuntimeError):
                    return self._opaque(facts, args, kwargs)  # sparse, opaque: no storage of its own
                block = hold.block
                reads[block] = hold
                geometry = geometry_of(value)
                shapes.append(geometry)
                looks.append((position, -1, block, geometry, value.storage_offset()))
            elif isinstance(value, (list, tuple)):
                plain[position] = self._look_into(value, position, looks, shapes, reads)
        if kwargs:
            plain_kwargs = dict(kwargs)
            for name, value in kwargs.items():
                if isinstance(value, Tensor):
                    self._look(value, name, -1, looks, shapes, reads)
                    plain_kwargs[name] = None
                elif isinstance(value, (list, tuple)):
                    plain_kwargs[name] = self._look_into(value, name, looks, shapes, reads)
            size = self.sizes.look_up((facts, *shapes, *plain, *plain_kwargs.items()), facts, args, kwargs)
        else:
            plain_kwargs = kwargs
            size = self.sizes.look_up((facts, *shapes, *plain), facts, args, kwargs)

        if not facts.needs_bytes:
            looks = [(position, index, None, geometry, offset) for position, index, _, geometry, offset in looks]
            reads.clear()
        repeatable = not (facts.effect or self.effects)
        makes: list[tuple[int, bool]] = []
        overwrites: Sequence[tuple[Block, int]] = ()
        written: Sequence[Hold] = ()
        if facts.written:
            overwrites, written = self._overwritten(facts, args, kwargs, makes)
            if len(overwrites) < len(written):
                repeatable = False
        keep: list[torch.UntypedStorage] | None = None
        soft = False
        if repeatable:
            for block in reads:
                maker = block.step
                if maker is not None:
                    soft = soft or maker.payload.soft
                    continue
                hold = reads[block]
                if hold.kind == "gradient" or hold.lent:
                    repeatable = False
                    break
                if hold.kind == "activation":
                    soft = True
                    continue
                storage = hold()
                if keep is None:
                    keep = [storage]
                else:
                    keep.append(storage)
        call = Call(facts, plain, plain_kwargs, looks, self.device, keep, soft)
        makes += [(nbytes, facts.dense) for nbytes in size.fresh or ()]
        workspace = size.workspace
        random = facts.random and facts.draws(args, kwargs)
        if random and repeatable:
            workspace += state_nbytes(self.device)
        self._busy = True
        core = self.core
        try:
            step = core.begin(list(reads), makes, workspace, size.seconds, repeatable, overwrites, call)
        except BaseException:
            self._clear()
            raise
        try:
            if random and repeatable:
                call.drawn = about_to_draw(args, kwargs, self.device)
            unforeseen = size.fresh is None
            if unforeseen or size.runs < SETTLED:
                result = first_run(self, step, len(overwrites), size, facts, args, kwargs)
            else:
                result = self.execute(step, len(overwrites), facts, args, kwargs)
            taken = step.workspace
            if unforeseen:  # its outputs lie in what was taken for workspace
                core.widen(step, 0)
            if overwrites:
                for old, position in overwrites:
                    hold, block = old.payload, step.makes[position]
                    block.payload, old.payload, hold.block = hold, None, block
                    if old in self.leaves.wants:
                        self.leaves.lost(old)
            fresh = self._bind(step, call, size, len(overwrites), result)
            if repeatable and not step.repeatable:
                for made in step.makes:
                    core.settle(made)
            if unforeseen:
                lain = sum(block.nbytes for block in fresh)
                step.workspace = max(0, taken - lain)
                if size.fresh is not None:
                    size.workspace = max(0, size.workspace - lain)
        except BaseException:
            core.abort(step)
            self._clear()
            raise
        core.end(step, size.seconds)
        if self.tape is not None:
            self.tape.ran(
                facts, list(reads.values()), written, [block.payload for block in fresh], workspace=step.workspace,
                seconds=size.seconds, repeatable=not facts.effect, random=random, effects=self.effects,
                has_outputs=bool(flat(result)),
            )  # fmt: skip
        self._busy = False
        if self._gone or self.leaves.loose:
            self._clear()
        return result

    def _may_go(self, tensor: Tensor) -> bool:
        """Whether the bytes of a tensor may be written over: they can be made again, and nobody knows their address."""
        hold = self.hold_of(tensor)
        return hold is not None and hold.block.step is not None and hold.kind == "activation" and not hold.exposed

    def _look_into(
        self, values: Sequence[Any], position: Any, looks: list[Any], shapes: list[Any], reads: dict[Block, Hold]
    ) -> Sequence[Any]:
        """Look at the tensors of a list; the list without them, as a tuple."""
        plain = list(values)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                self._look(value, position, index, looks, shapes, reads)
                plain[index] = None
        return tuple(plain)

    def _look(
        self, tensor: Tensor, position: Any, index: int, looks: list[Any], shapes: list[Any], reads: dict[Block, Hold]
    ) -> None:
        """Look at one tensor (`call` does the same in its own loop, for speed)."""
        hold = self.adopt(tensor)
        reads[hold.block] = hold
        geometry = geometry_of(tensor)
        shapes.append(geometry)
        looks.append((position, index, hold.block, geometry, tensor.storage_offset()))

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
                found[hold.block] = hold
        overwrites = []
        for block in found:
            if block.step is not None:
                overwrites.append((block, len(makes)))
                makes.append((block.nbytes, facts.dense))
        return overwrites, list(found.values())

    def _communicate(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator that other processes take part in, and that may still be writing when it has returned: what it is
        given stays where it is as long as it lives, and what it makes or writes has no recipe."""
        holds = dict.fromkeys(self.adopt(tensor) for tensor in tensors_of((*args, *kwargs.values())))
        for hold in holds:
            self._pin(hold)
        written = dict.fromkeys(self.adopt(tensor) for tensor in writes(facts.func, args, kwargs))
        for hold in written:
            self.core.settle(hold.block)
            if hold.block.read:
                self.cut((hold.block,))
        result = facts.call(*args, **kwargs)
        outputs = list(tensors_of((result,)))
        fresh = dict.fromkeys(self.adopt(tensor, "activation") for tensor in outputs if self.hold_of(tensor) is None)
        for hold in fresh:
            self._pin(hold)
        if self.tape is not None:
            self.tape.ran(
                facts, list(holds), list(written), list(fresh), workspace=0, seconds=0.0, repeatable=False, random=False,
                effects=self.effects, has_outputs=bool(outputs),
            )  # fmt: skip
        return result

    def _regeometry(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator that gives a tensor another storage or a storage another size: what it touches has no recipe."""
        tensors = [tensor for value in (*args, *kwargs.values()) for tensor in flat(value)]
        for tensor in tensors:
            self.settle(tensor)
            self.cut((self.adopt(tensor).block,))
        result = facts.call(*args, **kwargs)
        for tensor in (*tensors, *flat(result)):
            hold, nbytes = self.adopt(tensor), storage_of(tensor).nbytes()
            if hold.block.nbytes != nbytes:
                self.core.release(hold.block)
                hold.block = self.core.adopt(nbytes, hold, inside=True)
        return result

    def _opaque(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator on tensors without storages (sparse, oneDNN's own): everything else it uses comes back and stays."""
        for value in (*args, *kwargs.values()):
            for tensor in flat(value):
                if tensor.layout is torch.strided:
                    self.settle(tensor)
        result = facts.call(*args, **kwargs)
        for tensor in flat(result):
            if tensor.layout is torch.strided:
                self.adopt(tensor)
        return result

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
            self.backend.bound()
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

    # -- what the core asks for ---------------------------------------------------------------------------------------

    def drop(self, block: Block) -> None:
        if type(block.payload) is Hold:
            self._dropped[block] = None
            if is_soft(block):
                self.leaves.gone(block)
        self.backend.drop(block)

    def place(self, block: Block) -> None:
        pass

    def again(self, step: Step) -> None:
        call: Call = step.payload
        makes, num_over, places = step.makes, len(step.overwrites), []
        if self.backend.addresses:
            places = list(zip(step.sizes, step.places, strict=True))[num_over:]
        made = call.again(self.backend.run, places, (step.offset, step.workspace))
        for old, position in step.overwrites:
            scratch, old.payload = old.payload, None
            self._come_back(makes[position], scratch)
        for block, storage in zip(makes[num_over:], made, strict=True):
            self._come_back(block, storage)
        self.backend.bound()

    def _come_back(self, block: Block | None, storage: torch.UntypedStorage) -> None:
        if block is not None:
            self._dropped.pop(block, None)
            self.backend.back(block, storage)
            self.leaves.back(block)

    def move(self, block: Block, old_offset: int) -> None:
        self.backend.move(block, old_offset)

    def save(self, block: Block) -> None:
        raise NotImplementedError("no lower tier here")

    def load(self, block: Block) -> None:
        raise NotImplementedError("no lower tier here")

    def describe(self, step: Step | None, block: Block) -> str:
        call = (step or block.step).payload if step is not None or block.step is not None else None
        if call is not None:
            return repr(call)
        return block.payload if isinstance(block.payload, str) else "a tensor that came from outside"

    # -- what the user does besides calling operators -----------------------------------------------------------------

    def ensure(self, tensor: Tensor) -> None:
        """The bytes of a tensor are there when this returns."""
        hold = self.hold_of(tensor)
        if hold is not None and not hold.block.resident:
            self._at_work(lambda: self.core.ensure(hold.block))

    def expose(self, tensor: Tensor) -> None:
        """Somebody is about to know the address of a tensor's bytes: they stay there as long as they live."""
        hold = self.hold_of(tensor)
        if hold is not None:
            self._pin(hold)

    def lend(self, tensor: Tensor, nbytes: int) -> None:
        """The owner of a tensor's bytes is about to give it `nbytes`, or has just taken them all (0).

        Raises:
            BudgetError: there is no room for them.
        """
        hold = self.adopt(tensor)
        hold.lent = True
        old = hold.block
        if old.nbytes == nbytes:
            return
        if not nbytes and self.tape is not None:
            self.tape.died(hold, self._busy)
        hold.block = self.core.adopt(nbytes, hold, inside=True)
        old.payload = None
        self.core.release(old)

    def settle(self, tensor: Tensor, kind: Category = "activation") -> None:
        """A tensor's bytes come back and stay, without recipe: a finished gradient."""
        hold = self.adopt(tensor)
        hold.kind = kind
        if hold.block.step is not None:
            self._at_work(lambda: self.core.settle(hold.block))
            if hold.block.read:
                self.cut((hold.block,))

    def cut(self, leaves: Collection[Block]) -> None:
        """Blocks without recipe are about to change: whatever was made from them, in however many steps, comes back and stays.

        What is recorded of them can no longer be repeated; whoever reads what it made keeps that alive (see `call`).
        """
        reached: set[Step] = set()
        alive = [hold.block for hold in self.owner.holds.values()]
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
        going = [block for block in alive if block.step in stale]
        for block in going:
            self._at_work(lambda block=block: self.core.settle(block))
        for step in stale:
            step.repeatable = False
        for block in leaves:
            block.read = False

    def optimizing(self, yes: bool) -> None:
        """The optimizer's step begins or ends."""
        self.effects = yes
        if yes:
            self.cut({hold.block for hold in self.owner.holds.values() if hold.block.step is None and hold.block.read})

    def _pin(self, hold: Hold) -> None:
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
        for hold in self.owner.holds.values():
            self._leave(hold)
        self._end()

    def _leave(self, hold: Hold) -> None:
        storage = hold()
        if storage is not None and self.backend.addresses:
            self.backend.leave(storage)

    def leave(self) -> None:
        """Nothing is managed any more; what lies in an arena moves to torch's own memory."""
        self._dropped, self._gone = {}, []
        for hold in self.owner.holds.values():
            self._leave(hold)
        self.owner.holds.clear()
        self._end()

    def _end(self) -> None:
        self.backend.close()
        self.leaves.clear()
        del self.core, self.leaves  # they know their machine: apart, they and all that recipes keep are freed at once
