"""Rules that compare messages get the mean gradient of each process's own samples, however many it has."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan, plan_of
from tests.runtime.test_equal import engine_of
from torch import Tensor, nn
from torch.nn import functional as F

from weft.comm import Combine, Exchange, Median, TrimmedMean
from weft.graph import capture
from weft.runtime.batches import split
from weft.runtime.engine import Job

SGD = partial(torch.optim.SGD, lr=1.0)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.line(x), y)


def regression() -> nn.Module:
    torch.manual_seed(0)
    return Regression().double()


def alike(rows: int) -> tuple[Tensor, Tensor]:
    """The same sample so many times: every process's mean gradient is the gradient, and any rule must give it."""
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(1, 4, generator=generator).double(), torch.randn(1, 2, generator=generator).double()
    return one[0].repeat(rows, 1), one[1].repeat(rows, 1)


def moved(plan: HandPlan, rule: Combine, rows: int, parts: int = 1) -> tuple[str, Tensor, float]:
    """What a step on so many rows says, by how much the weights move, and the loss of a look at the gradients alone."""
    model, batch = regression(), alike(rows)
    engine = engine_of(plan, model, SGD, exchange=Exchange(combine=rule))
    jobs = [Job(leaves, share) for leaves, share in split(list(batch), parts)]
    for job in jobs:
        engine.add(capture(model, tuple(job.leaves)))
    told, before = "", engine.whole("line.weight").clone()
    try:
        engine.step(jobs)
    except ValueError as error:
        told = str(error)
    change = engine.whole("line.weight") - before
    loss = engine.gradients(jobs)[0]
    assert engine.coded is not None
    engine.coded.exchange.close()
    return told, change, loss


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(1)])
@pytest.mark.parametrize(("rows", "weights", "parts"), [(4, None, 1), (8, (6, 1, 1), 1), (7, None, 2)])
def test_any_rule_gives_the_gradient_that_all_have(
    pool: Any, rule: Combine, rows: int, weights: Any, parts: int
) -> None:
    model = regression()
    model(*alike(rows)).backward()
    plan = plan_of(regression(), alike(8 if weights else 6), (3,), 0, weights)
    for told, change, _ in pool(3).run(moved, plan, rule, rows, parts):
        assert not told
        torch.testing.assert_close(change, -model.line.weight.grad, rtol=1e-10, atol=0)


def test_a_process_without_a_sample_has_no_vote(pool: Any) -> None:
    plan = plan_of(regression(), alike(6), (3,), 0)
    for told, change, loss in pool(3).run(moved, plan, Median(), 2):
        assert "no sample for 1 of 3 processes" in told and "drop_last" in told
        assert not change.any() and loss > 0
