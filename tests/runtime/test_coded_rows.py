"""Exchanges beside tensor parallelism: along one axis of a mesh, in groups side by side that hold parts of the parameters."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan, batch, tiny
from tests.runtime.test_coded import DECAYING, HEAVY, PLAIN, interrupted
from tests.runtime.test_equal import engine_of
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.cluster import Cluster, Link
from weft.comm import (
    Controller,
    ErrorFeedback,
    Exchange,
    LowRank,
    Median,
    MomentumCorrection,
    Quantise,
    RandK,
    ScatterGather,
    Sign,
    Spec,
    TopK,
    auto,
    dgc,
)
from weft.comm.controller import Total, alone
from weft.errors import ExchangeMismatch, NotFinite
from weft.graph import capture
from weft.placement.comms import DONE, Group, Handle
from weft.placement.layout import Mesh
from weft.runtime import checkpoint
from weft.runtime.buckets import SumBucket
from weft.runtime.engine import Engine, Job
from weft.runtime.store import Groups

Made = Callable[[], Exchange] | None
EXACT = partial(TopK, 0.1, "exact")
KEEPING = partial(Exchange, EXACT(), ErrorFeedback())


class Cut(nn.Module):
    """Tensor parallelism cuts every parameter: nothing is summed along its axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 6, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x))), y)


def cut() -> Cut:
    torch.manual_seed(0)
    return Cut()


def numbers(samples: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 8, generator=generator), torch.randn(samples, 6, generator=generator)


def plan_of(
    strategy: Any = ("dp", "tp"), mesh: Mesh | tuple[int, ...] = (2, 2), model: Any = tiny, example: Any = batch
) -> HandPlan:
    mesh = mesh if isinstance(mesh, Mesh) else Mesh(mesh)
    graph, cluster = capture(model(), example()), Cluster.local(processes=mesh.size)
    return HandPlan(weft.Plan.manual(graph, cluster=cluster, mesh=mesh, strategy=strategy).assignment, graph)


def trained(
    plan: HandPlan, make: Made, optimizer: Any = PLAIN, model: Any = tiny, data: Any = batch, steps: int = 4
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """On one rank: the trained values, whole, and what this rank uses."""
    engine = engine_of(plan, model(), optimizer, exchange=None if make is None else make())
    for number in range(steps):
        engine.step([Job(data(seed=number))])
    found = {name: engine.whole(name).clone() for name in engine.names}
    if engine.coded is not None:
        engine.coded.exchange.close()
    here = {name: leaf for name, leaf in engine.store.leaves.items() if not engine.store.holdings[name].stored_cut}
    return found, {name: leaf.detach().clone() for name, leaf in here.items()}


class Twice:
    """In place of one collective over both axes: over the groups of tensor parallelism, then over those of data parallelism."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups

    def all_reduce_async(self, flat: Tensor) -> Handle:
        for group in self.groups:
            group.all_reduce_async(flat).wait()
        return DONE


def trained_by_two_collectives(plan: HandPlan, steps: int = 4) -> dict[str, Tensor]:
    engine = engine_of(plan, tiny(), PLAIN)
    groups = Groups(plan.assignment.mesh, engine.comms.rank)
    for bucket in engine.store.reduced:
        if isinstance(bucket, SumBucket) and bucket.trainable[0].sum_axes == (0, 1):
            bucket.group = Twice([groups.over((1,), "reduce"), groups.over((0,), "reduce")])  # type: ignore[assignment]
    for number in range(steps):
        engine.step([Job(batch(seed=number))])
    return {name: engine.whole(name).clone() for name in engine.names}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# ---- nothing is lost


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        ("dp", Mesh((2, 2))),
        pytest.param("dp", Mesh((2, 2), weights=((2.0, 1.0), (3.0, 1.0))), marks=pytest.mark.slow),
        pytest.param("zero-1", Mesh((2, 2)), marks=pytest.mark.slow),
        pytest.param("zero-3", Mesh((2, 2), weights=(None, (3.0, 1.0))), marks=pytest.mark.slow),
    ],
)
def test_identity_has_the_bits_of_collectives(pool, strategy, mesh):
    plan = plan_of((strategy, "tp"), mesh, cut, numbers)
    ours, plain = (pool(4).run(trained, plan, make, PLAIN, cut, numbers) for make in (Exchange, None))
    assert all(equal(a, b) for (a, _), (b, _) in zip(ours, plain, strict=True))


def test_what_all_groups_hold_is_summed_over_them_first(pool):
    ours, twice = pool(4).run(trained, plan_of(), Exchange), pool(4).run(trained_by_two_collectives, plan_of())
    assert all(equal(a, b) for (a, _), b in zip(ours, twice, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "make", "optimizer", "plain"),
    [
        (("dp", "tp"), Exchange, PLAIN, PLAIN),
        (("tp", "dp"), Exchange, PLAIN, PLAIN),
        (("zero-1", "tp"), Exchange, PLAIN, PLAIN),
        (("dp", "tp+sp"), Exchange, PLAIN, PLAIN),
        (
            ("zero-3", "tp"),
            partial(Exchange, TopK(1.0), MomentumCorrection(0.9)),
            DECAYING,
            partial(HEAVY, weight_decay=0.1),
        ),
    ],
)
def test_which_is_what_one_collective_does_to_rounding(pool, strategy, make, optimizer, plain):
    plan = plan_of(strategy)
    for (ours, _), (expected, _) in zip(
        pool(4).run(trained, plan, make, optimizer), pool(4).run(trained, plan, None, plain), strict=True
    ):
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# ---- by the book


def by_the_book(ratio: float, steps: int, lr: float, cuts: dict[str, int]) -> dict[str, Tensor]:
    """One process, two workers: error feedback with the largest entries of each half of what is cut along a dim."""
    model = tiny()
    owed = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    for number in range(steps):
        tokens, targets = batch(seed=number)
        sent = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for rank, (x, y) in enumerate(zip(tokens.chunk(2), targets.chunk(2), strict=True)):
            model.zero_grad()
            model(x, y).backward()
            for name, p in model.named_parameters():
                wanted, chosen = owed[rank][name] + p.grad, torch.zeros_like(p)
                if p.dim() == 1:
                    sent[name] += p.grad / 2
                    continue
                halves = (t.chunk(2, cuts[name]) if name in cuts else (t,) for t in (wanted, chosen))
                for piece, mine in zip(*halves, strict=True):
                    flat = piece.flatten()
                    largest = flat.abs().topk(max(1, math.ceil(ratio * flat.numel() - 1e-3))).indices
                    mine.copy_(torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view(piece.shape))
                owed[rank][name] = wanted - chosen
                sent[name] += chosen / 2
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * sent[name]
    return {name: p.detach() for name, p in model.named_parameters()}


def test_error_feedback_is_what_two_workers_do_by_the_book(pool):
    expected = by_the_book(0.1, 4, 0.05, {"up.weight": 0, "down.weight": 1})
    for found, _ in pool(4).run(trained, plan_of(), KEEPING):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# ---- the same bits on all that hold the same

LOSSY: dict[str, Any] = {
    "random bits": partial(Exchange, Quantise(4)),
    "random positions": partial(Exchange, RandK(0.2, unbiased=False), ErrorFeedback()),
    "a sampled threshold": partial(Exchange, TopK(0.1, "sampled"), ErrorFeedback()),
    "low rank": partial(Exchange, LowRank(1), ErrorFeedback()),
    "signs by segments": partial(Exchange, Sign(), ErrorFeedback(), topology=ScatterGather(memory=ErrorFeedback())),
    "velocities": partial(dgc, 0.05, warmup=[0.5, 0.25], stage_steps=2),
    "a median": partial(Exchange, combine=Median()),
}


@pytest.mark.parametrize(
    "name", ["random bits", *(pytest.param(n, marks=pytest.mark.slow) for n in LOSSY if n != "random bits")]
)
def test_whoever_holds_the_same_gets_the_same(pool, name):
    """Also on a mesh where the second group has its ranks the other way round."""
    plan, mesh = plan_of(), Mesh((2, 2), ranks=(0, 3, 2, 1))
    plan = replace(plan, assignment=replace(plan.assignment, mesh=mesh))
    held = [local for _, local in pool(4).run(trained, plan, LOSSY[name])]
    for parameter, placement in plan.assignment.parameters.items():
        whole = str(placement.used[1]) == "R"
        for rank in range(4):
            other = mesh.at((0, 0 if whole else mesh.coordinates(rank)[1]))
            assert torch.equal(held[rank][parameter], held[other][parameter]), (parameter, rank)
    assert sum(str(p.used[1]) == "R" for p in plan.assignment.parameters.values()) == 4  # embedding, norm, a bias


def chances(plan: HandPlan) -> tuple[dict[str, int], dict[str, int]]:
    engine = engine_of(plan, tiny(), PLAIN, exchange=Exchange(RandK(0.2, unbiased=False), ErrorFeedback()))
    engine.step([Job(batch())])
    states = engine.coded.exchange.state_dict()["states"]  # type: ignore[union-attr]
    engine.coded.exchange.close()  # type: ignore[union-attr]
    return {n: s["seed"] for n, s in states.items()}, {n: s["shared_seed"] for n, s in states.items()}


@pytest.mark.slow
def test_parts_have_chances_of_their_own(pool):
    ranks = pool(4).run(chances, plan_of())
    own, shared = ([rank[number] for rank in ranks] for number in (0, 1))
    assert len({seeds["up.weight"] for seeds in own}) == 4 and len({seeds["up.weight"] for seeds in shared}) == 2
    assert [seeds["embed.weight"] for seeds in own[:2]] == [own[0]["embed.weight"]] * 2
    assert len({seeds["embed.weight"] for seeds in own}) == 2 and len({seeds["embed.weight"] for seeds in shared}) == 1


# ---- faults


def states_of(engine: Engine) -> dict[str, Tensor]:
    assert engine.coded is not None
    states = engine.coded.exchange.state_dict()["states"]
    return {name: state["error"].clone() for name, state in states.items() if "error" in state}


def broken(plan: HandPlan, name: str) -> Any:
    """What a step says of which one rank's gradient ends in NaN, and whether values and memories stayed as they were."""
    engine = engine_of(plan, tiny(), PLAIN, exchange=KEEPING())
    engine.step([Job(batch())])
    values, kept = {n: engine.whole(n).clone() for n in engine.names}, states_of(engine)
    spoil = lambda gradient: (
        torch.cat([gradient[:-1], gradient[-1:] * math.nan]) if engine.comms.rank == 3 else gradient
    )
    hook = engine.store.leaves[name].register_hook(spoil)
    try:
        engine.step([Job(batch(seed=2))])
        told = "nothing"
    except NotFinite as error:
        told = str(error)
    hook.remove()
    same = equal({n: engine.whole(n) for n in engine.names}, values) and equal(states_of(engine), kept)
    engine.step([Job(batch(seed=2))])  # and training goes on
    skipped, values = engine.coded.exchange.skipped, {n: engine.whole(n).clone() for n in engine.names}  # type: ignore[union-attr]
    engine.coded.exchange.close()  # type: ignore[union-attr]
    return told, same, skipped, values


@pytest.mark.parametrize("name", ["up.weight", pytest.param("norm.weight", marks=pytest.mark.slow)])
def test_a_step_that_is_bad_in_one_group_changes_nothing_in_any(pool, name):
    found = pool(4).run(broken, plan_of(), name)
    for told, same, skipped, values in found:
        assert "not finite" in told or "the loss of step" in told
        assert same and skipped == 1 and equal(values, found[0][3])


def failing(plan: HandPlan) -> tuple[str, bool]:
    """The error of a step in which one rank's exchange thread fails, and whether it came soon."""
    engine = engine_of(plan, tiny(), PLAIN, exchange=KEEPING())
    engine.step([Job(batch())])
    if engine.comms.rank == 3:
        engine.coded.exchange.core.memory = None  # type: ignore[union-attr, assignment]
    began, told = time.monotonic(), ""
    try:
        engine.step([Job(batch())])
    except Exception as error:
        told = type(error).__name__
    return told, time.monotonic() - began < 30


@pytest.mark.slow
def test_a_failure_in_one_group_is_soon_told_to_all(pool):
    found = pool(4).run(failing, plan_of())
    assert [told for told, _ in found] == ["PeerLost"] * 3 + ["AttributeError"] and all(soon for _, soon in found)


class Alone(Controller):
    """Decides by what does not add up over parts."""

    def observe(self, spec: Spec, gradient: Tensor, step: int) -> None:
        return None

    def decide(self, step: int, specs: Mapping[str, Spec], total: Total = alone) -> Mapping[str, Any]:
        return {}


def refused(plan: HandPlan, make: Any, other: Any = None) -> str:
    """The error of a run in which the last rank may have another exchange."""
    import torch.distributed as dist

    last = dist.get_rank() == dist.get_world_size() - 1
    try:
        engine_of(plan, tiny(), PLAIN, exchange=(other if other is not None and last else make)())
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("strategy", "make", "other", "says"),
    [
        (("dp", "tp"), KEEPING, partial(Exchange, TopK(0.2), ErrorFeedback()), ExchangeMismatch.__name__),
        pytest.param(("tp", "tp"), KEEPING, None, "along which all gradients are summed", marks=pytest.mark.slow),
        (("dp", "tp"), partial(Exchange, TopK(0.1), controller=Alone()), None, "neither agreed nor additive"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(pool, strategy, make, other, says):
    assert all(says in told for told in pool(4).run(refused, plan_of(strategy), make, other))


# ---- checkpoints


@pytest.mark.parametrize(
    ("strategy", "make"),
    [
        (("dp", "tp"), partial(Exchange, RandK(0.2, unbiased=False), ErrorFeedback())),
        pytest.param(("dp", "tp"), LOSSY["velocities"], marks=pytest.mark.slow),
        pytest.param(("dp", "tp"), LOSSY["signs by segments"], marks=pytest.mark.slow),
        pytest.param(("zero-3", "tp"), partial(Exchange, Quantise(4), ErrorFeedback()), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(pool, tmp_path, strategy, make):
    for without, resumed in pool(4).run(interrupted, plan_of(strategy), make, tmp_path / "c"):
        assert equal(without, resumed)


def saved(plan: HandPlan, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    engine = engine_of(plan, tiny(), PLAIN, exchange=KEEPING())
    for number in range(2):
        engine.step([Job(batch(seed=number))])
    checkpoint.save(engine, path, {})
    kept, parts = states_of(engine), {n: s.part for n, s in engine.coded.exchange.core.specs.items()}  # type: ignore[union-attr]
    engine.coded.exchange.close()  # type: ignore[union-attr]
    return kept, parts


def loaded(plan: HandPlan, path: Path) -> Any:
    engine = engine_of(plan, tiny(seed=7), PLAIN, exchange=KEEPING())
    before = {name: engine.whole(name).clone() for name in engine.names}
    try:
        remark = checkpoint.load(engine, path)["remark"]
    except ValueError as error:
        return f"{type(error).__name__}: {error}", equal({n: engine.whole(n) for n in engine.names}, before)
    kept = states_of(engine)
    engine.step([Job(batch(seed=2))])
    engine.coded.exchange.close()  # type: ignore[union-attr]
    return remark, kept


def test_other_parts_are_refused_on_every_process(pool, tmp_path):
    pool(4).run(saved, plan_of(), tmp_path / "c")
    for told, same in pool(4).run(loaded, plan_of(("dp", "dp")), tmp_path / "c"):
        assert "ExchangeMismatch" in told and "parts of 'down.weight'" in told and "[0:10, 0:15]" in told and same


@pytest.mark.slow
def test_more_processes_in_a_group_go_on_with_what_it_owes(pool, tmp_path):
    ranks = pool(4).run(saved, plan_of(), tmp_path / "c")
    assert ranks[1][1]["up.weight"] == "[15:30, 0:10]" and ranks[1][1]["embed.weight"] == ""
    for rank, (remark, kept) in enumerate(pool(6).run(loaded, plan_of(mesh=(3, 2)), tmp_path / "c")):
        assert "2 processes of each group" in remark and "this run has 3" in remark
        for name, value in kept.items():
            mean = sum(ranks[place][0][name].double() for place in (rank % 2, 2 + rank % 2)) / 2
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=0)


def top_k() -> dict[str, Exchange]:
    return {"it": Exchange(TopK(0.2), ErrorFeedback())}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("dp", "tp"), ("dp", "zero-1")])
def test_planned_with_an_exchange_and_run_with_it(tmp_path, strategy):
    """In processes that weft starts: what was planned is run, and resumed; also where the exchange is one to choose."""
    cluster, exchange = Cluster.local(processes=4), top_k()["it"]
    options: dict[str, Any] = {"cluster": cluster, "mesh": (2, 2), "optimizer": "SGD"}
    plan = weft.Plan.manual(tiny(), batch(), strategy=strategy, exchange=exchange, **options)
    assert plan.exchange == exchange.options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with weft.run(plan, tiny(), PLAIN, exchange=exchange, accumulate=2) as trainer:
            losses = [trainer.step(batch()) for _ in range(4)]
            trainer.save(tmp_path / "c")
            further = [trainer.step(batch()) for _ in range(2)]
    assert losses[-1] < losses[0]
    slow = auto(Link(1e-6, 1e3), candidates=top_k)
    with weft.run(plan, tiny(), PLAIN, exchange=slow, accumulate=2, resume=tmp_path / "c") as trainer:
        assert [trainer.step(batch()) for _ in range(2)] == further and trainer.exchange == "it"
