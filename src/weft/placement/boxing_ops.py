"""The steps of a boxing as programs on local tensors: each with its exact adjoint.

An op maps the local tensors of all devices of a line to new ones. `run` is this device's part of that map and `adjoint` its part
of the transpose of the map as a whole, which is what autograd on every device separately needs:

    Gather   S -> R     all_gather          reduce_scatter
    Reduce   P -> R     all_reduce          all_reduce              avg: both divided by p
    Scatter  P -> S     reduce_scatter      all_gather              avg: both divided by p
    Slice    R -> S     a view              zero-pad
    Pad      S -> P     zero-pad            a view
    Keep     R -> P     the first device's  the first device's
    Scale    P <-> P(avg)
    Deal     S -> S'    all_to_all          all_to_all
    Recut    several axes: see `recut`
    Extreme  P(max | min) -> R or S: not linear; the gradient goes to the devices that hold the extreme value, in equal parts.

Blocks: a dim of r blocks cut in each block is seen as two dims (r, n/r), the second of which is cut plainly.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from weft.placement.boxing_steps import Step
from weft.placement.comms import Comms, Group
from weft.placement.layout import Partial, Placements, Replicate, Shard, deal, local_shape
from weft.placement.recut import Moves, recut

__all__ = ["Op", "build"]


@final
class Linear(torch.autograd.Function):
    """An op with its adjoint as backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Op) -> Tensor:
        ctx.op = op
        return op.run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.op.adjoint(gradient), None


class Op(abc.ABC):
    """One step on local tensors."""

    @abc.abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """The new local tensor; autograd records nothing of it."""

    @abc.abstractmethod
    def adjoint(self, g: Tensor) -> Tensor:
        """The gradient of the old local tensor, given that of the new one."""

    def __call__(self, x: Tensor) -> Tensor:
        """`run`, recorded by autograd."""
        return Linear.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.run(x)


@final
@dataclass(frozen=True)
class Adjoint(Op):
    """An op the other way round."""

    op: Op

    def run(self, x: Tensor) -> Tensor:
        return self.op.adjoint(x)

    def adjoint(self, g: Tensor) -> Tensor:
        return self.op.run(g)


@dataclass(frozen=True)
class Cut:
    """How a dim of a line's common tensor is cut among the devices of one axis.

    Attributes:
        dim: the dim that is cut.
        blocks: how many blocks it is seen as.
        sizes: every device's length within a block.
    """

    dim: int
    blocks: int
    sizes: tuple[int, ...]

    @property
    def at(self) -> int:
        """The dim that is cut in the blocked view."""
        return self.dim + (self.blocks > 1)

    def view(self, x: Tensor) -> Tensor:
        """A whole or a piece with its blocks as a dim of their own."""
        if self.blocks == 1:
            return x
        return x.unflatten(self.dim, (self.blocks, x.shape[self.dim] // self.blocks))

    def flat(self, x: Tensor) -> Tensor:
        """The inverse of `view`."""
        return x if self.blocks == 1 else x.flatten(self.dim, self.dim + 1)

    def piece(self, x: Tensor, index: int) -> Tensor:
        """Device `index`'s piece of a whole; a view if there is one block."""
        start = sum(self.sizes[:index])
        return self.flat(self.view(x).narrow(self.at, start, self.sizes[index]))


def cut_of(shard: Shard, axis: int, line_shape: Sequence[int], comms: Comms) -> Cut:
    mesh = comms.mesh
    count = line_shape[shard.dim] // (shard.unit * shard.blocks)
    dealt = deal(count, mesh.shape[axis], shard.weights or mesh.weights[axis])
    return Cut(shard.dim, shard.blocks, tuple(n * shard.unit for n in dealt))


@final
@dataclass(frozen=True)
class Gather(Op):
    """S -> R."""

    group: Group
    cut: Cut

    def run(self, x: Tensor) -> Tensor:
        cut = self.cut
        return cut.flat(self.group.all_gather(cut.view(x), cut.at, cut.sizes))

    def adjoint(self, g: Tensor) -> Tensor:
        cut = self.cut
        return cut.flat(self.group.reduce_scatter(cut.view(g), cut.at, cut.sizes))


@final
@dataclass(frozen=True)
class Scatter(Op):
    """P -> S, for any reduction if no gradient is wanted."""

    group: Group
    cut: Cut
    reduce: str

    def run(self, x: Tensor) -> Tensor:
        cut = self.cut
        return cut.flat(self.group.reduce_scatter(cut.view(x), cut.at, cut.sizes, self.reduce))

    def adjoint(self, g: Tensor) -> Tensor:
        cut = self.cut
        whole = cut.flat(self.group.all_gather(cut.view(g), cut.at, cut.sizes))
        return whole.div_(self.group.size) if self.reduce == "avg" else whole


@final
@dataclass(frozen=True)
class Reduce(Op):
    """P -> R, for any reduction if no gradient is wanted."""

    group: Group
    reduce: str

    def run(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(x, self.reduce)

    def adjoint(self, g: Tensor) -> Tensor:
        return self.group.all_reduce(g, self.reduce)


@final
@dataclass(frozen=True)
class Slice(Op):
    """R -> S."""

    cut: Cut
    index: int

    def run(self, x: Tensor) -> Tensor:
        return self.cut.piece(x, self.index)

    def adjoint(self, g: Tensor) -> Tensor:
        return pad(g, self.cut, self.index, 0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.cut.piece(x, self.index)  # autograd's own slice: no Python in backward


@final
@dataclass(frozen=True)
class Pad(Op):
    """S -> P: the piece, and around it what changes nothing in the reduction. `avg`: times p."""

    cut: Cut
    index: int
    reduce: str

    def run(self, x: Tensor) -> Tensor:
        if self.reduce == "avg":
            x = x * len(self.cut.sizes)
        return pad(x, self.cut, self.index, neutral(self.reduce, x.dtype))

    def adjoint(self, g: Tensor) -> Tensor:
        piece = self.cut.piece(g, self.index)
        return piece * len(self.cut.sizes) if self.reduce == "avg" else piece


def pad(piece: Tensor, cut: Cut, index: int, value: float | int | bool) -> Tensor:
    """A whole that holds a piece at its place and `value` elsewhere."""
    piece = cut.view(piece.detach())
    shape = (*piece.shape[: cut.at], sum(cut.sizes), *piece.shape[cut.at + 1 :])
    whole = piece.new_zeros(shape) if value == 0 else piece.new_full(shape, value)
    whole.narrow(cut.at, sum(cut.sizes[:index]), cut.sizes[index]).copy_(piece)
    return cut.flat(whole)


def neutral(reduce: str, dtype: torch.dtype) -> float | int | bool:
    """The value that changes nothing in a reduction."""
    if reduce in ("sum", "avg"):
        return 0
    if dtype == torch.bool:
        return reduce == "min"
    if dtype.is_floating_point:
        return -math.inf if reduce == "max" else math.inf
    return torch.iinfo(dtype).min if reduce == "max" else torch.iinfo(dtype).max


@final
@dataclass(frozen=True)
class Keep(Op):
    """R -> P: the first device keeps the value, the others put zeros in its place."""

    index: int

    def run(self, x: Tensor) -> Tensor:
        return x if self.index == 0 else torch.zeros_like(x)

    adjoint = run

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.index == 0 else Op.__call__(self, x)


@final
@dataclass(frozen=True)
class Scale(Op):
    """P(avg) -> P divides by p, P -> P(avg) multiplies by it."""

    factor: float

    def run(self, x: Tensor) -> Tensor:
        return x * self.factor

    adjoint = run


@final
@dataclass(frozen=True)
class Deal(Op):
    """S(i) -> S(j)."""

    group: Group
    old: Cut
    new: Cut

    def run(self, x: Tensor) -> Tensor:
        return _deal(x, self.group, self.old, self.new)

    def adjoint(self, g: Tensor) -> Tensor:
        return _deal(g, self.group, self.new, self.old)


def _deal(x: Tensor, group: Group, old: Cut, new: Cut) -> Tensor:
    """Cut the piece as the new cut says, give every device its part, and put what came together along the old dim."""
    sizes = [n * new.blocks for n in new.sizes]
    if new.blocks == 1:
        parts = list(x.split(sizes, new.dim))
    else:
        parts = [new.flat(part) for part in new.view(x).split(new.sizes, new.at)]
    shape = list(x.shape)
    shape[new.dim] = sizes[group.index]
    shapes = [[*shape[: old.dim], n * old.blocks, *shape[old.dim + 1 :]] for n in old.sizes]
    got = group.all_to_all(parts, shapes)
    return old.flat(torch.cat([old.view(part) for part in got], old.at))


@final
class Recut(Op):
    """Several axes at once; see `recut.recut`."""

    def __init__(self, moves: Moves, group: Group):
        self.moves, self.back, self.group = moves, moves.transpose(), group

    def run(self, x: Tensor) -> Tensor:
        return self.moves.run(x, self.group)

    def adjoint(self, g: Tensor) -> Tensor:
        return self.back.run(g, self.group)


@final
class Holders(torch.autograd.Function):
    """Backward of a maximum or minimum over devices: each holder of the extreme value gets its share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Extreme) -> Tensor:
        out = op.run(x)
        ctx.op = op
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, out = ctx.saved_tensors
        return ctx.op.share(x, out, gradient), None


@final
@dataclass(frozen=True)
class Extreme(Op):
    """P(max | min) -> R, or -> S if there is a cut. Its gradient needs the values: `share` instead of `adjoint`."""

    group: Group
    reduce: str
    cut: Cut | None = None

    def run(self, x: Tensor) -> Tensor:
        if self.cut is None:
            return self.group.all_reduce(x, self.reduce)
        return Scatter(self.group, self.cut, self.reduce).run(x)

    def adjoint(self, g: Tensor) -> Tensor:
        raise ValueError(
            f"Partial({self.reduce}) has no dual, for it is not linear; differentiate the boxing itself instead"
        )

    def __call__(self, x: Tensor) -> Tensor:
        return Holders.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.run(x)

    def share(self, x: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of x: that of the result where x equals it, divided by the number of devices for which that is so."""
        if self.cut is None:
            mine = (x == out).to(gradient.dtype)
            total, holders = self.group.all_reduce(torch.stack((gradient, mine)))
            return mine * (total / holders)
        gather = Gather(self.group, self.cut)
        mine = (x == gather.run(out)).to(gradient.dtype)
        return mine * gather.run(gradient / gather.adjoint(mine))


def build(step: Step, shape: Sequence[int], comms: Comms) -> Op:
    """The program of a step on this device, for a value of the given whole shape."""
    if step.kind == "recut":
        return Recut(recut(step.before, step.after, comms.mesh, shape, comms.rank), comms.world)
    axis, a, b = step.axis, step.source, step.target
    group, index = comms.group(axis), comms.coordinates[axis]
    line: Placements = (*step.before[:axis], Replicate(), *step.before[axis + 1 :])
    line_shape = local_shape(shape, line, comms.mesh, comms.coordinates)
    reduce = next((p.reduce for p in (a, b) if isinstance(p, Partial)), "sum")
    cuts = [cut_of(p, axis, line_shape, comms) for p in (a, b) if isinstance(p, Shard)]
    if step.kind in ("all_reduce", "reduce_scatter") and reduce in ("max", "min"):
        return Extreme(group, reduce, cuts[0] if cuts else None)
    match step.kind:
        case "all_gather":
            return Gather(group, cuts[0])
        case "reduce_scatter":
            return Scatter(group, cuts[0], reduce)
        case "all_reduce":
            return Reduce(group, reduce)
        case "slice":
            return Slice(cuts[0], index)
        case "pad":
            return Pad(cuts[0], index, reduce)
        case "keep":
            return Keep(index)
        case "scale":
            return Scale(float(group.size) if a == Partial() else 1 / group.size)
        case "all_to_all":
            return Deal(group, cuts[0], cuts[1])
    raise AssertionError(f"no program for {step}")
