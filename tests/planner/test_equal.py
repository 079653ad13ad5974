"""Plans carried out: every device as a thread, loss and gradients equal to one device in float64."""

from __future__ import annotations

import pytest
import torch
from tests.planner.conftest import gpt, plain_cluster, tokens

from weft.placement.boxing import box
from weft.placement.comms import run_threads
from weft.placement.layout import dual, take
from weft.placement.localize import localize
from weft.planner import Plan, plan

CASES = [
    (2, "dp"), (3, "zero-3"), (2, "tp"), (3, "tp+sp"), (4, "sp"), (4, ("dp", "tp")), (4, ("zero-3", "tp+sp")), (4, ("sp", "tp")),
]  # fmt: skip


def worst_error(made: Plan) -> float:
    """Largest absolute error of the loss and of every gradient over all devices."""
    model, batch = gpt(), tokens()
    loss = model(**batch)
    loss.backward()
    whole, graph, assignment = dict(model.named_parameters()), made.graph, made.assignment
    mesh = assignment.mesh

    def device(comms):
        local = localize(graph, assignment, comms.rank, comms)
        position = mesh.coordinates(comms.rank)
        with torch.no_grad():
            for name, leaf in local.leaves.items():
                leaf.copy_(take(whole[name].detach(), assignment.parameters[name].used, mesh, position))
        own = local(*batch.values())
        own.backward(torch.full_like(own, local.seed))
        errors = [float((local.whole_loss(own.detach()) - loss).abs())]
        for name, leaf in local.leaves.items():
            used = assignment.parameters[name].used
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            total = box(grad, tuple(map(dual, used)), used, comms, whole[name].shape)
            errors.append(float((total - take(whole[name].grad, used, mesh, position)).abs().max()))
        return max(errors)

    return max(run_threads(mesh, device))


@pytest.mark.parametrize(("devices", "strategy"), CASES)
def test_strategies_equal_one_device(gpt_graph, devices, strategy):
    assert worst_error(Plan.manual(gpt_graph, cluster=plain_cluster(devices), strategy=strategy)) < 1e-12


@pytest.mark.parametrize("link", [1e5, 1e8, 1e12])
def test_searched_plans_equal_one_device(gpt_graph, link):
    assert worst_error(plan(gpt_graph, cluster=plain_cluster(4, link=link))) < 1e-12


@pytest.mark.parametrize("strategy", ["dp", "tp"])
def test_weighted_shards_equal_one_device(gpt_graph, strategy):
    made = Plan.manual(gpt_graph, cluster=plain_cluster(2), strategy=strategy, weights=(3, 1))
    assert made.mesh.weights == ((3.0, 1.0),)
    assert worst_error(made) < 1e-12
