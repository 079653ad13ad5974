"""A good assignment for problems too wide to eliminate and too large for an integer programme.

Problem    as in `search`: the least sum of tables over discrete variables.
Method     fix some variables to their present states, so that what is left can be eliminated with small tables, and solve
           that exactly; repeat with other fixed variables, chosen at random among those that make tables large. `cutset`
Guarantee  never worse than the start, and each round's result is optimal in the variables that it leaves free; no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weft.planner.search import Factor, Infeasible, Solution, Table, Variable, eliminate, read_back

__all__ = ["cutset", "neighbourhood"]

ROUNDS = 12
PATIENCE = 4  # rounds without improvement before giving up
LIMIT = 300_000  # entries of the largest table in a round


def neighbourhood(
    sizes: Mapping[Variable, int],
    factors: Sequence[Factor],
    tables: Sequence[Table],
    start: Mapping[Variable, int] | None = None,
    *,
    limit: int = LIMIT,
    seed: int = 0,
) -> Solution:
    """Improve `start` (by default every variable's cheapest state) until rounds stop helping.

    Raises:
        Infeasible: no round reached an allowed assignment.
    """
    rng = np.random.default_rng(seed)
    states = dict(start) if start is not None else _cheapest(sizes, factors, tables)
    cost, idle = _cost(states, factors, tables), 0
    for _ in range(ROUNDS):
        fixed, order = cutset(sizes, [f.scope for f in factors], limit, rng)
        free = {v: n for v, n in sizes.items() if v not in fixed}
        scopes, reduced = [], []
        for factor, table in zip(factors, tables, strict=True):
            scopes.append(tuple(v for v in factor.scope if v in free))
            reduced.append(table[tuple(states[v] if v in fixed else slice(None) for v in factor.scope)])
        total, steps = eliminate(free, scopes, reduced, order)
        found = float(total)
        idle = 0 if found < cost * (1 - 1e-9) or not np.isfinite(cost) else idle + 1
        if found < cost:
            cost, states = found, {v: states[v] for v in fixed}
            read_back(steps, states)
        if idle >= PATIENCE or not fixed:
            break
    if not np.isfinite(cost):
        raise Infeasible("no allowed assignment was found")
    return Solution(states, cost, "neighbourhood search with exact subproblems", float("nan") if fixed else 0.0)


def cutset(
    sizes: Mapping[Variable, int], scopes: Sequence[tuple[Variable, ...]], limit: int, rng: np.random.Generator
) -> tuple[set[Variable], list[Variable]]:
    """Variables to fix, and an elimination order of the others in which no table exceeds `limit` entries."""
    neighbours: dict[Variable, set[Variable]] = {v: set() for v in sizes}
    for scope in scopes:
        for v in scope:
            neighbours[v].update(u for u in scope if u != v)

    def weight(v: Variable) -> float:
        return float(np.prod([float(sizes[u]) for u in (v, *neighbours[v])]))

    def drop(v: Variable) -> set[Variable]:
        around = neighbours.pop(v)
        del weights[v]
        for u in around:
            neighbours[u].discard(v)
        return around

    weights = {v: weight(v) for v in sizes}
    fixed: set[Variable] = set()
    order: list[Variable] = []
    while weights:
        v = min(weights, key=weights.__getitem__)
        if weights[v] > limit:
            crowd = sorted(neighbours, key=lambda u: -len(neighbours[u]))[:6]
            v = crowd[int(rng.integers(len(crowd)))]
            fixed.add(v)
            around = drop(v)
        else:
            order.append(v)
            around = drop(v)
            for u in around:
                neighbours[u] |= around - {u}
        for u in around:
            weights[u] = weight(u)
    return fixed, order


def _cheapest(sizes: Mapping[Variable, int], factors: Sequence[Factor], tables: Sequence[Table]) -> dict[Variable, int]:
    own = {v: np.zeros(n) for v, n in sizes.items()}
    for factor, table in zip(factors, tables, strict=True):
        if len(factor.scope) == 1:
            own[factor.scope[0]] += table
    return {v: int(cost.argmin()) for v, cost in own.items()}


def _cost(states: Mapping[Variable, int], factors: Sequence[Factor], tables: Sequence[Table]) -> float:
    return sum(float(t[tuple(states[v] for v in f.scope)]) for f, t in zip(factors, tables, strict=True))
