"""Gradients that travel by an exchange: equal to all-reduce where nothing is lost, and what cannot be is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.runtime.test_budget import gpt, planned, tokens
from tests.runtime.test_equal import engine_of

from weft.comm import ErrorFeedback, Exchange, Identity, MomentumCorrection, ScatterGather, TopK
from weft.errors import NotFinite
from weft.runtime.engine import Job

PLAIN = partial(torch.optim.SGD, lr=0.05)
HEAVY = partial(torch.optim.SGD, lr=0.05, momentum=0.9)

EXCHANGES: dict[str, Any] = {  # name -> (exchange, the optimizer beside it, the optimizer of plain all-reduce)
    "identity": (Exchange, PLAIN, PLAIN),
    "everything by top-k": (lambda: Exchange(TopK(0.999999), ErrorFeedback()), PLAIN, PLAIN),
    "scattered": (lambda: Exchange(Identity(), topology=ScatterGather()), PLAIN, PLAIN),
    "momentum in the memory": (lambda: Exchange(TopK(1.0), MomentumCorrection(0.9)), PLAIN, HEAVY),
}


def trained(plan: Any, optimizer: Any, make: Any, steps: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    """On one rank: losses, and the trained values."""
    model = gpt(dropout=0.0).double()
    engine = engine_of(plan, model, optimizer, exchange=None if make is None else make())
    losses = []
    for number in range(steps):
        batch = tokens(number, samples=5)  # 3 rows here, 2 there
        losses.append(engine.step([Job(tuple(batch.values()))]).loss)
    values = {name: engine.whole(name).clone() for name in engine.names}
    if engine.coded is not None:
        engine.coded.exchange.close()
    return losses, values


def broken(plan: Any) -> tuple[str, bool]:
    """A batch whose loss is not finite on one rank alone: the error, and whether the parameters stayed as they were."""
    engine = engine_of(plan, gpt(dropout=0.0).double(), PLAIN, exchange=Exchange(TopK(0.1), ErrorFeedback()))
    before = {name: engine.whole(name).clone() for name in engine.names}
    hook = None
    if engine.comms.rank == 1:
        leaf = next(iter(engine.store.leaves.values()))
        hook = leaf.register_hook(lambda gradient: gradient * float("nan"))
    try:
        engine.step([Job(tuple(tokens().values()))])
        told = "nothing"
    except NotFinite as error:
        told = str(error)
    if hook is not None:
        hook.remove()
    same = all(torch.equal(engine.whole(name), value) for name, value in before.items())
    engine.step([Job(tuple(tokens(2).values()))])  # and training goes on
    engine.coded.exchange.close()
    return told, same


def refused(plan: Any, optimizer: Any, make: Any) -> str:
    try:
        engine_of(plan, gpt(dropout=0.0), optimizer, exchange=make())
    except ValueError as error:
        return str(error)
    return ""


def build() -> torch.nn.Module:
    return gpt(dropout=0.0).double()


@pytest.mark.parametrize("name", EXCHANGES)
def test_equal_to_all_reduce_where_nothing_is_lost(pool, name):
    make, beside, plain = EXCHANGES[name]
    plan = planned(build, tokens(0, samples=5), "dp")
    coded = pool(2).run(trained, plan, beside, Named(name))
    expected = pool(2).run(trained, plan, plain, None)
    for (losses, values), (wanted, others) in zip(coded, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-6)
        for key, value in values.items():
            assert torch.allclose(value, others[key], rtol=1e-5, atol=1e-6), key
    assert all(torch.equal(coded[0][1][key], coded[1][1][key]) for key in coded[0][1])


class Named:
    """Makes an exchange of `EXCHANGES` on the worker: lambdas do not travel."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> Exchange:
        return EXCHANGES[self.name][0]()


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(pool):
    for told, same in pool(2).run(broken, planned(build, tokens(), "dp")):
        assert "not finite" in told or "the loss of step" in told
        assert same


@pytest.mark.parametrize(
    ("strategy", "optimizer", "make", "says"),
    [
        ("zero-1", PLAIN, Exchange, "data-parallel plan"),
        ("dp", HEAVY, partial(Exchange, TopK(0.1), MomentumCorrection(0.9)), "applied twice"),
        ("dp", torch.optim.AdamW, partial(Exchange, TopK(0.1), MomentumCorrection(0.9)), "normalise"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(pool, strategy, optimizer, make, says):
    plan = planned(lambda: gpt(dropout=0.0), tokens(), strategy)
    assert all(says in told for told in pool(2).run(refused, plan, optimizer, make))
