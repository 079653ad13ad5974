"""Arguments of another kind: an error that names the argument, what it got and what it wants, before anything runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import weft.memory as M
from weft.memory.compiled import backend

MODEL = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
BATCH = (torch.ones(4, 8), torch.ones(4, 4))
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), 0.1)


@pytest.fixture(scope="module")
def traced() -> M.Trace:
    return M.trace(MODEL, BATCH, F.mse_loss)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: M.limit(1, model="x"), r"limit: model must be a torch\.nn\.Module, got 'x'"),
        (lambda t: M.limit(1, model=nn.Linear), r"limit: model must .* got the class Linear"),
        (lambda t: M.limit(1, optimizer=torch.optim.SGD), r"limit: optimizer must be .* got the class SGD; make one"),
        (lambda t: M.limit(1, trace=3), r"limit: trace must be a weft\.memory\.Trace, got 3; weft\.memory\.trace"),
        (lambda t: M.limit(1, device="meta"), "limit: device must be cpu or cuda, got meta"),
        (lambda t: M.limit(1, model=nn.Linear(1, 1, device="meta")), "limit: device must be cpu or cuda, got meta"),
        (lambda t: M.limit(1, device="quux"), "limit: device must be cpu or cuda, got quux"),
        (lambda t: M.limit(1, policy=3), "policy must be given by its name, one of .*; got 3"),
        (lambda t: M.meter(3), r"meter: model must be a torch\.nn\.Module, got 3"),
        (lambda t: M.meter(MODEL.parameters()), "meter: model must .* got a Parameter"),
        (lambda t: M.meter(MODEL, [OPTIMIZER, torch.optim.SGD]), "meter: optimizer must be .* the class SGD"),
        (lambda t: M.meter(device="quux"), "meter: device must be cpu or cuda, got quux"),
        (lambda t: M.plan(t, 1e9, tier=12e9), r"plan: tier must be a weft\.memory\.Tier, got 12000000000\.0"),
        (lambda t: M.plan(MODEL, 1e9), "plan: trace must be .* got a Sequential"),
        (lambda t: M.least(3), "least: trace must be .* got 3"),
        (lambda t: M.check(t, M.plan(t)), r"check: schedule must be .* got a MemoryPlan; plan\.schedule is one"),
        (lambda t: M.check(t, M.plan(t).schedule, 3), "check: tiers must be a weft.memory.Tier, got 3"),
        (lambda t: M.frontier(t, "100KiB"), r"frontier: budgets must be several, as in \['100KiB'\]"),
        (lambda t: M.frontier(t, 3), "frontier: budgets must be several"),
        (lambda t: backend("1MiB", optimizer=3), "backend: optimizer must be .* got 3"),
        (lambda t: backend("1MiB", costs=3), "backend: costs must be .* got 3"),
        (lambda t: M.trace(3, BATCH), "trace: model must be .* got 3"),
        (lambda t: M.trace(MODEL, BATCH, F.mse_loss, 3), "trace: optimizer.* must be .* got 3"),
        (lambda t: M.trace(MODEL, BATCH, F.mse_loss, lambda parameters: 3), "trace: optimizer.* must be .* got 3"),
        (lambda t: M.trace(MODEL, BATCH, F.mse_loss, torch.optim.LBFGS), "LBFGS runs the model itself"),
        (lambda t: M.trace(MODEL, BATCH, lambda o, y: (o - y).sum() * 1j), "must be a real scalar.* it is torch.complex64"),
        (lambda t: M.trace(MODEL, BATCH, lambda o, y: (o - y).sum().detach()), "it leads back to no parameter"),
        (lambda t: M.trace(MODEL, BATCH, lambda o, y: o - y), "loss: must return a scalar tensor, got"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, says, traced):
    with pytest.raises(ValueError, match=says):
        call(traced)


def test_a_limit_that_is_not_entered_has_no_steps():
    limited = M.limit("1 MiB")
    for call in (limited.step, lambda: limited.count(torch.ones(1))):
        with pytest.raises(RuntimeError, match="not entered"):
            call()
    with limited, pytest.raises(ValueError, match="must be a tensor, got a list"):
        limited.count([torch.ones(1)])


def test_the_judge_says_by_which_trace_a_plan_goes(traced):
    """A plan lays results over gradients, which the user's trace does not."""
    planned = M.plan(traced)
    assert planned.trace is not traced
    with pytest.raises(ValueError, match=r"judge it by plan\.trace"):
        M.check(traced, planned.schedule)
    assert M.check(planned.trace, planned.schedule) == planned.checked


@pytest.mark.parametrize("fake", [True, False])
def test_a_frozen_model_is_traced_forward(fake):
    frozen = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
    traced = M.trace(frozen, BATCH, F.mse_loss, fake=fake)
    assert {op.phase for op in traced.ops} == {"forward"} and any("forward pass alone" in n for n in traced.notes)
    with torch.no_grad():
        assert [op.name for op in M.trace(MODEL, BATCH, F.mse_loss, fake=fake).ops] == [op.name for op in traced.ops]
    with pytest.raises(ValueError, match="nothing for an optimizer to update"):
        M.trace(frozen, BATCH, F.mse_loss, torch.optim.AdamW)
