"""ZeRO's gradients by an exchange, Partial -> Shard: as plain ZeRO where nothing is lost, else as one process by the book."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan, batch, plan_of, tiny, zero
from tests.runtime.test_coded import DECAYING, HEAVY, PLAIN, interrupted, loaded, saved
from tests.runtime.test_equal import engine_of
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.comm import (
    AllGather,
    Cast,
    ErrorFeedback,
    Exchange,
    GeometricMedian,
    Gossip,
    Identity,
    LowRank,
    Median,
    MomentumCorrection,
    Peer,
    Quantise,
    ScatterGather,
    Shift,
    Sign,
    Spec,
    TopK,
    dgc,
)
from weft.errors import NotFinite
from weft.graph import capture
from weft.placement import parameters as rule
from weft.placement.assignment import ParameterPlacement
from weft.placement.layout import Mesh, Replicate, Shard, deal
from weft.runtime.batches import split
from weft.runtime.engine import Engine, Job

Made = Callable[[], Exchange] | None
EXACT = partial(TopK, 0.1, "exact")


class Even(nn.Module):
    """Every parameter has rows for two and for three processes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x))), y)


def even() -> Even:
    torch.manual_seed(0)
    return Even()


def numbers(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 8, generator=generator), torch.randn(samples, 6, generator=generator)


def jobs_of(engine: Engine, model: nn.Module, example: tuple[Tensor, ...], accumulate: int) -> list[Job]:
    """The micro-batches of a batch, with a program for them."""
    jobs = [Job(piece, share) for piece, share in split(list(example), accumulate)]
    if jobs[0].key not in engine.programs:
        engine.add(capture(model, tuple(jobs[0].leaves)))
    return jobs


def trained(
    plan: HandPlan,
    make: Made,
    optimizer: Any = PLAIN,
    model: Any = tiny,
    data: Any = batch,
    accumulate: int = 1,
    steps: int = 4,
) -> dict[str, Tensor]:
    """On one rank: the trained values."""
    engine = engine_of(plan, model(), optimizer, exchange=None if make is None else make())
    for number in range(steps):
        engine.step(jobs_of(engine, model(), data(seed=number), accumulate))
    values = {name: engine.whole(name).clone() for name in engine.names}
    if engine.coded is not None:
        engine.coded.exchange.close()
    return values


def in_small_buckets(*arguments: Any, **options: Any) -> dict[str, Tensor]:
    """`trained` with a bucket per parameter: more of them than plain ZeRO would have under way at a time."""
    before = rule.FIRST_BUCKET_NBYTES, rule.BUCKET_NBYTES, rule.MIN_GATHER_NBYTES
    rule.FIRST_BUCKET_NBYTES = rule.BUCKET_NBYTES = rule.MIN_GATHER_NBYTES = 1
    try:
        return trained(*arguments, **options)
    finally:
        rule.FIRST_BUCKET_NBYTES, rule.BUCKET_NBYTES, rule.MIN_GATHER_NBYTES = before


def in_two(plan: HandPlan, make: Made) -> dict[str, Tensor]:
    return trained(plan, make, accumulate=2)


def equal(results: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(value, b[name]) for a, b in zip(results, others, strict=True) for name, value in a.items())


def stage_of(number: int, shape: tuple[int, ...] = (2,), **options: Any) -> HandPlan:
    return plan_of(tiny(), batch(), shape, number, **options)


# ---- nothing is lost


@pytest.mark.parametrize("stage", [1, 3])
def test_identity_has_the_bits_of_plain_zero(pool, stage):
    plan = stage_of(stage)
    assert equal(pool(2).run(trained, plan, Exchange), pool(2).run(trained, plan, None))


def lopsided(stage: int) -> HandPlan:
    """The first process keeps everything."""
    plan = stage_of(0)
    assert plan.graph is not None
    first = ParameterPlacement.zero((Replicate(),), {0: Shard(0, (1.0, 0.0))}, stage)
    return replace(plan, assignment=replace(plan.assignment, parameters=dict.fromkeys(plan.graph.parameters, first)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_identity_in_other_ways(pool, stage):
    """Micro-batches add up before the exchange, as in ZeRO-1; unlike devices, with an empty piece; many buckets; Adam."""
    plain = pool(2).run(in_two, stage_of(1), None)
    assert equal(pool(2).run(in_two, stage_of(stage), Exchange), plain)
    for unlike in (stage_of(stage, weights=(3.0, 1.0)), lopsided(stage)):
        assert equal(pool(2).run(in_small_buckets, unlike, Exchange), pool(2).run(trained, unlike, None))
    adam = partial(torch.optim.AdamW, lr=0.01)
    scattered = partial(Exchange, Identity(), topology=ScatterGather())
    assert equal(
        pool(2).run(trained, stage_of(stage), scattered, adam), pool(2).run(trained, stage_of(stage), None, adam)
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_over_two_axes_and_where_a_third_of_it_cannot_be_exact(pool, stage):
    """Four processes: the bits. Three: an exchange takes means, and a third of three times a number is not always that number."""
    square = stage_of(stage, (2, 2))
    assert equal(pool(4).run(trained, square, Exchange), pool(4).run(trained, square, None))
    for ours, plain in zip(
        pool(3).run(trained, stage_of(stage, (3,)), Exchange),
        pool(3).run(trained, stage_of(stage, (3,)), None),
        strict=True,
    ):
        for name, value in ours.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


# ---- by the book


def by_the_book(ratio: float, ranks: int, steps: int, lr: float) -> dict[str, Tensor]:
    """One process: error feedback with the largest entries of every piece of a weight; biases and norms whole."""
    model = tiny()
    owed = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(ranks)]
    for number in range(steps):
        tokens, targets = batch(seed=number)
        sent: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for rank, (x, y) in enumerate(zip(tokens.chunk(ranks), targets.chunk(ranks), strict=True)):
            model.zero_grad()
            model(x, y).backward()
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    sent[name] += p.grad / ranks
                    continue
                wanted = owed[rank][name] + p.grad
                chosen = torch.zeros_like(wanted)
                for mine, piece in zip(
                    chosen.split(deal(len(p), ranks)), wanted.split(deal(len(p), ranks)), strict=True
                ):
                    largest = piece.abs().flatten().topk(max(1, round(ratio * piece.numel() + 0.499))).indices
                    mine.view(-1)[largest] = piece.flatten()[largest]
                owed[rank][name] = wanted - chosen
                sent[name] += chosen / ranks
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * sent[name]
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_error_feedback_is_what_one_process_does_by_the_book(pool, stage):
    expected = by_the_book(0.1, 2, 4, 0.05)
    for found in pool(2).run(trained, stage_of(stage), partial(Exchange, EXACT(), ErrorFeedback())):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


SAME: dict[
    str, Any
] = {  # an owner that answers exactly: data parallelism then only gathers what ZeRO leaves with the owners
    "top-k": partial(Exchange, EXACT(), ErrorFeedback(), topology=ScatterGather(down=Identity())),
    "signs": partial(Exchange, Sign(), ErrorFeedback(), topology=ScatterGather(down=Identity())),
    "velocities": partial(Exchange, EXACT(), MomentumCorrection(0.9), topology=ScatterGather(down=Identity())),
    "median": partial(Exchange, Identity(), combine=Median(), topology=ScatterGather(down=Identity())),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", SAME)
def test_the_same_parameters_as_data_parallelism_with_the_same_exchange(pool, name, ranks):
    """Pieces and segments are the same rows here, so everything is, to the bit; but ZeRO all-reduces what keeps its momentum
    whole (biases), and over three processes that adds in another order."""
    plans = [plan_of(even(), numbers(), (ranks,), stage) for stage in (0, 1, 3)]
    whole, *cut = (pool(ranks).run(trained, plan, SAME[name], PLAIN, even, numbers) for plan in plans)
    if name != "velocities" or ranks == 2:
        assert all(equal(found, whole) for found in cut)
    for found in cut:
        torch.testing.assert_close(found[0], whole[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "optimizer", "plain"),
    [
        (partial(Exchange, TopK(1.0), MomentumCorrection(0.9)), DECAYING, partial(HEAVY, weight_decay=0.1)),
        (partial(Exchange, TopK(0.999999), ErrorFeedback()), PLAIN, PLAIN),
        (partial(Exchange, LowRank(8), ErrorFeedback()), PLAIN, PLAIN),
        (partial(Exchange, Identity(), Shift()), PLAIN, PLAIN),
        (partial(Exchange, Cast("float16")), PLAIN, PLAIN),
        (partial(Exchange, Quantise(8), ErrorFeedback(), topology=ScatterGather()), PLAIN, PLAIN),
    ],
)
def test_codes_that_lose_next_to_nothing_train_as_plain_zero_does(pool, make, optimizer, plain):
    for stage in (1, 3):
        expected = pool(2).run(trained, stage_of(stage), None, plain)
        for found, values in zip(pool(2).run(trained, stage_of(stage), make, optimizer), expected, strict=True):
            for name, value in found.items():
                torch.testing.assert_close(value, values[name], rtol=2e-2, atol=2e-3)


def mixed(ranks: int) -> HandPlan:
    """Some gradients whole, some in pieces."""
    plan = stage_of(0, (ranks,))
    assert plan.graph is not None
    cut = zero(plan.graph, Mesh((ranks,)), 3)
    some = {name: cut[name] if "weight" in name else p for name, p in plan.assignment.parameters.items()}
    return replace(plan, assignment=replace(plan.assignment, parameters=some))


@pytest.mark.slow
@pytest.mark.parametrize("topology", [AllGather(), ScatterGather(down=Identity())])
def test_a_rule_over_the_whole_model_sees_pieces_and_wholes_once_each(pool, topology):
    """It waits for the step's last bucket, so nothing may wait for an earlier one."""
    robust = partial(Exchange, Identity(), combine=GeometricMedian(), topology=topology, select=everything)
    expected = pool(3).run(trained, stage_of(0, (3,)), partial(robust, topology=AllGather()))
    for plan in (stage_of(1, (3,)), stage_of(3, (3,)), mixed(3)):
        for found, values in zip(pool(3).run(in_small_buckets, plan, robust), expected, strict=True):
            for name, value in found.items():
                torch.testing.assert_close(value, values[name], rtol=1e-4, atol=1e-6)


def everything(spec: Spec) -> bool:
    return True


# ---- bytes, faults, what somebody only wants to look at


def looked_at(plan: HandPlan) -> Any:
    """(bytes a step of a weight and of a bias, whether `gradients` are exact and left no trace, what a bad step said)."""
    coded = engine_of(plan, even(), PLAIN, exchange=Exchange(EXACT(), ErrorFeedback()))
    exact = engine_of(plan, even(), PLAIN)
    jobs = jobs_of(coded, even(), numbers(), 2)
    jobs_of(exact, even(), numbers(), 2)
    coded.step(jobs)
    exchange = coded.coded.exchange  # type: ignore[union-attr]
    report = {name: tensor.nbytes for name, tensor in exchange.report().tensors.items()}
    specs = [Spec(name, tuple(p.shape)) for name, p in even().named_parameters()]
    assert sum(report.values()) == exchange.wire(specs, 2, scatter=True)[1]  # what plans are priced by
    coded.load({name: exact.whole(name).clone() for name in exact.names})
    state = coded.coded.exchange.state_dict()["states"]["up.weight"]["error"].clone()  # type: ignore[union-attr]
    (_, ours), (_, theirs) = coded.gradients(jobs), exact.gradients(jobs)
    same = all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    before = {name: coded.whole(name).clone() for name in coded.names}
    hook = next(iter(coded.store.leaves.values())).register_hook(
        lambda g: g * float("nan" if coded.comms.rank else "1")
    )
    try:
        coded.step(jobs)
        told = "nothing"
    except NotFinite as error:
        told = str(error)
    hook.remove()
    same &= all(torch.equal(coded.whole(name), value) for name, value in before.items())
    same &= torch.equal(coded.coded.exchange.state_dict()["states"]["up.weight"]["error"], state)  # type: ignore[union-attr]
    coded.step(jobs)
    coded.coded.exchange.close()  # type: ignore[union-attr]
    return report["up.weight"], report["up.bias"], same, told


def test_pieces_alone_travel_and_a_bad_step_changes_nothing(pool):
    for weight, bias, same, told in pool(2).run(looked_at, plan_of(even(), numbers(), (2,), 3)):
        assert weight == 8 * 10 and bias == 4 * 12  # a tenth of half of 192 entries; half of 24
        assert same and ("not finite" in told or "the loss of step" in told)


# ---- checkpoints


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        partial(Exchange, TopK(0.1), ErrorFeedback()),
        pytest.param(partial(dgc, 0.02, warmup=[0.5, 0.25], stage_steps=2), marks=pytest.mark.slow),
        pytest.param(partial(Exchange, Quantise(4), ErrorFeedback(), topology=ScatterGather()), marks=pytest.mark.slow),
        pytest.param(partial(Exchange, LowRank(1), ErrorFeedback()), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(pool, tmp_path, make, stage):
    for without, resumed in pool(2).run(interrupted, stage_of(stage), make, tmp_path / "c"):
        assert all(torch.equal(resumed[key], value) for key, value in without.items())


@pytest.mark.slow
def test_what_is_owed_goes_on_in_other_numbers_and_placements(pool, tmp_path):
    make, path = partial(Exchange, TopK(0.1), ErrorFeedback()), tmp_path / "c"
    ranks = pool(3).run(saved, stage_of(1, (3,)), make, path)
    mean = {name: sum(kept[name].double() for kept in ranks) / 3 for name in ranks[0]}
    for processes, stage in ((2, 3), (2, 0), (3, 0)):
        for rank, (remark, kept, _) in enumerate(
            pool(processes).run(loaded, stage_of(stage, (processes,)), make, path)
        ):
            assert ("conserves what is owed" in remark) == (processes != 3)
            for name, value in kept.items():
                expected = ranks[rank][name].double() if processes == 3 else mean[name]
                torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_what_owners_owe_is_not_dropped(pool, tmp_path):
    owners = partial(Exchange, TopK(0.1), ErrorFeedback(), topology=ScatterGather(memory=ErrorFeedback()))
    pool(2).run(saved, stage_of(0), owners, tmp_path / "c")
    for kind, told, same in pool(2).run(loaded, stage_of(1), owners, tmp_path / "c"):
        assert kind == "ExchangeMismatch" and "owners owe" in told and same
    pool(2).run(saved, stage_of(1), owners, tmp_path / "d")  # nobody owes anything there
    assert all(remark == "" for remark, _, _ in pool(2).run(loaded, stage_of(1), owners, tmp_path / "d"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero-1", "zero-2", "zero-3"])
def test_planned_with_an_exchange_and_run_with_it(tmp_path, stage):
    """In processes that weft starts: what was planned is run, resumed, and refused with `clip_norm` where that would be wrong."""
    exchange, data = Exchange(TopK(0.2), ErrorFeedback()), numbers()
    cluster = weft.Cluster.local(processes=2)
    plan = weft.Plan.manual(even(), data, cluster=cluster, strategy=stage, optimizer="SGD", exchange=exchange)
    assert plan.exchange == exchange.options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with weft.run(plan, even(), PLAIN, exchange=exchange, accumulate=2) as trainer:
            losses = [trainer.step(data) for _ in range(4)]
            trainer.save(tmp_path / "c")
            further = [trainer.step(data) for _ in range(2)]
    assert losses[-1] < losses[0]
    again = Exchange(TopK(0.2), ErrorFeedback())
    with weft.run(plan, even(), PLAIN, exchange=again, accumulate=2, resume=tmp_path / "c") as trainer:
        assert [trainer.step(data) for _ in range(2)] == further
    with (
        pytest.raises(ValueError, match="take them for gradients"),
        weft.run(plan, even(), PLAIN, exchange=dgc(0.1), clip_norm=1.0),
    ):
        pass


# ---- what cannot be


@pytest.mark.parametrize(
    ("make", "optimizer", "says"),
    [
        (partial(dgc, 0.1), HEAVY, "applied twice"),
        (partial(dgc, 0.1), torch.optim.AdamW, "normalise"),
        (partial(Exchange, topology=Peer()), PLAIN, "drift apart"),
        (partial(Exchange, topology=Gossip(((0.5, 0.5), (0.5, 0.5)))), PLAIN, "drift apart"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(pool, make, optimizer, says):
    assert all(says in told for told in pool(2).run(refused_here, stage_of(1), optimizer, make))


def refused_here(plan: HandPlan, optimizer: Any, make: Any) -> str:
    try:
        engine_of(plan, tiny(), optimizer, exchange=make())
    except ValueError as error:
        return str(error)
    return ""
