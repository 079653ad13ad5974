"""Boxing between device sets: a value leaves one mesh and arrives on another, which may share devices with the first or none.

Method     point-to-point messages: each consumer fetches every slab of its piece from one device that holds it: from itself
           if it does, else replicas take turns.                                            `routes`
           A sum that is owed: if the value arrives once, the consumer fetches from all that owe it and adds up; if it arrives
           several times, the producers first reduce-scatter it among themselves.           `gathered_first`
           A sum that is to be owed: the first device of the axis gets the value, the others fill with zeros.
Volumes    total bytes on disjoint sets, p1 producers, p2 consumers; what a device already has is not sent:  `transfer_elements`
               S -> S  |T|       S -> R  p2 |T|              S -> P  |T|
               R -> S  |T|       R -> R  p2 |T|              R -> P  |T|
               P -> S  p1 |T|    P -> R  (p1 + p2 - 1) |T|   P -> P  p1 |T|
Source     Yuan et al., OneFlow, arXiv:2110.15032, table 2.

All devices of both meshes call `box_between` or `Transfer`. Backward sends the gradients back along the same messages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from weft.placement.boxing_ops import neutral
from weft.placement.boxing_steps import normal
from weft.placement.comms import Group
from weft.placement.layout import Mesh, Partial, Placement, Placements, Replicate, Shard, local_shape
from weft.placement.recut import Moves, Slab, overlap, ranges, volume

__all__ = ["Transfer", "box_between", "transfer_elements"]


class Message(NamedTuple):
    """A slab that one rank sends another (or itself), for one stage of a transfer."""

    sender: int
    receiver: int
    source: Slab
    target: Slab


@dataclass(frozen=True)
class Stage:
    """Messages from pieces under `before` on one mesh to pieces under `after` on another, added up where `add`."""

    before: tuple[Placements, Mesh]
    after: tuple[Placements, Mesh]
    messages: tuple[Message, ...]
    add: bool

    @property
    def elements(self) -> int:
        """Elements on the wire."""
        return sum(volume(message.source) for message in self.messages if message.sender != message.receiver)


@lru_cache(maxsize=1024)
def stages(src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, shape: tuple[int, ...]) -> tuple[Stage, ...]:
    """The stages of a transfer.

    Raises:
        ValueError: a placement does not fit, or `src` owes a maximum or minimum, which only its own mesh can work out.
    """
    src, dst = normal(src, mesh_a), normal(dst, mesh_b)
    for placements, mesh in ((src, mesh_a), (dst, mesh_b)):
        local_shape(shape, placements, mesh, (0,) * mesh.ndim)
    if any(isinstance(p, Partial) and p.reduce in ("max", "min") for p in src):
        raise ValueError(f"{' '.join(map(str, src))} cannot leave its mesh: box it to Replicate or Shard there first")
    middle = gathered_first(src, mesh_a, dst, mesh_b, shape)
    if middle is None:
        return (_stage(src, mesh_a, dst, mesh_b, shape, spread=True),)
    return (
        _stage(src, mesh_a, middle, mesh_a, shape, spread=False),
        _stage(middle, mesh_a, dst, mesh_b, shape, spread=False),
    )


def gathered_first(
    src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, shape: tuple[int, ...]
) -> Placements | None:
    """Where the producers should reduce-scatter an owed sum before it leaves; None if adding up on arrival moves no more."""
    owed = [axis for axis, p in enumerate(src) if isinstance(p, Partial)]
    arrivals = math.prod(p for p, placement in zip(mesh_b.shape, dst, strict=True) if isinstance(placement, Replicate))
    if not owed or arrivals == 1:
        return None
    for dim in sorted(range(len(shape)), key=lambda dim: -shape[dim]):
        cuts = [axis for axis, p in enumerate(src) if isinstance(p, Shard) and p.dim == dim]
        if all(axis < owed[0] for axis in cuts):  # nested cuts: the new ones are the innermost
            like = src[cuts[0]] if cuts else Shard(dim)
            assert isinstance(like, Shard)
            new = Shard(dim, None, like.unit, like.blocks)
            return tuple(new if axis in owed else p for axis, p in enumerate(src))
    return None


def _stage(src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, shape: tuple[int, ...], spread: bool) -> Stage:
    messages = []
    for sender, receiver, here, there in routes(src, mesh_a, dst, mesh_b, spread):
        both = overlap(ranges(shape, src, mesh_a, here), ranges(shape, dst, mesh_b, there))
        if both is not None and volume(both[0]):
            messages.append(Message(sender, receiver, *both))
    return Stage((src, mesh_a), (dst, mesh_b), tuple(messages), any(isinstance(p, Partial) for p in src))


def routes(
    src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, spread: bool
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """(sender, receiver, position of the sender, position of the receiver) of every message that a transfer may need.

    With `spread` replicas of a shard take turns; without, the first one serves all (for the others have not reduced).
    """
    within = mesh_a == mesh_b and not spread  # a reduce-scatter: other axes' coordinates stay
    for number, there in enumerate(mesh_b.positions()):
        receiver = mesh_b.at(there)
        takes = all(i == 0 or not owes for i, owes in zip(there, map(_leaves_out, dst), strict=True))
        if within:
            takes = all(i == 0 or not isinstance(p, Replicate) for i, p in zip(there, src, strict=True))
        if not takes:
            continue
        own = mesh_a.coordinates(receiver) if receiver in mesh_a.ranks else None
        for kept in itertools.product(*(_choices(p, i, mesh_a) for i, p in enumerate(src))):
            here = list(kept)
            turn = number
            for axis, p in enumerate(src):
                if isinstance(p, Replicate) and spread:
                    turn, here[axis] = divmod(turn, mesh_a.shape[axis])
            if (
                spread
                and own is not None
                and all(isinstance(p, Replicate) or here[a] == own[a] for a, p in enumerate(src))
            ):
                here = list(own)
            if within and any(isinstance(p, Shard) and here[a] != there[a] for a, p in enumerate(src)):
                continue
            yield mesh_a.at(here), receiver, tuple(here), there


def _leaves_out(placement: Placement) -> bool:
    """Whether only the first device of the axis takes the value."""
    return isinstance(placement, Partial)


def _choices(placement: Placement, axis: int, mesh: Mesh) -> Sequence[int]:
    return (0,) if isinstance(placement, Replicate) else range(mesh.shape[axis])


def transfer_elements(src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, shape: Sequence[int]) -> int:
    """Elements that a transfer puts on the wire, over all links."""
    return sum(stage.elements for stage in stages(src, mesh_a, dst, mesh_b, tuple(shape)))


@final
class Transfer:
    """A prepared move of a value from one mesh to another.

    Args:
        src, mesh_a: where it is.
        dst, mesh_b: where it goes.
        shape: of the whole value.
        group: a group of, at least, all devices of both meshes, all of which must use the same transfers in the same order.
    """

    def __init__(
        self, src: Placements, mesh_a: Mesh, dst: Placements, mesh_b: Mesh, shape: Sequence[int], group: Group
    ):
        missing = sorted({*mesh_a.ranks, *mesh_b.ranks} - set(group.ranks))
        if missing:
            raise ValueError(f"the group of ranks {group.ranks} lacks ranks {missing} of the two meshes")
        self.group, self.rank = group, group.ranks[group.index]
        src, dst = normal(src, mesh_a), normal(dst, mesh_b)
        self.gives, self.takes = self.rank in mesh_a.ranks, self.rank in mesh_b.ranks
        path = stages(src, mesh_a, dst, mesh_b, tuple(shape))
        self.moves = tuple(self._own(stage, tuple(shape), first=not i) for i, stage in enumerate(path))
        self.backs = tuple(moves.transpose() for moves in reversed(self.moves))
        self.elements = sum(stage.elements for stage in path)
        self.before = math.prod((1 / n for n in _means(src, mesh_a)), start=1.0)
        self.after = math.prod(_means(dst, mesh_b), start=1)
        self.fill = self._fill(dst, mesh_b) if self.takes else None

    def _own(self, stage: Stage, shape: tuple[int, ...], first: bool) -> Moves:
        """This device's part of a stage; a device that holds nothing there has a piece of shape (0,)."""
        member, rank = self.group.ranks.index, self.rank
        pieces = []
        for placements, mesh in (stage.before, stage.after):
            at = mesh.coordinates(rank) if rank in mesh.ranks else None
            pieces.append((0,) if at is None else local_shape(shape, placements, mesh, at))
        others = [message for message in stage.messages if message.sender != message.receiver]
        return Moves(
            *pieces,
            sends=tuple((member(m.receiver), m.source) for m in others if m.sender == rank),
            receives=tuple((member(m.sender), m.target) for m in others if m.receiver == rank),
            copies=tuple((m.source, m.target) for m in stage.messages if m.sender == m.receiver == rank),
            add=stage.add,
            add_back=True,
        )

    def _fill(self, dst: Placements, mesh: Mesh) -> str | None:
        """The reduction whose neutral value stands here in the value's place; None if the value is here."""
        here = mesh.coordinates(self.rank)
        out = [p.reduce for i, p in zip(here, dst, strict=True) if isinstance(p, Partial) and i > 0]
        return out[0] if out else None

    def run(
        self, x: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor | None:
        """This device's new piece, None if it gets none. `x` is its old piece, None (with a dtype) if it has none."""
        y = _placeholder(dtype, device) if x is None else x.detach()
        if self.before != 1:
            y = y * self.before
        for moves in self.moves:
            y = moves.run(y, self.group)
        if not self.takes:
            return None
        if self.fill is not None:
            return y.fill_(neutral(self.fill, y.dtype))
        return y.mul_(self.after) if self.after != 1 else y

    def adjoint(
        self, g: Tensor | None, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor | None:
        """The gradient of the old piece, given that of the new one; None where there is none."""
        y = _placeholder(dtype, device) if g is None else g.detach()
        if self.takes and self.after != 1:
            y = y * self.after
        for moves in self.backs:
            y = moves.run(y, self.group)
        if not self.gives:
            return None
        return y * self.before if self.before != 1 else y

    def __call__(
        self,
        x: Tensor | None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        requires_grad: bool = True,
    ) -> Tensor:
        """`run`, recorded by autograd: the new piece, or, where there is none, a zero to call `backward` on.

        Args:
            x: the old piece; None on devices that have none. These must say the dtype.
            requires_grad: there, whether the others' pieces require a gradient.
        """
        if x is None:
            x = _placeholder(dtype, device).requires_grad_(requires_grad)
        return Between.apply(x, self)


def _placeholder(dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    if dtype is None:
        raise ValueError("a device that has no piece of the value must say what dtype it will receive: pass dtype=...")
    return torch.empty(0, dtype=dtype, device=device)


def _means(placements: Placements, mesh: Mesh) -> list[int]:
    return [p for p, placement in zip(mesh.shape, placements, strict=True) if placement == Partial("avg")]


@final
class Between(torch.autograd.Function):
    """A transfer with its adjoint as backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        ctx.like = (x.dtype, x.device)
        y = transfer.run(x)
        return x.new_zeros(()) if y is None else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        g = transfer.adjoint(gradient if transfer.takes else None, *ctx.like)
        return gradient.new_zeros(0) if g is None else g, None


def box_between(
    x: Tensor | None,
    src: Placements,
    mesh_a: Mesh,
    dst: Placements,
    mesh_b: Mesh,
    shape: Sequence[int],
    group: Group,
    **like: Any,
) -> Tensor:
    """Move a value from one mesh to another, once and differentiably; see `Transfer` and `Transfer.__call__`."""
    return Transfer(src, mesh_a, dst, mesh_b, shape, group)(x, **like)
