"""Steps within a budget: the bits of the same plan without one, measured bytes below it, and errors that name the process."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan
from tests.runtime.test_equal import engine_of
from tests.runtime.test_run import gone
from torch import Tensor, nn

from weft.cluster import Cluster
from weft.errors import BudgetError
from weft.graph import Graph, capture
from weft.memory.execute.replay import Replay
from weft.nn import GPT, GPTOptions, ResNet, ResNetOptions, UNet, UNetOptions
from weft.planner import Plan
from weft.runtime import run
from weft.runtime.driver import InProcess, whole_values
from weft.runtime.engine import Job, Options
from weft.runtime.optimizer import recipe

SGD = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
STRATEGIES = ("dp", "zero-1", "zero-3", "tp")


def gpt(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return GPT(GPTOptions(vocabulary=40, context=32, layers=2, heads=4, width=32, dropout=dropout))


def tokens(seed: int = 1, samples: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(0, 40, (samples, 32), generator=generator)
    return {"tokens": draw(), "targets": draw()}


@dataclass(frozen=True)
class Outcome:
    """Of one rank: losses, gradients of the last step, trained values, bytes at most and between steps, repeated operators."""

    losses: list[float]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]
    peak: int
    kept: int
    repeats: int
    notes: list[str]


def planned(build: Any, example: Any, strategy: str) -> HandPlan:
    model = build()
    graph = capture(model, example)
    cluster = Cluster.local(processes=2)
    return HandPlan(Plan.manual(graph, cluster=cluster, mesh=(2,), strategy=strategy).assignment, graph)


def trained(plan: HandPlan, build: Any, batches: list[Any], budget: int | None, steps: int = 5) -> Outcome:
    assert plan.graph is not None
    engine = engine_of(plan, build(), SGD, measure=True, budget=budget)
    leaves = [list(batch.values()) if isinstance(batch, dict) else list(batch) for batch in batches]
    for leaf in (leaf for batch in leaves for leaf in batch):
        engine.keeper._meter.count(leaf, "input")  # older than the meter
    losses = [engine.step([Job(leaves[step % len(leaves)])]).loss for step in range(steps)]
    kept = engine.keeper._meter.live  # between steps
    within, repeats, notes = engine.keeper._limit, 0, list[str]()
    if within is not None:
        executor: Any = within._executor
        repeats = executor.repeats if isinstance(executor, Replay) else executor.core.repeats
        notes += within.notes
    loss, gradients = engine.gradients([Job(leaves[0])])
    whole = {name: gradient.clone() for name, gradient in gradients}
    peak = engine.keeper.peak
    values = {name: engine.whole(name).clone() for name in engine.names}
    engine.keeper.close()
    return Outcome([*losses, loss], whole, values, peak, kept, repeats, notes)


def same(found: Outcome, want: Outcome) -> None:
    assert found.losses == want.losses
    for name, gradient in want.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name
    for name, value in want.values.items():
        assert torch.equal(found.values[name], value), name


# what is made from ZeRO-3's gathered copies cannot be made again, so that it can save less
SHARES = {"dp": 0.6, "zero-1": 0.6, "zero-3": 0.75, "tp": 0.6}


def compare(pool: Any, build: Any, example: Any, strategy: str, share: float) -> None:
    """The same bits at a share of what the step takes beyond what lives between steps, and no more bytes than that."""
    plan = planned(build, example, strategy)
    free = pool(2).run(trained, plan, build, [example], None)
    budget = int(max(rank.kept + (rank.peak - rank.kept) * share for rank in free))
    for found, want in zip(pool(2).run(trained, plan, build, [example], budget), free, strict=True):
        same(found, want)
        assert found.peak <= budget < want.peak
        assert found.kept == want.kept
        assert found.repeats > 0
        assert not found.notes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_within_a_budget(pool: Any, strategy: str) -> None:
    compare(pool, gpt, tokens(), strategy, SHARES[strategy])


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(ResNetOptions(3, 8, (8, 12), (2, 2)))


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 24, 24, generator=generator), torch.randint(0, 8, (8,), generator=generator)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(UNetOptions(3, 5, (8, 12, 16)))


def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 24, 40, generator=generator), torch.randint(0, 5, (4, 24, 40), generator=generator)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    hf = pytest.importorskip("transformers")
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=3, n_head=4))


def text() -> dict[str, Tensor]:
    found = torch.randint(0, 60, (8, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": found, "labels": found.clone()}


# of an operator that allocates while it runs as much as it makes, nobody knows before it has run
CONVOLUTIONS = {"resnet": (resnet, pictures, 0.9), "unet": (unet, maps, 0.75)}


@pytest.mark.parametrize("name", [pytest.param("resnet", marks=pytest.mark.slow), "unet"])
def test_same_bits_with_large_workspaces(pool: Any, name: str) -> None:
    build, example, share = CONVOLUTIONS[name]
    compare(pool, build, example(), "dp", share)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero-1", "tp"])
@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_same_bits_with_large_workspaces_of_other_strategies(pool: Any, name: str, strategy: str) -> None:
    build, example, share = CONVOLUTIONS[name]
    compare(pool, build, example(), strategy, share)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("build", "example"), [(gpt2, text)])
def test_same_bits_of_other_models(pool: Any, build: Any, example: Any, strategy: str) -> None:
    compare(pool, build, example(), strategy, 0.9 if strategy == "zero-3" else 0.75)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_any_budget_is_kept_or_refused(pool: Any, name: str, strategy: str) -> None:
    """Budgets down to what cannot be kept: none is exceeded, none changes a bit."""
    build, example, _ = CONVOLUTIONS[name]
    plan, ran, said = planned(build, example(), strategy), 0, []
    free = pool(2).run(trained, plan, build, [example()], None)
    for tenth in (4, 6, 7, 8, 9, 12):
        budget = int(max(rank.kept + (rank.peak - rank.kept) * tenth / 10 for rank in free))
        outcomes = pool(2).collect(trained, plan, build, [example()], budget)
        refusals = [str(outcome.error) for outcome in outcomes if isinstance(outcome.error, BudgetError)]
        if refusals:  # the run is over; whoever did not refuse waits for those who did
            assert all("(rank " in refusal for refusal in refusals)
            said += refusals
            continue
        for outcome, want in zip(outcomes, free, strict=True):
            assert outcome.finished and outcome.error is None, outcome.trace
            same(outcome.value, want)
            assert outcome.value.peak <= budget
        ran += 1
    assert ran, "\n".join(said)


def alternating(plan: HandPlan, others: list[Graph], budget: int | None) -> Outcome:
    """Two sizes of batch, micro-batches, and an evaluation between steps that knows nothing of budgets."""
    assert plan.graph is not None
    engine = engine_of(plan, gpt(), SGD, measure=True, budget=budget)
    small = tokens(2, samples=4)
    for graph in others:
        engine.add(graph)
    losses = []
    for _ in range(4):
        losses.append(engine.step([Job(list(tokens().values()))]).loss)
        losses.append(engine.step([Job(list(small.values()), 0.5), Job(list(small.values()), 0.5)]).loss)
        losses.append(engine.evaluate(Job(list(small.values()), train=False)))
    values = {name: engine.whole(name).clone() for name in engine.names}
    peak = engine.keeper.peak
    engine.keeper.close()
    return Outcome(losses, {}, values, peak, 0, 0, [])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_sizes_and_work_between_steps(pool: Any, strategy: str) -> None:
    plan = planned(gpt, tokens(), strategy)
    small = tokens(2, samples=4)
    others = [capture(gpt(), small), capture(gpt(), small, train=False)]
    free = pool(2).run(alternating, plan, others, None)
    budget = int(max(rank.peak for rank in free) * 0.9)
    for found, want in zip(pool(2).run(alternating, plan, others, budget), free, strict=True):
        same(found, want)
        assert found.peak <= budget < want.peak


def squeezed(share: float = 0.7) -> Plan:
    graph, cluster = capture(gpt(), tokens()), Cluster.local(processes=2)
    roomy = Plan.manual(graph, cluster=cluster, strategy="dp")
    use = roomy.prediction.memory[0].use
    memory = int(use.peak - (1 - share) * use.activations)
    return Plan.manual(graph, cluster=cluster, strategy="dp", memory=memory)


@pytest.mark.slow
def test_a_run_keeps_to_a_squeezed_plan(pool: Any) -> None:
    plan = squeezed()
    (squeeze,) = plan.squeezes
    free = pool(2).run(trained, HandPlan(plan.assignment, plan.graph), gpt, [tokens()], None)
    with run(plan, gpt(), SGD) as trainer:
        losses = [trainer.step(tokens()) for _ in range(5)]
        assert losses == free[0].losses[:5]
        assert 0 < trainer.peak <= squeeze.budget < free[0].peak
        loss, gradients = trainer.gradients(tokens())
        assert loss == free[0].losses[5]
        for name, gradient in free[0].gradients.items():
            assert torch.equal(gradients[name], gradient), name


@pytest.mark.slow
def test_a_budget_that_one_process_cannot_keep_ends_the_run_on_all() -> None:
    plan = squeezed()
    (squeeze,) = plan.squeezes
    lopsided = replace(plan, squeezes=(replace(squeeze, ranks=(1,), budget=int(squeeze.least * 0.6)),))
    began = time.monotonic()
    with pytest.raises(BudgetError, match="rank 1"), run(lopsided, gpt(), SGD, timeout=60) as trainer:
        pids = trainer.driver.pids  # type: ignore[attr-defined]
        trainer.step(tokens())
    assert all(gone(pid) for pid in pids)
    assert time.monotonic() - began < 50  # nobody waits for the timeout


def lopsided(plan: HandPlan, budgets: dict[int, int]) -> tuple[list[float], int]:
    """Losses and peak of a run in which some processes have a budget."""
    assert plan.graph is not None
    model = gpt()
    driver = InProcess(Options(timeout=20))
    squeezes: Any = {rank: SimpleNamespace(budget=budget, tier=None) for rank, budget in budgets.items()}
    driver.setup(plan.graph, plan.assignment, recipe(SGD, model), whole_values(model), squeezes)
    results = [driver.step([Job(list(tokens().values()))], [{}]) for _ in range(2)]
    driver.engine.keeper.close()
    return [result.loss for result in results], results[-1].peak


def test_a_budget_for_some_processes_alone(pool: Any) -> None:
    plan = planned(gpt, tokens(), "dp")
    free = pool(2).run(lopsided, plan, {})
    for (losses, peak), (want, _) in zip(pool(2).run(lopsided, plan, {1: 1 << 30}), free, strict=True):
        assert losses == want and peak > 0


def begun(plan: HandPlan, share: float) -> tuple[str, int]:
    """What a run within a share of parameters and AdamW's state says, and for how many parameters state was made."""
    engine = engine_of(
        plan, gpt(), torch.optim.AdamW, budget=int(share * 3 * sum(p.nbytes for p in gpt().parameters()))
    )
    try:
        engine.step([Job(tuple(tokens().values()))])
        said = "it ran"
    except BudgetError as error:
        said = str(error)
    return said, len(engine.optimizer.state)


def test_a_budget_without_room_for_an_optimizers_state_is_refused_before_the_first_update(pool: Any) -> None:
    plan = planned(gpt, tokens(), "dp")
    for said, made in pool(2).run(begun, plan, 0.9):
        assert "the state that AdamW will make" in said and "rank" in said and not made
    for said, made in pool(2).run(begun, plan, 4.0):
        assert said == "it ran" and made
