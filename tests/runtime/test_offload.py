"""Plans whose activations wait on disk: the bits of the same plan without limits, within bytes that nothing else could keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan
from tests.runtime.test_budget import SGD, gpt, tokens, trained

from weft.cluster import Cluster, Tier
from weft.errors import BudgetError
from weft.graph import capture
from weft.planner import Plan
from weft.runtime import run

DISK = Tier(bandwidth=1e9, latency=1e-5, name="disk")


def squeezed(strategy: str) -> Plan:
    """A plan within bytes that recomputation alone cannot reach, or only at more seconds, on processes that may use a disk."""
    local = Cluster.local(processes=2)
    cluster = replace(local, devices=tuple(replace(device, offload=DISK, overlap=0.5) for device in local))
    graph = capture(gpt(), tokens())
    plan = lambda memory, **moves: Plan.manual(graph, cluster=cluster, strategy=strategy, memory=memory, **moves)
    roomy = plan(int(0.97 * plan(None).prediction.peak))
    budget = int(1.01 * roomy.squeezes[0].least)
    alone, made = plan(budget, offload=False).prediction, plan(budget)
    assert not alone.fits or (strategy == "dp" and made.prediction.seconds < alone.seconds)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dp", "zero-3"])
def test_a_run_keeps_to_a_plan_that_offloads(pool: Any, strategy: str) -> None:
    plan = squeezed(strategy)
    (squeeze,) = plan.squeezes
    assert squeeze.moved and squeeze.tier == replace(DISK, overlap=0.5)  # that of the device
    free = pool(2).run(trained, HandPlan(plan.assignment, plan.graph), gpt, [tokens()], None)
    assert free[0].peak > squeeze.budget
    with run(plan, gpt(), SGD) as trainer:
        losses = [trainer.step(tokens()) for _ in range(5)]
        assert losses == free[0].losses[:5]
        assert 0 < trainer.peak <= squeeze.budget
        loss, gradients = trainer.gradients(tokens())
        assert loss == free[0].losses[5]
        for name, gradient in free[0].gradients.items():
            assert torch.equal(gradients[name], gradient), name
    if strategy == "zero-3":  # what is made from gathered weights cannot be made again
        without = replace(plan, squeezes=(replace(squeeze, tier=None),))
        with pytest.raises(BudgetError), run(without, gpt(), SGD) as trainer:
            trainer.step(tokens())
