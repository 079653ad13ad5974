"""What a training step holds in memory on each device, and when: liveness over forward and backward.

Time runs over 2N steps for a graph of N calls: call i runs forward at step i and backward at step 2N - 1 - i. In between a
device holds
    parameters, optimizer state               pieces as the plan stores them, all the time
    gradients                                 what travels: its flat bucket, all the time, and autograd's own until the
                                              bucket is full. What does not: from its backward to the update `gradients_held`
    gathered copies                           of ZeRO-3 parameters, around their use (and the next bucket's, fetched ahead)
    activations                               from the call that makes them to their last reader, or if autograd keeps them
                                              to the backward of the first call that kept them                      `Retention`
    gradients of activations                  from the backward of the last reader to that of the maker
Views share their source's memory; a value boxed to another placement is a copy of its own unless that only narrows.

The peak is the most that these add up to.                                                                     `memory_use`
`squeeze` tells the same story as a trace whose activations may be made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Graph, Node, Ref, TensorSpec
from weft.placement.assignment import Assignment
from weft.placement.layout import Placements, Replicate, Shard

if TYPE_CHECKING:
    from weft.planner.buckets import Bucket
    from weft.planner.costs import Costs
    from weft.planner.optimizer import OptimizerCost
    from weft.planner.placed import PlacedGraph, View

__all__ = [
    "CATEGORIES", "Hold", "Life", "MemoryUse", "Retention", "Storage", "always", "copies", "gradients_held", "held",
    "life_of_activations", "memory_use",
]  # fmt: skip

CATEGORIES = ("parameters", "gradients", "optimizer state", "gathered copies", "activations")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one device by category at the step of the peak, and the peak itself."""

    parameters: float
    gradients: float
    optimizer_state: float
    gathered_copies: float
    activations: float

    @property
    def peak(self) -> float:
        return self.parameters + self.gradients + self.optimizer_state + self.gathered_copies + self.activations

    def by_category(self) -> dict[str, float]:
        """Bytes by the names of `CATEGORIES`."""
        values = (self.parameters, self.gradients, self.optimizer_state, self.gathered_copies, self.activations)
        return dict(zip(CATEGORIES, values, strict=True))

    @property
    def largest(self) -> str:
        """The category that takes most."""
        return max(self.by_category().items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Retention:
    """Which values autograd keeps for backward, and whose memory each value shares.

    Attributes:
        root: for each output of a call, the value whose memory it is (itself, unless the call is a view).
        needed: values kept for backward by some reader, by their maker, or through a view of them.
    """

    root: Mapping[Ref, Ref]
    needed: frozenset[Ref]

    @classmethod
    def of(cls, graph: Graph) -> Retention:
        root: dict[Ref, Ref] = {}
        needed: set[Ref] = set()
        for node in graph.calls:
            for index in range(len(node.outputs)):
                ref = Ref(node.name, index)
                root[ref] = root.get(node.inputs[0], node.inputs[0]) if node.kind == "view" and node.inputs else ref
        for node in reversed(graph.calls):
            outputs = [Ref(node.name, index) for index in range(len(node.outputs))]
            if node.cost.keeps_output:
                needed.update(outputs)
            for operand, ref in enumerate(node.inputs):
                kept = node.cost.keeps_inputs[operand] if operand < len(node.cost.keeps_inputs) else False
                through = node.kind == "view" and operand == 0 and any(out in needed for out in outputs)
                if kept or through:
                    needed.add(ref)
        return cls(root, frozenset(needed))

    def keeps(self, node: Node, operand: int) -> bool:
        """Whether a call keeps an operand for backward, itself or through a view that it makes of it."""
        if operand < len(node.cost.keeps_inputs) and node.cost.keeps_inputs[operand]:
            return True
        views = node.kind == "view" and operand == 0
        return views and any(Ref(node.name, index) in self.needed for index in range(len(node.outputs)))

    def kept_storage(self, ref: Ref) -> bool:
        """Whether the value has memory of its own that backward needs."""
        return self.root.get(ref, ref) == ref and ref in self.needed


def memory_use(
    placed: PlacedGraph,
    assignment: Assignment,
    views: Sequence[View],
    optimizer: OptimizerCost,
    buckets: Sequence[Bucket],
) -> list[MemoryUse]:
    """Memory of one device of each class of `costs.places`, at its peak. `views` are `placed.views(assignment)`."""
    places = len(placed.costs.places)
    parameters, state = always(placed, assignment, optimizer)
    steps = 2 * len(views)
    activations = _levels(_activations(placed, life_of_activations(placed, assignment, views), steps), steps, places)
    gathered = _levels(copies(buckets, steps), steps, places)
    gradients = _levels(gradients_held(placed, assignment, buckets), steps, places)
    peak = (activations + gathered + gradients).argmax(axis=0)
    at = np.arange(places)
    moving = (part[peak, at] for part in (gradients, gathered, activations))
    of_gradients, of_copies, of_activations = moving
    return [
        MemoryUse(*(float(x) for x in row))
        for row in zip(parameters, of_gradients, state, of_copies, of_activations, strict=True)
    ]


def always(
    placed: PlacedGraph, assignment: Assignment, optimizer: OptimizerCost
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes of parameters (with buffers and the batch) and of optimizer state, on a device of each class."""
    graph, costs = placed.graph, placed.costs
    parameters, state = np.zeros(len(costs.places)), np.zeros(len(costs.places))
    for name, node in graph.parameters.items():
        spec, placement = node.outputs[0], assignment.parameters[name]
        stored, of_state = placed.shares(spec, placement)
        parameters += spec.nbytes * stored
        if spec.requires_grad:
            state += optimizer.state_bytes(spec.nbytes) * of_state
    for node in graph.of("buffer"):
        placements = assignment.output(graph, Ref(node.name))
        parameters += node.outputs[0].nbytes * costs.fraction(node.outputs[0].shape, placements)
    for node in (*graph.of("input"), *graph.of("constant")):
        parameters += node.outputs[0].nbytes
    return parameters, state


def held(costs: Costs, spec: TensorSpec, placements: Placements) -> NDArray[np.float64]:
    """Fraction of a parameter on a device of each class: the cuts of `used`, and of ZeRO, by even division of elements."""
    flat = tuple(Shard(0, p.weights) if isinstance(p, Shard) else p for p in placements)
    return costs.fraction((max(1, spec.numel),), flat)


Hold = tuple[int, int, "NDArray[np.float64] | float"]
"""Bytes held from one step to another, both included, on a device of each class."""


def _levels(holds: Iterable[Hold], steps: int, places: int) -> NDArray[np.float64]:
    """Bytes held per step, for every class of devices."""
    changes = np.zeros((steps + 1, places))
    for first, last, nbytes in holds:
        changes[first] += nbytes
        changes[last + 1] -= nbytes
    return changes.cumsum(axis=0)[:-1]


@dataclass(eq=False)
class Storage:
    """One piece of memory: what lies there, who made it and when, who reads it last, and the first call that keeps it."""

    ref: Ref
    spec: TensorSpec
    placement: int
    made: int
    last: int
    keeper: int | None = None

    def until(self, steps: int) -> int:
        """The last step that needs its contents."""
        return self.last if self.keeper is None else steps - 1 - self.keeper


@dataclass(frozen=True)
class Life:
    """What one call does with activations.

    Attributes:
        reads: storages of its operands, in order; None for parameters and inputs.
        kept: those that its backward reads again, its own outputs among them if it keeps these.
        makes: storages of its outputs; a view makes none.
        boxed: (what is boxed, the copy) for each operand that is brought to another placement just before it.
        saved: bytes that autograd keeps for it besides, on a device of each class.
    """

    reads: tuple[Storage | None, ...]
    kept: tuple[Storage, ...]
    makes: tuple[Storage, ...]
    boxed: tuple[tuple[Storage | None, Storage], ...]
    saved: NDArray[np.float64] | float


def life_of_activations(placed: PlacedGraph, assignment: Assignment, views: Sequence[View]) -> list[Life]:
    """What each call makes, reads and keeps, in order."""
    where = placed.sources(assignment)
    of: dict[tuple[Ref, int], Storage | None] = {}  # None: memory that is not an activation's
    lives = []
    for number, (call, view) in enumerate(zip(placed.prepared.calls, views, strict=True)):
        cost = call.node.cost
        reads: list[Storage | None] = []
        kept: list[Storage] = []
        makes: list[Storage] = []
        boxed: list[tuple[Storage | None, Storage]] = []
        for operand, (ref, wanted) in enumerate(zip(call.inputs, view.inputs, strict=True)):
            storage = _reading(placed, ref, where[ref], wanted, number, of, boxed)
            if storage is not None:
                storage.last = number
                if operand < len(cost.keeps_inputs) and cost.keeps_inputs[operand]:
                    kept.append(storage)
                    if storage.keeper is None:
                        storage.keeper = number
            reads.append(storage)
        for ref, placement, spec in zip(call.values, view.outputs, call.node.outputs, strict=True):
            where[ref] = placement
            if call.node.kind == "view" and reads:
                of[ref, placement] = reads[0]
            else:
                made = Storage(ref, spec, placement, number, number, number if cost.keeps_output else None)
                makes.append(made)
                of[ref, placement] = made
                if cost.keeps_output:
                    kept.append(made)
        saved = cost.saved * view.share if cost.saved else 0.0
        lives.append(Life(tuple(reads), tuple(kept), tuple(makes), tuple(boxed), saved))
    return lives


def _activations(placed: PlacedGraph, lives: Sequence[Life], steps: int) -> Iterator[Hold]:
    """Activations, what autograd saves besides them, and their gradients."""
    for number, life in enumerate(lives):
        if not isinstance(life.saved, float):
            yield number, steps - 1 - number, life.saved
        for storage in (*(copy for _, copy in life.boxed), *life.makes):
            nbytes = placed.held(storage.spec, storage.placement)
            yield storage.made, storage.until(steps), nbytes
            if storage.spec.requires_grad and storage.last > storage.made:
                yield steps - 1 - storage.last, steps - 1 - storage.made, nbytes


def _reading(
    placed: PlacedGraph,
    ref: Ref,
    made: int,
    wanted: int,
    number: int,
    of: dict[tuple[Ref, int], Storage | None],
    boxed: list[tuple[Storage | None, Storage]],
) -> Storage | None:
    """The memory in which a reader finds a value: the maker's, or a boxed copy made on first demand."""
    key = (ref, wanted)
    if key not in of:
        source = of.get((ref, made))
        if made == wanted or _narrows(placed.placements(made), placed.placements(wanted)):
            of[key] = source
        else:
            copy = Storage(ref, placed.prepared.specs[ref], wanted, number, number)
            if source is not None:
                source.last = number  # the boxing reads it
            boxed.append((source, copy))
            of[key] = copy
    return of[key]


def _narrows(made: Placements, wanted: Placements) -> bool:
    return all(a == b or (isinstance(a, Replicate) and isinstance(b, Shard)) for a, b in zip(made, wanted, strict=True))


def copies(buckets: Sequence[Bucket], steps: int) -> Iterator[Hold]:
    """Whole copies of ZeRO-3 buckets."""
    gathered = [bucket for bucket in buckets if bucket.gathers]
    for number, bucket in enumerate(gathered):
        fetched = gathered[number - 1].first if number else bucket.first
        yield min(fetched, bucket.first), bucket.last, bucket.used_bytes
    again = sorted((bucket for bucket in gathered if bucket.regathers), key=lambda bucket: -bucket.last)
    for number, bucket in enumerate(again):  # the first is still there from forward, the others come one ahead
        fetched = steps - 1 - max(bucket.last, again[number - 1].last if number > 1 else 0)
        yield fetched if number else bucket.last + 1, steps - 1 - bucket.first, bucket.used_bytes


def gradients_held(placed: PlacedGraph, assignment: Assignment, buckets: Sequence[Bucket]) -> Iterator[Hold]:
    """Gradients of parameters, as `runtime.buckets` holds them for one micro-batch.

    A bucket's flat tensor is always there: the sums of an all-reduce, or this device's piece of a reduce-scatter. Autograd's
    own gradients stand beside it until the bucket is full; a reduce-scatter then copies them into the order of the members.
    """
    graph, readings = placed.graph, placed.prepared.readings
    end = 2 * len(graph.calls) - 1
    bucket_of = {name: bucket for bucket in buckets for name in bucket.names}
    for name, node in graph.parameters.items():
        spec, placement = node.outputs[0], assignment.parameters[name]
        if not spec.requires_grad or name not in readings.last:
            continue
        used = spec.nbytes * placed.costs.fraction(spec.shape, placement.used)
        born, bucket = end - readings.last[name], bucket_of.get(name)
        full = end - (bucket.first if bucket else 0)
        yield born, full, used
        if bucket is not None:
            scattered = placement.state != placement.used
            yield 0, end, spec.nbytes * placed.shares(spec, placement)[1] if scattered else used
            if scattered:
                yield full, (end if bucket.coded and not bucket.cut_first else full), used
    for bucket in buckets:
        if bucket.kept:
            yield 0, end, bucket.kept
