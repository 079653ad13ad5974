"""Who reads parameters, what they are owed, and which travel together: the rules that the planner prices and the runtime keeps.

A parameter has a placement in which forward and backward `use` it. Along a mesh axis where that is Shard nothing is owed. Along
one where it is Replicate each process computes a part of the gradient, and the plan says what becomes of it:

    gradient, state both Replicate    the axis is summed over                             `Owed.sum_axes`
    gradient or state Shard           the axis is summed over and cut: every process      `Owed.scatter_axes`
                                      keeps, updates and (ZeRO-3) stores one piece

Several scatter axes form one group, numbered row by row. If one of them stores the parameter cut, all do: never more memory
than planned.

Parameters that are owed the same travel in one flat tensor (`buckets`), against the order of first use, which is the order in
which backward completes gradients: up to 25 MiB, the first of each kind 1 MiB; those gathered before use, by repeated block.
Source: Li et al., PyTorch Distributed, arXiv:2006.15704 (buckets); Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from weft.graph.graph import Graph, Ref
from weft.placement.assignment import ParameterPlacement
from weft.placement.layout import Mesh, Placements, Replicate, Shard, local_shape

__all__ = ["Owed", "Readings", "Traveller", "buckets", "cut_of", "largest_piece"]

MIB = 1 << 20
BUCKET_NBYTES = 25 * MIB  # as torch DDP: large enough to hide latency, small enough to start early
FIRST_BUCKET_NBYTES = 1 * MIB  # the first reduction has nothing to hide behind but should start at once
MIN_GATHER_NBYTES = 1 * MIB  # smaller blocks share a gather


@dataclass(frozen=True)
class Readings:
    """Who reads parameters, by parameter name; those that no call reads are missing.

    Attributes:
        first, last: number of the first and of the last call that reads it, itself or through a view.
        block: the copy of a repeated block that alone reads it; others are missing.
        again: those whose values backward reads too: an embedding's only scatters into them.
    """

    first: Mapping[str, int]
    last: Mapping[str, int]
    block: Mapping[str, Hashable]
    again: frozenset[str]

    @classmethod
    def of(cls, graph: Graph) -> Readings:
        of = {Ref(node.name): name for name, node in graph.parameters.items()}
        copy_of: dict[int, Hashable] = {}
        for number, repeat in enumerate(graph.repeats):
            for index in range(repeat.length * repeat.count):
                copy_of[repeat.start + index] = (number, index // repeat.length)
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        users: dict[str, set[Hashable]] = {}
        again: set[str] = set()
        for number, call in enumerate(graph.calls):
            for operand, ref in enumerate(call.inputs):
                name = of.get(ref)
                if name is None:
                    continue
                first.setdefault(name, number)
                last[name] = number
                if call.op != "embedding":
                    again.add(name)
                if graph[ref.node].role == "parameter":
                    users.setdefault(name, set()).add(copy_of.get(number))
                if call.kind == "view" and operand == 0:  # who reads a view reads the parameter
                    of.update({Ref(call.name, index): name for index in range(len(call.outputs))})
        block = {name: found.pop() for name, found in users.items() if len(found) == 1 and None not in found}
        return cls(first, last, block, frozenset(again))

    def order(self, names: Iterable[str]) -> list[str]:
        """Names in order of first use, those that nobody reads before all others."""
        return sorted(names, key=lambda name: self.first.get(name, -1))


class Owed(NamedTuple):
    """What becomes of one parameter's gradient.

    Attributes:
        scatter_axes: mesh axes over which gradients are summed and cut.
        sum_axes: mesh axes over which gradients are summed and the result kept whole.
        stored_cut: the parameter itself is stored cut and gathered before use (ZeRO-3).
        every_micro_batch: gradients are scattered after every micro-batch (ZeRO-2, ZeRO-3), not once per step.
    """

    scatter_axes: tuple[int, ...]
    sum_axes: tuple[int, ...]
    stored_cut: bool
    every_micro_batch: bool

    @classmethod
    def of(cls, placement: ParameterPlacement, shape: Sequence[int]) -> Owed:
        """On a mesh of this shape."""
        whole = [axis for axis, used in enumerate(placement.used) if isinstance(used, Replicate) and shape[axis] > 1]
        cut = {axis: cut_of(placement, axis) for axis in whole}
        scatter = tuple(axis for axis in whole if cut[axis] is not None)
        return cls(
            scatter,
            tuple(axis for axis in whole if cut[axis] is None),
            any(isinstance(placement.stored[axis], Shard) for axis in scatter),
            any(isinstance(p[axis], Shard) for p in (placement.gradient, placement.stored) for axis in scatter),
        )


def cut_of(placement: ParameterPlacement, axis: int) -> Shard | None:
    """How the pieces of a parameter are cut along a mesh axis where it is used whole, if at all."""
    each = (p[axis] for p in (placement.state, placement.gradient, placement.stored))
    return next((p for p in each if isinstance(p, Shard)), None)


class Traveller(NamedTuple):
    """A parameter as `buckets` sees it; `nbytes` are those of the largest piece on any device, in the placement of use."""

    name: str
    owed: Owed
    dtype: torch.dtype
    trains: bool
    nbytes: int


def largest_piece(shape: Sequence[int], used: Placements, mesh: Mesh) -> int:
    """Elements of a parameter on the device that has most of it: buckets are the same ones on every process."""
    if not any(isinstance(p, Shard) for p in used):
        return math.prod(shape)
    return max(math.prod(local_shape(shape, used, mesh, position)) for position in mesh.positions())


def buckets(travellers: Sequence[Traveller], block: Mapping[str, Hashable]) -> list[list[Traveller]]:
    """Parameters by bucket, in the order in which gradients are reduced, which is that within each bucket too.

    A bucket's parameters have one dtype and are owed the same; frozen ones are owed no sum, and go with the others where all are
    gathered before use.

    Args:
        travellers: all parameters, in order of first use.
        block: `Readings.block`.
    """
    kinds: dict[Hashable, list[Traveller]] = {}
    for each in travellers:
        owing = each.trains or each.owed.stored_cut
        owed = each.owed if owing else each.owed._replace(sum_axes=())
        kinds.setdefault((each.dtype, owed, owing), []).append(each)
    place = {each.name: index for index, each in enumerate(travellers)}
    found: list[list[Traveller]] = []
    for members in kinds.values():
        members = members[::-1]
        found += _by_block(members, block) if members[0].owed.stored_cut else _by_size(members)
    return sorted(found, key=lambda bucket: -min(place[each.name] for each in bucket))


def _by_size(members: Sequence[Traveller]) -> list[list[Traveller]]:
    found: list[list[Traveller]] = [[]]
    room, filled = FIRST_BUCKET_NBYTES, 0
    for each in members:
        if found[-1] and filled + each.nbytes > room:
            found.append([])
            room, filled = BUCKET_NBYTES, 0
        found[-1].append(each)
        filled += each.nbytes
    return found


def _by_block(members: Sequence[Traveller], block: Mapping[str, Hashable]) -> list[list[Traveller]]:
    """Consecutive parameters of one block together; a bucket below the minimum is joined by its neighbour."""
    found: list[list[Traveller]] = []
    filled = 0
    for each in members:
        same = bool(found) and block.get(found[-1][-1].name) == block.get(each.name)
        if found and (filled < MIN_GATHER_NBYTES or (same and filled + each.nbytes <= BUCKET_NBYTES)):
            found[-1].append(each)
            filled += each.nbytes
        else:
            found.append([each])
            filled = each.nbytes
    return found
