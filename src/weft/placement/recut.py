"""Moving index ranges between devices: who sends which slab of its piece to whom.

A *slab* is a box of a local tensor: per dim, one or more (start, length) runs of local indices. A `Moves` is one device's part
of a redistribution: slabs to send, slabs to receive, slabs to copy from its own old piece to its own new one. Its transpose sends
everything back and adds it up.

    same mesh, other cuts           `recut`       each device fetches what it lacks from the device that has it and shares
                                                  its coordinate on the axes where the value is whole
    other device set                `transfer`    (boxing_between.py)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from weft.placement.comms import Group
from weft.placement.layout import Mesh, Placements, Shard, intervals, local_shape

__all__ = ["Moves", "Slab", "overlap", "recut"]

Slab: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]  # per dim: runs of (start, length)


def overlap(
    held: Sequence[Sequence[tuple[int, int]]], wanted: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Slab, Slab] | None:
    """Where the indices that two pieces share stand: the slab of the piece that holds `held`, and of the one that holds `wanted`.

    Args:
        held, wanted: per dim, ascending half-open ranges of the whole tensor's indices.
    Returns:
        None if the pieces share nothing.
    """
    source: list[tuple[tuple[int, int], ...]] = []
    target: list[tuple[tuple[int, int], ...]] = []
    for have, want in zip(held, wanted, strict=True):
        here: list[tuple[int, int]] = []
        there: list[tuple[int, int]] = []
        have_at = 0
        for a, b in have:
            want_at = 0
            for c, d in want:
                low, high = max(a, c), min(b, d)
                if low < high:
                    here.append((have_at + low - a, high - low))
                    there.append((want_at + low - c, high - low))
                want_at += d - c
            have_at += b - a
        if not here:
            return None
        source.append(tuple(here))
        target.append(tuple(there))
    return tuple(source), tuple(target)


def volume(slab: Slab) -> int:
    return math.prod(sum(length for _, length in runs) for runs in slab)


def read(x: Tensor, slab: Slab) -> Tensor:
    """The slab as a tensor: a view if it has one run per dim."""
    for dim, runs in enumerate(slab):
        parts = [x if run == (0, x.shape[dim]) else x.narrow(dim, *run) for run in runs]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return x


def write(out: Tensor, slab: Slab, value: Tensor, add: bool) -> None:
    """Put, or add, a tensor of the slab's shape into the slab of `out`."""
    lengths = [[length for _, length in runs] for runs in slab]
    starts = [[0, *itertools.accumulate(lengths_of)] for lengths_of in lengths]
    for choice in itertools.product(*(range(len(runs)) for runs in slab)):
        place, part = out, value
        for dim, number in enumerate(choice):
            start, length = slab[dim][number]
            place = place.narrow(dim, start, length)
            part = part.narrow(dim, starts[dim][number], length)
        if add:
            place.add_(part)
        else:
            place.copy_(part)


@final
@dataclass(frozen=True)
class Moves:
    """One device's part of a redistribution among the members of a group.

    Attributes:
        shape, new_shape: local shapes before and after.
        sends: (member, slab of the old piece), in the order in which messages to that member go out.
        receives: (member, slab of the new piece), in the order in which messages of that member come in.
        copies: (slab of the old piece, slab of the new piece).
        add: several messages may fall on one element of the new piece and are added up.
        add_back: the same for the transpose and the old piece.
    """

    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    sends: tuple[tuple[int, Slab], ...] = ()
    receives: tuple[tuple[int, Slab], ...] = ()
    copies: tuple[tuple[Slab, Slab], ...] = ()
    add: bool = False
    add_back: bool = True

    def run(self, x: Tensor, group: Group) -> Tensor:
        """The new piece, given the old one."""
        return _move(x, group, self.new_shape, self.sends, self.receives, self.copies, self.add)

    def transpose(self) -> Moves:
        """What takes a gradient of the new piece to the gradient of the old one."""
        back = tuple((b, a) for a, b in self.copies)
        return Moves(self.new_shape, self.shape, self.receives, self.sends, back, self.add_back, self.add)


def _move(
    x: Tensor, group: Group, new_shape: tuple[int, ...], sends: Sequence[tuple[int, Slab]],
    receives: Sequence[tuple[int, Slab]], copies: Sequence[tuple[Slab, Slab]], add: bool,
) -> Tensor:  # fmt: skip
    x = x.detach()
    covered = sum(volume(slab) for _, slab in receives) + sum(volume(slab) for _, slab in copies)
    full = not add and covered == math.prod(new_shape)
    out = x.new_empty(new_shape) if full else x.new_zeros(new_shape)
    landing: list[tuple[int, Tensor]] = []
    late: list[tuple[int, Slab, Tensor]] = []
    for member, slab in receives:
        place = read(out, slab) if not add and all(len(runs) == 1 for runs in slab) else None
        if place is None or not place.is_contiguous():
            place = x.new_empty([sum(length for _, length in runs) for runs in slab])
            late.append((member, slab, place))
        landing.append((member, place))
    pending = group.exchange([(member, read(x, slab)) for member, slab in sends], landing, "recut")
    late += [(group.index, target, read(x, source)) for source, target in copies]
    pending.wait()
    for _, slab, value in sorted(late, key=lambda item: item[0]):  # replicas add in one order: to the same bits
        write(out, slab, value, add)
    return out


def ranges(
    shape: Sequence[int], placements: Placements, mesh: Mesh, position: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """Per dim, the index ranges that the device at `position` holds."""
    return [intervals(size, dim, placements, mesh, position) for dim, size in enumerate(shape)]


def recut(src: Placements, dst: Placements, mesh: Mesh, shape: Sequence[int], rank: int) -> Moves:
    """One device's part of changing cuts on one mesh. Members are numbered in row-major order of the mesh.

    On axes where `src` does not cut, a device deals only with those that share its coordinate: they have, or owe, the same.
    """
    here = mesh.coordinates(rank)
    line = [range(p) if isinstance(src[axis], Shard) else (here[axis],) for axis, p in enumerate(mesh.shape)]
    held, wanted = ranges(shape, src, mesh, here), ranges(shape, dst, mesh, here)
    sends, receives, copies = [], [], []
    for there in itertools.product(*line):
        if there == here:
            both = overlap(held, wanted)
            copies += [both] if both else []
            continue
        member = mesh.ranks.index(mesh.at(there))
        out = overlap(held, ranges(shape, dst, mesh, there))
        sends += [(member, out[0])] if out else []
        back = overlap(ranges(shape, src, mesh, there), wanted)
        receives += [(member, back[1])] if back else []
    whole = any(not isinstance(dst[axis], Shard) and isinstance(src[axis], Shard) for axis in range(mesh.ndim))
    old, new = (local_shape(shape, placements, mesh, here) for placements in (src, dst))
    return Moves(old, new, tuple(sends), tuple(receives), tuple(copies), add=False, add_back=whole)
