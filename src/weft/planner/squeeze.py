"""A plan whose activations do not fit, made to fit: what each class of devices computes again or moves away, and what it costs.

Problem    a step holds more than a device has. Which activations are given up after forward and made again for backward, which
           wait in the tier below the device (`Device.offload`: its host's memory, a disk) and come back?
Method     the liveness model of `memory` told as a `weft.memory` trace                                     `step_trace`
               operators     call i forward, and at the mirrored place its backward; a boxing is an operator of its own
               values        activations, and what else autograd keeps; everything else is always there while it is there
               repeatable    forward calls; not what other processes take part in, nor what reads ZeRO-3's gathered copies,
                             which are gone again when backward begins
               movable       activations, but for what is sent or received: the runtime pins it
               workspace     of convolutions, measured on this machine, which `memory_use` does not know     `workspace`
           which `weft.memory.plan` fits into what the device has, with the tier and without; the cheaper counts     `squeeze`
           Copies hide behind computing as communication does: all but the fraction 1 - `overlap` of the device, on a
           link of their own, which the step waits for where it is late                                     `_waits`
Guarantee  without a limit, and without workspace, the trace's peak is that of `memory_use`: one model told twice.
           A squeezed step has passed `weft.memory.check`; `least` bytes are enough for such a plan as well.
What is carried out is not this schedule: each process plans its own operators within the same bytes (`runtime.budget`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from weft.cluster import Tier
from weft.errors import BudgetError
from weft.graph.graph import Ref
from weft.memory.planning.memory_plan import MemoryPlan, Part
from weft.memory.record import Op, Trace, Value
from weft.placement.assignment import Assignment
from weft.planner.buckets import Bucket
from weft.planner.memory import Hold, Life, MemoryUse, Storage, always, copies, gradients_held, life_of_activations
from weft.planner.workspace import workspace

if TYPE_CHECKING:
    from weft.planner.placed import View
    from weft.planner.prepared import Call
    from weft.planner.price import DeviceMemory, Prediction, Pricing

__all__ = ["Moves", "Repeats", "Squeeze", "Squeezed", "Story", "least_bytes", "squeeze", "step_trace"]

Repeats = Mapping[tuple[str, int], NDArray[np.float64]]
"""("forward" or "backward", number of a call) -> seconds that each class of devices repeats, or waits, just before it."""

Moments = Mapping[int, tuple[str, int]]
"""Operator of a trace -> the forward or backward of the call to which it belongs."""


@final
@dataclass(frozen=True)
class Moves:
    """What may be done with activations to fit: compute them again, move them to the tiers that the cluster names."""

    recompute: bool = True
    offload: bool = True

    def tier(self, story: Story, place: int) -> Tier | None:
        """Where a class of devices may move activations to; its copies hide as well as others do where nobody has measured it."""
        device = story.pricing.costs.places[place].device
        tier = device.offload if self.offload else None
        return tier if tier is None or tier.overlap is not None else replace(tier, overlap=device.overlap)


@final
@dataclass(frozen=True)
class Squeeze:
    """How the devices of one class stay within their memory.

    Attributes:
        device, ranks: of the class.
        budget: bytes that each of them has.
        whole: bytes that the step would take with nothing given up; `peak` what it takes so.
        least: bytes for which there is a way as well, at more seconds.
        seconds: of repeated operators per step.
        repeated: how many operators run again, of `operators` in forward.
        parts: what they are, by module, the dearest first.
        tier: where activations wait; None if none do.
        moved: bytes that go there in a step, and come back; `held` is the most that is there at once.
        waiting: seconds per step of these copies that nothing hides.
        away: what they are, by module, the largest first.
    """

    device: str
    ranks: tuple[int, ...]
    budget: int
    whole: int
    peak: int
    least: int
    seconds: float
    repeated: int
    operators: int
    parts: tuple[Part, ...] = field(default=(), repr=False)
    tier: Tier | None = None
    moved: int = 0
    held: int = 0
    waiting: float = 0.0
    away: tuple[Part, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        found = {**asdict(self), "ranks": list(self.ranks)}
        if self.tier is not None and self.tier.capacity == math.inf:
            found["tier"]["capacity"] = None  # JSON has no infinity
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Squeeze:
        """The inverse of `to_dict`."""
        parts = {name: tuple(Part(**part) for part in data.get(name, ())) for name in ("parts", "away")}
        tier = data.get("tier")
        if tier is not None:
            tier = Tier(**{**tier, "capacity": math.inf if tier["capacity"] is None else tier["capacity"]})
        return cls(**{**data, **parts, "ranks": tuple(data["ranks"]), "tier": tier})


@final
@dataclass(frozen=True, eq=False)
class Squeezed:
    """An assignment made to fit: what classes of devices do for it (`others`: dearer ways, with and without a lower tier), the
    seconds that repeats and copies add where, memory at the peaks."""

    plans: Mapping[int, MemoryPlan]
    others: Mapping[int, Sequence[MemoryPlan]]
    repeats: Repeats
    waits: Repeats
    memory: tuple[DeviceMemory, ...]
    whole: tuple[DeviceMemory, ...]
    operators: int

    def squeezes(self) -> tuple[Squeeze, ...]:
        """For the plan; finding the least that would do takes as long as planning."""
        found = []
        for place, plan in self.plans.items():
            before, after, judged = self.whole[place], self.memory[place], plan.checked
            least = min(each.least for each in (plan, *self.others[place]))
            found.append(
                Squeeze(
                    before.device, before.ranks, before.have, math.ceil(before.use.peak), math.ceil(after.use.peak), least,
                    judged.repeated_seconds, judged.repeated, self.operators, plan.recomputed,
                    plan.tier if judged.saved_bytes else None, judged.saved_bytes, judged.held_bytes,
                    sum(float(row[place]) for row in self.waits.values()), plan.offloaded,
                )
            )  # fmt: skip
        return tuple(found)


def squeeze(pricing: Pricing, assignment: Assignment, prediction: Prediction, moves: Moves = Moves()) -> Squeezed:
    """Plan what is computed again and moved away on every class of devices for which a step is too large.

    Raises:
        BudgetError: a class cannot be made to fit.
    """
    plans: dict[int, MemoryPlan] = {}
    others: dict[int, Sequence[MemoryPlan]] = {}
    repeats: dict[tuple[str, int], NDArray[np.float64]] = {}
    waits: dict[tuple[str, int], NDArray[np.float64]] = {}
    memory = list(prediction.memory)
    story = Story(pricing, assignment)
    for place, device in enumerate(prediction.memory):
        if device.fits:
            continue
        (plans[place], repeated, waited), *rest = _fitted(story, place, device.have, moves)
        others[place] = [plan for plan, _, _ in rest]
        memory[place] = replace(device, use=_at_most(device.use, plans[place].peak))
        for table, rows in ((repeats, repeated), (waits, waited)):
            for where, seconds in rows:
                table.setdefault(where, np.zeros(len(memory)))[place] += seconds
    return Squeezed(plans, others, repeats, waits, tuple(memory), prediction.memory, len(story.calls))


Rows = list[tuple[tuple[str, int], float]]


def _fitted(story: Story, place: int, budget: int, moves: Moves) -> list[tuple[MemoryPlan, Rows, Rows]]:
    """Plans of one class of devices with their repetitions and waits, the cheapest first: with the tier, if there is one, and
    without, unless the tier costs nothing.

    Raises:
        BudgetError: there is none.
    """
    from weft.memory import plan as fitted  # not before a plan needs it: most do not

    tier = moves.tier(story, place)
    found: list[tuple[float, MemoryPlan, Rows, Rows]] = []
    refused: BudgetError | None = None
    for lower in (tier, None) if tier is not None else (None,):
        trace, moments = step_trace(story, place, moves.recompute, pinned=lower is not None)
        try:
            plan = fitted(trace, budget, tier=lower)
        except BudgetError as error:
            refused = error
            continue
        waits = _waits(plan, moments)
        seconds = plan.checked.repeated_seconds + sum(seconds for _, seconds in waits)
        found.append((seconds, plan, _repeated_before(plan, moments), waits))
        if not seconds:
            break
    if not found:
        assert refused is not None
        raise refused
    return [row[1:] for row in sorted(found, key=lambda row: row[0])]


def least_bytes(pricing: Pricing, assignment: Assignment, prediction: Prediction, moves: Moves = Moves()) -> list[int]:
    """The least bytes known to do on each class of devices, whatever is computed again or moved away."""
    from weft.memory import least

    story, found = Story(pricing, assignment), []
    for place in range(len(prediction.memory)):
        tier = moves.tier(story, place)
        alone = least(step_trace(story, place, moves.recompute)[0])
        both = least(step_trace(story, place, moves.recompute, pinned=True)[0], tier) if tier is not None else alone
        found.append(min(alone, both))
    return found


def _at_most(use: MemoryUse, peak: int) -> MemoryUse:
    """Bytes by category where fewer activations bring the peak down: what else may go counts as far as there is room."""
    room = max(0.0, peak - use.parameters - use.optimizer_state)
    gradients = min(use.gradients, room)
    gathered = min(use.gathered_copies, room - gradients)
    return replace(use, gradients=gradients, gathered_copies=gathered, activations=room - gradients - gathered)


def _repeated_before(plan: MemoryPlan, moments: Moments) -> Rows:
    """(call that waits for it, seconds) of each repetition."""
    found: Rows = []
    waiting = 0.0
    for action in plan.schedule.actions:
        if action.kind == "again":
            waiting += plan.trace.ops[action.index].seconds
        elif action.kind == "run" and waiting:
            found.append((moments[action.index], waiting))
            waiting = 0.0
    if waiting:
        found.append((moments[len(plan.trace.ops) - 1], waiting))
    return found


def _waits(plan: MemoryPlan, moments: Moments) -> Rows:
    """(call that waits, seconds) of the copies to and from the lower tier."""
    last = len(plan.trace.ops) - 1
    return [(moments[min(op, last)], seconds) for op, seconds in enumerate(plan.checked.waits) if seconds]


# ---------------------------------------------------------------------------------------------------------------- trace


@final
class Story:
    """What happens in a step under an assignment, the same on every class of devices up to bytes and seconds."""

    def __init__(self, pricing: Pricing, assignment: Assignment):
        self.pricing, self.placed, self.assignment = pricing, pricing.placed, assignment
        self.calls: Sequence[Call] = pricing.prepared.calls
        self.views: Sequence[View] = self.placed.views(assignment)
        self.buckets: Sequence[Bucket] = pricing.buckets(assignment)
        self.lives: Sequence[Life] = life_of_activations(self.placed, assignment, self.views)
        self.steps = 2 * len(self.calls)
        self.holds: list[Hold] = [
            *copies(self.buckets, self.steps),
            *gradients_held(self.placed, assignment, self.buckets),
        ]
        self.sent = self._sent()
        self.repeatable = [not reason for reason in self._reasons()]
        self.pinned = self._pinned()

    def _reasons(self) -> list[str]:
        """For each call, why it cannot be repeated; "" if it can."""
        graph = self.placed.graph
        gathered = {name for bucket in self.buckets if bucket.gathers for name in bucket.names}
        lives_in = {Ref(node.name): name for name, node in graph.parameters.items()}
        found = []
        for call, view, life in zip(self.calls, self.views, self.lives, strict=True):
            reason = ""
            for operand, ref in enumerate(call.inputs):
                name = lives_in.get(ref)
                if name in gathered:
                    reason = "reads a gathered copy"
                if name is not None and call.node.kind == "view" and operand == 0:
                    lives_in.update(dict.fromkeys(call.values, name))
            if view.inner.forward or view.inner.nbytes:
                reason = "other processes take part in it"
            elif call.node.mutates and call.node.op not in ("batch_norm", "instance_norm"):
                reason = "writes a buffer"
            elif any(storage in self.sent for storage in life.makes):
                reason = "what it makes is sent to other processes, and pinned"
            found.append(reason)
        return found

    def _sent(self) -> set[Storage]:
        """What other processes are sent."""
        return {source for source, _ in self._travels() if source is not None}

    def _pinned(self) -> set[Storage]:
        """What must stay where it is while it lives: sent, received, or made by an operator that other processes take part in."""
        found = self.sent | {copy for _, copy in self._travels()}
        for view, life in zip(self.views, self.lives, strict=True):
            if view.inner.forward or view.inner.nbytes:
                found.update(life.makes)
        return found

    def _travels(self) -> Iterator[tuple[Storage | None, Storage]]:
        for life in self.lives:
            for source, copy in life.boxed:
                if source is not None:
                    boxing = self.placed.boxing(copy.ref, source.placement, copy.placement)
                    if boxing.forward or boxing.nbytes:
                        yield source, copy


class _Writer:
    """A trace being written: values get their numbers as they are born."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.moments: dict[int, tuple[str, int]] = {}
        self.main: list[int] = []  # operator of each step of `memory`'s clock
        self._ends: list[int] = []  # step at which each value dies, -1: it outlives the step

    def value(self, nbytes: float, category: Any, name: str, until: int, born: int | None = None) -> int:
        """A value that the operator to be written next makes (or that was there, `born` = -1), alive until a step."""
        number = len(self.values)
        self.values.append(
            Value(math.ceil(nbytes - 1e-6), number, category, name, len(self.ops) if born is None else born, 0)
        )
        self._ends.append(until)
        return number

    def op(self, moment: tuple[str, int], main: bool, **fields: Any) -> None:
        if main:
            self.main.append(len(self.ops))
        self.moments[len(self.ops)] = moment
        self.ops.append(Op(**fields))

    def trace(self, device: str, model: str) -> Trace:
        end = len(self.ops)
        values = tuple(
            replace(value, dies=end if until < 0 else self.main[until])
            for value, until in zip(self.values, self._ends, strict=True)
        )
        return Trace(tuple(self.ops), values, device, model)


def step_trace(
    story: Story, place: int, recompute: bool = True, *, pinned: bool = False, workspaces: bool = True
) -> tuple[Trace, Moments]:
    """A step of one class of devices, as memory sees it.

    Args:
        recompute: forward calls may run again.
        pinned: what the runtime pins may not go: needed where activations may be moved away.
        workspaces: count what operators take while they run.
    """
    out, steps = _Writer(), story.steps
    pieces = lambda nbytes: float(nbytes if isinstance(nbytes, float) else nbytes[place])
    where = story.pricing.costs.places[place]
    device = where.device
    parameters, state = always(story.placed, story.assignment, story.pricing.optimizer)
    out.value(pieces(parameters), "parameter", "parameters", -1, born=-1)
    out.value(pieces(state), "optimizer", "optimizer state", -1, born=-1)
    begun: dict[int, list[tuple[int, float]]] = {}
    for first, last, nbytes in story.holds:
        if (first, last) == (0, steps - 1):
            out.value(pieces(nbytes), "gradient", "gradient bucket", -1, born=-1)
        elif pieces(nbytes):
            begun.setdefault(first, []).append((last, pieces(nbytes)))
    of: dict[Storage, int] = {}
    grown: dict[
        int, list[tuple[int, float]]
    ] = {}  # step -> (until, bytes) of gradients of activations that begin there
    kept: list[tuple[int, ...]] = []
    beside: list[tuple[int, int]] = []  # workspace of each call, forward and backward

    def born(storage: Storage, module: str) -> int:
        nbytes = pieces(story.placed.held(storage.spec, storage.placement))
        if storage.spec.requires_grad and storage.last > storage.made:
            grown.setdefault(steps - 1 - storage.last, []).append((steps - 1 - storage.made, nbytes))
        stays = pinned and storage in story.pinned
        of[storage] = out.value(nbytes, "buffer" if stays else "activation", module, storage.until(steps))
        return of[storage]

    for number, (call, view, life) in enumerate(zip(story.calls, story.views, story.lives, strict=True)):
        moment, module = ("forward", number), call.node.module
        for source, copy in life.boxed:
            reads = (of[source],) if source is not None else ()
            made = (born(copy, module),)
            out.op(
                moment, False, name="boxing", module=module, phase="forward", reads=reads, makes=made, repeatable=False
            )
        if number in begun:
            made = tuple(out.value(nbytes, "parameter", "gathered", until) for until, nbytes in begun[number])
            out.op(moment, False, name="gather", module=module, phase="forward", reads=(), makes=made, repeatable=False)
        makes = [born(storage, module) for storage in life.makes]
        saved = pieces(life.saved)
        if saved:
            makes.append(out.value(saved, "activation", module, steps - 1 - number))
        kept.append((*(dict.fromkeys(of[s] for s in life.kept)), *(makes[-1:] if saved else ())))
        reads = tuple(dict.fromkeys(of[storage] for storage in life.reads if storage is not None))
        beside.append(workspace(story.placed, call, view, where) if workspaces else (0, 0))
        out.op(
            moment, True, name=call.node.op, module=module, phase="forward", reads=reads, makes=tuple(makes),
            workspace=beside[number][0], seconds=float(view.forward[place]),
            repeatable=recompute and story.repeatable[number],
            dense=call.node.kind in ("matmul", "conv", "attention"),
        )  # fmt: skip
    for number in range(len(story.calls) - 1, -1, -1):
        step, call = steps - 1 - number, story.calls[number]
        made = tuple(out.value(n, "gradient", call.node.module, until) for until, n in grown.get(step, ()))
        made += tuple(out.value(n, "gradient", call.node.module, until) for until, n in begun.get(step, ()))
        out.op(
            ("backward", number), True, name=f"{call.node.op} backward", module=call.node.module, phase="backward",
            reads=tuple(dict.fromkeys(kept[number])), makes=made, workspace=beside[number][1],
            seconds=float(story.views[number].backward[place]), repeatable=False,
        )  # fmt: skip
    return out.trace("cpu" if device.kind.startswith("cpu") else device.name, ""), out.moments
