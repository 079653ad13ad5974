"""Ways to store a parameter, and what each costs: as used, or ZeRO stage 1, 2 or 3 over some mesh axes.

Time is split into what nothing hides (the update, gathers after it) and what may hide behind compute (reductions of
gradients, gathers before use); small parameters travel in buckets, so that they pay their bytes' share of a bucket's time.
Gradients by an exchange: messages may hide, codec seconds do not, and what it cannot carry is infinitely dear.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weft.graph.graph import TensorSpec
from weft.placement.assignment import ParameterPlacement
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard
from weft.placement.parameters import BUCKET_NBYTES, Owed
from weft.planner.coding import Coding, fits
from weft.planner.costs import Costs
from weft.planner.memory import held
from weft.planner.optimizer import OptimizerCost

__all__ = ["Choose", "Mode", "best_mode", "modes", "used_for", "zero_shards"]


@dataclass(frozen=True)
class Mode:
    """One way to store a parameter: seconds that nothing hides, seconds that compute may hide, bytes on a device."""

    placement: ParameterPlacement
    name: str
    exposed: float
    hidden: float
    nbytes: float


Choose = Callable[[Sequence[Mode]], Sequence[Mode]]  # the modes that constraints leave of a parameter's


def modes(
    spec: TensorSpec,
    used: Placements,
    costs: Costs,
    optimizer: OptimizerCost,
    coding: Coding | None = None,
    along: tuple[int, ...] = (),
) -> tuple[Mode, ...]:
    """Ways to store a parameter that is used in a placement.

        as used       gradients all-reduced where it is Replicate (data parallel); nothing owed where Shard
        zero-1, -2    gradients reduce-scattered, the piece updated, the new parameters gathered; -2 keeps the gradient's piece
        zero-3        stored as a piece, gathered for forward and again for backward, gradients reduce-scattered
    over every set of mesh axes on which it is Replicate and a dim is long enough to be cut. With `coding` an exchange sums along
    the mesh axes `along`.
    """
    mesh = costs.mesh
    n, size = spec.numel, spec.dtype.itemsize
    bucket = max(1.0, BUCKET_NBYTES / max(1, spec.nbytes))  # parameters like this one in a bucket: latency is shared
    local = costs.nbytes(spec, used)
    owed = tuple(Partial() if isinstance(p, Replicate) else p for p in used)

    def moving(source: Placements, target: Placements) -> float:
        return costs.flat_seconds(n * size * bucket, source, target) / bucket

    def update(state: Placements) -> float:
        share = held(costs, spec, state)
        moved = optimizer.moved_bytes(spec.nbytes) * share
        return float(costs.seconds("optimizer", optimizer.flops(n) * share, moved, "float32", 0).max())

    def reducing(placement: ParameterPlacement, cut: Placements) -> tuple[float, float, float]:
        """Seconds that nothing hides, seconds that compute may hide, and bytes that stay, of summing and cutting the gradient."""
        if coding is None:
            return 0.0, moving(owed, cut), 0.0
        fate = Owed.of(placement, mesh.shape)
        if not fits((fate.scatter_axes, fate.sum_axes), along):
            return np.inf, 0.0, 0.0
        price = coding.reduce({coding.name_of(spec): spec}, [placement], along, costs, 1 / bucket)
        return price.codec, price.wire, price.kept

    same = ParameterPlacement.same(used)
    if not spec.requires_grad:
        found = [Mode(same, "frozen", 0.0, 0.0, local)]
    else:
        code, reduce, kept = reducing(same, used)
        nbytes = 2 * local + optimizer.state_bytes(local) + kept
        found = [Mode(same, "as used", update(used) + code, reduce, nbytes)]
    free = [axis for axis, p in enumerate(used) if isinstance(p, Replicate) and mesh.shape[axis] > 1]
    for count in range(1, len(free) + 1):
        for axes in itertools.combinations(free, count):
            shards = zero_shards(spec.shape, used, axes, mesh)
            if shards is None or not optimizer.elementwise:
                continue
            for stage in (1, 2, 3) if spec.requires_grad else (3,):
                placement = ParameterPlacement.zero(used, shards, stage)
                cut = placement.state
                piece = local / float(np.prod([mesh.shape[axis] for axis in axes]))
                gather = moving(cut, used)
                if not spec.requires_grad:
                    found.append(Mode(placement, "zero-3", 0.0, 2 * gather, piece))
                    continue
                code, reduce, kept = reducing(placement, cut)
                exposed, hidden = (update(cut), reduce + 2 * gather) if stage == 3 else (update(cut) + gather, reduce)
                exposed += code
                nbytes = (piece if stage == 3 else local) + (piece if stage >= 2 else local)
                nbytes += optimizer.state_bytes(piece) + kept
                found.append(Mode(placement, f"zero-{stage}", exposed, hidden, nbytes))
    return tuple(found)


def zero_shards(shape: Sequence[int], used: Placements, axes: Sequence[int], mesh: Mesh) -> dict[int, Shard] | None:
    """Shards that cut a parameter over some mesh axes where it is used whole; None if no dim is long enough.

    Dim 0 where the piece in use has a row for every device, else the longest dim that does.
    """
    pieces = int(np.prod([mesh.shape[axis] for axis in axes]))
    held = list(shape)
    for axis, p in enumerate(used):
        if isinstance(p, Shard):
            held[p.dim] //= mesh.shape[axis]
    dims = sorted(range(len(held)), key=lambda d: (d != 0, -held[d]))
    for dim in dims:
        if held[dim] >= pieces and not any(isinstance(p, Shard) and p.dim == dim and p.blocks > 1 for p in used):
            return {axis: Shard(dim) for axis in axes}
    return None


def best_mode(options: Sequence[Mode], mu: float, weight: float, choose: Choose | None) -> tuple[float, Mode | None]:
    """The cheapest of the chosen modes and its cost; (inf, None) where none is."""
    cost, best = np.inf, None
    for mode in options if choose is None else choose(options):
        here = mode.exposed + mu * mode.hidden + weight * mode.nbytes
        if here < cost:
            cost, best = here, mode
    return cost, best


def used_for(wanted: Placements) -> Placements:
    """The placement in which to hold a parameter that is wanted so: Partial is cut out of a whole copy for nothing."""
    return tuple(Replicate() if isinstance(p, Partial) else p for p in wanted)
