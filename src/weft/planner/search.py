"""Exact minimisation of a sum of small tables over discrete variables.

Problem    variables v with states 0..n[v]-1, tables f over a few of them each. Choose a state for every variable so that
               sum of f(states of f's variables)
           is least. The planner's variables are operators, their states signatures; the tables hold seconds.
Method     variable elimination in the (min, +) semiring, in the order that keeps the next table small:   `eliminate`
               g(rest) = min over v of the sum of the tables that mention v
           then the choices read back in reverse:                                                      `read_back`
           Repeated blocks: one block's interior is eliminated once, which leaves a matrix
               M(interface of the previous copy, interface of this copy; shared outside variables),
           and the copies are chained by (min, +) products, whose argmins give every copy's interface:   `power`
           If a table would outgrow `limit` entries, the same problem as an integer programme (HiGHS):    `integer`
Guarantee  the minimum, whichever way is taken, unless HiGHS runs into its time limit (`Solution.gap` says how far).
Source     Dechter, "Bucket elimination", Artificial Intelligence 113, 1999. Chaining and folding are ours.

Infinite entries mark forbidden combinations; a problem without a finite assignment raises `Infeasible`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Factor", "Infeasible", "Program", "Solution", "TooWide", "integer"]

Variable: TypeAlias = Hashable
Table: TypeAlias = NDArray[np.float64]

LIMIT = 3_000_000  # entries of the largest table that elimination may build (24 MB); a wider problem takes minutes


class Infeasible(ValueError):
    """No assignment has a finite cost: the constraints contradict each other."""


class TooWide(ValueError):
    """Elimination would need a table of more than `limit` entries; `integer` may still solve the problem."""


@dataclass(frozen=True)
class Factor:
    """A table over some variables. Factors with the same `key` have the same table, in every solve of a `Program`.

    `scope` lists different variables, in the order of the table's axes.
    """

    scope: tuple[Variable, ...]
    key: Hashable


@dataclass(frozen=True)
class Solution:
    """A state per variable, the total cost, the method ("elimination", ...), and cost minus proven lower bound."""

    states: Mapping[Variable, int]
    cost: float
    method: str
    gap: float = 0.0


@dataclass(frozen=True)
class _Step:
    """Elimination of one variable: the arg-minimum for every assignment of `rest`."""

    variable: Variable
    rest: tuple[Variable, ...]
    best: NDArray[np.int32]


# ------------------------------------------------------------------------------------------------------- elimination


def elimination_order(
    sizes: Mapping[Variable, int], scopes: Sequence[tuple[Variable, ...]], keep: Sequence[Variable], limit: int = LIMIT
) -> list[Variable]:
    """Order in which to eliminate all variables but `keep`: always the one whose joint table is smallest.

    Ties go to the variable that adds fewer fill edges, then to the earlier one.

    Raises:
        TooWide: some joint table would have more than `limit` entries.
    """
    kept = set(keep)
    neighbours: dict[Variable, set[Variable]] = {v: set() for v in sizes}
    for scope in (*scopes, tuple(keep)):
        for v in scope:
            neighbours[v].update(scope)
    for v, around in neighbours.items():
        around.discard(v)

    def weight(v: Variable) -> float:
        joint = float(sizes[v])
        for u in neighbours[v]:
            joint *= sizes[u]
        return joint

    weights = {v: weight(v) for v in sizes if v not in kept}
    order: list[Variable] = []
    while weights:
        least = min(weights.values())
        candidates = [v for v, w in weights.items() if w == least]
        v = min(candidates[:8], key=lambda c: _fill(c, neighbours)) if len(candidates) > 1 else candidates[0]
        if least > limit:
            raise TooWide(f"eliminating {v!r} would join {len(neighbours[v]) + 1} variables: {least:.3g} entries")
        order.append(v)
        around = neighbours.pop(v)
        del weights[v]
        for u in around:
            neighbours[u] |= around
            neighbours[u] -= {u, v}
        for u in around:
            if u in weights:
                weights[u] = weight(u)
    return order


def _fill(v: Variable, neighbours: Mapping[Variable, set[Variable]]) -> int:
    around = neighbours[v]
    return sum(len(around - neighbours[u]) - 1 for u in around)


def eliminate(
    sizes: Mapping[Variable, int],
    scopes: Sequence[tuple[Variable, ...]],
    tables: Sequence[Table],
    order: Sequence[Variable],
    keep: Sequence[Variable] = (),
) -> tuple[Table, list[_Step]]:
    """Minimise over the variables of `order`; returns the table over `keep` (axes in that order) and the steps taken."""
    live: dict[int, tuple[tuple[Variable, ...], Table]] = dict(enumerate(zip(scopes, tables, strict=True)))
    holding: dict[Variable, set[int]] = {v: set() for v in sizes}
    for number, (scope, _) in live.items():
        for v in scope:
            holding[v].add(number)
    steps: list[_Step] = []
    fresh = len(live)
    for v in order:
        mine = [live.pop(number) for number in sorted(holding[v])]
        numbers = set(holding[v])
        rest = tuple(dict.fromkeys(u for scope, _ in mine for u in scope if u != v))
        joint = _join([*mine], (*rest, v), sizes)
        best = joint.argmin(axis=-1)
        least = np.take_along_axis(joint, best[..., None], axis=-1)[..., 0]
        steps.append(_Step(v, rest, best.astype(np.int32)))
        for u in rest:
            holding[u] -= numbers
            holding[u].add(fresh)
        del holding[v]
        live[fresh] = (rest, least)
        fresh += 1
    return _join(list(live.values()), tuple(keep), sizes), steps


def _join(
    parts: list[tuple[tuple[Variable, ...], Table]], scope: tuple[Variable, ...], sizes: Mapping[Variable, int]
) -> Table:
    """Sum of tables, broadcast to the variables of `scope`."""
    total = np.zeros([sizes[v] for v in scope])
    axis = {v: number for number, v in enumerate(scope)}
    for variables, table in parts:
        if len(variables) > 1:
            by_axis = sorted(range(len(variables)), key=lambda i: axis[variables[i]])
            table = table.transpose(by_axis)
            variables = tuple(variables[i] for i in by_axis)
        shape = [1] * len(scope)
        for v, n in zip(variables, table.shape, strict=True):
            shape[axis[v]] = n
        total += table.reshape(shape)
    return total


def read_back(steps: Sequence[_Step], states: dict[Variable, int]) -> None:
    """Extend `states` of the kept variables to the eliminated ones, in place."""
    for step in reversed(steps):
        states[step.variable] = int(step.best[tuple(states[u] for u in step.rest)])


# ------------------------------------------------------------------------------------------------------------ chains


@dataclass(frozen=True)
class Segment:
    """`length` copies in a row as one table (in, out, shared); `via` is the best interface in the middle."""

    table: Table
    length: int
    left: Segment | None = None
    right: Segment | None = None
    via: NDArray[np.int32] | None = None

    def path(self, start: int, stop: int, shared: int) -> list[int]:
        """The interface states after copies 1 .. length - 1 when the chain goes from `start` to `stop`."""
        if self.via is None or self.left is None or self.right is None:
            return []
        middle = int(self.via[start, stop, shared])
        return [*self.left.path(start, middle, shared), middle, *self.right.path(middle, stop, shared)]


def _chain(left: Segment, right: Segment) -> Segment:
    """(min, +) product over the interface between two segments, for every shared state on its own."""
    n_in, n_mid, n_shared = left.table.shape
    n_out = right.table.shape[1]
    table = np.empty((n_in, n_out, n_shared))
    via = np.empty((n_in, n_out, n_shared), np.int32)
    rows = max(1, 2_000_000 // max(1, n_mid * n_out * n_shared))
    for low in range(0, n_in, rows):
        joint = left.table[low : low + rows, :, None, :] + right.table[None, :, :, :]
        via[low : low + rows] = joint.argmin(axis=1)
        table[low : low + rows] = joint.min(axis=1)
    return Segment(table, left.length + right.length, left, right, via)


def power(matrix: Table, length: int) -> Segment:
    """The (min, +) power of a matrix (interface, interface, shared), by repeated squaring."""
    square, result = Segment(matrix, 1), None
    while True:
        if length & 1:
            result = square if result is None else _chain(result, square)
        length >>= 1
        if not length:
            assert result is not None
            return result
        square = _chain(square, square)


@dataclass(frozen=True)
class _Fold:
    """How one repeat is folded: copies 1.. of a block, each a shift of the next.

    Attributes:
        copies: variables per copy, copy 0 included; position i of every copy is the same operator.
        interface: positions whose variables the next copy, or what follows the last copy, mentions.
        shared: outside variables that every copy mentions.
        factors: the factors of copy 1 (indices), which stand for those of copies 2.. too.
        order: elimination order of copy 1's interior.
    """

    copies: tuple[tuple[Variable, ...], ...]
    interface: tuple[int, ...]
    shared: tuple[Variable, ...]
    factors: tuple[int, ...]
    order: tuple[Variable, ...]

    def ends(self, copy: int) -> tuple[Variable, ...]:
        return tuple(self.copies[copy][i] for i in self.interface)

    @property
    def interior(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.copies[0])) if i not in self.interface)


def _fold(
    sizes: Mapping[Variable, int],
    factors: Sequence[Factor],
    copies: tuple[tuple[Variable, ...], ...],
    limit: int,
) -> tuple[_Fold, set[int]] | None:
    """Fold copies 1.. of a repeat and the factors that this takes care of; None where the copies are not alike.

    A factor belongs to the last copy that it mentions. Copy k's factors, with their variables named relative to k, must be
    the same for all k >= 1; factors that only the last copy has are what follows it and stay outside.
    """
    place = {v: (copy, i) for copy, variables in enumerate(copies) for i, v in enumerate(variables)}
    count = len(copies)
    if count < 3 or any(sizes[v] != sizes[copies[0][i]] for v, (_, i) in place.items()):
        return None
    by_copy: list[dict[Hashable, list[int]]] = [{} for _ in copies]
    for number, factor in enumerate(factors):
        held = [place[v][0] for v in factor.scope if v in place]
        if not held:
            continue
        last = max(held)
        relative = tuple((last - place[v][0], place[v][1]) if v in place else ("outside", v) for v in factor.scope)
        by_copy[last].setdefault((relative, factor.key), []).append(number)
    common = {name for name in by_copy[1] if all(len(c.get(name, ())) == len(by_copy[1][name]) for c in by_copy[1:])}
    taken = {number for c in by_copy[1:] for name in common for number in c[name]}
    interface: set[int] = set()
    shared: dict[Variable, None] = {}
    for name in common:
        for number in by_copy[1][name]:
            for v in factors[number].scope:
                if v not in place:
                    shared[v] = None
                elif place[v][0] == 0:
                    interface.add(place[v][1])
    for c in by_copy[1:]:
        for name, numbers in c.items():
            if name in common:
                continue
            for v in (v for number in numbers for v in factors[number].scope if v in place and place[v][0] > 0):
                if place[v][0] < count - 1:
                    return None
                interface.add(place[v][1])
    ends = tuple(sorted(interface))
    joint = np.prod([float(sizes[copies[0][i]]) for i in ends]) if ends else 1.0
    if joint**2 * np.prod([float(sizes[v]) for v in shared] or [1.0]) > min(limit, 4_000_000):
        return None
    mine = tuple(sorted(number for name in common for number in by_copy[1][name]))
    keep = (*(copies[0][i] for i in ends), *(copies[1][i] for i in ends), *shared)
    local = {v: sizes[v] for v in (*keep, *copies[1])}
    order = elimination_order(local, [factors[number].scope for number in mine], keep, limit)
    return _Fold(copies, ends, tuple(shared), mine, tuple(order)), taken


# ----------------------------------------------------------------------------------------------------------- programs


class Program:
    """A problem's structure, analysed once; `solve` takes the tables.

    Args:
        sizes: number of states per variable.
        factors: scopes and keys. Factors with equal keys must get equal tables.
        repeats: for each repeated block, the variables of every copy in corresponding order.
        limit: entries of the largest table to build.
    """

    def __init__(
        self,
        sizes: Mapping[Variable, int],
        factors: Sequence[Factor],
        repeats: Sequence[Sequence[Sequence[Variable]]] = (),
        limit: int = LIMIT,
    ):
        self.sizes, self.factors = dict(sizes), tuple(factors)
        self._folds: list[_Fold] = []
        taken: set[int] = set()
        for copies in repeats:
            try:
                folded = _fold(self.sizes, self.factors, tuple(tuple(c) for c in copies), limit)
            except TooWide:
                folded = None
            if folded is not None:
                self._folds.append(folded[0])
                taken |= folded[1]
        hidden = {v for f in self._folds for copy in f.copies[1:-1] for v in copy}
        hidden |= {f.copies[-1][i] for f in self._folds for i in f.interior}
        self._outer = tuple(number for number in range(len(self.factors)) if number not in taken)
        self._outer_sizes = {v: n for v, n in self.sizes.items() if v not in hidden}
        self._scopes = [self.factors[number].scope for number in self._outer]
        self._scopes += [(*f.ends(0), *f.ends(-1), *f.shared) for f in self._folds]
        self._order = elimination_order(self._outer_sizes, self._scopes, (), limit)

    @property
    def method(self) -> str:
        folded = f", {sum(len(f.copies) - 1 for f in self._folds)} block copies folded" if self._folds else ""
        return f"elimination of {len(self.sizes)} variables{folded}"

    def solve(self, tables: Sequence[Table]) -> Solution:
        """The least-cost states for these tables (one per factor, in order).

        Raises:
            Infeasible: every assignment has a forbidden combination.
        """
        chains, inner = [], []
        for fold in self._folds:
            keep = (*fold.ends(0), *fold.ends(1), *fold.shared)
            local = {v: self.sizes[v] for v in (*keep, *fold.copies[1])}
            scopes = [self.factors[number].scope for number in fold.factors]
            matrix, steps = eliminate(local, scopes, [tables[number] for number in fold.factors], fold.order, keep)
            ends = [self.sizes[v] for v in fold.ends(0)]
            joint, shared = int(np.prod(ends or [1])), [self.sizes[v] for v in fold.shared]
            chain = power(matrix.reshape(joint, joint, -1), len(fold.copies) - 1)
            chains.append(chain)
            inner.append((fold, chain, steps, ends, shared))
        all_tables = [tables[number] for number in self._outer]
        all_tables += [c.table.reshape(*e, *e, *s) for (_, c, _, e, s) in inner]
        total, steps = eliminate(self._outer_sizes, self._scopes, all_tables, self._order)
        cost = float(total)
        if not np.isfinite(cost):
            raise Infeasible("no assignment satisfies all constraints")
        states: dict[Variable, int] = {}
        read_back(steps, states)
        for fold, chain, steps, ends, shared in inner:
            _unfold(fold, chain, steps, ends, shared, states)
        return Solution(states, cost, self.method)


def _unfold(
    fold: _Fold, chain: Segment, steps: list[_Step], ends: list[int], shared: list[int], states: dict[Variable, int]
) -> None:
    """States of every variable of copies 1.. from the states of copy 0 and of the last copy's interface."""
    flat = lambda variables, shape: int(np.ravel_multi_index([states[v] for v in variables], shape)) if shape else 0
    start, stop = flat(fold.ends(0), ends), flat(fold.ends(-1), ends)
    middle = chain.path(start, stop, flat(fold.shared, shared))
    for copy, interface in enumerate(middle, start=1):
        here = np.unravel_index(interface, ends) if ends else ()
        states.update({v: int(s) for v, s in zip(fold.ends(copy), here, strict=True)})
    template, before = fold.copies[1], fold.copies[0]
    for copy in range(1, len(fold.copies)):
        local = {v: states[v] for v in fold.shared}
        local.update({before[i]: states[fold.copies[copy - 1][i]] for i in fold.interface})
        local.update({template[i]: states[fold.copies[copy][i]] for i in fold.interface})
        read_back(steps, local)
        states.update({fold.copies[copy][i]: local[template[i]] for i in fold.interior})


# ---------------------------------------------------------------------------------------------------- integer programme


def integer(
    sizes: Mapping[Variable, int], factors: Sequence[Factor], tables: Sequence[Table], seconds: float = 60.0
) -> Solution:
    """The same minimum as an integer programme by HiGHS, for problems too wide to eliminate.

        variables    x[v, s] in {0, 1}, y[f, a] in [0, 1] for every finite entry a of a table over two or more variables
        minimise     sum of unary costs x + sum of table entries y
        subject to   sum over s of x[v, s] = 1;   for v in f: sum of y[f, a] over a with a[v] = s equals x[v, s]

    Raises:
        Infeasible: no assignment is allowed, or none was found in `seconds`.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    starts = np.concatenate([[0], np.cumsum(list(sizes.values()))]).astype(int)
    first = dict(zip(sizes, starts[:-1].tolist(), strict=True))
    states = int(starts[-1])
    cost = [np.zeros(states)]
    upper = [np.ones(states)]
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float64]] = []
    right: list[NDArray[np.float64]] = []

    def constrain(row: NDArray, column: NDArray, value: float | NDArray) -> None:
        rows.append(np.asarray(row))
        columns.append(np.asarray(column))
        values.append(np.broadcast_to(np.asarray(value, float), np.shape(column)))

    height = 0
    for v, n in sizes.items():
        constrain(np.full(n, height), first[v] + np.arange(n), 1.0)
        right.append(np.ones(1))
        height += 1
    width, constant = states, 0.0
    for factor, table in zip(factors, tables, strict=True):
        if not factor.scope:
            constant += float(table)
        elif len(factor.scope) == 1:
            span = slice(first[factor.scope[0]], first[factor.scope[0]] + table.size)
            cost[0][span] += np.where(np.isfinite(table), table, 0.0)
            upper[0][span][~np.isfinite(table)] = 0.0
        else:
            entries = np.argwhere(np.isfinite(table))
            number = width + np.arange(len(entries))
            cost.append(table[np.isfinite(table)])
            upper.append(np.ones(len(entries)))
            for axis, v in enumerate(factor.scope):
                n = sizes[v]
                constrain(height + entries[:, axis], number, 1.0)
                constrain(height + np.arange(n), first[v] + np.arange(n), -1.0)
                right.append(np.zeros(n))
                height += n
            width += len(entries)
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(height, width)
    ).tocsr()
    level = np.concatenate(right)
    scale = max(1e-30, float(np.abs(np.concatenate(cost)).max(initial=0.0)))
    result = milp(
        np.concatenate(cost) / scale,
        integrality=np.concatenate([np.ones(states), np.zeros(width - states)]),
        bounds=Bounds(0.0, np.concatenate(upper)),
        constraints=LinearConstraint(matrix, level, level),
        options={"time_limit": seconds, "mip_rel_gap": 1e-9},
    )
    if result.x is None:
        raise Infeasible(f"HiGHS found no assignment: {result.message}")
    chosen = {v: int(np.argmax(result.x[first[v] : first[v] + n])) for v, n in sizes.items()}
    total = constant + sum(
        float(table[tuple(chosen[v] for v in factor.scope)])
        for factor, table in zip(factors, tables, strict=True)
        if factor.scope
    )
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
    return Solution(chosen, total, "integer programme (HiGHS)", max(0.0, total - constant - float(bound) * scale))
