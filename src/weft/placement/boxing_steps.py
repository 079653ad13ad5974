"""Which steps take a value from one placement to another, and how many bytes each puts on the wire.

Problem    a value of a given shape on an n-D mesh has placements `src`, one per axis; it is wanted with placements `dst`.
Method     a shortest path over placements in between: each axis may pass through src, dst or Replicate.    `steps`
           A step changes one axis by a collective along it, or several axes at once by a *recut* (every device fetches the
           indices that it lacks from a device that has them), which is needed where the same dim is cut on several axes.
           A dim cut on several axes is gathered from the outer axis in, where the cut is even: the slow links then carry the
           small pieces; its adjoint reduce-scatters from the inner axis out.                `_outer_first`
           Where several axes owe a sum, the inner ones may also pass through a shard: reduce-scatter inside, reduce the pieces
           across, gather inside, which is the all-reduce of the whole mesh.
           Shortest is fewest bytes, then fewest steps; of about equal bytes more go over inner axes, whose links are the faster.
Volumes    total bytes over all links, p devices along the axis, |T| what one line of the axis holds together:  `Step.elements`
               S -> R    all_gather       (p - 1) |T|           S -> P    pad, nothing
               P -> S    reduce_scatter   (p - 1) |T|           R -> S    slice, nothing
               P -> R    all_reduce       2 (p - 1) |T|         R -> P    keep (the first device does), nothing
               S(i) -> S(j)  all_to_all   (p - 1)/p |T| if even; recut: what the devices lack
           P(avg) costs what P does; R -> P(avg | max | min) is nothing at all, for equal values are their own mean and maximum.
Source     Yuan et al., OneFlow, arXiv:2110.15032, table 2. Weights, units, blocks, nested cuts and recuts are ours.

The placements of a tuple nest: the reduction of an outer axis is over results of the inner axes' reductions, and an outer
cut is made before an inner one. So an axis can be changed alone only if no inner axis cuts the same dim unevenly or owes
another reduction.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from weft.placement.layout import Mesh, Partial, Placement, Placements, Replicate, Shard, intervals, local_shape

__all__ = ["Step", "lacking", "normal", "steps"]

STEP_ELEMENTS = 1 << 14  # what a step's latency is worth in elements when paths are compared
OUTER = 0.1  # by how much an element counts more, per axis further out, for its links are rather slower
LINEAR = ("sum", "avg")


@dataclass(frozen=True)
class Step:
    """One step of a boxing.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce, all_to_all, recut; local ones: slice, pad, keep, scale, none.
        axis: the mesh axis along which it works; -1 for a recut, which may change several. A step along the outer axis of a
            nested cut also respells the inner cuts.
        before, after: placements of all axes.
        elements: elements put on the wire, over all links of the mesh.
    """

    kind: str
    axis: int
    before: Placements
    after: Placements
    elements: int

    @property
    def source(self) -> Placement:
        return self.before[self.axis]

    @property
    def target(self) -> Placement:
        return self.after[self.axis]

    def __str__(self) -> str:
        where = f" on axis {self.axis}" if self.axis >= 0 else ""
        before, after = (" ".join(map(str, placements)) for placements in (self.before, self.after))
        return f"{self.kind}{where}: {before} -> {after}, {self.elements} elements"


def normal(placements: Placements, mesh: Mesh) -> Placements:
    """Placements with axes of one device, where all placements mean the same, written as Replicate.

    Raises:
        ValueError: not one placement per mesh axis.
    """
    if len(placements) != mesh.ndim:
        raise ValueError(f"{[str(p) for p in placements]}: a mesh of shape {mesh.shape} needs one placement per axis")
    if 1 in mesh.shape:
        return tuple(Replicate() if p == 1 else placement for p, placement in zip(mesh.shape, placements, strict=True))
    return tuple(placements)


@lru_cache(maxsize=1 << 16)
def steps(src: Placements, dst: Placements, mesh: Mesh, shape: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps that take a value of the given whole shape from `src` to `dst`; empty if nothing is to be done.

    Raises:
        ValueError: a placement does not fit the shape or the mesh.
    """
    src, dst = normal(src, mesh), normal(dst, mesh)
    for placements in (src, dst):
        _check(placements, mesh, shape)
    changed = [axis for axis in range(mesh.ndim) if src[axis] != dst[axis]]
    if not changed or _same_cuts(src, dst, mesh, shape):
        return ()
    if len(changed) == 1:
        direct = _along_axis(src, dst, changed[0], mesh, shape)
        if direct is not None:
            return () if direct.kind == "none" else (direct,)
    return tuple(step for step in _shortest(src, dst, mesh, shape) if step.kind != "none")


def lacking(src: Placements, dst: Placements, mesh: Mesh, shape: tuple[int, ...]) -> np.ndarray:
    """Elements of its `dst` piece that each device lacks in its `src` piece, in the mesh's shape. Partial counts as whole."""
    need = have = np.array(math.prod(shape), dtype=np.int64)
    whole = tuple(Replicate() for _ in src)
    for dim in {p.dim for p in (*src, *dst) if isinstance(p, Shard)}:
        before, after = (tuple(_on_first_dim(p) if _cuts(p, dim) else Replicate() for p in side) for side in (src, dst))
        need = need // shape[dim] * _overlap(shape[dim], after, whole, mesh) if shape[dim] else need
        have = have // shape[dim] * _overlap(shape[dim], after, before, mesh) if shape[dim] else have
    return np.broadcast_to(need - have, mesh.shape)


@lru_cache(maxsize=1 << 14)
def _overlap(size: int, wanted: Placements, held: Placements, mesh: Mesh) -> np.ndarray:
    """Indices of a dim that each device both wants and holds, in the shape of the mesh (1 along axes that do not matter)."""
    cut = [isinstance(a, Shard) or isinstance(b, Shard) for a, b in zip(wanted, held, strict=True)]
    shape = tuple(p if here else 1 for p, here in zip(mesh.shape, cut, strict=True))
    table = [
        _common(intervals(size, 0, wanted, mesh, position), intervals(size, 0, held, mesh, position))
        for position in itertools.product(*(range(p) for p in shape))
    ]
    return np.array(table, dtype=np.int64).reshape(shape)


def _cuts(placement: Placement, dim: int) -> bool:
    return isinstance(placement, Shard) and placement.dim == dim


def _on_first_dim(placement: Placement) -> Placement:
    return Shard(0, placement.weights, placement.unit, placement.blocks) if isinstance(placement, Shard) else placement


def _common(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> int:
    return sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


def _check(placements: Placements, mesh: Mesh, shape: tuple[int, ...]) -> None:
    local_shape(shape, placements, mesh, (0,) * mesh.ndim)


def _same_cuts(src: Placements, dst: Placements, mesh: Mesh, shape: tuple[int, ...]) -> bool:
    """True if two placements differ only in how they spell cuts that give every device the same indices."""
    for a, b in zip(src, dst, strict=True):
        if a != b and not (isinstance(a, Shard) and isinstance(b, Shard) and a.dim == b.dim):
            return False
    dims = {p.dim for p in src if isinstance(p, Shard)}
    return all(
        intervals(shape[dim], dim, src, mesh, position) == intervals(shape[dim], dim, dst, mesh, position)
        for dim in dims
        for position in mesh.positions()
    )


def _along_axis(before: Placements, after: Placements, axis: int, mesh: Mesh, shape: tuple[int, ...]) -> Step | None:
    """The step that changes one axis alone; None if there is none."""
    a, b = before[axis], after[axis]
    inner = before[axis + 1 :]
    for placement in (a, b):
        if isinstance(placement, Shard) and any(_cuts(p, placement.dim) for p in inner):
            return None
    if isinstance(b, Shard):
        for outer in before[:axis]:
            if isinstance(outer, Shard) and outer.dim == b.dim and (outer.unit, outer.blocks) != (b.unit, b.blocks):
                return None
    owed = {p.reduce for p in inner if isinstance(p, Partial)}
    if isinstance(a, Partial) and not isinstance(b, Partial) and not all(_commute(a.reduce, r) for r in owed):
        return None
    if isinstance(a, Shard) and isinstance(b, Partial) and b.reduce not in LINEAR and owed & set(LINEAR):
        return None  # the filling would be added up
    kind = _kind(a, b)
    if kind is None:
        return None
    return Step(kind, axis, before, after, _elements(kind, before, after, axis, mesh, shape))


def _outer_first(before: Placements, after: Placements, axis: int, mesh: Mesh, shape: tuple[int, ...]) -> Step | None:
    """A gather, or a reduce-scatter, along the outermost axis of an even nested cut; None if it is no such step.

    After the gather a device holds its inner part of every outer piece: the same inner cut of p times as many blocks.
    """
    a, b = before[axis], after[axis]
    kind = _kind(a, b)
    if kind not in ("all_gather", "reduce_scatter"):
        return None
    nested, merged, cut = (before, after, a) if kind == "all_gather" else (after, before, b)
    assert isinstance(cut, Shard)
    p, parts = mesh.shape[axis], 1
    for k, (fine, coarse) in enumerate(zip(nested, merged, strict=True)):
        if _cuts(fine, cut.dim):
            if fine.weights or mesh.weights[k]:
                return None
            parts *= mesh.shape[k]
            if k != axis and (k < axis or coarse != Shard(cut.dim, None, cut.unit, cut.blocks * p)):
                return None
        elif fine != coarse:
            return None
    if shape[cut.dim] % (cut.unit * cut.blocks * parts):
        return None
    owed = [q.reduce for q in before[axis + 1 :] if isinstance(q, Partial)]
    if isinstance(a, Partial) and not all(_commute(a.reduce, r) for r in owed):
        return None
    return Step(kind, axis, before, after, _elements(kind, before, after, axis, mesh, shape))


def _commute(outer: str, inner: str) -> bool:
    return outer == inner or (outer in LINEAR and inner in LINEAR)


def _kind(a: Placement, b: Placement) -> str | None:
    if isinstance(a, Shard):
        if isinstance(b, Shard):
            return "all_to_all" if a.dim != b.dim else None
        return "all_gather" if isinstance(b, Replicate) else "pad"
    if isinstance(a, Replicate):
        if isinstance(b, Shard):
            return "slice"
        return "keep" if b == Partial() else "none"
    if isinstance(b, Shard):
        return "reduce_scatter"
    if isinstance(b, Replicate):
        return "all_reduce"
    if a == b:
        return "none"
    return "scale" if a.reduce in LINEAR and b.reduce in LINEAR else None


def _elements(kind: str, before: Placements, after: Placements, axis: int, mesh: Mesh, shape: tuple[int, ...]) -> int:
    rounds = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}.get(kind, 0)
    if kind == "all_to_all":
        return int(lacking(before, after, mesh, shape).sum())
    if rounds == 0:
        return 0
    copies = math.prod(p for a, p in enumerate(mesh.shape) if a != axis and not isinstance(before[a], Shard))
    return rounds * (mesh.shape[axis] - 1) * math.prod(shape) * copies


def _shortest(src: Placements, dst: Placements, mesh: Mesh, shape: tuple[int, ...]) -> list[Step]:
    """Dijkstra over placements. There is always a path: reduce and gather from the inner axis out, then cut from the outer in."""
    choices = _passing(src, dst, mesh, shape)
    nodes = [state for state in itertools.product(*choices) if _consistent(state)]
    best: dict[Placements, float] = {src: 0.0}
    came: dict[Placements, Step] = {}
    heap: list[tuple[float, int, Placements]] = [(0.0, 0, src)]
    ticket = itertools.count(1)
    closed: set[Placements] = set()
    while heap:
        cost, _, here = heapq.heappop(heap)
        if here == dst:
            break
        if here in closed:
            continue
        closed.add(here)
        for there in nodes:
            if there in closed:
                continue
            step = _between(here, there, mesh, shape)
            if step is None:
                continue
            outwards = 1 + OUTER * (mesh.ndim - 1 - max(step.axis, 0))
            total = cost + step.elements * outwards + (STEP_ELEMENTS if step.elements else 1)
            if total < best.get(there, math.inf):
                best[there], came[there] = total, step
                heapq.heappush(heap, (total, next(ticket), there))
    path, state = [], dst
    while state != src:
        path.append(came[state])
        state = came[state].before
    return path[::-1]


def _passing(src: Placements, dst: Placements, mesh: Mesh, shape: tuple[int, ...]) -> list[tuple[Placement, ...]]:
    """Per axis, the placements that a path may pass through."""
    owing = [isinstance(a, Partial) and not isinstance(b, Partial) for a, b in zip(src, dst, strict=True)]
    cut = {p.dim for p in (*src, *dst) if isinstance(p, Shard)}
    spare = sorted(range(len(shape)), key=lambda dim: (dim in cut, -shape[dim]))[:1] if sum(owing) > 1 else []
    choices: list[tuple[Placement, ...]] = []
    for axis, (a, b) in enumerate(zip(src, dst, strict=True)):
        more: list[Placement] = [Shard(dim) for dim in spare if isinstance(a, Partial)]
        for side in (src, dst):
            inner = side[axis]
            if not isinstance(inner, Shard):
                continue
            outer = [mesh.shape[k] for k in range(axis) if _cuts(side[k], inner.dim)]
            for count in range(1, len(outer) + 1):
                for some in itertools.combinations(outer, count):
                    blocks = inner.blocks * math.prod(some)
                    if shape[inner.dim] % (blocks * inner.unit) == 0:
                        more.append(Shard(inner.dim, inner.weights, inner.unit, blocks))
        choices.append(tuple(dict.fromkeys((a, Replicate(), b, *more))))
    return choices


def _consistent(state: Placements) -> bool:
    """Nested cuts agree in unit and blocks."""
    forms: dict[int, tuple[int, int]] = {}
    return all(forms.setdefault(p.dim, (p.unit, p.blocks)) == (p.unit, p.blocks) for p in state if isinstance(p, Shard))


def _between(here: Placements, there: Placements, mesh: Mesh, shape: tuple[int, ...]) -> Step | None:
    changed = [axis for axis in range(mesh.ndim) if here[axis] != there[axis]]
    if len(changed) == 1:
        step = _along_axis(here, there, changed[0], mesh, shape)
        if step is not None:
            return step
    elif changed:
        step = _outer_first(here, there, changed[0], mesh, shape)
        if step is not None:
            return step
    if any(isinstance(here[axis], Partial) or isinstance(there[axis], Partial) for axis in changed):
        return None
    return Step("recut", -1, here, there, int(lacking(here, there, mesh, shape).sum()))
