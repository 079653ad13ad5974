"""Elimination, folding and the integer programme against brute force on small random problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.planner.neighbourhood import neighbourhood
from weft.planner.search import Factor, Infeasible, Program, TooWide, elimination_order, integer, power


def brute_force(sizes, factors, tables):
    """The least cost over all assignments."""
    names = list(sizes)
    best = np.inf
    for states in itertools.product(*(range(sizes[v]) for v in names)):
        chosen = dict(zip(names, states, strict=True))
        best = min(best, cost_of(chosen, factors, tables))
    return best


def cost_of(chosen, factors, tables):
    return sum(float(t[tuple(chosen[v] for v in f.scope)]) for f, t in zip(factors, tables, strict=True))


def random_problem(seed, variables=6, ternary=2, forbidden=0.15):
    rng = np.random.default_rng(seed)
    sizes = {f"v{i}": int(rng.integers(1, 4)) for i in range(variables)}
    factors = [Factor((v,), ("unary", v)) for v in sizes]
    for number in range(int(rng.integers(0, 2 * variables))):
        factors.append(Factor(tuple(rng.choice(list(sizes), 2, replace=False)), ("pair", number)))
    for number in range(ternary):
        factors.append(Factor(tuple(rng.choice(list(sizes), 3, replace=False)), ("triple", number)))
    tables = [rng.integers(0, 20, [sizes[v] for v in f.scope]).astype(float) for f in factors]
    for factor, table in zip(factors, tables, strict=True):
        if len(factor.scope) > 1:
            table[rng.random(table.shape) < forbidden] = np.inf
    return sizes, factors, tables


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_elimination_is_brute_force(seed):
    sizes, factors, tables = random_problem(seed)
    best = brute_force(sizes, factors, tables)
    if not np.isfinite(best):
        with pytest.raises(Infeasible):
            Program(sizes, factors).solve(tables)
        return
    solution = Program(sizes, factors).solve(tables)
    assert solution.cost == pytest.approx(best)
    assert cost_of(solution.states, factors, tables) == pytest.approx(best)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_integer_programme_is_brute_force(seed):
    sizes, factors, tables = random_problem(seed, variables=5, ternary=1)
    best = brute_force(sizes, factors, tables)
    if not np.isfinite(best):
        with pytest.raises(Infeasible):
            integer(sizes, factors, tables)
        return
    solution = integer(sizes, factors, tables)
    assert solution.cost == pytest.approx(best)
    assert cost_of(solution.states, factors, tables) == pytest.approx(best)
    assert solution.gap <= 1e-6 * max(1.0, best)


def repeated_problem(seed, copies):
    """A prefix, `copies` equal blocks of three variables that also read an outside variable, and a suffix."""
    rng = np.random.default_rng(seed)
    block = [int(n) for n in rng.integers(1, 4, 3)]
    sizes = {"pre": block[2], "mask": 2, "post": 3}
    sizes |= {(k, i): n for k in range(copies) for i, n in enumerate(block)}
    kinds: dict[str, np.ndarray] = {}
    factors, tables = [], []

    def add(kind, *scope):
        shape = [sizes[v] for v in scope]
        if kind not in kinds:
            kinds[kind] = rng.integers(0, 30, shape).astype(float)
            kinds[kind][rng.random(shape) < 0.1] = np.inf if len(shape) > 1 else 0.0
        factors.append(Factor(scope, kind))
        tables.append(kinds[kind])

    add("pre", "pre")
    add("mask", "mask")
    add("pre-mask", "pre", "mask")
    for k in range(copies):
        before = (k - 1, 2) if k else "pre"
        for i in range(3):
            add(f"unary{i}", (k, i))
        add("skip" if k else "skip of the first", before, (k, 0), (k, 2))
        add("inner", (k, 0), (k, 1))
        add("masked", (k, 1), "mask")
        add("outer", (k, 1), (k, 2))
    add("last", (copies - 1, 2), "post")
    add("last mask", (copies - 1, 1), "post")
    add("tied", "pre", "post")
    return sizes, factors, tables, [[[(k, i) for i in range(3)] for k in range(copies)]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_folded_is_unfolded(seed, copies):
    sizes, factors, tables, repeats = repeated_problem(seed, copies)
    folded = Program(sizes, factors, repeats)
    assert ("folded" in folded.method) == (copies >= 3)
    try:
        flat = Program(sizes, factors).solve(tables)
    except Infeasible:
        with pytest.raises(Infeasible):
            folded.solve(tables)
        return
    solution = folded.solve(tables)
    assert solution.cost == pytest.approx(flat.cost)
    assert set(solution.states) == set(sizes)
    assert cost_of(solution.states, factors, tables) == pytest.approx(flat.cost)


def test_unlike_copies_are_not_folded_wrongly():
    sizes, factors, tables, repeats = repeated_problem(3, 5)
    at = next(i for i, f in enumerate(factors) if f.scope == ((2, 1),))
    factors[at] = Factor(factors[at].scope, "another")
    tables[at] = tables[at] + np.arange(tables[at].size) * 100.0
    solution = Program(sizes, factors, repeats).solve(tables)
    assert solution.cost == pytest.approx(Program(sizes, factors).solve(tables).cost)
    assert cost_of(solution.states, factors, tables) == pytest.approx(solution.cost)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_power_is_the_product_of_all_paths(seed, length):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 50, (3, 3, 2)).astype(float)
    chain = power(matrix, length)
    assert chain.length == length
    for start, stop, shared in itertools.product(range(3), range(3), range(2)):
        path = [start, *chain.path(start, stop, shared), stop]
        assert len(path) == length + 1
        walked = sum(matrix[a, b, shared] for a, b in itertools.pairwise(path))
        assert walked == pytest.approx(chain.table[start, stop, shared])
    best = matrix[:, :, 0]
    for _ in range(length - 1):
        best = (best[:, :, None] + matrix[None, :, :, 0]).min(axis=1)
    assert np.array_equal(best, chain.table[:, :, 0])


def test_too_wide_is_said():
    sizes = dict.fromkeys(range(8), 10)
    scopes = [(i, j) for i in range(8) for j in range(i)]
    with pytest.raises(TooWide, match="entries"):
        elimination_order(sizes, scopes, (), limit=10_000)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_neighbourhood_search_never_loses_its_start(seed):
    sizes, factors, tables = random_problem(seed, variables=9, ternary=4, forbidden=0.0)
    best = Program(sizes, factors).solve(tables).cost
    start = dict.fromkeys(sizes, 0)
    found = neighbourhood(sizes, factors, tables, start, limit=12)
    assert best - 1e-9 <= found.cost <= cost_of(start, factors, tables)
    assert cost_of(found.states, factors, tables) == pytest.approx(found.cost)
    assert neighbourhood(sizes, factors, tables).cost == pytest.approx(best)
