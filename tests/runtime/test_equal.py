"""The engine on several processes gives the losses, gradients and trained weights of one device."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.placement.random_plans import random_assignment
from tests.runtime.plans import HandPlan, batch, plan_of, tiny, with_random_zero
from torch import nn

from weft.graph import capture
from weft.placement.assignment import Assignment, replicated
from weft.placement.axes import find_cuts
from weft.placement.layout import Mesh
from weft.runtime.batches import split
from weft.runtime.driver import whole_values
from weft.runtime.engine import Engine, Job, Options, connect
from weft.runtime.optimizer import recipe

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)


def engine_of(
    plan: HandPlan, model: nn.Module, optimizer: Any = ADAMW, budget: int | None = None, **options: Any
) -> Engine:
    graph = plan.graph
    assert graph is not None
    wanted = recipe(optimizer, model)
    comms = connect(plan.assignment.mesh)
    engine = Engine(graph, plan.assignment, comms, wanted, Options(**options), budget=budget)
    engine.load(whole_values(model))
    return engine


def one_device(model: nn.Module, steps: int, clip: float | None = None, accumulate: int = 1) -> list[float]:
    """Train the model itself; the losses."""
    optimizer = ADAMW(model.parameters())
    losses = []
    for step in range(steps):
        tokens, targets = batch(seed=step)
        optimizer.zero_grad()
        total = 0.0
        for (x, y), share in split([tokens, targets], accumulate):
            loss = model(x, y) * share
            loss.backward()
            total += loss.item()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(total)
    return losses


# ---- on every rank


def gradients_of(plan: HandPlan) -> tuple[float, dict[str, torch.Tensor]]:
    engine = engine_of(plan, tiny(dtype=torch.float64))
    loss, gradients = engine.gradients([Job(batch())])
    return loss, {name: g.clone() for name, g in gradients}


def train(
    plan: HandPlan, steps: int, accumulate: int = 1, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = tiny()
    engine = engine_of(plan, model, **options)
    losses = []
    for step in range(steps):
        jobs = [Job(leaves, share) for leaves, share in split(list(batch(seed=step)), accumulate)]
        for job in jobs:
            if job.key not in engine.programs:
                engine.add(capture(model, tuple(job.leaves)))
        losses.append(engine.update(engine.accumulate(jobs)).loss)
    return losses, {name: engine.whole(name).clone() for name in engine.names}


# ---- the tests


def same_gradients(found: tuple[float, dict[str, torch.Tensor]]) -> None:
    model = tiny(dtype=torch.float64)
    want = model(*batch())
    want.backward()
    loss, gradients = found
    assert loss == pytest.approx(want.item(), rel=1e-10)
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "stage", "weights"),
    [
        ((2,), 0, None),
        ((2,), 1, None),
        ((2,), 2, None),
        ((2,), 3, None),
        ((2,), 3, (3, 1)),
        ((3,), 3, None),
        ((2, 2), 3, None),
    ],
)
def test_loss_and_every_gradient(pool: Any, shape: tuple[int, ...], stage: int, weights: Any) -> None:
    plan = plan_of(tiny(dtype=torch.float64), batch(), shape, stage, weights)
    for found in pool(plan.assignment.mesh.size).run(gradients_of, plan):
        same_gradients(found)


@pytest.mark.parametrize(("shape", "seeds"), [((3,), range(3)), ((2, 2), range(5))])
def test_random_plans(pool: Any, shape: tuple[int, ...], seeds: range) -> None:
    graph = capture(tiny(dtype=torch.float64), batch())
    mesh = Mesh(shape)
    cuts = find_cuts(graph, finest=mesh.size)
    for seed in seeds:
        drawn: Assignment = random_assignment(graph, mesh, cuts, seed)
        plan = HandPlan(with_random_zero(drawn, graph, seed), graph)
        for found in pool(mesh.size).run(gradients_of, plan):
            same_gradients(found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_twenty_steps(pool: Any, stage: int) -> None:
    plan = plan_of(tiny(), batch(), (2,), stage)
    results = pool(2).run(train, plan, 20)
    model = tiny()
    want = one_device(model, 20)
    for losses, values in results:
        assert losses == pytest.approx(want, rel=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-2, atol=2e-4)


def clipped(plan: HandPlan, accumulate: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    return train(plan, 4, accumulate, clip_norm=0.3)


@pytest.mark.parametrize(("stage", "accumulate"), [(0, 1), (3, 1), (0, 4), (1, 4), (2, 4), (3, 4)])
def test_clipping_and_uneven_accumulation(pool: Any, stage: int, accumulate: int) -> None:
    """Six samples in four micro-batches: 2, 2, 1, 1."""
    plan = plan_of(tiny(), batch(), (2,), stage)
    model = tiny()
    want = one_device(model, 4, clip=0.3, accumulate=accumulate)
    for losses, values in pool(2).run(clipped, plan, accumulate):
        assert losses == pytest.approx(want, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-3, atol=1e-4)


def with_dropout(plan: HandPlan, seed: int) -> list[tuple[float, float]]:
    engine = engine_of(plan, tiny(dropout=0.5, dtype=torch.float64), seed=seed)
    first = engine.accumulate([Job(batch())]).loss
    engine.store.abandon()
    again = engine.accumulate([Job(batch())]).loss
    engine.store.abandon()
    engine.steps += 1
    later = engine.accumulate([Job(batch())]).loss
    return [(first, again), (first, later)]


def test_dropout_depends_on_seed_and_step(pool: Any) -> None:
    plan = plan_of(tiny(dropout=0.5, dtype=torch.float64), batch(), (2,), 0)
    results = pool(2).run(with_dropout, plan, 0)
    assert results[0] == results[1]
    (first, again), (_, later) = results[0]
    assert first == again and first != later
    assert pool(2).run(with_dropout, plan, 1)[0][0][0] != first


class Normed(nn.Module):
    """Batch norm and dropout: training and evaluation differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.dropout, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.b(self.dropout(self.norm(self.a(x)))), y)


def normed(plan: HandPlan, example: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Normed()
    engine = engine_of(plan, model)
    engine.accumulate([Job(example)])  # moves the running statistics
    engine.store.abandon()
    engine.add(capture(model, example, train=False))
    return engine.evaluate(Job(example, train=False)), {
        n: engine.whole(n).clone() for n in engine.names if "running" in n
    }


def test_evaluation_has_no_dropout_and_running_statistics(pool: Any) -> None:
    example = (torch.randn(6, 5), torch.randint(0, 3, (6,)))
    torch.manual_seed(0)
    model = Normed()
    graph = capture(model, example)
    plan = HandPlan(replicated(graph, Mesh((2,))), graph)
    model(*example)
    model.eval()
    want = model(*example).item()
    for loss, buffers in pool(2).run(normed, plan, example):
        assert loss == pytest.approx(want, rel=1e-5)
        for name, value in buffers.items():
            torch.testing.assert_close(value, model.get_buffer(name))


def keeps(plan: HandPlan) -> tuple[dict[str, int], list[str]]:
    engine = engine_of(plan, tiny())
    engine.update(engine.accumulate([Job(batch())]))
    buckets = [b for b in engine.store.buckets if getattr(b, "stored_cut", False)]
    return engine.memory(), [name for bucket in buckets if bucket.full for name in bucket.leaves]  # type: ignore[attr-defined]


def test_memory_follows_the_stage(pool: Any) -> None:
    total = sum(p.nbytes for p in tiny().parameters())
    for stage, (parameters, gradients, state) in enumerate([(1, 1, 2), (1, 0.5, 1), (1, 0.5, 1), (0.5, 0.5, 1)]):
        plan = plan_of(tiny(), batch(), (2,), stage)
        for kept, full in pool(2).run(keeps, plan):
            assert not full
            assert kept["parameters"] == pytest.approx(parameters * total, rel=0.1)
            assert kept["gradients"] == pytest.approx(gradients * total, rel=0.1)
            assert kept["optimizer"] == pytest.approx(state * total, rel=0.1)
