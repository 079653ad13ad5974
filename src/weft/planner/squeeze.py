"""A plan whose activations do not fit, made to fit: what each class of devices computes again, and what that costs.

Problem    a step holds more than a device has. Which activations are given up after forward and made again for backward?
Method     the liveness model of `memory` told as a `weft.memory` trace                                     `step_trace`
               operators     call i forward, and at the mirrored place its backward; a boxing is an operator of its own
               values        activations, and what else autograd keeps; everything else is always there while it is there
               repeatable    forward calls; not what other processes take part in, nor what reads ZeRO-3's gathered copies,
                             which are gone again when backward begins
           which `weft.memory.plan` fits into what the device has                                           `squeeze`
Guarantee  without a limit the trace's peak is that of `memory_use`: one model told twice.
           A squeezed step has passed `weft.memory.check`; `least` bytes are enough for such a plan as well.
What is carried out is not this schedule: each process plans its own operators within the same bytes (`runtime.budget`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Ref
from weft.memory.planning.memory_plan import MemoryPlan, Part
from weft.memory.record import Op, Trace, Value
from weft.placement.assignment import Assignment
from weft.planner.buckets import Bucket, buckets_of
from weft.planner.memory import Hold, Life, MemoryUse, Storage, always, copies, gradients_held, life_of_activations

if TYPE_CHECKING:
    from weft.planner.placed import View
    from weft.planner.prepared import Call
    from weft.planner.price import DeviceMemory, Prediction, Pricing

__all__ = ["Repeats", "Squeeze", "Squeezed", "Story", "least_bytes", "squeeze", "step_trace"]

Repeats = Mapping[tuple[str, int], NDArray[np.float64]]
"""("forward" or "backward", number of a call) -> seconds that each class of devices repeats just before it."""

Moments = Mapping[int, tuple[str, int]]
"""Operator of a trace -> the forward or backward of the call to which it belongs."""


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

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "ranks": list(self.ranks), "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Squeeze:
        """The inverse of `to_dict`."""
        parts = tuple(Part(**part) for part in data["parts"])
        return cls(**{**data, "ranks": tuple(data["ranks"]), "parts": parts})


@final
@dataclass(frozen=True, eq=False)
class Squeezed:
    """An assignment made to fit: what classes of devices do for it, the seconds that repeats add where, memory at the peaks."""

    plans: Mapping[int, MemoryPlan]
    repeats: Repeats
    memory: tuple[DeviceMemory, ...]
    whole: tuple[DeviceMemory, ...]
    operators: int

    def squeezes(self) -> tuple[Squeeze, ...]:
        """For the plan; finding the least that would do takes as long as planning."""
        found = []
        for place, plan in self.plans.items():
            before, after = self.whole[place], self.memory[place]
            found.append(
                Squeeze(
                    before.device,
                    before.ranks,
                    before.have,
                    math.ceil(before.use.peak),
                    math.ceil(after.use.peak),
                    plan.least,
                    plan.checked.repeated_seconds,
                    plan.checked.repeated,
                    self.operators,
                    plan.recomputed,
                )
            )
        return tuple(found)


def squeeze(pricing: Pricing, assignment: Assignment, prediction: Prediction) -> Squeezed:
    """Plan what is computed again on every class of devices for which a step is too large.

    Raises:
        BudgetError: a class cannot be made to fit.
    """
    from weft.memory import plan as fitted  # not before a plan needs it: most do not

    plans: dict[int, MemoryPlan] = {}
    repeats: dict[tuple[str, int], NDArray[np.float64]] = {}
    memory = list(prediction.memory)
    story = Story(pricing, assignment)
    for place, device in enumerate(prediction.memory):
        if device.fits:
            continue
        trace, moments = step_trace(story, place)
        plans[place] = found = fitted(trace, device.have)
        memory[place] = replace(device, use=_at_most(device.use, found.peak))
        for where, seconds in _repeated_before(found, moments):
            row = repeats.setdefault(where, np.zeros(len(prediction.memory)))
            row[place] += seconds
    return Squeezed(plans, repeats, tuple(memory), prediction.memory, len(story.calls))


def least_bytes(pricing: Pricing, assignment: Assignment, prediction: Prediction) -> list[int]:
    """The least bytes known to do on each class of devices, whatever is computed again."""
    from weft.memory import least

    story = Story(pricing, assignment)
    return [least(step_trace(story, place)[0]) for place in range(len(prediction.memory))]


def _at_most(use: MemoryUse, peak: int) -> MemoryUse:
    """Bytes by category where fewer activations bring the peak down: what else may go counts as far as there is room."""
    room = max(0.0, peak - use.parameters - use.optimizer_state)
    gradients = min(use.gradients, room)
    gathered = min(use.gathered_copies, room - gradients)
    return replace(use, gradients=gradients, gathered_copies=gathered, activations=room - gradients - gathered)


def _repeated_before(plan: MemoryPlan, moments: Moments) -> list[tuple[tuple[str, int], float]]:
    """(call that waits for it, seconds) of each repetition."""
    found: list[tuple[tuple[str, int], float]] = []
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


# ---------------------------------------------------------------------------------------------------------------- trace


@final
class Story:
    """What happens in a step under an assignment, the same on every class of devices up to bytes and seconds."""

    def __init__(self, pricing: Pricing, assignment: Assignment):
        self.pricing, self.placed, self.assignment = pricing, pricing.placed, assignment
        self.calls: Sequence[Call] = pricing.prepared.calls
        self.views: Sequence[View] = self.placed.views(assignment)
        self.buckets: Sequence[Bucket] = buckets_of(
            self.placed.graph, assignment, pricing.costs, pricing.prepared.readings
        )
        self.lives: Sequence[Life] = life_of_activations(self.placed, assignment, self.views)
        self.steps = 2 * len(self.calls)
        self.holds: list[Hold] = [
            *copies(self.buckets, self.steps),
            *gradients_held(self.placed, assignment, self.buckets),
        ]
        self.repeatable = [not reason for reason in self._reasons()]

    def _reasons(self) -> list[str]:
        """For each call, why it cannot be repeated; "" if it can."""
        graph = self.placed.graph
        gathered = {name for bucket in self.buckets if bucket.gathers for name in bucket.names}
        lives_in = {Ref(node.name): name for name, node in graph.parameters.items()}
        sent = self._sent()
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
            elif any(storage in sent for storage in life.makes):
                reason = "what it makes is sent to other processes, and pinned"
            found.append(reason)
        return found

    def _sent(self) -> set[Storage]:
        found = set()
        for life in self.lives:
            for source, copy in life.boxed:
                if source is not None:
                    boxing = self.placed.boxing(copy.ref, source.placement, copy.placement)
                    if boxing.forward or boxing.nbytes:
                        found.add(source)
        return found


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


def step_trace(story: Story, place: int) -> tuple[Trace, Moments]:
    """A step of one class of devices, as memory sees it."""
    out, steps = _Writer(), story.steps
    pieces = lambda nbytes: float(nbytes if isinstance(nbytes, float) else nbytes[place])
    device = story.pricing.costs.places[place].device
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

    def born(storage: Storage, module: str) -> int:
        nbytes = pieces(story.placed.held(storage.spec, storage.placement))
        if storage.spec.requires_grad and storage.last > storage.made:
            grown.setdefault(steps - 1 - storage.last, []).append((steps - 1 - storage.made, nbytes))
        of[storage] = out.value(nbytes, "activation", module, storage.until(steps))
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
        out.op(
            moment, True, name=call.node.op, module=module, phase="forward", reads=reads, makes=tuple(makes),
            seconds=float(view.forward[place]), repeatable=story.repeatable[number],
            dense=call.node.kind in ("matmul", "conv", "attention"),
        )  # fmt: skip
    for number in range(len(story.calls) - 1, -1, -1):
        step, call = steps - 1 - number, story.calls[number]
        made = tuple(out.value(n, "gradient", call.node.module, until) for until, n in grown.get(step, ()))
        made += tuple(out.value(n, "gradient", call.node.module, until) for until, n in begun.get(step, ()))
        out.op(
            ("backward", number), True, name=f"{call.node.op} backward", module=call.node.module, phase="backward",
            reads=tuple(dict.fromkeys(kept[number])), makes=made, seconds=float(story.views[number].backward[place]),
            repeatable=False,
        )  # fmt: skip
    return out.trace("cpu" if device.kind.startswith("cpu") else device.name, ""), out.moments
