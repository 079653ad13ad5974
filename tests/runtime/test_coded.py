"""Gradients that travel by an exchange: equal to all-reduce where nothing is lost, and what cannot be is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan, batch, plan_of, tiny
from tests.runtime.test_budget import gpt, planned, tokens
from tests.runtime.test_equal import engine_of

from weft.comm import (
    Accordion,
    ErrorFeedback,
    Exchange,
    GeometricMedian,
    Identity,
    LowRank,
    MomentumCorrection,
    RandK,
    ScatterGather,
    TopK,
    dgc,
)
from weft.errors import NotFinite
from weft.runtime import checkpoint
from weft.runtime.engine import Engine, Job

PLAIN = partial(torch.optim.SGD, lr=0.05)
HEAVY = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
DECAYING = partial(PLAIN, weight_decay=0.1)  # beside a momentum in the memory the decay has one of its own

EXCHANGES: dict[str, Any] = {  # name -> (exchange, the optimizer beside it, the optimizer of plain all-reduce)
    "identity": (Exchange, PLAIN, PLAIN),
    "everything by top-k": (lambda: Exchange(TopK(0.999999), ErrorFeedback()), PLAIN, PLAIN),
    "scattered": (lambda: Exchange(Identity(), topology=ScatterGather()), PLAIN, PLAIN),
    "momentum in the memory": (lambda: Exchange(TopK(1.0), MomentumCorrection(0.9)), PLAIN, HEAVY),
    "and weight decay beside it": (
        lambda: Exchange(TopK(1.0), MomentumCorrection(0.9)),
        DECAYING,
        partial(HEAVY, weight_decay=0.1),
    ),
    "the same by Nesterov": (
        lambda: Exchange(TopK(1.0), MomentumCorrection(0.9, nesterov=True)),
        DECAYING,
        partial(HEAVY, weight_decay=0.1, nesterov=True),
    ),
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
    exact = name in ("identity", "scattered")  # float64 travels as it is
    for (losses, values), (wanted, others) in zip(coded, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-6)
        for key, value in values.items():
            assert torch.allclose(value, others[key], rtol=1e-5, atol=1e-6), key
            assert not exact or torch.equal(value, others[key]), key
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
        ("tp", PLAIN, Exchange, "data parallelism or ZeRO over all devices"),
        ("dp", HEAVY, partial(Exchange, TopK(0.1), MomentumCorrection(0.9)), "applied twice"),
        ("dp", torch.optim.AdamW, partial(Exchange, TopK(0.1), MomentumCorrection(0.9)), "normalise"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(pool, strategy, optimizer, make, says):
    plan = planned(lambda: gpt(dropout=0.0), tokens(), strategy)
    assert all(says in told for told in pool(2).run(refused, plan, optimizer, make))


# ---- checkpoints

KEEPERS: dict[str, Any] = {
    "top-k": partial(Exchange, TopK(0.1), ErrorFeedback()),
    "low rank, warm": partial(Exchange, LowRank(1), ErrorFeedback()),
    "segments with a memory at both ends": partial(
        Exchange, TopK(0.1), ErrorFeedback(), topology=ScatterGather(memory=ErrorFeedback())
    ),
    "drawn": partial(Exchange, RandK(0.1, unbiased=False), ErrorFeedback()),
    "dgc, warming up": partial(dgc, 0.02, warmup=[0.5, 0.25], stage_steps=2),
    "a controller with sums": partial(Exchange, TopK(0.1), ErrorFeedback(), controller=Accordion(0.1, 0.5, every=2)),
}


def run_of(plan: HandPlan, make: Any, seed: int = 0) -> Engine:
    return engine_of(plan, tiny(seed=seed), DECAYING, exchange=None if make is None else make())


def steps_of(engine: Engine, first: int, last: int) -> dict[str, torch.Tensor]:
    for number in range(first, last):
        engine.step([Job(batch(seed=number))])
    return {name: engine.whole(name).clone() for name in engine.names}


def interrupted(
    plan: HandPlan, make: Any, path: Path, before: int = 3, after: int = 3
) -> list[dict[str, torch.Tensor]]:
    """Trained values without interruption, and of a new run from the checkpoint in the middle."""
    engine = run_of(plan, make)
    steps_of(engine, 0, before)
    checkpoint.save(engine, path, {})
    found = [steps_of(engine, before, before + after)]
    if engine.coded is not None:
        engine.coded.exchange.close()
    engine = run_of(plan, make, seed=7)
    assert checkpoint.load(engine, path)["remark"] == ""
    found.append(steps_of(engine, before, before + after))
    if engine.coded is not None:
        engine.coded.exchange.close()
    return found


@pytest.mark.parametrize("name", KEEPERS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(pool, tmp_path, name):
    plan = plan_of(tiny(), batch(), (2,), 0)
    for without, resumed in pool(2).run(interrupted, plan, KEEPERS[name], tmp_path / "c"):
        assert all(torch.equal(resumed[key], value) for key, value in without.items())


def owed(engine: Engine, key: str) -> dict[str, torch.Tensor]:
    assert engine.coded is not None
    states = engine.coded.exchange.state_dict()["states"]
    return {name: state[key].clone() for name, state in states.items() if key in state}


def saved(plan: HandPlan, make: Any, path: Path) -> dict[str, torch.Tensor]:
    engine = run_of(plan, make)
    steps_of(engine, 0, 3)
    checkpoint.save(engine, path, {})
    if engine.coded is None:
        return {}
    engine.coded.exchange.close()
    return owed(engine, "error")


def loaded(plan: HandPlan, make: Any, path: Path) -> Any:
    """(remark, what is owed), and that training goes on with equal ranks; or the error, and whether nothing has changed."""
    engine = run_of(plan, make, seed=7)
    before = {name: engine.whole(name).clone() for name in engine.names}
    try:
        remark = checkpoint.load(engine, path)["remark"]
    except ValueError as error:
        same = all(torch.equal(engine.whole(name), value) for name, value in before.items())
        return type(error).__name__, str(error), same
    kept = owed(engine, "error") if engine.coded is not None else {}
    values = steps_of(engine, 3, 5)
    if engine.coded is not None:
        engine.coded.exchange.close()
    return remark, kept, values


def test_on_another_number_of_processes_what_is_owed_stays_the_same(pool, tmp_path):
    model, path, make = (tiny(), batch()), tmp_path / "c", KEEPERS["top-k"]
    ranks = pool(3).run(saved, plan_of(*model, (3,), 0), make, path)
    assert ranks[0] and not torch.equal(ranks[0]["up.weight"], ranks[1]["up.weight"])
    mean = {name: sum(kept[name].double() for kept in ranks) / 3 for name in ranks[0]}
    resumed = pool(2).run(loaded, plan_of(*model, (2,), 0), make, path)
    for remark, kept, values in resumed:
        assert "3 processes" in remark and "conserves what is owed" in remark
        for name, value in kept.items():
            torch.testing.assert_close(value.double(), mean[name], rtol=1e-6, atol=0)
        assert all(torch.equal(values[name], resumed[0][2][name]) for name in values)
    remark, _, _ = loaded(plan_of(*model, (1,), 0), make, path)
    assert "left out" in remark


REFUSED: dict[str, tuple[Any, Any, int, str, str]] = {  # saved by, loaded by, processes, the error, words of it
    "another codec": (KEEPERS["top-k"], partial(Exchange, TopK(0.2), ErrorFeedback()), 2, "ExchangeMismatch", "TopK(ratio=0.2"),
    "another memory": (KEEPERS["top-k"], partial(Exchange, TopK(0.1)), 2, "ExchangeMismatch", "memory ErrorFeedback"),
    "an owner's memory": (
        *[KEEPERS["segments with a memory at both ends"]] * 2, 3, "ExchangeMismatch", "owner",
    ),
    "mistrusted ranks": (
        *[partial(Exchange, TopK(0.1), ErrorFeedback(), combine=GeometricMedian())] * 2, 3, "ExchangeMismatch", "mistrusts ranks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_exchange_is_refused_on_every_process(pool, tmp_path, case):
    by, to, processes, error, words = REFUSED[case]
    pool(2).run(saved, plan_of(tiny(), batch(), (2,), 0), by, tmp_path / "c")
    for kind, told, same in pool(processes).run(loaded, plan_of(tiny(), batch(), (processes,), 0), to, tmp_path / "c"):
        assert kind == error and words in told and same


def saved_with_momentum(plan: HandPlan, path: Path) -> None:
    engine = engine_of(plan, tiny(), HEAVY)
    steps_of(engine, 0, 2)
    checkpoint.save(engine, path, {})


def test_to_and_from_runs_without_an_exchange(pool, tmp_path):
    plan, path = plan_of(tiny(), batch(), (2,), 0), tmp_path / "c"
    pool(2).run(saved_with_momentum, plan, path)
    for kind, told, same in pool(2).run(loaded, plan, partial(dgc, 0.1), path):
        assert kind == "ValueError" and "whose optimizer had it" in told and same
    pool(2).run(saved, plan, None, path)
    for remark, kept, _ in pool(2).run(loaded, plan, KEEPERS["top-k"], path):
        assert remark == "" and not kept  # nothing was owed
    pool(2).run(saved, plan, KEEPERS["top-k"], path)
    for remark, _, _ in pool(2).run(loaded, plan, None, path):
        assert "without an exchange" in remark
