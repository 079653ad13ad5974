"""Candidate plans of one graph on one mesh: the search under several weights, and the strategies that have names.

Problem    `search` minimises a sum of tables; a step's time is not quite one: communication hides behind compute, parameters
           travel in buckets, memory counts at its peak.
Method     the additive search is run for several weights mu of communication that may hide (0: all of it hides, 1:
           none), and each result is priced in full by `price`; the strategies with names are priced as well, so
           that the outcome is never worse than those.                                       `Explorer.free`, `Explorer.named`
           The best then tries other storage of its parameters, at full price.                    `Explorer.refined`
           If the best does not fit, seconds per byte lambda are added, raised until a candidate fits, then
           bisected towards the least that does.                                              `Explorer.within_memory`
           Or it is made to fit: activations are made again, or come back from a lower tier, when backward wants them.
                                                                                                      `Explorer.squeezed`
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from weft.errors import ImpossibleConstraint, MeshTooLarge
from weft.placement.assignment import Assignment, ParameterPlacement
from weft.placement.layout import Mesh, Placements
from weft.planner.coding import Coding
from weft.planner.constraints import Constraints, masks, modes_left, overridden
from weft.planner.costs import Costs
from weft.planner.model import Model
from weft.planner.modes import Choose
from weft.planner.neighbourhood import neighbourhood
from weft.planner.optimizer import OptimizerCost
from weft.planner.prepared import Prepared
from weft.planner.price import Prediction, Pricing
from weft.planner.roles import Roles
from weft.planner.search import Factor, Infeasible, Program, Solution, TooWide, Variable, integer
from weft.planner.squeeze import Moves, Squeezed, least_bytes, squeeze

__all__ = ["Candidate", "Explorer"]

MU = (0.0, 0.1, 0.3, 1.0)  # weights of communication that may hide behind compute
INTEGER = 100_000  # entries of all tables up to which a problem too wide to eliminate goes to HiGHS
EXACT = 1e-6  # relative gap at which HiGHS is done
PATIENCE = 10.0  # seconds for HiGHS; what it has by then is compared with the neighbourhood search
NAMED_MU = 0.3  # the one under which strategies with names are tried first
NAMED_1D = ("dp", "zero-1", "zero-2", "zero-3", "tp", "tp+sp")
NAMED_2D = (("dp", "tp"), ("zero-1", "tp"), ("zero-3", "tp"), ("dp", "tp+sp"), ("zero-3", "tp+sp"))
CODED_2D = (  # what an exchange can carry besides
    ("dp", "dp"), ("zero-1", "zero-1"), ("zero-3", "zero-3"), ("dp", "zero-1"), ("dp", "zero-3"),
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An assignment with its price, the strategy or weights that led to it, how it was found, and how it was made to fit.

    `along`: axes of the mesh along which the search took gradients to go by an exchange.
    """

    name: str
    assignment: Assignment
    prediction: Prediction
    method: str
    squeezed: Squeezed | None = None
    along: tuple[int, ...] = ()

    @property
    def excess(self) -> float:
        """The fullest device's need, as a multiple of what it has."""
        return max(m.use.peak / m.have for m in self.prediction.memory)

    @property
    def floor(self) -> float:
        """What neither recomputation nor offload can save on the fullest device, as a multiple of what it has."""
        return max((m.use.peak - m.use.activations) / m.have for m in self.prediction.memory)


class _Restricted:
    """A model's problem with some states ruled out, compiled for repeated solving."""

    def __init__(self, model: Model, allowed: Mapping[Variable, NDArray[np.bool_]], constraints: Constraints):
        self.model = model
        self.choose: Choose | None = modes_left(constraints, model.mesh)
        self.left = {v: np.flatnonzero(mask) for v, mask in allowed.items()}
        for name, template in model.templates.items():
            kept = model.undominated(name, allowed.get(name))
            if kept.sum() < len(template.states):
                self.left[name] = np.flatnonzero(kept)
        named = {v: kept.tobytes() for v, kept in self.left.items()}
        sizes = {v: len(self.left[v]) if v in self.left else n for v, n in model.sizes.items()}
        self.factors = [Factor(f.scope, (f.key, tuple(named.get(v) for v in f.scope))) for f in model.factors]
        self.sizes = sizes
        try:
            self.program: Program | None = Program(sizes, self.factors, model.repeats)
        except TooWide:
            self.program = None

    def solve(self, mu: float, weight: float, known: Sequence[Solution] = ()) -> Solution:
        """The least-cost states, in the model's numbering; `known` solutions are starts where no exact way is short enough."""
        whole = self.model.tables(mu, weight, self.choose)
        cut: dict[object, NDArray[np.float64]] = {}
        for factor, original in zip(self.factors, self.model.factors, strict=True):
            if factor.key not in cut:
                table = whole[original.key]
                some = any(v in self.left for v in factor.scope)
                keep = [self.left.get(v, np.arange(n)) for v, n in zip(factor.scope, table.shape, strict=True)]
                cut[factor.key] = table[np.ix_(*keep)] if some else table
        tables = [cut[factor.key] for factor in self.factors]
        if self.program is not None:
            found = self.program.solve(tables)
        else:
            found = self._wide(tables, known)
        states = {v: int(self.left[v][s]) if v in self.left else s for v, s in found.states.items()}
        return Solution(states, found.cost, found.method, found.gap)

    def _wide(self, tables: Sequence[NDArray[np.float64]], known: Sequence[Solution]) -> Solution:
        """Where elimination is too long: HiGHS if that is done in time, else the best that it and the neighbourhoods find."""
        tried: list[Solution] = []
        if sum(table.size for table in tables) <= INTEGER:
            with contextlib.suppress(Infeasible):  # or nothing found in time
                found = integer(self.sizes, self.factors, tables, seconds=PATIENCE)
                if found.gap <= EXACT * abs(found.cost):
                    return found
                tried.append(found)
        starts = [{v: self._nearest(v, s) for v, s in solution.states.items()} for solution in known]
        for start in (*starts, None):
            try:
                tried.append(neighbourhood(self.sizes, self.factors, tables, start))
            except Infeasible:
                if start is None and not tried:
                    raise
        return min(tried, key=lambda solution: solution.cost)

    def _nearest(self, variable: Variable, state: int) -> int:
        """The number here of a state of the model's; of the first that is left where that one is not."""
        if variable not in self.left:
            return state
        where = np.flatnonzero(self.left[variable] == state)
        return int(where[0]) if len(where) else 0


class Explorer:
    """Makes candidates for one graph on one mesh.

    Args:
        prepared, roles: the graph; its cuts found for a mesh of this size.
        costs: the cost model on the mesh.
        optimizer: what it costs.
        constraints: what the user fixed.
        memory: bytes that each device of the cluster may use, in place of what it has.
        coding: of gradients by an exchange. It carries all gradients of a plan along the same axes, or none: there is a
            search without it, and one for each set of axes among the plans that it can carry along them.
    """

    def __init__(
        self,
        prepared: Prepared,
        roles: Roles,
        costs: Costs,
        optimizer: OptimizerCost,
        constraints: Constraints,
        memory: tuple[int, ...] | None = None,
        coding: Coding | None = None,
    ):
        self.model = Model(prepared, costs, optimizer)
        self.roles = roles
        self.pricing = Pricing(prepared, roles, costs, optimizer, memory, coding)
        self.constraints = constraints
        self._models: dict[tuple[int, ...], Model] = {
            (): self.model
        }  # by the axes along which an exchange carries gradients
        self._programs: dict[object, _Restricted] = {}
        self._known: list[Solution] = []
        self._prices: dict[tuple[int, ...], tuple[Assignment, Prediction]] = {}  # keeps alive what the ids name
        self._named: dict[str, Constraints] = {}

    @property
    def mesh(self) -> Mesh:
        return self.model.mesh

    def free(self) -> list[Candidate]:
        """The search under the user's constraints, for every weight of hidden communication.

        Raises:
            ImpossibleConstraint, MeshTooLarge: the constraints cannot be met on this mesh.
        """
        found = [self.candidate("search", self.constraints, mu) for mu in MU]
        for along in self.pricing.coding.choices(self.mesh) if self.pricing.coding is not None else ():
            with contextlib.suppress(Infeasible):  # it can carry none
                found += [self.candidate("search", self.constraints, mu, along=along) for mu in MU]
        return found

    def named(self) -> list[Candidate]:
        """The strategies with names that are legal here, under the user's other constraints."""
        if self.constraints.strategy != "any" or self.mesh.ndim > 2 or self.mesh.size == 1:
            return []
        found = []
        products = (*NAMED_2D, *CODED_2D) if self.pricing.coding is not None else NAMED_2D
        for strategy in NAMED_1D if self.mesh.ndim == 1 else products:
            fixed = Constraints(strategy, self.constraints.parameters, self.constraints.inputs)
            name = strategy if isinstance(strategy, str) else " x ".join(strategy)
            self._named[name] = fixed
            try:
                found.append(self.candidate(name, fixed, NAMED_MU))
            except (ImpossibleConstraint, MeshTooLarge, Infeasible):
                continue
        return found

    def again(self, found: Candidate) -> list[Candidate]:
        """A named strategy under the other weights of hidden communication."""
        return [self.candidate(found.name, self._named[found.name], mu) for mu in MU if mu != NAMED_MU]

    def candidate(
        self, name: str, constraints: Constraints, mu: float, weight: float = 0.0, along: tuple[int, ...] = ()
    ) -> Candidate:
        """Search once and price the result in full; `along`: the axes along which an exchange carries gradients, if it does."""
        restricted = self._restricted(constraints, along)
        solution = restricted.solve(mu, weight, self._known[-3:])
        self._known.append(solution)
        assignment = restricted.model.assignment(solution, mu, weight, restricted.choose)
        if constraints.parameters:
            fixed = {n: overridden(constraints, n, p) for n, p in assignment.parameters.items()}
            assignment = Assignment(assignment.mesh, assignment.signatures, fixed, assignment.buffers)
        return Candidate(name, assignment, self._price(assignment), solution.method, None, along)

    def _price(self, assignment: Assignment) -> Prediction:
        """The price, remembered: other weights often lead to the same plan. States and placements are shared objects."""
        key = (*map(id, assignment.signatures.values()), *map(id, assignment.parameters.values()))
        if key not in self._prices:
            self._prices[key] = (assignment, self.pricing.price(assignment, details=False))
        return self._prices[key][1]

    def refined(self, found: Candidate) -> Candidate:
        """The same signatures with better storage of parameters, if there is any.

        The search gives all parameters that are used alike nearly the same weight, while a step hides some of their
        communication and not the rest. Here each group of parameters used alike tries every storage mode, at its full price.
        """
        if modes_left(self.constraints, self.mesh) is not None:
            return found
        groups: dict[object, list[str]] = {}
        for name, node in self.model.graph.parameters.items():
            if node.outputs[0].requires_grad and not isinstance(
                self.constraints.for_parameter(name), ParameterPlacement
            ):
                groups.setdefault(found.assignment.parameters[name].used, []).append(name)
        best = found
        for names in groups.values():
            options = {name: self._modes(name, found.assignment.parameters[name].used) for name in names}
            for kind in dict.fromkeys(kind for modes in options.values() for kind in modes):
                chosen = {n: o[kind] if kind in o else best.assignment.parameters[n] for n, o in options.items()}
                parameters = {**best.assignment.parameters, **chosen}
                assignment = replace(best.assignment, parameters=parameters)
                prediction = self._price(assignment)
                if (prediction.fits or not best.prediction.fits) and prediction.seconds < best.prediction.seconds:
                    best = Candidate("search", assignment, prediction, best.method, None, found.along)
        return best

    def _modes(self, name: str, used: Placements) -> dict[object, ParameterPlacement]:
        """Storage modes of a parameter by stage and by the axes that it cuts."""
        found: dict[object, ParameterPlacement] = {}
        for mode in self.model.modes_of(self.model.graph.parameters[name].outputs[0], used):
            state = mode.placement.state
            cut = tuple(axis for axis, (a, b) in enumerate(zip(used, state, strict=True)) if a != b)
            found[mode.name, cut] = mode.placement
        return found

    def _restricted(self, constraints: Constraints, along: tuple[int, ...] = ()) -> _Restricted:
        """Compiled programs are shared by constraints that leave the same states (data parallel and the ZeRO stages)."""
        key = (constraints.strategy, id(constraints.parameters), id(constraints.inputs), along)
        if key not in self._programs:
            if along not in self._models:
                assert self.pricing.coding is not None
                self._models[along] = self.model.carried(self.pricing.coding, along)
            allowed = masks(self.model, constraints, self.roles)
            same = (along, *sorted((str(v), m.tobytes()) for v, m in allowed.items()))
            shared = self._programs.get(same)
            if shared is None:
                shared = self._programs[same] = _Restricted(self._models[along], allowed, constraints)
            made = object.__new__(_Restricted)
            made.__dict__.update(shared.__dict__, choose=modes_left(constraints, self.mesh))
            self._programs[key] = made
        return self._programs[key]

    def squeezed(self, found: Candidate, moves: Moves) -> Candidate:
        """A candidate that does not fit, with as much computed again or moved away as it takes to fit, at its new price.

        Raises:
            BudgetError: it cannot be made to fit.
        """
        made = squeeze(self.pricing, found.assignment, found.prediction, moves)
        return replace(found, prediction=self._repriced(found.assignment, made, details=False), squeezed=made)

    def details(self, found: Candidate) -> Prediction:
        """The price of a candidate with layers and timeline."""
        if found.squeezed is None:
            return self.pricing.price(found.assignment)
        return self._repriced(found.assignment, found.squeezed, details=True)

    def _repriced(self, assignment: Assignment, made: Squeezed, details: bool) -> Prediction:
        priced = self.pricing.price(assignment, details=details, repeats=made.repeats, waits=made.waits)
        return replace(priced, memory=made.memory)

    def least_bytes(self, found: Candidate, moves: Moves) -> list[int]:
        """Bytes per class of devices with which the candidate can still be made to fit."""
        return least_bytes(self.pricing, found.assignment, found.prediction, moves)

    def within_memory(self, fastest: Candidate) -> list[Candidate]:
        """Candidates that trade time for memory: lambda raised until one fits, then bisected.

        The last resort weighs memory alone; if that does not fit either, nothing in reach does.
        """
        unit = fastest.prediction.seconds / max(1.0, fastest.prediction.peak)
        found: list[Candidate] = []

        def at(exponent: float) -> Candidate:
            found.append(self.candidate("search", self.constraints, 0.3, unit * 2.0**exponent, fastest.along))
            return found[-1]

        low, high = -6.0, None
        for exponent in (-3.0, 0.0, 4.0, 9.0, 20.0):
            if at(exponent).prediction.fits:
                high = exponent
                break
            low = exponent
        if high is not None:
            for _ in range(4):
                middle = (low + high) / 2
                if at(middle).prediction.fits:
                    high = middle
                else:
                    low = middle
        return found


def factorizations(devices: int, ndim: int) -> list[tuple[int, ...]]:
    """Shapes of `ndim` axes, each of at least 2 devices, with `devices` in all (`ndim` = 1: also 1 device)."""
    if ndim == 1:
        return [(devices,)]
    return [
        (p, *rest)
        for p in range(2, devices // 2 + 1)
        if devices % p == 0
        for rest in factorizations(devices // p, ndim - 1)
        if math.prod(rest) * p == devices and min(rest) >= 2
    ]
