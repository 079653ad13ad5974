"""What the collectives of parameters and gradients cost, bucket by bucket as the runtime starts them (`placement.parameters`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weft.graph.graph import Graph, Node
from weft.placement.assignment import Assignment
from weft.placement.layout import Partial, Placements, Replicate
from weft.placement.parameters import Owed, Readings, Traveller, buckets
from weft.planner.coding import in_pieces
from weft.planner.costs import FREE, Boxing, Costs

if TYPE_CHECKING:
    from weft.planner.coding import Coding

__all__ = ["Bucket", "buckets_of"]


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel in one flat tensor.

    Attributes:
        names: of the parameters, in reverse order of first use; frozen ones only where all are gathered.
        first, last: numbers of the first and last call that reads any of them.
        used_bytes: bytes in the placement of use, on a device of each class.
        reduce: gradients all-reduced or reduce-scattered.
        gather: pieces gathered: before each use (`gathers`), else once after the update.
        gathers, regathers, scatters: stored cut; read again by backward, for which it is gathered once more; gradients cut.
        coded: an exchange reduces, in place of a collective; `code` are its codec seconds, `kept` bytes of its memories.
        cut_first: it gets pieces, which a reduce-scatter along other axes has made.
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
    cut_first: bool = False


def buckets_of(
    graph: Graph, assignment: Assignment, costs: Costs, readings: Readings, coding: Coding | None = None
) -> list[Bucket]:
    """The buckets of an assignment in order of first use, without those that owe nothing; gradients by an exchange if it can."""
    mesh, nodes = assignment.mesh, graph.parameters
    alike: dict[int, Owed] = {}  # few placements serve many parameters
    travellers, trained = [], set()
    for name in readings.order(nodes):
        spec, placement = nodes[name].outputs[0], assignment.parameters[name]
        owed = alike.get(id(placement))
        if owed is None:
            owed = alike[id(placement)] = Owed.of(placement, mesh.shape)
        trains = spec.requires_grad and name in readings.first
        nbytes = round(costs.nbytes(spec, placement.used))
        travellers.append(Traveller(name, owed, spec.dtype, trains, nbytes))
        if trains:
            trained.add((owed.scatter_axes, owed.sum_axes))
    axes = coding.axes(trained, mesh) if coding is not None else ()
    found = []
    for members in buckets(travellers, readings.block):
        names = [each.name for each in members if each.name in readings.first]
        owed = members[0].owed
        if names and (owed.scatter_axes or (owed.sum_axes and any(each.trains for each in members))):
            found.append(_bucket(names, owed, nodes, assignment, costs, readings, coding, axes))
    return sorted(found, key=lambda bucket: bucket.first)


def _bucket(
    names: list[str],
    owed: Owed,
    nodes: Mapping[str, Node],
    assignment: Assignment,
    costs: Costs,
    readings: Readings,
    coding: Coding | None,
    axes: tuple[int, ...],
) -> Bucket:
    """`axes`: of the mesh, along which an exchange sums; none where it carries nothing."""
    specs = {name: nodes[name].outputs[0] for name in names}
    placement = assignment.parameters[names[0]]
    used = placement.used
    cut = in_pieces(placement)
    partial: Placements = tuple(Partial() if isinstance(u, Replicate) else u for u in used)
    trained = {name: spec for name, spec in specs.items() if spec.requires_grad}
    numel, size = sum(spec.numel for spec in trained.values()), specs[names[0]].dtype.itemsize
    used_bytes = np.zeros(len(costs.places))
    for name, spec in specs.items():
        used_bytes = used_bytes + spec.nbytes * costs.fraction(spec.shape, assignment.parameters[name].used)
    scatters = bool(owed.scatter_axes and trained)
    cut_first = scatters and bool(axes) and not {*owed.scatter_axes} & {*axes}
    reduce, price = FREE, None
    if coding is not None and axes and trained:
        price = coding.reduce(trained, [assignment.parameters[name] for name in trained], axes, costs)
        reduce = Boxing(price.wire, 0.0, price.nbytes)
    elif trained:
        reduce = costs.flat(numel, size, partial, cut)
    return Bucket(
        tuple(names),
        min(readings.first[name] for name in names),
        max(readings.last[name] for name in names),
        used_bytes,
        reduce,
        costs.flat(sum(spec.numel for spec in specs.values()), size, cut, used),
        owed.stored_cut,
        owed.stored_cut and any(name in readings.again for name in names),
        scatters,
        price is not None,
        price.codec if price is not None else 0.0,
        price.kept if price is not None else 0.0,
        cut_first,
    )
