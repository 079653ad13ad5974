"""What a step of a plan costs: seconds along the critical path, bytes on the wire, memory.

Method     the step is walked in the runtime's order on two clocks, compute and communication:                     `_Walk`
               boxing of activations      compute waits for it; what is under way besides is delayed as long
               gathers (ZeRO-3)           start one bucket ahead; a bucket's first reader waits for them
               reductions of gradients    start when a bucket's gradients are complete; the step's end waits for all
                                      by an exchange: its codecs are compute, its messages communication     (see `coding`)
               gathers after the update   (ZeRO-1, -2) nothing hides them
               the loss                   is summed over all devices during backward
           so that a window costs max(compute, communication). Devices hide only the fraction `overlap` of a communication;
           the rest of it holds up compute.
           Unlike devices keep clocks of their own between communications, where the slowest counts.
           What is computed again to save memory is compute before the call that waits for it; so are the copies to a
           lower tier that nothing hides, but for the name.                                                   `_make_up`
Memory     `memory_use`, for a device of each class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weft.cluster import costs as collectives
from weft.graph.graph import Graph, Ref
from weft.placement.assignment import Assignment
from weft.placement.axes import Cuts, find_cuts
from weft.placement.layout import Shard
from weft.planner.buckets import Bucket, buckets_of
from weft.planner.coding import Coding
from weft.planner.costs import Boxing, Costs
from weft.planner.memory import MemoryUse, memory_use
from weft.planner.optimizer import OptimizerCost
from weft.planner.placed import PlacedGraph, View
from weft.planner.prepared import Prepared, layer_of
from weft.planner.roles import Roles

if TYPE_CHECKING:
    from weft.cluster import Cluster
    from weft.comm import Exchange
    from weft.planner.squeeze import Repeats

__all__ = ["DeviceMemory", "Event", "Layer", "Prediction", "Pricing", "layer_of", "price"]

LOSS_NBYTES = 16  # of the all-reduce that brings the loss, and whether to stop, to every process (`runtime.engine`)


@dataclass(frozen=True)
class Event:
    """Something on the timeline: `lane` is "compute" or "communication", times in seconds from the step's start."""

    lane: str
    kind: str
    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class Layer:
    """One layer's share of a step.

    Attributes:
        name: module path down to the first number (`transformer.h.3`).
        compute, communication: seconds of operators, and of boxings of activations, forward and backward.
        nbytes: bytes that those boxings put on the wire.
        cuts: per mesh axis, share of the compute by role ("batch", "sequence", "tensor", "whole").
        parameters: number of elements.
        storage: storage modes of its parameters, by number of elements.
    """

    name: str
    compute: float
    communication: float
    nbytes: float
    cuts: tuple[Mapping[str, float], ...]
    parameters: int
    storage: Mapping[str, int]


@dataclass(frozen=True)
class DeviceMemory:
    """Predicted memory of the devices of one class: bytes by category, and what they have."""

    device: str
    ranks: tuple[int, ...]
    use: MemoryUse
    have: int

    @property
    def fits(self) -> bool:
        return self.use.peak <= self.have


@dataclass(frozen=True)
class Prediction:
    """What a step costs.

    Attributes:
        seconds: of the step, optimizer included.
        compute: seconds of operators, and of the step's own Python (`Device.step`), on the slowest device.
        communication: seconds of all communication, hidden or not.
        exposed: seconds of communication that nothing hides.
        update: seconds of the optimizer.
        waiting: seconds of copies to and from a lower tier that nothing hides, on the slowest device.
        nbytes: bytes on the wire per step, over all links, but for those of the loss.
        memory: per class of devices.
        layers: in order of the model.
        timeline: of the slowest device, neighbouring events of one layer merged.
    """

    seconds: float
    compute: float
    communication: float
    exposed: float
    update: float
    nbytes: float
    memory: tuple[DeviceMemory, ...]
    layers: tuple[Layer, ...] = field(default=(), repr=False)
    timeline: tuple[Event, ...] = field(default=(), repr=False)
    waiting: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes on the fullest device."""
        return max(m.use.peak for m in self.memory)

    @property
    def fits(self) -> bool:
        return all(m.fits for m in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        numbers = ("seconds", "compute", "communication", "exposed", "update", "nbytes", "waiting")
        return {
            **{name: getattr(self, name) for name in numbers},
            "memory": [
                {"device": m.device, "ranks": list(m.ranks), "have": m.have, **m.use.__dict__} for m in self.memory
            ],
            "layers": [
                {**layer.__dict__, "cuts": [dict(c) for c in layer.cuts], "storage": dict(layer.storage)}
                for layer in self.layers
            ],
            "timeline": [list(event.__dict__.values()) for event in self.timeline],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_dict`."""
        memory = tuple(
            DeviceMemory(
                m["device"],
                tuple(m["ranks"]),
                MemoryUse(**{k: m[k] for k in MemoryUse.__dataclass_fields__}),
                int(m["have"]),
            )
            for m in data["memory"]
        )
        layers = tuple(Layer(**{**layer, "cuts": tuple(layer["cuts"])}) for layer in data["layers"])
        numbers = ("seconds", "compute", "communication", "exposed", "update", "nbytes")
        return cls(
            **{name: float(data[name]) for name in numbers},
            memory=memory,
            layers=layers,
            timeline=tuple(Event(*event) for event in data["timeline"]),
            waiting=float(data.get("waiting", 0.0)),
        )


def price(
    graph: Graph,
    assignment: Assignment,
    cluster: Cluster,
    optimizer: Any = "AdamW",
    *,
    cuts: Cuts | None = None,
    exchange: Exchange | None = None,
) -> Prediction:
    """Price any assignment of a graph: the plan of a search or one written by hand.

    Args:
        graph: the captured model.
        assignment: placements for all of it; its mesh's ranks are device numbers of the cluster.
        cluster: devices and links.
        optimizer: class, instance or name, or an `OptimizerCost`.
        cuts: `find_cuts(graph)`, if at hand.
        exchange: that carries gradients if mesh axes sum all of them.
    """
    cuts = cuts or find_cuts(graph, finest=assignment.mesh.size, allow_replicated=True)
    prepared = Prepared(graph, cuts)
    coding = Coding.of(exchange, graph, cluster) if exchange is not None else None
    costs, optimizer = Costs(cluster, assignment.mesh), OptimizerCost.of(optimizer)
    return Pricing(prepared, Roles(prepared), costs, optimizer, None, coding).price(assignment)


class Pricing:
    """Prices assignments of one graph on one mesh; keeps what they share.

    `memory` replaces what the devices have: bytes per device of the cluster. `coding` is for gradients by an exchange.
    """

    def __init__(
        self,
        prepared: Prepared,
        roles: Roles,
        costs: Costs,
        optimizer: OptimizerCost,
        memory: tuple[int, ...] | None = None,
        coding: Coding | None = None,
    ):
        self.prepared, self.roles, self.costs, self.optimizer, self.memory = prepared, roles, costs, optimizer, memory
        self.coding = coding
        self.placed = PlacedGraph(prepared, costs)

    def price(
        self,
        assignment: Assignment,
        *,
        details: bool = True,
        repeats: Repeats | None = None,
        waits: Repeats | None = None,
    ) -> Prediction:
        """The prediction for an assignment; without `details`, no layers and no timeline. `repeats` are seconds of operators
        that run again to save memory, and where; `waits` those of copies to a lower tier that nothing hides."""
        buckets = self.buckets(assignment)
        walk = _Walk(self, assignment, buckets, details, repeats or {}, waits or {})
        walk.run()
        return Prediction(
            walk.seconds,
            float(walk.worked.max()),
            walk.communicated,
            max(0.0, walk.seconds - float((walk.worked + walk.waited + walk.updated).max())),
            float(walk.updated.max()),
            walk.nbytes,
            self._devices(assignment, walk.views, buckets),
            self._layers(assignment, walk) if details else (),
            tuple(walk.events),
            float(walk.waited.max()),
        )

    def buckets(self, assignment: Assignment) -> list[Bucket]:
        """What travels together, and what its collectives cost."""
        return buckets_of(self.prepared.graph, assignment, self.costs, self.prepared.readings, self.coding)

    def coded(self, assignment: Assignment) -> bool:
        """Whether an exchange carries the gradients of an assignment."""
        return any(bucket.coded for bucket in self.buckets(assignment))

    def _devices(
        self, assignment: Assignment, views: Sequence[View], buckets: Sequence[Bucket]
    ) -> tuple[DeviceMemory, ...]:
        """Memory of each class of devices."""
        uses = memory_use(self.placed, assignment, views, self.optimizer, buckets)
        found = []
        for place, use in zip(self.costs.places, uses, strict=True):
            have = min(self.memory[rank] for rank in place.ranks) if self.memory else place.device.memory
            found.append(DeviceMemory(place.device.name, place.ranks, use, have))
        return tuple(found)

    def _layers(self, assignment: Assignment, walk: _Walk) -> tuple[Layer, ...]:
        """Layers in the order in which forward reaches them."""
        axes = self.costs.mesh.ndim
        cuts: dict[str, tuple[dict[str, float], ...]] = {}
        for call, view in zip(self.prepared.calls, walk.views, strict=True):
            rows = cuts.setdefault(call.layer, tuple({} for _ in range(axes)))
            seconds = float((view.forward + view.backward).max())
            for row, signature in zip(rows, view.state, strict=True):
                role = self.roles.of_signature(call, signature)
                role = "whole" if role == "partial" else role
                if seconds:
                    row[role] = row.get(role, 0.0) + seconds
        stored: dict[str, dict[str, int]] = {}
        calls = self.prepared.calls
        for name, node in self.prepared.graph.parameters.items():
            reader = self.prepared.readings.first.get(name)
            modes = stored.setdefault(calls[reader].layer if reader is not None else "model", {})
            mode = storage_name(assignment, name)
            modes[mode] = modes.get(mode, 0) + node.outputs[0].numel
        found = []
        for name in dict.fromkeys([*cuts, *stored]):
            compute, communication, nbytes = walk.by_layer.get(name, (0.0, 0.0, 0.0))
            modes = stored.get(name, {})
            rows = cuts.get(name) or tuple({} for _ in range(axes))
            found.append(Layer(name, compute, communication, nbytes, rows, sum(modes.values()), modes))
        return tuple(found)


class _Walk:
    """One step in the runtime's order; see the module's header.

    Attributes:
        now: each class's compute clock.
        channel: when the communication under way is done.
        worked, waited, updated: seconds of operators, of waiting for a lower tier, and of the optimizer, per class.
        by_layer: of operators and of the boxings that they wait for.
    """

    def __init__(
        self, pricing: Pricing, assignment: Assignment, buckets: Sequence[Bucket], details: bool, repeats: Repeats,
        waits: Repeats,
    ):  # fmt: skip
        self.repeats, self.waits = repeats, waits
        self.pricing, self.placed, self.costs = pricing, pricing.placed, pricing.costs
        self.assignment, self.buckets, self.details = assignment, buckets, details
        self.views = self.placed.views(assignment)
        places = len(self.costs.places)
        self.now, self.channel = np.zeros(places), 0.0
        self.worked, self.waited, self.updated = np.zeros(places), np.zeros(places), np.zeros(places)
        self.communicated = self.nbytes = self.seconds = 0.0
        self.overlap = self.costs.overlap
        self.events: list[Event] = []
        self.by_layer: dict[str, list[float]] = {}  # compute seconds, boxing seconds, boxing bytes
        self._boxed: dict[int, list[Boxing]] = {}  # made for call i

    def run(self) -> None:
        self.now += [place.device.step for place in self.costs.places]
        self.worked += self.now
        if self.now.any():
            self._event("compute", "step", "model", 0.0, float(self.now.max()))
        self._forward()
        self._backward()
        self._update()
        self.seconds = float(self.now.max())

    # ---- clocks

    def _work(self, seconds: NDArray[np.float64], layer: str, kind: str) -> None:
        start = self.now
        self.now = start + seconds
        self.worked += seconds
        if self.details and seconds.any():
            self.by_layer.setdefault(layer, [0.0, 0.0, 0.0])[0] += float(seconds.max())
            self._event("compute", kind, layer, float(start.max()), float(self.now.max()))

    def _code(self, bucket: Bucket) -> None:
        """What an exchange computes for a bucket: no processor is idle meanwhile."""
        start = float(self.now.max())
        self.now, self.worked = self.now + bucket.code, self.worked + bucket.code
        if self.details and bucket.code:
            self._event("compute", "code gradients", bucket.names[-1], start, float(self.now.max()))

    def _make_up(self, phase: str, number: int, layer: str) -> None:
        """What a call waits for because its operands were given up: they are made again, or come back from a lower tier."""
        if self.repeats and (phase, number) in self.repeats:
            self._work(self.repeats[phase, number], layer, "recompute")
        if self.waits and (phase, number) in self.waits:
            start, seconds = float(self.now.max()), self.waits[phase, number]
            self.now, self.waited = self.now + seconds, self.waited + seconds
            if self.details:
                self._event("compute", "offload", layer, start, float(self.now.max()))

    def _wait_for(self, seconds: float, nbytes: float, layer: str, kind: str) -> None:
        """A communication that compute waits for; it takes the links from what is under way."""
        self.communicated += seconds
        self.nbytes += nbytes
        if not seconds:
            return
        start = float(self.now.max())
        if self.channel > start:
            self.channel += seconds
        self.now = np.full(len(self.now), start + seconds)
        if self.details:
            row = self.by_layer.setdefault(layer, [0.0, 0.0, 0.0])
            row[1] += seconds
            row[2] += nbytes
            self._event("communication", kind, layer, start, start + seconds)

    def _start(self, boxing: Boxing, label: str, kind: str) -> float:
        """A communication besides compute: when it will be done."""
        self.communicated += boxing.forward
        self.nbytes += boxing.nbytes
        if not boxing.forward:
            return 0.0
        self.now = self.now + (1.0 - self.overlap) * boxing.forward
        begin = max(self.channel, float(self.now.max()))
        self.channel = begin + self.overlap * boxing.forward
        if self.details:
            self._event("communication", kind, label, begin, self.channel)
        return self.channel

    def _event(self, lane: str, kind: str, label: str, start: float, stop: float) -> None:
        """Neighbouring events of one lane, kind and layer become one."""
        for back in range(len(self.events) - 1, max(-1, len(self.events) - 3), -1):
            last = self.events[back]
            near = start - last.stop < 1e-9 + 0.02 * (stop - last.start)
            if near and (last.lane, last.kind, last.label) == (lane, kind, label):
                self.events[back] = Event(lane, kind, label, last.start, stop)
                return
        self.events.append(Event(lane, kind, label, start, stop))

    # ---- the step

    def _gathers(self, order: list[Bucket], use: Callable[[Bucket], int]) -> Callable[[int], None]:
        """What to do before call i: start the gathers of its buckets and of the next one, wait for its own."""
        at: dict[int, list[int]] = {}
        for number, bucket in enumerate(order):
            at.setdefault(use(bucket), []).append(number)
        ready: dict[int, float] = {}

        def before(call: int) -> None:
            for number in at.get(call, ()):
                for ahead in (number, number + 1):
                    if ahead < len(order) and ahead not in ready:
                        ready[ahead] = self._start(order[ahead].gather, order[ahead].names[-1], "gather parameters")
                self.now = np.maximum(self.now, ready[number])

        return before

    def _forward(self) -> None:
        before = self._gathers([bucket for bucket in self.buckets if bucket.gathers], lambda bucket: bucket.first)
        where = self.placed.sources(self.assignment)
        made: set[tuple[Ref, int]] = set()
        for number, (call, view) in enumerate(zip(self.pricing.prepared.calls, self.views, strict=True)):
            before(number)
            for ref, wanted in zip(call.inputs, view.inputs, strict=True):
                source = where[ref]
                if source != wanted and (ref, wanted) not in made:
                    made.add((ref, wanted))
                    boxing = self.placed.boxing(ref, source, wanted)
                    if boxing.forward or boxing.backward:
                        self._boxed.setdefault(number, []).append(boxing)
                        self._wait_for(boxing.forward, boxing.nbytes, call.layer, "activations")
            self._make_up("forward", number, call.layer)
            self._work(view.forward, call.layer, "forward")
            if view.inner.forward:
                self._wait_for(view.inner.forward, view.inner.nbytes, call.layer, "activations")
            for ref, placement in zip(call.values, view.outputs, strict=True):
                where[ref] = placement

    def _backward(self) -> None:
        loss = collectives.all_reduce(self.costs.cluster, self.costs.mesh.ranks, LOSS_NBYTES)
        self._start(Boxing(loss), "model", "sum losses")
        again = sorted((bucket for bucket in self.buckets if bucket.regathers), key=lambda bucket: -bucket.last)
        before = self._gathers(again[1:], lambda bucket: bucket.last)  # the first is still there from forward
        complete: dict[int, list[Bucket]] = {}
        for bucket in self.buckets:
            complete.setdefault(bucket.first, []).append(bucket)
        for number in range(len(self.views) - 1, -1, -1):
            before(number)
            layer = self.pricing.prepared.calls[number].layer
            self._make_up("backward", number, layer)
            self._work(self.views[number].backward, layer, "backward")
            for boxing in reversed(self._boxed.get(number, ())):
                self._wait_for(boxing.backward, 0.0, layer, "activations")
            for bucket in complete.get(number, ()):
                if bucket.coded:
                    self._code(bucket)
                kind = "scatter gradients" if bucket.scatters else "sum gradients"
                self._start(bucket.reduce, bucket.names[-1], "exchange gradients" if bucket.coded else kind)
        self.now = np.maximum(self.now, self.channel)

    def _update(self) -> None:
        optimizer, numel, nbytes = self.pricing.optimizer, np.zeros(len(self.now)), np.zeros(len(self.now))
        trained = False
        for name, node in self.pricing.prepared.graph.parameters.items():
            spec = node.outputs[0]
            if spec.requires_grad:
                _, share = self.placed.shares(spec, self.assignment.parameters[name])
                nbytes, numel, trained = nbytes + spec.nbytes * share, numel + spec.numel * share, True
        flops, moved = optimizer.flops(1.0) * numel, optimizer.moved_bytes(1.0) * nbytes
        seconds = self.costs.seconds("optimizer", flops, moved, "float32", int(trained))
        start = float(self.now.max())
        self.now, self.updated = self.now + seconds, seconds
        if self.details:
            self._event("compute", "update", "optimizer", start, float(self.now.max()))
        for bucket in self.buckets:
            if bucket.scatters and not bucket.gathers:
                self._wait_for(bucket.gather.forward, bucket.gather.nbytes, "optimizer", "gather parameters")


def storage_name(assignment: Assignment, name: str) -> str:
    """How a parameter is stored, in a word: "whole", "sharded", or the ZeRO stage of what is left whole."""
    p = assignment.parameters[name]
    if p.stored != p.used:
        return "zero-3"
    if p.gradient != p.used:
        return "zero-2"
    if p.state != p.used:
        return "zero-1"
    cut = any(isinstance(u, Shard) and size > 1 for u, size in zip(p.used, assignment.mesh.shape, strict=True))
    return "sharded" if cut else "whole"
