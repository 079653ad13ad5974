"""`weft.plan`: capture, look at every mesh, keep the fastest plan that fits.

meshes            all arrangements of the devices in one or two axes, or the one asked for             `meshes_for`
unlike devices    shards in proportion to speed, and even ones: the pricing decides                    `mesh_weights`
per mesh          the search for several weights, and the strategies with names                        `explore`
enough            a plan within 5 % of the lower bound ends the search over meshes
memory            only if the fastest does not fit: the search again with a price on bytes             `explore.within_memory`
squeezing         plans that do not fit and are faster than what does: made to fit, they may still be faster   `_squeezed`
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.cluster import Cluster
from weft.cluster.units import nbytes_of
from weft.errors import BudgetError, DoesNotFit, ImpossibleConstraint, MeshTooLarge
from weft.graph.graph import Graph
from weft.placement.axes import find_cuts
from weft.placement.layout import Mesh
from weft.planner.bound import lower_bound, speeds
from weft.planner.coding import Coding
from weft.planner.constraints import Constraints
from weft.planner.costs import Costs
from weft.planner.explore import Candidate, Explorer, factorizations
from weft.planner.optimizer import OptimizerCost
from weft.planner.plan import REMEDY, Alternative, Plan
from weft.planner.prepared import Prepared
from weft.planner.roles import Roles
from weft.planner.search import Infeasible
from weft.planner.squeeze import Moves

if TYPE_CHECKING:
    from weft.comm import Exchange

ENOUGH = 1.05  # a plan this near the lower bound ends the search over meshes: none can be better by more
REFINED = 3  # meshes whose best candidate is refined
AGAIN = 2  # strategies with names that get a second look at most
SQUEEZED = 8  # plans that do not fit which are made to, at most, if others fit; three times as many if none does
LEANEST = 4  # plans with the least that recomputation cannot save: tried whatever they cost if none fits
NEAR = 1.1  # a strategy with a name gets a second look within this factor of the best

__all__ = ["make_plan", "memory_limits", "mesh_weights", "meshes_for", "plan"]


def plan(
    model: Any,
    batch: Any = None,
    *,
    cluster: Cluster,
    loss: Any = None,
    optimizer: Any = "AdamW",
    memory: int | str | Sequence[int | str] | None = None,
    constraints: Constraints | None = None,
    mesh: Mesh | Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    allow_replicated: bool | Sequence[str] = False,
    recompute: bool = True,
    offload: bool = True,
    exchange: Exchange | None = None,
) -> Plan:
    """Find the fastest plan, by the cost model, that fits every device's memory.

    Args:
        model: an `nn.Module`, on any device (also meta), or a `Graph` that `weft.capture` made (then without `batch`).
        batch: one global batch, as `step` will get it: tensors in a tuple or dict.
        cluster: devices and links.
        loss: function of (output, target), if the model does not return its loss.
        optimizer: class, instance or name; it decides the optimizer's memory and time.
        memory: what each device may use: bytes or "6GiB", for all devices or one per device. Default: what the cluster says.
        constraints: decisions taken by hand.
        mesh: a `Mesh` or its shape; by default every arrangement of all devices in one and two axes is tried.
        weights: shares of the devices of a one-axis mesh, such as (3, 1), or fractions that sum to 1.
        allow_replicated: operators without a placement rule may run whole on every device: True, or their names.
        recompute: a plan may give up activations after forward and compute them again for backward, where that is what it
            takes to fit, or costs less than more sharding does; `weft.run` then keeps each process within these bytes.
        offload: likewise, activations may wait in the tier that the cluster names below a device (`Device.offload`).
        exchange: of gradients (`weft.comm`), to be given to `weft.run` as well. Plans whose gradients it can carry, those of data
            parallelism and ZeRO over all devices, beside each other or beside tensor parallelism, are searched and priced
            with its messages and codec seconds as tried on this machine; others with all-reduce. `Plan.exchange` says it.
    Raises:
        UnknownOperators: operators without a rule, all at once, before anything else is done.
        DoesNotFit: no plan in reach fits; the error names the device, the least bytes that would do there, what is largest,
            and what to do.
        ImpossibleConstraint, MeshTooLarge: what was fixed by hand cannot be.
        ValueError: an argument is not what it should be, or there is nothing to train.
        CaptureError: the model cannot be captured.
    """
    from weft.graph.capture import rarely_collecting

    with rarely_collecting():
        return make_plan(
            model, batch, cluster=cluster, loss=loss, optimizer=optimizer, memory=memory, mesh=mesh, weights=weights,
            constraints=constraints or Constraints(), allow_replicated=allow_replicated, must_fit=True,
            moves=Moves(recompute, offload), exchange=exchange,
        )  # fmt: skip


def make_plan(
    model: Any,
    batch: Any,
    *,
    cluster: Cluster,
    loss: Any,
    optimizer: Any,
    memory: int | str | Sequence[int | str] | None,
    mesh: Mesh | Sequence[int] | None,
    weights: Sequence[float] | None,
    constraints: Constraints,
    allow_replicated: bool | Sequence[str],
    must_fit: bool,
    moves: Moves,
    exchange: Exchange | None = None,
) -> Plan:
    """What `plan` and `Plan.manual` share; `must_fit` makes a lack of memory an error."""
    from weft.graph import graph_fingerprint

    started = time.perf_counter()
    if not isinstance(cluster, Cluster):
        raise ValueError(
            f"plan: cluster must be a weft.Cluster, got {cluster!r}; weft.Cluster.load reads one from a file"
        )
    if isinstance(mesh, str):
        raise ValueError(f"plan: mesh must be a Mesh or its shape, as (2, 4), got {mesh!r}")
    graph = model if isinstance(model, Graph) else _capture(model, batch, loss, cluster)
    if not graph.spec(graph.loss).requires_grad:
        raise ValueError(
            "plan: there is nothing to train: no parameter that requires a gradient takes part in the loss (all are frozen, or "
            "the loss is detached or a whole number); unfreeze what is to be trained"
        )
    costing, coding = OptimizerCost.of(optimizer), _coding(exchange, graph, cluster)
    limits = memory_limits(memory, cluster)
    bound = lower_bound(graph, cluster, costing)
    explorers = _explorers(graph, cluster, costing, constraints, limits, mesh, weights, allow_replicated, coding)
    candidates = _candidates(explorers, bound)
    squeezable = moves.recompute or (moves.offload and any(device.offload for device in cluster))
    if squeezable:
        candidates = _squeezed(candidates, moves)
    fitting = [pair for pair in candidates if pair[1].prediction.fits]
    if not fitting and must_fit:
        raise _does_not_fit(candidates, moves if squeezable else None)
    explorer, best = _best(fitting) if fitting else min(candidates, key=lambda pair: pair[1].excess)
    strategy = constraints.strategy if isinstance(constraints.strategy, str) else " x ".join(constraints.strategy)
    return Plan(
        best.assignment,
        graph_fingerprint(graph),
        cluster,
        costing,
        explorer.details(best),
        _alternatives([c for _, c in candidates], best),
        best.method,
        bound,
        best.name if constraints.strategy == "any" else strategy,
        time.perf_counter() - started,
        graph,
        loss,
        best.squeezed.squeezes() if best.squeezed is not None else (),
        exchange.options if exchange is not None and explorer.pricing.coded(best.assignment) else "",
    )


def _candidates(explorers: Sequence[Callable[[], Explorer]], bound: float) -> list[tuple[Explorer, Candidate]]:
    """What the search finds on every mesh, up to one that is near the bound; more of the best, and leaner ones if none fits.

    Raises:
        ImpossibleConstraint, MeshTooLarge, Infeasible: there is no candidate on any mesh; the first mesh says why.
    """
    refused: list[ValueError] = []
    candidates: list[tuple[Explorer, Candidate]] = []
    for make in explorers:
        if any(c.prediction.fits and c.prediction.seconds <= ENOUGH * bound for _, c in candidates):
            break
        try:
            explorer = make()
            candidates += [(explorer, c) for c in (*explorer.named(), *explorer.free())]
        except (ImpossibleConstraint, MeshTooLarge, Infeasible) as error:
            refused.append(error)
    if not candidates:
        raise refused[0]
    candidates += _named_again(candidates)
    candidates += _refined(candidates)
    if not any(c.prediction.fits for _, c in candidates):
        fastest = {id(e): min((c for x, c in candidates if x is e), key=_seconds) for e, _ in candidates}
        for explorer in dict.fromkeys(e for e, _ in candidates):
            candidates += [(explorer, c) for c in explorer.within_memory(fastest[id(explorer)])]
    return candidates


def _coding(exchange: Exchange | None, graph: Graph, cluster: Cluster) -> Coding | None:
    from weft.comm import Exchange

    if exchange is None:
        return None
    if not isinstance(exchange, Exchange):
        raise ValueError(
            f"plan: exchange must be a weft.comm.Exchange or None, got {exchange!r}; to choose among several, plan with each, or "
            "plan without and give weft.run exchange='auto'"
        )
    return Coding.of(exchange, graph, cluster)


def _named_again(candidates: list[tuple[Explorer, Candidate]]) -> list[tuple[Explorer, Candidate]]:
    """Strategies with names that come near the best, searched with the weights that `Plan.manual` would try as well."""
    best = min(c.prediction.seconds for _, c in candidates)
    near = sorted(
        ((e, c) for e, c in candidates if c.name != "search" and c.prediction.seconds <= NEAR * best),
        key=lambda pair: pair[1].prediction.seconds,
    )[:AGAIN]
    return [(explorer, again) for explorer, candidate in near for again in explorer.again(candidate)]


def _refined(candidates: list[tuple[Explorer, Candidate]]) -> list[tuple[Explorer, Candidate]]:
    """The best candidates of the best meshes with better storage of their parameters."""
    best: dict[int, tuple[Explorer, Candidate]] = {}
    for explorer, candidate in sorted(candidates, key=lambda pair: pair[1].prediction.seconds):
        best.setdefault(id(explorer), (explorer, candidate))
    tried = [(explorer, explorer.refined(candidate)) for explorer, candidate in list(best.values())[:REFINED]]
    return [pair for pair, before in zip(tried, best.values(), strict=False) if pair[1] is not before[1]]


def _squeezed(candidates: list[tuple[Explorer, Candidate]], moves: Moves) -> list[tuple[Explorer, Candidate]]:
    """The candidates, where those that do not fit and could win are made to fit by computing activations again or moving them.

    They come in the order of their seconds, which squeezing can only add to: the first that is slower than the best so far
    ends the search. Where nothing fits, those with the least that cannot be given up are tried as well.
    """
    best = min((c.prediction.seconds for _, c in candidates if c.prediction.fits), default=math.inf)
    alone = best == math.inf
    unfit = {id(c.prediction): (e, c) for e, c in candidates if not c.prediction.fits}
    order = sorted(unfit.values(), key=lambda pair: pair[1].prediction.seconds)
    order = order[: 3 * SQUEEZED if alone else SQUEEZED]
    if alone:
        order += sorted(unfit.values(), key=lambda pair: pair[1].floor)[:LEANEST]
    made: dict[int, Candidate] = {}
    for explorer, candidate in order:
        if candidate.prediction.seconds >= best or candidate.floor > 1 or id(candidate.prediction) in made:
            continue
        try:
            found = explorer.squeezed(candidate, moves)
        except BudgetError:
            continue
        made[id(candidate.prediction)] = found
        best = min(best, found.prediction.seconds)
    return [(e, replace(made[id(c.prediction)], name=c.name) if id(c.prediction) in made else c) for e, c in candidates]


def _capture(model: Any, batch: Any, loss: Any, cluster: Cluster) -> Graph:
    """The model's graph, with the costs of operators on the cluster's devices rather than on the model's own."""
    from weft.graph import capture, reprice

    if batch is None:
        raise ValueError("plan needs one batch of the model's inputs, to know shapes and sizes; pass batch=...")
    graph = capture(model, batch, loss)
    return graph if any(device.kind.startswith("cpu") for device in cluster.devices) else reprice(graph, "cuda")


def _seconds(candidate: Candidate) -> float:
    return candidate.prediction.seconds


def _best(pairs: list[tuple[Explorer, Candidate]]) -> tuple[Explorer, Candidate]:
    """The fastest; of those that are slower by less than one in five hundred, one that neither computes again nor offloads, the
    simplest, and then the leanest."""
    names = ("dp", "zero-1", "zero-2", "zero-3", "tp", "tp+sp")
    least = min(candidate.prediction.seconds for _, candidate in pairs)

    def rank(pair: tuple[Explorer, Candidate]) -> tuple[bool, int, int, float]:
        candidate = pair[1]
        simple = names.index(candidate.name) if candidate.name in names else len(names)
        return (candidate.squeezed is not None, candidate.assignment.mesh.ndim, simple, candidate.prediction.peak)

    return min((pair for pair in pairs if pair[1].prediction.seconds <= least * 1.002), key=rank)


# -------------------------------------------------------------------------------------------------------------- meshes


def _explorers(
    graph: Graph,
    cluster: Cluster,
    optimizer: OptimizerCost,
    constraints: Constraints,
    limits: tuple[int, ...] | None,
    mesh: Mesh | Sequence[int] | None,
    weights: Sequence[float] | None,
    allow_replicated: bool | Sequence[str],
    coding: Coding | None,
) -> list[Callable[[], Explorer]]:
    """What makes an explorer of each mesh worth trying, on demand. Unknown operators come out here, first of all."""
    meshes = list(meshes_for(graph, cluster, optimizer, constraints, mesh, weights))
    ready = {}
    for size in {m.size for m in meshes}:
        prepared = Prepared(graph, find_cuts(graph, finest=size, allow_replicated=allow_replicated))
        ready[size] = (prepared, Roles(prepared))
    return [
        partial(
            lambda one: Explorer(*ready[one.size], Costs(cluster, one), optimizer, constraints, limits, coding), one
        )
        for one in meshes
    ]


def meshes_for(
    graph: Graph,
    cluster: Cluster,
    optimizer: OptimizerCost,
    constraints: Constraints,
    mesh: Mesh | Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Iterator[Mesh]:
    """Meshes to look at: the one asked for, else all devices in one axis and in every pair of axes.

    Where every pair of devices has the same link, (4, 2) and (2, 4) are the same, and one of them is left out. On
    unlike devices each shape comes weighted by speed and unweighted.
    """
    if isinstance(mesh, Mesh):
        _check_ranks(mesh, cluster)
        yield mesh
        return
    if mesh is not None:
        shapes = [tuple(int(p) for p in mesh)]
    elif isinstance(constraints.strategy, tuple):
        shapes = factorizations(len(cluster), len(constraints.strategy))
        if not shapes:
            raise ValueError(
                f"strategy names {len(constraints.strategy)} mesh axes ({', '.join(constraints.strategy)}), but "
                f"{len(cluster)} devices cannot be arranged in as many of two or more; name fewer, or use more devices"
            )
    else:
        shapes = [(len(cluster),), *factorizations(len(cluster), 2)]
        if _one_link(cluster):
            shapes = [s for s in shapes if tuple(sorted(s, reverse=True)) == s]
    if weights is not None:
        for shape in shapes if mesh is not None else [(len(cluster),)]:
            if len(shape) != 1:
                raise ValueError(
                    f"weights are for a mesh of one axis, got mesh {shape}; give `Mesh(shape, weights=...)` instead"
                )
            made = Mesh(shape, weights=(normalised(weights, shape[0]),))
            _check_ranks(made, cluster)
            yield made
        return
    for shape in shapes:
        made = Mesh(shape)
        _check_ranks(made, cluster)
        by_speed = mesh_weights(graph, cluster, optimizer, made)
        if any(by_speed):
            yield Mesh(shape, weights=by_speed)
        yield made


def _check_ranks(mesh: Mesh, cluster: Cluster) -> None:
    if max(mesh.ranks) >= len(cluster):
        raise MeshTooLarge("the cluster", len(cluster), mesh.size, "x".join(mesh.names))


def _one_link(cluster: Cluster) -> bool:
    """Whether every pair of devices has the same link, not shared, so that their order does not matter."""
    if not cluster.uniform or cluster.pairs or len(cluster.levels) > 1:
        return False
    return all(not link.shared for level in cluster.levels for link in level.links)


def normalised(weights: Sequence[float], devices: int) -> tuple[float, ...]:
    """A user's weights, checked: one per device, shares such as (3, 1) or fractions that sum to 1.

    Raises:
        ValueError: another number of weights, a negative one, or fractions that do not sum to 1.
    """
    found = tuple(float(w) for w in weights)
    if len(found) != devices:
        raise ValueError(f"weights {found} are for {len(found)} devices, but the mesh axis has {devices}")
    if not all(math.isfinite(w) and w >= 0 for w in found) or sum(found) <= 0:
        raise ValueError(f"weights must be >= 0, finite and not all 0, got {found}")
    if max(found) < 1 and abs(sum(found) - 1.0) > 1e-6:
        raise ValueError(
            f"weights {found} sum to {sum(found):g}; fractions must sum to 1, or give shares such as (3, 1)"
        )
    return found


def mesh_weights(
    graph: Graph, cluster: Cluster, optimizer: OptimizerCost, mesh: Mesh
) -> tuple[tuple[float, ...] | None, ...]:
    """Per mesh axis, shares in proportion to the speed of its slices on this model; None where they are alike."""
    if cluster.uniform:
        return (None,) * mesh.ndim
    speed = speeds(graph, cluster, optimizer)[list(mesh.ranks)].reshape(mesh.shape)
    found: list[tuple[float, ...] | None] = []
    for axis in range(mesh.ndim):
        share = speed.sum(axis=tuple(a for a in range(mesh.ndim) if a != axis))
        share = share / share.max()
        found.append(None if np.ptp(share) < 0.02 else tuple(float(f"{s:.3g}") for s in share))
    return tuple(found)


# -------------------------------------------------------------------------------------------------------------- memory


def memory_limits(memory: int | str | Sequence[int | str] | None, cluster: Cluster) -> tuple[int, ...] | None:
    """Bytes per device of the cluster, from bytes or "6GiB", for all or one per device; None for what the cluster says.

    >>> memory_limits("1.5GiB", Cluster.local(processes=2))
    (1610612736, 1610612736)
    """
    if memory is None:
        return None
    if isinstance(memory, (int, float, str)):
        return (nbytes_of(memory, "memory"),) * len(cluster)
    limits = tuple(nbytes_of(m, "memory") for m in memory)
    if len(limits) != len(cluster):
        given = f"{len(limits)} for {len(cluster)} devices"
        raise ValueError(f"memory: give one limit for all devices or one per device; got {given}")
    return limits


def _does_not_fit(candidates: list[tuple[Explorer, Candidate]], moves: Moves | None) -> DoesNotFit:
    """The error for the leanest plan: what it needs as it is, or with all that these moves can do."""
    if moves is None:
        leanest = min((c for _, c in candidates), key=lambda c: c.excess)
        worst = max(leanest.prediction.memory, key=lambda m: m.use.peak / m.have)
        return DoesNotFit(worst.device, worst.use.peak, worst.have, worst.use.largest, REMEDY[worst.use.largest])
    unlike = {id(c.prediction): (e, c) for e, c in candidates}.values()
    found = []
    for explorer, candidate in sorted(unlike, key=lambda pair: pair[1].floor)[:LEANEST]:
        least = explorer.least_bytes(candidate, moves)
        need, worst = max(zip(least, candidate.prediction.memory, strict=True), key=lambda row: row[0] / row[1].have)
        found.append((need / worst.have, need, worst))
    _, need, worst = min(found, key=lambda row: row[0])
    return DoesNotFit(worst.device, need, worst.have, worst.use.largest, REMEDY[worst.use.largest])


def _alternatives(candidates: list[Candidate], best: Candidate) -> tuple[Alternative, ...]:
    """The others, fastest first: one per name and mesh, and per price."""
    found: dict[tuple, Alternative] = {}

    def key(c: Candidate) -> tuple:
        price = f"{c.prediction.seconds:.4g}" if c.name == "search" else ""
        return (c.name, c.assignment.mesh.shape, any(c.assignment.mesh.weights), price)

    for c in sorted(candidates, key=_seconds):
        if key(c) == key(best) or key(c) in found:
            continue
        p, weighted = c.prediction, any(c.assignment.mesh.weights)
        name = f"{c.name}, weighted" if weighted else c.name
        again = max((m.checked.repeated_seconds for m in c.squeezed.plans.values()), default=0.0) if c.squeezed else 0.0
        shape = c.assignment.mesh.shape
        found[key(c)] = Alternative(name, shape, p.seconds, p.exposed, p.nbytes, p.peak, p.fits, again, p.waiting)
    return tuple(found.values())
