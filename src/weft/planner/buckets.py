"""Which parameters travel together, and what their collectives cost: the runtime's buckets as the planner sees them.

The rules are those of `weft.runtime.store`: parameters that are owed the same go together in reverse order of first use, up to
25 MiB (the first bucket 1 MiB, so that something is under way early); what is gathered before use goes by repeated block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Graph, Node, Ref
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.layout import Partial, Placements, Replicate, Shard, local_shape
from weft.planner.coding import Owed, gradients
from weft.planner.costs import FREE, Boxing, Costs

if TYPE_CHECKING:
    import torch

    from weft.planner.coding import Coding

__all__ = ["Bucket", "Readings", "buckets_of"]

MIB = 1 << 20
BUCKET_NBYTES = 25 * MIB
FIRST_BUCKET_NBYTES = 1 * MIB
MIN_GATHER_NBYTES = 1 * MIB


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel in one flat tensor.

    Attributes:
        names: of the parameters, in reverse order of first use.
        first, last: numbers of the first and last call that reads any of them.
        used_bytes: bytes in the placement of use, on a device of each class.
        reduce: gradients all-reduced or reduce-scattered.
        gather: pieces gathered: before each use (`gathers`), else once after the update.
        gathers, regathers, scatters: stored cut; gathered again for backward; gradients cut.
        coded: an exchange reduces, in place of a collective; `code` are its codec seconds, `kept` bytes of its memories.
    """

    names: tuple[str, ...]
    first: int
    last: int
    used_bytes: NDArray[np.float64]
    reduce: Boxing
    gather: Boxing
    gathers: bool
    regathers: bool
    scatters: bool
    coded: bool = False
    code: float = 0.0
    kept: float = 0.0


@dataclass(frozen=True)
class Readings:
    """Who reads parameters.

    Attributes:
        first, last: by parameter name, number of the first and of the last call that reads it, itself or through a view.
        block: the copy of a repeated block that alone reads it; others are missing.
    """

    first: Mapping[str, int]
    last: Mapping[str, int]
    block: Mapping[str, object]

    @classmethod
    def of(cls, graph: Graph) -> Readings:
        of = {Ref(node.name): name for name, node in graph.parameters.items()}
        copy_of: dict[int, object] = {}
        for number, repeat in enumerate(graph.repeats):
            for index in range(repeat.length * repeat.count):
                copy_of[repeat.start + index] = (number, index // repeat.length)
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        users: dict[str, set[object]] = {}
        for number, call in enumerate(graph.calls):
            for operand, ref in enumerate(call.inputs):
                name = of.get(ref)
                if name is None:
                    continue
                first.setdefault(name, number)
                last[name] = number
                if graph[ref.node].role == "parameter":
                    users.setdefault(name, set()).add(copy_of.get(number))
                if call.kind == "view" and operand == 0:
                    of.update({Ref(call.name, index): name for index in range(len(call.outputs))})
        block = {name: found.pop() for name, found in users.items() if len(found) == 1 and None not in found}
        return cls(first, last, block)


def buckets_of(
    graph: Graph, assignment: Assignment, costs: Costs, readings: Readings, coding: Coding | None = None
) -> list[Bucket]:
    """The buckets of an assignment in order of first use, without those that owe nothing; gradients by an exchange if it can."""
    first = readings.first
    nodes = {name: node for name, node in graph.parameters.items() if name in first}
    kinds: dict[object, list[str]] = {}
    known: dict[tuple, _Kind | None] = {}
    trained: set[Owed | None] = set()
    for name in sorted(nodes, key=lambda name: first[name]):
        spec, placement = nodes[name].outputs[0], assignment.parameters[name]
        key = (id(placement), spec.dtype, spec.requires_grad)
        if key not in known:
            known[key] = _kind(nodes[name], placement, assignment.mesh.shape)
        kind = known[key]
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
        if spec.requires_grad:
            trained.add(None if kind is None else (kind.cut, kind.summed))
    axes = coding.axes(trained, assignment.mesh) if coding is not None else ()
    found = []
    for members in kinds.values():
        members = members[::-1]
        sizes = {name: costs.nbytes(nodes[name].outputs[0], assignment.parameters[name].used) for name in members}
        cut = _stored_cut(assignment.parameters[members[0]])
        groups = _by_block(members, sizes, readings.block) if cut else _by_size(members, sizes)
        found += [_bucket(names, nodes, assignment, costs, readings, coding, axes) for names in groups]
    return sorted(found, key=lambda bucket: bucket.first)


def _stored_cut(placement: ParameterPlacement) -> bool:
    return placement.stored != placement.used


class _Kind(NamedTuple):
    """What parameters of one bucket have in common: axes over which gradients are cut, and summed, see `coding.Owed`."""

    dtype: torch.dtype
    cut: tuple[int, ...]
    stored_cut: bool
    every_micro_batch: bool
    summed: tuple[int, ...]
    trains: bool


def _kind(node: Node, placement: ParameterPlacement, shape: tuple[int, ...]) -> _Kind | None:
    """What a parameter is owed; None where nothing is."""
    cut = tuple(
        axis for axis, used in enumerate(placement.used)
        if isinstance(used, Replicate) and shape[axis] > 1
        and any(isinstance(p[axis], Shard) for p in (placement.state, placement.gradient, placement.stored))
    )  # fmt: skip
    summed = tuple(
        axis
        for axis, used in enumerate(placement.used)
        if isinstance(used, Replicate) and shape[axis] > 1 and axis not in cut
    )
    spec = node.outputs[0]
    if not cut and not (summed and spec.requires_grad):
        return None
    each = placement.gradient != placement.used or _stored_cut(placement)
    return _Kind(spec.dtype, cut, _stored_cut(placement), each, summed, spec.requires_grad)


def _by_size(members: list[str], sizes: Mapping[str, float]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room, filled = FIRST_BUCKET_NBYTES, 0.0
    for name in members:
        if groups[-1] and filled + sizes[name] > room:
            groups.append([])
            room, filled = BUCKET_NBYTES, 0.0
        groups[-1].append(name)
        filled += sizes[name]
    return groups


def _by_block(members: list[str], sizes: Mapping[str, float], blocks: Mapping[str, object]) -> list[list[str]]:
    groups: list[list[str]] = []
    filled = 0.0
    for name in members:
        same = bool(groups) and blocks.get(groups[-1][-1]) == blocks.get(name)
        if groups and (filled < MIN_GATHER_NBYTES or (same and filled + sizes[name] <= BUCKET_NBYTES)):
            groups[-1].append(name)
            filled += sizes[name]
        else:
            groups.append([name])
            filled = sizes[name]
    return groups


def _bucket(
    names: list[str],
    nodes: Mapping[str, Node],
    assignment: Assignment,
    costs: Costs,
    readings: Readings,
    coding: Coding | None,
    axes: tuple[int, ...],
) -> Bucket:
    """`axes`: of the mesh, along which an exchange sums; none where it carries nothing."""
    specs = [nodes[name].outputs[0] for name in names]
    placement = assignment.parameters[names[0]]
    used = placement.used
    cut: Placements = tuple(
        s if isinstance(u, Replicate) and isinstance(s, Shard) else u
        for u, s in zip(used, placement.state, strict=True)
    )
    owed: Placements = tuple(Partial() if isinstance(u, Replicate) else u for u in used)
    numel, size = sum(spec.numel for spec in specs), specs[0].dtype.itemsize
    trains = specs[0].requires_grad
    used_bytes = np.zeros(len(costs.places))
    for name, spec in zip(names, specs, strict=True):
        used_bytes = used_bytes + spec.nbytes * costs.fraction(spec.shape, assignment.parameters[name].used)
    scatters = cut != used and trains
    reduce, price = FREE, None
    if coding is not None and axes and trains:
        mesh, position = costs.mesh, costs.places[int(np.argmax(used_bytes))].position
        local = [
            local_shape(s.shape, assignment.parameters[n].used, mesh, position)
            for n, s in zip(names, specs, strict=True)
        ]
        price = coding.price(gradients(zip(names, specs, strict=True), local), mesh, axes, scatters)
        rest: Placements = tuple(u if axis in axes else p for axis, (u, p) in enumerate(zip(used, owed, strict=True)))
        first = costs.flat(numel, size, rest, used)
        reduce = Boxing(price.wire + first.forward, 0.0, price.nbytes + first.nbytes)
    elif trains:
        reduce = costs.flat(numel, size, owed, cut)
    return Bucket(
        tuple(names),
        min(readings.first[name] for name in names),
        max(readings.last[name] for name in names),
        used_bytes,
        reduce,
        costs.flat(numel, size, cut, used),
        _stored_cut(placement),
        _stored_cut(placement) and placement.regather,
        scatters,
        price is not None,
        price.codec if price is not None else 0.0,
        price.kept if price is not None else 0.0,
    )
