"""Many small boxings as few: gathers, reductions and reduce-scatters along one axis share one message per pair of devices.

    box_together([x, y, ...], [boxing_x, boxing_y, ...])

A step of a boxing that gathers, reduces or reduce-scatters joins the others of its kind, axis, reduction and dtype; so do the
adjoints in backward. Boxings of several steps, and other kinds, run by themselves. The bytes on the wire are the same; what is
saved is latency, 0.3 ms per collective on gloo, against one copy of the tensors into a flat one and one out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from weft.placement.boxing import Boxing
from weft.placement.boxing_ops import Gather, Op, Reduce, Scatter

__all__ = ["box_together"]


def box_together(tensors: Sequence[Tensor], boxings: Sequence[Boxing]) -> list[Tensor]:
    """The local pieces after their boxings, differentiable. All devices of the mesh give the same boxings in the same order."""
    result = list(tensors)
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for number, (x, boxing) in enumerate(zip(tensors, boxings, strict=True)):
        key = _bucket(boxing, x)
        if key is None:
            result[number] = boxing(x)
        else:
            buckets.setdefault(key, []).append(number)
    for numbers in buckets.values():
        if len(numbers) == 1:
            result[numbers[0]] = boxings[numbers[0]](tensors[numbers[0]])
            continue
        bucket = Bucket([boxings[number].ops[0] for number in numbers])
        for number, y in zip(numbers, Together.apply(bucket, *(tensors[number] for number in numbers)), strict=True):
            result[number] = y
    return result


def _bucket(boxing: Boxing, x: Tensor) -> tuple[Any, ...] | None:
    """What the boxings of one bucket have in common; None if it cannot be in one."""
    if len(boxing.ops) != 1:
        return None
    match boxing.ops[0]:
        case Gather(group):
            return "gather", id(group), x.dtype, x.requires_grad
        case Reduce(group, reduce) | Scatter(group, _, reduce):
            return type(boxing.ops[0]).__name__, id(group), reduce, x.dtype, x.requires_grad
    return None


@final
class Together(torch.autograd.Function):
    """A bucket with its adjoint as backward."""

    @staticmethod
    def forward(ctx: Any, bucket: Bucket, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.bucket = bucket
        return tuple(bucket.run(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.bucket.adjoint(gradients))


@final
class Bucket:
    """Steps of one kind on one group, run as one collective."""

    def __init__(self, ops: Sequence[Op]):
        self.ops = ops
        self.group = ops[0].group  # type: ignore[attr-defined]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        first = self.ops[0]
        if isinstance(first, Reduce):
            return self._reduce(tensors, first.reduce)
        return self._gather(tensors) if isinstance(first, Gather) else self._scatter(tensors, first.reduce)  # type: ignore[attr-defined]

    def adjoint(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        first = self.ops[0]
        if isinstance(first, Reduce):
            return self._reduce(gradients, first.reduce)
        if isinstance(first, Gather):
            return self._scatter(gradients, "sum")
        wholes = self._gather(gradients)
        return [whole / self.group.size for whole in wholes] if first.reduce == "avg" else wholes  # type: ignore[attr-defined]

    def _reduce(self, tensors: Sequence[Tensor], reduce: str) -> list[Tensor]:
        flat = torch.cat([x.reshape(-1) for x in tensors])
        total = self.group.all_reduce(flat, reduce)
        return [part.view(x.shape) for part, x in zip(total.split([x.numel() for x in tensors]), tensors, strict=True)]

    def _gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Pieces to wholes: one flat all-gather, then every whole is put together from the members' runs."""
        cuts = [op.cut for op in self.ops]  # type: ignore[attr-defined]
        views = [cut.view(x) for cut, x in zip(cuts, tensors, strict=True)]
        shapes = [
            [
                (*v.shape[: cut.at], cut.sizes[member], *v.shape[cut.at + 1 :])
                for cut, v in zip(cuts, views, strict=True)
            ]
            for member in range(self.group.size)
        ]
        counts = [[torch.Size(shape).numel() for shape in of_member] for of_member in shapes]
        flat = self.group.all_gather(
            torch.cat([v.reshape(-1) for v in views]), 0, [sum(of_member) for of_member in counts]
        )
        runs = iter(flat.split([n for of_member in counts for n in of_member]))
        pieces = [[next(runs).view(shape) for shape in of_member] for of_member in shapes]
        return [
            cut.flat(torch.cat(of_tensor, cut.at))
            for cut, of_tensor in zip(cuts, zip(*pieces, strict=True), strict=True)
        ]

    def _scatter(self, tensors: Sequence[Tensor], reduce: str) -> list[Tensor]:
        """Wholes that are owed to pieces: every member gets its runs of all tensors in one flat piece."""
        cuts = [op.cut for op in self.ops]  # type: ignore[attr-defined]
        split = [cut.view(x).split(cut.sizes, cut.at) for cut, x in zip(cuts, tensors, strict=True)]
        own = [parts[self.group.index].shape for parts in split]
        sources = [torch.cat([parts[member].reshape(-1) for parts in split]) for member in range(self.group.size)]
        out = sources[self.group.index]
        self.group.reduce_scatter_async(out, sources, None, reduce).wait()
        runs = out.split([shape.numel() for shape in own])
        return [cut.flat(run.view(shape)) for cut, run, shape in zip(cuts, runs, own, strict=True)]
