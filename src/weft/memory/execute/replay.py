"""Carrying a plan out: the steps of a loop that does the same every time, without any search.

A `Schedule` says what happens before each operator of a `Trace`. `Replay` compares each call with the operator that the trace
has at this point, does what the schedule says, runs it, and remembers the call for repetitions. It decides nothing.

It relies on the trace for bytes only, never for bits: whatever is repeated is repeated from calls that were remembered in this
very step, and a call that reads something that is not there is noticed. Such a call, or a run of calls that the trace does not
have, makes it hand over to `Online`, in the middle of the step, with everything remembered so far (`takeover.take_over`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from weft.memory.core import Block
from weft.memory.execute.actions import Actions, Deviation
from weft.memory.execute.backends import Backend, Hold, Owner, Places, tie
from weft.memory.execute.calls import Call, Look, flat, is_plain, require_bytes, shapes_only, take_apart
from weft.memory.execute.executor import Executor
from weft.memory.execute.facts import Facts
from weft.memory.execute.in_place import over_its_gradient
from weft.memory.execute.random_state import about_to_draw
from weft.memory.execute.recall import never_read_again, remembered
from weft.memory.execute.rows import Row, rows
from weft.memory.execute.shelf import Shelf
from weft.memory.execute.sizes import Sizes
from weft.memory.execute.unremembered import parts
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.private import storage_of
from weft.memory.record import Category, Trace
from weft.memory.tracing.operators import moved_statistics, tensors_of

__all__ = ["Deviation", "Replay"]

CAUTIOUS_STEPS = 8  # replayed steps in which every call is remembered; afterwards those of the forward pass
EXTRA_CALLS = 8  # calls in a row that the trace does not have, before the step counts as another one


@final
class Replay(Executor):
    """Executes one planned step after the other.

    Args:
        plan: what is carried out.
        budget: bytes, at least those of the plan.
        backend, device, owner: see `Executor`.
        sizes: what operators have taken so far.
        given: the plan was made of a trace, not of a step that we have seen: what the program brings along may be more.

    Attributes:
        trace, schedule: the plan's.
        slack: bytes between the plan's peak and the budget: for what calls make that the trace does not have, and for what
            somebody refers to longer than the plan needs it.
        at: number of the operator that comes next.
        actions: what the schedule says, carried out. dropped: of these.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        budget: int,
        backend: Backend,
        device: torch.device,
        owner: Owner,
        sizes: Sizes,
        given: bool = False,
    ):
        super().__init__(backend, device, owner)
        trace, schedule = self.trace, self.schedule = plan.trace, plan.schedule
        self.budget, self.sizes = budget, sizes
        self.slack = max(budget - plan.peak, 0)
        self.at = 0
        self._expected = _brought(trace) if given else -1
        self.token = -1.0  # marks the blocks of this step; negative, as no clock
        self.log: list[tuple[Call, int | None]] = []  # what was remembered in this step, and its number in the trace
        self._leaned_on: set[Block] = set()  # what was there before this step, and repetitions read
        self.steps = 0
        self._unread, spared = never_read_again(trace, schedule, self.slack // 2)
        self.slack -= sum(trace.values[v].nbytes for v in spared)
        self.shelf = Shelf(device, plan.tier.folder if plan.tier is not None else "")
        self.actions = Actions(trace, schedule, backend, self.shelf, spared)
        self.dropped = self.actions.dropped
        self._lay_out(cautious=True)
        self._extra_calls = self._extra_bytes = 0
        self._unmet = 0  # bytes that the plan counts from the start of the step, and that we have not met then
        self._larger = False  # an operator of this step has made more than planned
        self._updating = 0  # bytes that unplanned calls of the optimizer's step may still make

    def held(self, but: str = "") -> int:
        """Bytes of everything that is there and that we know of, but for one kind."""
        kind = self.device.type
        return sum(
            hold.block.nbytes
            for hold in list(self.owner.holds.values())
            if hold.block.resident
            and hold.kind != but
            and (kind == "cpu" or ((storage := hold()) is not None and storage.device.type == kind))
        )

    @property
    def repeats(self) -> int:
        """Operators run again so far."""
        return self.actions.repeats

    def _lay_out(self, cautious: bool) -> None:
        """Turn the schedule into rows.

        Args:
            cautious: remember all operators, so that everything can go on online if the step turns out to be another one;
                else those of the forward pass, whose results users may hold on to, and those that will be repeated.
        """
        remember = remembered(self.trace, self.schedule, self.slack, cautious)
        self._cautious = cautious and bool(remember)
        self.rows, self.after = rows(self.trace, self.schedule, self.actions, remember, self.backend.addresses)
        # Nobody asks for older versions of a storage: nothing goes, nothing is repeated.
        self._bare = not (remember or self.backend.addresses or any(a.kind != "run" for a in self.schedule.actions))
        if self._expected >= 0 and self.rows:
            self.rows[0].before.insert(0, self._begin)

    # -- storages -----------------------------------------------------------------------------------------------------

    def adopt(self, tensor: Tensor, kind: Category | None = None) -> Hold:
        """Take note of a storage that was there before."""
        hold = self.hold_of(tensor)
        if hold is None:
            require_bytes(tensor)
            storage = storage_of(tensor)
            whole = tensor if tensor._base is None else tensor._base  # a weight is met first as its transpose
            leaf = whole.requires_grad and whole.is_leaf
            hold = tie(self.owner, storage, Block(storage.nbytes()), kind or ("parameter" if leaf else "input"))
            if leaf:
                self.watch(whole)
        return hold

    def died(self, hold: Hold) -> None:
        block = hold.block
        block.payload, block.resident, block.alive = None, False, False
        if self.dropped:
            self.dropped.pop(block, None)
            self.shelf.forget(block)

    # -- one call -----------------------------------------------------------------------------------------------------

    def call(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator of the program, as planned.

        Raises:
            Deviation: it has not run; somebody else must.
        """
        at = self.at
        if at == len(self.rows):
            return self._extra(facts, args, kwargs)
        if self._extra_bytes > self.slack:
            self._require_room(facts)
        row = self.rows[at]
        if row.facts is not facts:
            if row.name != facts.name:
                if facts.over is None or row.name != facts.over[0]:
                    return self._extra(facts, args, kwargs)
                over = over_its_gradient(facts, args, kwargs)
                if over is None:
                    raise Deviation(f"somebody else has the gradient that {facts.name} is to write over")
                facts, kwargs = over
            row.facts = facts
        if facts.statistics:
            self._check_statistics(facts, args)
        if row.open or self._larger:
            self._check_size(row, facts, args, kwargs)
        if row.remember:
            try:
                plain, named, looks = self._take_apart(facts, args, kwargs)
            except (NotImplementedError, RuntimeError):  # a namesake that traces leave out (`unremembered.opaque`)
                return self._extra(facts, args, kwargs)
        for act in row.before:
            act()
        if row.remember:
            lasting = self.trace.ops[at].repeatable
            call = self.actions.calls[at] = self._remember(facts, plain, named, looks, lasting)
            self.log.append((call, at))
            if facts.random and facts.draws(args, kwargs):
                call.drawn = about_to_draw(args, kwargs, self.device)
        else:
            call = None
            if self.dropped:
                self._check(facts, args, kwargs)
        self.at = at + 1
        self._extra_calls = 0
        if not row.bind:
            result = facts.call(*args, **kwargs) if kwargs else facts.call(*args)
            if row.places:
                self._measure(row.places, result)
            if row.overwrites and not self._bare:
                self._write_over(row.overwrites, facts, args, kwargs, known=True)
        else:
            result = self.backend.run(row.places, row.workspace, facts.call, args, kwargs)
            over = self._write_over(row.overwrites, facts, args, kwargs) if row.overwrites else ()
            self._bind(row.makes, row.places, call, over, result)
        if facts.in_flight:
            for tensor in tensors_of((*args, *kwargs.values(), result)):
                self.adopt(tensor).exposed = True
        return result

    def _bind(
        self,
        numbers: Sequence[int],
        addresses: Places,
        call: Call | None,
        over: Sequence[tuple[Block, Block]],
        result: Any,
    ) -> None:
        """Tie the fresh outputs of an operator: values `numbers` of the trace."""
        blocks, places, made, token, owner = self.actions.blocks, [], [], self.token, self.owner
        count = 0
        for place, output in enumerate((result,) if isinstance(result, Tensor) else flat(result)):
            try:
                storage = storage_of(output)
            except (NotImplementedError, RuntimeError):
                continue  # sparse
            hold = getattr(storage, "_weft_tie", None)
            if hold is not None and hold.owner is owner:
                continue
            block = Block(storage.nbytes())
            block.last = token
            tie(owner, storage, block, "activation")
            if count < len(numbers):
                blocks[numbers[count]] = block
                nbytes, block.offset = addresses[count]
                if block.nbytes > nbytes:
                    self._larger = True
                    self._extra_bytes += block.nbytes - nbytes
                if block.offset >= 0:
                    self.backend.born(block, storage)
            places.append(place)
            made.append(block)
            count += 1
        if call is not None:
            call.places, call.made, call.over = places, made, over
        if self.backend.addresses:
            self.backend.bound(self.slack - self._extra_bytes)

    def _measure(self, places: Places, result: Any) -> None:
        """The step may do what was planned and be larger (another batch): what its operators make beyond the plan counts."""
        outputs = (result,) if isinstance(result, Tensor) else flat(result)
        if len(outputs) == len(places):
            for out, (nbytes, _) in zip(outputs, places, strict=True):
                more = storage_of(out).nbytes() - nbytes
                if more > 0:
                    self._larger = True
                    self._extra_bytes += more

    def _check(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `Deviation` if a call reads what is not there."""
        if not facts.needs_bytes:
            return
        owner = self.owner
        for value in args if not kwargs else (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                for part in (value,) if value.layout is torch.strided else parts(value):
                    hold = getattr(storage_of(part), "_weft_tie", None)
                    if hold is not None and not hold.block.resident and hold.owner is owner:
                        raise Deviation(f"{facts.name} reads what the plan has dropped")
            elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
                self._check(facts, value, {})

    def _check_size(self, row: Row, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `Deviation` if a call is about to make so much more than planned (another batch) that there is no room."""
        if is_plain(args, kwargs):
            made = sum(self.sizes.of(facts, args, kwargs).fresh or ())
            self._require_room(facts, max(made - row.made, 0))

    def _check_statistics(self, facts: Facts, args: Sequence[Any]) -> None:
        """Raise `Deviation` if a call moves running statistics that something has read that may be repeated: they did not move
        when the plan was made."""
        for position in moved_statistics(facts.func, args):
            hold = self.hold_of(args[position])
            if hold is not None and hold.block in self._leaned_on:
                raise Deviation(f"{facts.name} moves statistics that something else reads")

    def _take_apart(
        self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], Mapping[str, Any], list[Look]]:
        """`take_apart`; a repetition does not read the statistics that the call moves."""
        plain, named, looks = take_apart(args, kwargs, self.owner, self.adopt)
        if facts.statistics:
            looks = shapes_only(looks, moved_statistics(facts.func, args))
        return plain, named, looks

    def _remember(
        self, facts: Facts, plain: Sequence[Any], named: Mapping[str, Any], looks: Sequence[Look], lasting: bool = True
    ) -> Call:
        """A call that was taken apart, to be repeated if it is `lasting`. It holds what this step has not made and nothing can
        make again.

        Raises:
            Deviation: it reads what is not there.
        """
        if not facts.needs_bytes:
            return Call(facts, plain, named, shapes_only(looks), self.device)
        keep: list[torch.UntypedStorage] | None = None
        token = self.token
        for look in looks:
            block: Any = look[2]
            if block is None:
                continue
            if not block.resident:
                raise Deviation(f"{facts.name} reads what the plan has dropped")
            if block.last != token:
                if lasting:
                    self._leaned_on.add(block)
                hold = block.payload
                if hold.kind == "gradient":
                    continue
                if keep is None:
                    keep = [hold()]
                else:
                    keep.append(hold())
        return Call(facts, plain, named, looks, self.device, keep)

    def _write_over(
        self, overwrites: Sequence[tuple[int, int]], facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any],
        known: bool = False,
    ) -> list[tuple[Block, Block]]:  # fmt: skip
        """What an operator has written in place is a new version of its storage; what was read before keeps the old one."""
        over = []
        for n, hold in enumerate(self._written(facts, args, kwargs, known)):
            old = hold.block
            block = Block(old.nbytes)
            block.payload, block.offset, block.last, hold.block = hold, old.offset, self.token, block
            old.payload, old.resident, old.alive = None, False, False
            over.append((old, block))
            if n < len(overwrites):
                self.actions.blocks[overwrites[n][1]] = block
        return over

    def _written(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any], known: bool = False) -> list[Hold]:
        """Ties of what a call writes; with `known` only those that there are already."""
        found: dict[Block, Hold] = {}
        for position, name in facts.written:
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in flat(value):
                hold = self.hold_of(tensor) if known else self.adopt(tensor)
                if hold is not None:
                    found[hold.block] = hold
        return list(found.values())

    def _extra(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call that the trace does not have here: it runs if it reads only what is there, and makes little."""
        inside = 0 < self.at < len(self.rows) and not self.effects
        self._require_room(facts)
        if inside and self._extra_calls > EXTRA_CALLS:
            raise Deviation(f"{facts.name} where the plan has {self.rows[self.at].name}")
        if facts.opaque or not is_plain(args, kwargs):
            return self._extra_opaque(facts, args, kwargs)
        self._meet(args, kwargs)
        self._expect(facts, self.sizes.of(facts, args, kwargs).taken)
        if facts.statistics:
            self._check_statistics(facts, args)
        if inside and self._cautious:
            return self._extra_remembered(facts, args, kwargs)
        if self.dropped:
            self._check(facts, args, kwargs)
        if inside and any(self._matters(hold.block) for hold in self._written(facts, args, kwargs, known=True)):
            raise Deviation(f"{facts.name} writes something, which the plan does not do here")
        known = {storage_of(tensor)._cdata for value in (*args, *kwargs.values()) for tensor in flat(value)}
        result = facts.call(*args, **kwargs)
        stored = [out for out in flat(result) if out.layout is torch.strided and storage_of(out)._cdata not in known]
        kind = "optimizer" if self.effects else None
        made = [self.adopt(out, kind).block.nbytes for out in stored]  # the program may keep it
        if not self.effects:
            self._stray(facts, made, bool(flat(result)))
        return result

    def _meet(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call that the plan does not have is about to read these. What came from outside, and is none of what the plan counts,
        counts as made beyond it."""
        for value in (*args, *kwargs.values()):
            for tensor in flat(value):
                if self.hold_of(tensor) is None and tensor.device.type == self.device.type:
                    nbytes = storage_of(tensor).nbytes()
                    known = min(nbytes, self._unmet)
                    self._unmet -= known
                    self._extra_bytes += nbytes - known
                    self._updating -= nbytes - known
                    self.adopt(tensor, None if known == nbytes else "buffer")  # no batch, of which the plan knows

    def _matters(self, block: Block) -> bool:
        """Whether something may be made again from what a block holds now, or the block itself."""
        return block.last == self.token or block in self._leaned_on

    def _extra_opaque(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call that traces leave out (`unremembered.opaque`)."""
        if self.dropped:
            self._check(facts, args, kwargs)
        return facts.call(*args, **kwargs)

    def brought_along(self, expected: int, but: str = "") -> int:
        """How many bytes more than `expected` are there as the step begins; they count as made beyond the plan."""
        more = self.held(but) - expected
        self._extra_bytes, self._unmet = max(more, 0), max(-more, 0)
        return self._extra_bytes

    def _begin(self) -> None:
        """The first operator of a step is about to run: gradients are gone, if they go at all."""
        if self.brought_along(self._expected, but="input") > self.slack:
            raise Deviation(f"{self._extra_bytes:,} bytes are there that its trace does not have")
        self._unmet = max(self.trace.fixed - self.held(), 0)

    def _expect(self, facts: Facts, nbytes: int) -> None:
        """A call that the plan does not have is about to take so many bytes.

        Raises:
            Deviation: there is no room for them.
        """
        if not self.effects:
            self._require_room(facts, nbytes)
            return
        self._updating -= nbytes
        if self._updating < 0:  # what calls before have made may be gone
            self._updating = self.budget - self.held() - nbytes
            if self._updating < 0:
                raise Deviation(f"{facts.name} of the optimizer takes {nbytes:,} bytes, which the plan does not have")

    def _require_room(self, facts: Facts, nbytes: int = 0) -> None:
        """Raise `Deviation` if what the step has made beyond the plan, and `nbytes` more, are above the slack."""
        more = self._extra_bytes + nbytes
        if more > self.slack:
            raise Deviation(
                f"with {facts.name} it takes {more:,} bytes more than planned, and there is room for {self.slack:,}"
            )

    def _extra_remembered(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = self._remember(facts, *self._take_apart(facts, args, kwargs))
        if facts.random and facts.draws(args, kwargs):
            call.drawn = about_to_draw(args, kwargs, self.device)
        result = facts.call(*args, **kwargs)
        over = self._write_over((), facts, args, kwargs) if facts.written else ()
        self._bind((), (), call, over, result)
        if call.made or over:
            self.log.append((call, None))
        self._stray(facts, [block.nbytes for block in call.made], bool(flat(result)))
        return result

    def _stray(self, facts: Facts, made: Sequence[int], has_outputs: bool) -> None:
        """Count a call that the trace does not have; a view in disguise is none."""
        if made or facts.written or not has_outputs:
            self._extra_calls += 1
            self._extra_bytes += sum(made)

    def optimizing(self, yes: bool) -> None:
        """The optimizer's step begins or ends. Raises `Deviation` if something is still to be brought back that it would make
        impossible to bring back."""
        if yes and self._missed():
            raise Deviation("something outlives the backward pass that the plan has dropped")
        self.effects, self._updating = yes, 0

    def _missed(self) -> bool:
        """Whether something is not there that the user refers to, other than what the trace says nobody will read."""
        return bool(self.dropped) and not self.dropped.keys() <= {self.actions.blocks[v] for v in self._unread}

    def skip_optimizer(self) -> bool:
        """Whether the optimizer's step may run without us, since nothing is to be done in it; then it counts as done."""
        if self._missed() or self.backend.addresses or self.at == 0:
            return False
        at, rows, ops = self.at, self.rows, self.trace.ops
        while at < len(rows) and ops[at].phase != "optimizer":
            at += 1  # operators of the trace that did not come: they will not come any more
        end = at
        while end < len(rows) and ops[end].phase == "optimizer":
            if rows[end].before or rows[end].bind:
                return False
            end += 1
        if at != self.at or at == end:  # an optimizer that the plan does not know may make anything
            return False
        self.at = end
        return True

    # -- what the user does besides calling operators -----------------------------------------------------------------

    def expose(self, tensor: Tensor) -> None:
        """Somebody is about to know the address of a tensor's bytes. Raises `Deviation` if they are not there."""
        hold = self.hold_of(tensor)
        if hold is not None:
            if not hold.block.resident:
                raise Deviation("the address of a tensor is asked for that the plan has dropped")
            hold.exposed = True

    def lend(self, tensor: Tensor, nbytes: int) -> None:
        """The owner of a tensor's bytes is about to give it `nbytes`, another number. Raises `Deviation` if a repetition may want
        those it has."""
        hold = self.adopt(tensor)
        if not self.steps and nbytes < hold.block.nbytes and self._repeats_from(hold.block):  # later steps do the same
            raise Deviation("a tensor is emptied by its owner, and others are to be made from it again")
        hold.lent = True
        hold.block.payload, hold.block = None, Block(nbytes)
        hold.block.payload = hold

    def _repeats_from(self, block: Block) -> bool:
        """Whether the plan may repeat a call of this step that read a block."""
        ops = self.trace.ops
        return block in self._leaned_on or any(
            number is not None and ops[number].repeatable and any(look[2] is block for look in call.looks)
            for call, number in self.log
        )

    def rest(self) -> None:
        """Everything that is alive is there, as `end_step` has found."""

    def settle(self, tensor: Tensor, kind: Category | None = None) -> None:
        """A tensor is a finished gradient. Raises `Deviation` if its bytes are not there."""
        hold = self.adopt(tensor, kind)
        hold.kind = kind or hold.kind
        if not hold.block.resident:
            raise Deviation("a finished gradient is not there")

    # -- steps --------------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        return self.at > 0

    @property
    def midway(self) -> bool:
        return self.at < len(self.rows)

    def end_step(self) -> bool:
        """The step is over: everything remembered is forgotten. False if something is missing that the user still refers to."""
        if self.at == len(self.rows):
            for act in self.after:
                act()
        whole = not self._missed()
        if whole:
            self.forget()
        return whole

    def forget(self) -> None:
        """Begin again with the first operator."""
        if self.backend.addresses:
            room = self.budget - self.held()
            for hold in self.owner.holds.values():
                storage = hold()
                # without room it stays: what the next step places there goes elsewhere
                if storage is not None and hold.block.offset >= 0 and self.backend.leave(storage, room):
                    hold.block.offset = -1
        self.steps += 1
        if self.steps == CAUTIOUS_STEPS:
            self._lay_out(cautious=False)
        self.actions.begin()
        self.log = []
        self._leaned_on.clear()
        self.at = self._extra_calls = self._extra_bytes = 0
        self._larger = False
        self.token -= 1.0


def _brought(trace: Trace) -> int:
    """Bytes that a trace has throughout, without the batch: that is met later."""
    values = {value.storage: value for value in trace.values if value.category == "input"}
    return trace.fixed - sum(value.nbytes for value in values.values() if value.born < 0)
