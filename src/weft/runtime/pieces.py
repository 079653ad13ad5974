"""What one process holds of each parameter: which axes owe a sum of gradients, which cut the optimizer's state.

A parameter has a placement in which forward and backward `use` it. Along a mesh axis where that is Shard nothing is owed. Along
one where it is Replicate each process computes a part of the gradient, and the plan says what becomes of it:

    gradient, state both Replicate    the axis is summed over                             `Holding.sum_axes`
    gradient or state Shard           the axis is summed over and cut: every process      `Holding.scatter_axes`
                                      keeps, updates and (ZeRO-3) stores one piece

The piece is cut from the local tensor that the process uses (not from the whole), outermost axis first, by `layout.deal`. Where
the used tensor is whole in the cut dim that is the plan's Shard itself; where another axis cuts the same dim already,
it is a finer cut of the same size that needs no exchange across the other axis.

Several scatter axes form one group, numbered row by row. If one of them stores the parameter cut, all do: never more memory
than planned.
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
from weft.placement.layout import Mesh, Placements, Replicate, Shard, deal, intervals, local_shape, take

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
        sum_axes: mesh axes over which gradients are summed and the result kept whole.
        scatter_axes: mesh axes over which gradients are summed and cut.
        boxes: for each member of the scatter group, what it keeps of the local tensor; one box, all of it, without such axes.
        member: which of them this process is.
        stored_cut: the parameter itself is stored cut and gathered before use (ZeRO-3).
        every_micro_batch: gradients are scattered after every micro-batch (ZeRO-2, ZeRO-3), not once per step.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    placement: ParameterPlacement
    mesh: Mesh
    position: tuple[int, ...]
    local: tuple[int, ...]
    sum_axes: tuple[int, ...]
    scatter_axes: tuple[int, ...]
    boxes: tuple[Box, ...]
    member: int
    stored_cut: bool
    every_micro_batch: bool

    @property
    def used(self) -> Placements:
        return self.placement.used

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
    cut = {}
    for axis in range(mesh.ndim):
        shards = [
            p[axis] for p in (placement.state, placement.gradient, placement.stored) if isinstance(p[axis], Shard)
        ]
        if used[axis] == Replicate() and shards and mesh.shape[axis] > 1:
            cut[axis] = shards[0]
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
    return Holding(
        name, tuple(shape), dtype, trainable, placement, mesh, position, local,
        sum_axes=tuple(a for a in range(mesh.ndim) if used[a] == Replicate() and a not in cut and mesh.shape[a] > 1),
        scatter_axes=tuple(cut),
        boxes=tuple(boxes),
        member=member,
        stored_cut=any(isinstance(placement.stored[axis], Shard) for axis in cut),
        every_micro_batch=any(isinstance(p[axis], Shard) for p in (placement.gradient, placement.stored) for axis in cut),
    )  # fmt: skip


def holdings(graph: Graph, assignment: Assignment, rank: int) -> dict[str, Holding]:
    """The holding of every parameter of a graph at a global rank, in order of first use in forward."""
    position = assignment.mesh.coordinates(rank)
    first_use: dict[str, int] = {}
    by_node = {node.name: name for name, node in graph.parameters.items()}
    for number, call in enumerate(graph.calls):
        for ref in call.inputs:
            if ref.node in by_node:
                first_use.setdefault(by_node[ref.node], number)
    names = sorted(graph.parameters, key=lambda name: first_use.get(name, -1))
    found = {}
    for name in names:
        spec = graph.parameters[name].outputs[0]
        placement = assignment.parameters[name]
        trainable = spec.requires_grad and name in first_use  # an unused one has no gradient on one device either
        found[name] = hold(name, spec.shape, spec.dtype, trainable, placement, assignment.mesh, position)
    return found
