"""Where a tensor lives: one placement per mesh axis, and which indices of the tensor each device then holds.

A *placement* along one mesh axis of p devices says how the p local tensors make the whole (OneFlow's SBP, arXiv:2110.15032):
    Shard(dim)      the pieces, put together along `dim`
    Replicate()     each is the whole
    Partial(reduce) their elementwise sum (max, min, mean) is the whole
Along several mesh axes a value has one placement per axis; a dim sharded on two axes is cut by the outer axis first.

A cut of a dim of n elements is described by (blocks r, unit u, weights w): the dim is seen as (r, m, u) with n = r m u, the m
units are dealt to the p parts in proportion to w, in order, and a part holds its units out of every block. r = u = 1 is the
plain contiguous cut; u = 8 keeps attention heads of 8 together; r = 3 cuts each of the fused q, k, v on its own.

    units per part              `deal`
    indices a device holds      `intervals`
    local shape, local piece    `local_shape`, `take`
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Mesh", "Partial", "Placement", "Placements", "Replicate", "Shard",
    "deal", "dual", "intervals", "local_shape", "parse", "take",
]  # fmt: skip

Reduce = Literal["sum", "max", "min", "avg"]


@dataclass(frozen=True)
class Shard:
    """Split along `dim`; `weights` (positive, one per device of the axis) default to the mesh axis's weights.

    `unit` and `blocks` are how the dim factors (see the module's header); the planner fills them in, users rarely do.
    """

    dim: int
    weights: tuple[float, ...] | None = None
    unit: int = 1
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"Shard: dim must be >= 0, got {self.dim}; count dimensions from the front")
        if self.unit < 1 or self.blocks < 1:
            raise ValueError(f"Shard: unit and blocks must be >= 1, got unit={self.unit}, blocks={self.blocks}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            if (
                not self.weights
                or min(self.weights) < 0
                or not math.isfinite(sum(self.weights))
                or sum(self.weights) <= 0
            ):
                raise ValueError(f"Shard: weights must be >= 0, finite and sum to more than 0, got {self.weights}")

    def __str__(self) -> str:
        more = [f"{'/'.join(f'{w:g}' for w in self.weights)}"] if self.weights else []
        more += [f"u{self.unit}"] if self.unit > 1 else []
        more += [f"x{self.blocks}"] if self.blocks > 1 else []
        return f"S({','.join([str(self.dim), *more])})"


@dataclass(frozen=True)
class Replicate:
    """Every device of the axis holds the whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Partial:
    """The value is the elementwise `reduce` of what the devices of the axis hold."""

    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        if self.reduce not in ("sum", "max", "min", "avg"):
            raise ValueError(f"Partial: reduce must be sum, max, min or avg, got {self.reduce!r}")

    def __str__(self) -> str:
        return "P" if self.reduce == "sum" else f"P({self.reduce})"


Placement: TypeAlias = Shard | Replicate | Partial
Placements: TypeAlias = tuple[Placement, ...]  # one per mesh axis, outermost first


def parse(text: str) -> Placement:
    """The placement that prints as `text`: `R`, `P`, `P(max)`, `S(0)`, `S(1,3/1,u8,x3)`."""
    head, _, body = text.strip().rstrip(")").partition("(")
    if head == "R" and not body:
        return Replicate()
    if head == "P":
        return Partial(body or "sum")  # type: ignore[arg-type]
    if head == "S" and body:
        dim, *more = body.split(",")
        options: dict[str, object] = {}
        for item in more:
            if item.startswith("u"):
                options["unit"] = int(item[1:])
            elif item.startswith("x"):
                options["blocks"] = int(item[1:])
            else:
                options["weights"] = tuple(float(w) for w in item.split("/"))
        return Shard(int(dim), **options)  # type: ignore[arg-type]
    raise ValueError(f"not a placement: {text!r}; expected R, P, P(max), S(0) or S(1,3/1,u8,x3)")


def dual(placement: Placement) -> Placement:
    """Placement of the gradient of a value: a shard's is a shard, a replica's is partial, a partial sum's is replicated.

    With these, autograd run on every device separately, seeded so that the seeds of a replicated loss sum to 1,
    computes the gradient of the whole program, and the adjoint of boxing X to Y is boxing dual(Y) to dual(X).
    """
    if isinstance(placement, Shard):
        return placement
    return Partial() if isinstance(placement, Replicate) else Replicate()


@dataclass(frozen=True)
class Mesh:
    """Processes arranged in a grid.

    Attributes:
        shape: devices along each axis, outermost first; ranks are numbered row by row unless `ranks` says otherwise.
        names: a name per axis ("x0", "x1", ... by default).
        weights: per axis, None (equal) or the share of each device: what `Shard` uses unless it has weights of its own.
        ranks: global ranks (device numbers of the cluster) in row-major order of the grid; default 0, 1, 2, ...
    """

    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    weights: tuple[tuple[float, ...] | None, ...] = ()
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        put = lambda field, value: object.__setattr__(self, field, value)
        put("shape", tuple(int(p) for p in self.shape))
        if any(p < 1 for p in self.shape):
            raise ValueError(f"Mesh: every axis needs at least one device, got shape {self.shape}")
        put("names", tuple(self.names) or tuple(f"x{axis}" for axis in range(len(self.shape))))
        put("weights", tuple(None if w is None else tuple(w) for w in self.weights) or (None,) * len(self.shape))
        put("ranks", tuple(self.ranks) or tuple(range(self.size)))
        if len(self.names) != len(self.shape) or len(self.weights) != len(self.shape):
            raise ValueError(f"Mesh: shape {self.shape} needs one name and one weights entry per axis")
        for axis, (p, weights) in enumerate(zip(self.shape, self.weights, strict=True)):
            if weights is not None and (len(weights) != p or min(weights) < 0 or sum(weights) <= 0):
                raise ValueError(
                    f"Mesh: axis {self.names[axis]!r} has {p} devices and weights {weights}; give one weight >= 0 per "
                    "device, not all 0"
                )
        if len(self.ranks) != self.size or len(set(self.ranks)) != self.size:
            raise ValueError(f"Mesh: shape {self.shape} needs {self.size} different ranks, got {self.ranks}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Position of a global rank in the grid."""
        index = self.ranks.index(rank)
        position = []
        for p in reversed(self.shape):
            index, here = divmod(index, p)
            position.append(here)
        return tuple(reversed(position))

    def group(self, axis: int, rank: int) -> tuple[int, ...]:
        """Global ranks that differ from `rank` only along `axis`, in order of that coordinate."""
        here = self.coordinates(rank)
        return tuple(self.at((*here[:axis], i, *here[axis + 1 :])) for i in range(self.shape[axis]))

    def lines(self, axes: Sequence[int]) -> list[tuple[int, ...]]:
        """The groups of global ranks that differ along some axes alone; groups, and the ranks of each, row by row."""
        found: dict[tuple[int, ...], list[int]] = {}
        for position in self.positions():
            beside = tuple(here for axis, here in enumerate(position) if axis not in axes)
            found.setdefault(beside, []).append(self.at(position))
        return [tuple(ranks) for ranks in found.values()]

    def at(self, coordinates: Sequence[int]) -> int:
        """Global rank at a position of the grid."""
        index = 0
        for p, here in zip(self.shape, coordinates, strict=True):
            index = index * p + here
        return self.ranks[index]

    def positions(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(p) for p in self.shape)))


def deal(count: int, parts: int, weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """Deal `count` units to `parts` parts, in proportion to `weights`, exactly and in order.

    Without weights the first `count % parts` parts get one more than the others. With weights every part gets its share
    rounded down and the remainder goes to the largest fractions (ties: the earlier part).
    """
    if weights is None:
        return tuple(count // parts + (part < count % parts) for part in range(parts))
    if len(weights) != parts:
        raise ValueError(f"weights {tuple(weights)} are for {len(weights)} devices, but the mesh axis has {parts}")
    total = sum(weights)
    shares = [count * weight / total for weight in weights]
    dealt = [int(share + 1e-9) for share in shares]
    by_fraction = sorted(range(parts), key=lambda part: (dealt[part] - shares[part], part))
    for part in by_fraction[: count - sum(dealt)]:
        dealt[part] += 1
    return tuple(dealt)


def intervals(
    size: int, dim: int, placements: Placements, mesh: Mesh, position: Sequence[int]
) -> list[tuple[int, int]]:
    """Half-open index ranges of a dim of `size` elements that the device at `position` holds, ascending and merged.

    Nested cuts (one dim sharded over several axes) must agree in unit and blocks.

    Raises:
        ValueError: `blocks * unit` does not divide the size, or nested cuts disagree in them.
    """
    cuts = [(axis, p) for axis, p in enumerate(placements) if isinstance(p, Shard) and p.dim == dim]
    if not cuts:
        return [(0, size)]
    blocks, unit = cuts[0][1].blocks, cuts[0][1].unit
    if any((cut.blocks, cut.unit) != (blocks, unit) for _, cut in cuts):
        raise ValueError(f"a dim cut on several mesh axes needs one unit and blocks, got {[str(c) for _, c in cuts]}")
    if size % (blocks * unit):
        raise ValueError(
            f"{cuts[0][1]} does not fit a dim of {size}: {blocks} blocks of units of {unit} must divide it"
        )
    low, count = 0, size // (blocks * unit)
    for axis, cut in cuts:
        dealt = deal(count, mesh.shape[axis], cut.weights or mesh.weights[axis])
        low, count = low + sum(dealt[: position[axis]]), dealt[position[axis]]
    stride = size // blocks
    held = [(b * stride + low * unit, b * stride + (low + count) * unit) for b in range(blocks)]
    merged: list[tuple[int, int]] = []
    for start, stop in held:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged or [(held[0][0], held[0][0])]


def local_shape(shape: Sequence[int], placements: Placements, mesh: Mesh, position: Sequence[int]) -> tuple[int, ...]:
    """Shape of the piece that the device at `position` holds of a tensor of the given shape."""
    sharded = {p.dim for p in placements if isinstance(p, Shard)}
    if any(dim >= len(shape) for dim in sharded):
        raise ValueError(f"placements {[str(p) for p in placements]} shard a dim that shape {tuple(shape)} lacks")
    return tuple(
        sum(stop - start for start, stop in intervals(n, dim, placements, mesh, position)) if dim in sharded else n
        for dim, n in enumerate(shape)
    )


def take(tensor: Tensor, placements: Placements, mesh: Mesh, position: Sequence[int]) -> Tensor:
    """The piece of a whole tensor that the device at `position` holds; a view where the piece is contiguous in each dim.

    A Partial(sum) axis gives the value to the axis's first device and zeros to the others; the other reductions and
    Replicate give it to all.
    """
    piece = tensor
    for dim in sorted({p.dim for p in placements if isinstance(p, Shard)}):
        held = intervals(tensor.shape[dim], dim, placements, mesh, position)
        parts = [piece.narrow(dim, start, stop - start) for start, stop in held]
        piece = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    if any(p == Partial() and position[axis] > 0 for axis, p in enumerate(placements)):
        piece = torch.zeros_like(piece)
    return piece
