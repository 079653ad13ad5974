"""What one process holds of each parameter: the piece that it keeps, updates and, under ZeRO-3, stores.

The piece is cut from the local tensor that the process uses (not from the whole), outermost axis first, by `layout.deal`. Where
the used tensor is whole in the cut dim that is the plan's Shard itself; where another axis cuts the same dim already,
it is a finer cut of the same size that needs no exchange across the other axis. What is owed to whom: `placement.parameters`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.graph.graph import Graph
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.layout import Mesh, Placements, deal, intervals, local_shape, take
from weft.placement.parameters import Owed, Readings, cut_of

__all__ = ["Holding", "hold", "holdings"]

Box = tuple[tuple[int, int], ...]  # half-open index range per dim


@dataclass(frozen=True)
class Holding:
    """One parameter as one process holds it.

    Attributes:
        name: in the module.
        shape: of the whole parameter.
        dtype: of the parameter, its gradient and the pieces.
        trainable: whether it gets a gradient: neither frozen nor unused.
        placement: the plan's word.
        mesh, position: the mesh and where this process is.
        local: shape in the used placement, here.
        owed: mesh axes over which gradients are summed, and summed and cut.
        boxes: for each member of the scatter group, what it keeps of the local tensor; one box, all of it, without such axes.
        member: which of them this process is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    placement: ParameterPlacement
    mesh: Mesh
    position: tuple[int, ...]
    local: tuple[int, ...]
    owed: Owed
    boxes: tuple[Box, ...]
    member: int

    @property
    def used(self) -> Placements:
        return self.placement.used

    @property
    def sum_axes(self) -> tuple[int, ...]:
        return self.owed.sum_axes

    @property
    def scatter_axes(self) -> tuple[int, ...]:
        return self.owed.scatter_axes

    @property
    def stored_cut(self) -> bool:
        return self.owed.stored_cut

    @property
    def numel(self) -> int:
        """Elements of the local tensor in the used placement."""
        return math.prod(self.local)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def piece_shape(self, member: int | None = None) -> tuple[int, ...]:
        """Shape of a member's piece; this process's by default."""
        return tuple(stop - start for start, stop in self.boxes[self.member if member is None else member])

    def piece(self, local: Tensor, member: int | None = None) -> Tensor:
        """A member's piece of a tensor in the used placement: a view. This process's by default."""
        for dim, (start, stop) in enumerate(self.boxes[self.member if member is None else member]):
            if stop - start < local.shape[dim]:
                local = local.narrow(dim, start, stop - start)
        return local

    def take(self, whole: Tensor) -> Tensor:
        """This process's piece of a whole tensor of the parameter's shape; a view where it can be one."""
        return self.piece(take(whole, self.used, self.mesh, self.position))

    def offsets(self) -> Box | None:
        """Where this process's piece stands in the whole parameter, or None if it is not one box."""
        found = []
        for dim, (start, stop) in enumerate(self.boxes[self.member]):
            held = intervals(self.shape[dim], dim, self.used, self.mesh, self.position)
            if len(held) != 1:
                return None
            found.append((held[0][0] + start, held[0][0] + stop))
        return tuple(found)


def hold(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    trainable: bool,
    placement: ParameterPlacement,
    mesh: Mesh,
    position: tuple[int, ...],
) -> Holding:
    """The holding of one parameter at one position of the mesh.

    Raises:
        ValueError: a Shard does not fit the shape.
    """
    used = placement.used
    owed = Owed.of(placement, mesh.shape)
    cut = {axis: shard for axis in owed.scatter_axes if (shard := cut_of(placement, axis)) is not None}
    local = local_shape(shape, used, mesh, position)
    boxes = []
    for here in itertools.product(*(range(mesh.shape[axis]) for axis in cut)):
        low, size = [0] * len(local), list(local)
        for (axis, shard), index in zip(cut.items(), here, strict=True):
            if shard.dim >= len(local):
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(shape)} cannot be cut as {shard}: it has no such dim"
                )
            dealt = deal(size[shard.dim], mesh.shape[axis], shard.weights or mesh.weights[axis])
            low[shard.dim] += sum(dealt[:index])
            size[shard.dim] = dealt[index]
        boxes.append(tuple((start, start + count) for start, count in zip(low, size, strict=True)))
    member = 0
    for axis in cut:
        member = member * mesh.shape[axis] + position[axis]
    return Holding(name, tuple(shape), dtype, trainable, placement, mesh, position, local, owed, tuple(boxes), member)


def holdings(graph: Graph, assignment: Assignment, rank: int, readings: Readings | None = None) -> dict[str, Holding]:
    """The holding of every parameter of a graph at a global rank, in order of first use in forward."""
    position = assignment.mesh.coordinates(rank)
    readings = readings or Readings.of(graph)
    found = {}
    for name in readings.order(graph.parameters):
        spec = graph.parameters[name].outputs[0]
        placement = assignment.parameters[name]
        trainable = spec.requires_grad and name in readings.first  # an unused one has no gradient on one device either
        found[name] = hold(name, spec.shape, spec.dtype, trainable, placement, assignment.mesh, position)
    return found
