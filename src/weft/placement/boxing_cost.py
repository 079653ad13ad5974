"""What a boxing costs: bytes on the wire, and seconds on a cluster.

    seconds = sum over steps of the slowest line of devices along the step's axis        `boxing_cost`
    a line's time is `weft.cluster.costs` of the collective, on p times the line's largest piece: the slowest piece counts

Lines along an axis work at the same time; those that cross one shared link together divide it (`concurrent`). A slice is a
view and costs exactly nothing; the other local steps (`LOCAL`) cost what they read and write.

The planner asks 10^5 times: everything is memoised, per (placements, shape, mesh, cluster).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from weft.cluster import Cluster, costs
from weft.placement.boxing_steps import Step, lacking, steps
from weft.placement.layout import Mesh, Placements, Replicate, Shard, deal

__all__ = ["LOCAL", "BoxingCost", "boxing_cost", "in_memory", "unlike_lines"]

LOCAL = ("keep", "pad", "scale")  # kinds of steps that send nothing and yet write a new tensor
PROBES = (0.0, 1e3, 1e5, 1e7, 1e9)  # bytes at which lines of devices are compared


@dataclass(frozen=True)
class BoxingCost:
    """Cost of one boxing.

    Attributes:
        seconds: until the slowest device is done.
        nbytes: bytes put on the wire, over all links.
        steps: what is done.
    """

    seconds: float
    nbytes: int
    steps: tuple[Step, ...] = ()


FREE = BoxingCost(0.0, 0)


def boxing_cost(
    src: Placements, dst: Placements, shape: Sequence[int], itemsize: int, mesh: Mesh, cluster: Cluster
) -> BoxingCost:
    """Cost of taking a value from `src` to `dst`.

    Args:
        shape: of the whole value.
        itemsize: bytes per element.
        mesh: its ranks are device numbers of the cluster.
    Raises:
        ValueError: a placement does not fit the shape or the mesh.
    """
    if src == dst:
        return FREE
    return _cost(src, dst, shape if type(shape) is tuple else tuple(shape), itemsize, mesh, cluster)


@lru_cache(maxsize=1 << 18)
def _cost(
    src: Placements, dst: Placements, shape: tuple[int, ...], itemsize: int, mesh: Mesh, cluster: Cluster
) -> BoxingCost:
    path = steps(src, dst, mesh, shape)
    if not path:
        return FREE
    seconds = sum(
        _seconds(step, shape, itemsize, mesh, cluster) for step in path if step.elements or step.kind in LOCAL
    )
    return BoxingCost(seconds, itemsize * sum(step.elements for step in path), path)


def _seconds(step: Step, shape: tuple[int, ...], itemsize: int, mesh: Mesh, cluster: Cluster) -> float:
    if step.kind == "recut":
        return _recut_seconds(step, shape, itemsize, mesh, cluster)
    axis, p = step.axis, mesh.shape[step.axis]
    line = list(_largest_piece(shape, (*step.before[:axis], Replicate(), *step.before[axis + 1 :]), mesh))
    share = 1.0
    for placement in (step.source, step.target):
        if isinstance(placement, Shard) and line[placement.dim]:  # p times the largest piece
            share *= p * _largest(line[placement.dim], placement, axis, mesh) / line[placement.dim]
    nbytes = itemsize * math.prod(line) * share
    wire = 0.0
    if step.elements:
        collective = getattr(costs, step.kind)
        wire = max(
            collective(cluster, ranks, nbytes, concurrent=together)
            for ranks, together in unlike_lines(mesh, (axis,), cluster)
        )
    strided = any(math.prod(line[: s.dim]) > 1 for s in (step.source, step.target) if isinstance(s, Shard))
    return wire + nbytes * in_memory(step.kind, p, strided, cluster, mesh)


def in_memory(kind: str, p: int, strided: bool, cluster: Cluster, mesh: Mesh) -> float:
    """Seconds per byte of the whole tensor that a step spends in a device's own memory, beside the wire.

    Sums read two operands and write one, as elementwise operators do. Pieces along a dim that is not the first (`strided`) are
    not contiguous: they are copied before they are sent, or put together after they came, at the rate of gathers. Who does
    not keep a value writes zeros; who pads a piece writes zeros and copies the piece among them.
    """
    rest = (p - 1) / p
    summed, copied = {
        "all_gather": (0.0, 2.0 * strided),
        "reduce_scatter": (3.0 * rest, 2.0 * rest * strided),
        "all_reduce": (3.0 * rest if p > 2 else 3.0, 0.0),
        "all_to_all": (0.0, 4.0 / p),
        "keep": (1.0, 0.0),
        "pad": (1.0 + 2.0 / p, 0.0),
        "scale": (2.0, 0.0),
    }[kind]
    return summed * _per_byte("elementwise", cluster, mesh) + copied * _per_byte("gather", cluster, mesh)


@lru_cache(maxsize=4096)
def _per_byte(kind: str, cluster: Cluster, mesh: Mesh) -> float:
    """Seconds per byte of the mesh's slowest memory, in the pattern of a kind of operators."""
    return max(1.0 / cluster[rank].rate(kind).bandwidth for rank in mesh.ranks)


def _recut_seconds(step: Step, shape: tuple[int, ...], itemsize: int, mesh: Mesh, cluster: Cluster) -> float:
    """Like an all-to-all, among the devices that exchange anything, of as much per device as the device that lacks most gets."""
    lack = int(lacking(step.before, step.after, mesh, shape).max())
    axes = tuple(axis for axis in range(mesh.ndim) if _moves_along(axis, step.before, step.after))
    p = math.prod(mesh.shape[axis] for axis in axes)
    nbytes = itemsize * lack * p * p / (p - 1)
    wire = max(
        costs.all_to_all(cluster, ranks, nbytes, concurrent=together)
        for ranks, together in unlike_lines(mesh, axes, cluster)
    )
    return wire + nbytes * in_memory("all_to_all", p, True, cluster, mesh)


def _moves_along(axis: int, before: Placements, after: Placements) -> bool:
    """Whether a recut moves anything between devices that differ along an axis: not if it cuts the same indices as before."""
    cut = before[axis]
    if not isinstance(cut, Shard):
        return False
    nested = [k for k in range(axis + 1) for p in (before[k], after[k]) if isinstance(p, Shard) and p.dim == cut.dim]
    return any(before[k] != after[k] for k in nested)


def _largest_piece(shape: Sequence[int], placements: Placements, mesh: Mesh) -> tuple[int, ...]:
    sizes = list(shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            sizes[placement.dim] = _largest(sizes[placement.dim], placement, axis, mesh)
    return tuple(sizes)


def _largest(size: int, shard: Shard, axis: int, mesh: Mesh) -> int:
    """Length of the largest piece that a cut makes of a dim of `size` elements."""
    form = shard.unit * shard.blocks
    return max(deal(size // form, mesh.shape[axis], shard.weights or mesh.weights[axis])) * form


@lru_cache(maxsize=4096)
def unlike_lines(mesh: Mesh, axes: tuple[int, ...], cluster: Cluster) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The sub-meshes along some axes that cost differently: (ranks, how many of them use the same shared links at once)."""
    lines = mesh.lines(axes)
    ports = [_ports(line, cluster) for line in lines]
    unlike: dict[tuple[float, ...], tuple[tuple[int, ...], int]] = {}
    for line, own in zip(lines, ports, strict=True):
        together = sum(1 for other in ports if other & own) if own else 1
        times = tuple(
            collective(cluster, line, n, concurrent=together)
            for collective in (costs.all_reduce, costs.all_gather, costs.reduce_scatter, costs.all_to_all)
            for n in PROBES
        )
        unlike.setdefault(times, (line, together))
    return tuple(unlike.values())


def _ports(line: tuple[int, ...], cluster: Cluster) -> frozenset[tuple[int, int]]:
    """The connections that the line's messages leave by, at the outermost level that it crosses, if shared."""
    routes = [cluster.route(line[0], there) for there in line[1:]]
    level = max((level for link, level in routes if link.shared), default=-1)
    return frozenset((level, cluster.port(level, rank)) for rank in line) if level >= 0 else frozenset()
