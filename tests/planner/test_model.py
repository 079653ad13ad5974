"""The tables against the pricing, and what makes the search short against the search without it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.planner.conftest import plain_cluster

from weft.graph.graph import TensorSpec
from weft.placement.axes import find_cuts
from weft.placement.layout import Mesh, Partial, Replicate, Shard
from weft.planner.costs import Costs
from weft.planner.model import Model
from weft.planner.optimizer import OptimizerCost
from weft.planner.prepared import Prepared
from weft.planner.price import Pricing
from weft.planner.roles import Roles
from weft.planner.search import Program


def made(graph, shape, **cluster):
    mesh = Mesh(shape)
    prepared = Prepared(graph, find_cuts(graph, finest=mesh.size))
    return Model(prepared, Costs(plain_cluster(mesh.size, **cluster), mesh), OptimizerCost.of("AdamW"))


def solved(model, mu, weight=0.0, repeats=()):
    tables = model.tables(mu, weight)
    return Program(model.sizes, model.factors, repeats).solve([tables[f.key] for f in model.factors])


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)])
def test_the_sum_of_tables_is_the_price_without_overlap(gpt_graph, shape):
    model = made(gpt_graph, shape, overlap=0.0)
    solution = solved(model, mu=1.0)
    assignment = model.assignment(solution, 1.0, 0.0)
    pricing = Pricing(model.prepared, Roles(model.prepared), model.costs, model.optimizer)
    price = pricing.price(assignment)
    assert price.seconds == pytest.approx(solution.cost, rel=0.05)
    assert price.seconds == pytest.approx(price.compute + price.communication + price.update, rel=0.02)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_interpolated_boxings_cost_what_boxings_do(shape):
    """Also those that send nothing and only write zeros or a multiple: a partial sum made of a whole is not free."""
    mesh, value = Mesh(shape), TensorSpec((480, 480), torch.float32)
    costs = Costs(plain_cluster(mesh.size, latency=1e-5), mesh)
    along = (Replicate(), Shard(0), Shard(1), Partial(), Partial("avg"))
    every = list(itertools.product(along, repeat=mesh.ndim))
    table = costs.box_table(value, every, every)
    exact = [[costs.boxing(value.shape, 4, a, b).seconds for b in every] for a in every]
    np.testing.assert_allclose(table, exact, rtol=0.2)  # paths are those of stand-ins
    whole = every.index((Replicate(),) * mesh.ndim)
    owed = every.index((Partial(),) * mesh.ndim)
    assert 0 < table[whole, owed] < 0.2 * table[owed, whole]


def test_folding_changes_nothing(deep_graph):
    model = made(deep_graph, (2, 2))
    assert deep_graph.repeats
    for mu, weight in ((0.0, 0.0), (1.0, 0.0), (0.3, 1e-9)):
        whole, folded = solved(model, mu, weight), solved(model, mu, weight, model.repeats)
        assert "folded" in folded.method
        assert folded.cost == pytest.approx(whole.cost, rel=1e-12)


@pytest.mark.parametrize("link", [1e6, 1e8, 1e11])
def test_dropping_needless_states_costs_nothing(gpt_graph, link):
    model = made(gpt_graph, (3,), link=link)
    tables = model.tables(0.5, 0.0)
    full = Program(model.sizes, model.factors).solve([tables[f.key] for f in model.factors])
    left = {name: np.flatnonzero(model.undominated(name, None)) for name in model.templates}
    cut = {v: len(left[v]) if v in left else n for v, n in model.sizes.items()}
    small = [tables[f.key][np.ix_(*(left.get(v, np.arange(model.sizes[v])) for v in f.scope))] for f in model.factors]
    short = Program(cut, model.factors).solve(small)
    assert sum(cut.values()) < sum(model.sizes.values())
    assert short.cost == pytest.approx(full.cost, rel=1e-3)


def test_no_assignment_drawn_at_random_is_better(gpt_graph):
    model = made(gpt_graph, (2,))
    tables = model.tables(0.3, 0.0)
    best = solved(model, 0.3).cost
    rng = np.random.default_rng(0)
    for _ in range(200):
        states = {v: int(rng.integers(n)) for v, n in model.sizes.items()}
        cost = sum(float(tables[f.key][tuple(states[v] for v in f.scope)]) for f in model.factors)
        assert cost >= best * (1 - 1e-12)


def test_calls_without_gradient_stay_whole_and_free(gpt_graph):
    model = made(gpt_graph, (2,))
    positions = next(node.name for node in gpt_graph.calls if node.op == "arange")
    assert positions in model.whole
    assert not any(positions in factor.scope and len(factor.scope) > 1 for factor in model.factors)
