"""`weft.run(..., exchange="auto")`: a code where the plan's prediction says that it pays, all-reduce anywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.plans import HandPlan, batch, plan_of, tiny
from tests.runtime.test_equal import engine_of
from torch import nn

import weft
from weft.cluster import Cluster, Level, Link
from weft.cluster.costs import all_reduce, ring_link
from weft.comm import Cast, ErrorFeedback, Exchange, Spec, TopK, auto, dgc
from weft.placement.axes import find_cuts
from weft.planner import OptimizerCost, price
from weft.runtime import checkpoint
from weft.runtime.choice import Choice
from weft.runtime.engine import Job


def cluster_of(link: Link, processes: int = 2) -> Cluster:
    ranks = tuple(range(processes))
    return Cluster(Cluster.local(processes=processes).devices, (Level("net", (ranks,), (link,)),))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_link_of_a_cluster_costs_what_its_all_reduce_does(processes):
    found = ring_link(cluster_of(Link(1e-4, 1e8), processes))
    ring = 2 * (processes - 1) * found.latency + 2 * (processes - 1) / processes * (1 << 24) / found.bandwidth
    assert ring == pytest.approx(
        all_reduce(cluster_of(Link(1e-4, 1e8), processes), range(processes), 1 << 24), rel=1e-3
    )


def choice(link: Link, processes: int = 2, **options: Any) -> Choice:
    return Choice(auto(**options), cluster_of(link, processes), OptimizerCost.of("SGD"))


def codec_of_a_nanosecond(exchange: Exchange, specs: Sequence[Spec], ranks: int) -> tuple[float, float]:
    coded = sum(spec.numel for spec in specs if exchange.select(spec))
    return 1e-9 * coded, 4.0 * coded


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_by_prediction_it_is_never_slower_than_plain(stage, monkeypatch):
    """Over links from 1 Mbit/s to 100 Gbit/s; plain is priced as the plan is."""
    monkeypatch.setattr("weft.comm.automatic.tried", codec_of_a_nanosecond)
    model, example = nn.Linear(1000, 1000), (torch.randn(64, 1000), torch.randn(64, 1000))
    plan = plan_of(model, example, (2,), stage, loss=nn.functional.mse_loss)
    assert plan.graph is not None
    cuts, chosen = find_cuts(plan.graph, finest=2), set()
    for bandwidth in (1e5, 1e6, 1e7, 1e8, 1e9, 1e10):
        for latency in (1e-6, 1e-2):
            which = choice(Link(latency, bandwidth))
            predicted = which.predict(plan.graph, plan.assignment, cuts)
            assert predicted["plain"] == price(plan.graph, plan.assignment, which.cluster, "SGD").seconds
            name = which.auto.choose(predicted)
            assert predicted[name] <= predicted["plain"]
            chosen.add(name)
    assert "plain" in chosen and len(chosen) > 1


ROOT = Path(__file__).resolve().parents[2]
SLOW, FAST = Link(1e-4, 1e3), Link(1e-7, 1e11)


def codes() -> dict[str, Exchange]:
    return {"half": Exchange(Cast("bfloat16")), "top-k": Exchange(TopK(0.05), ErrorFeedback())}


def chosen(plan: HandPlan, link: Link) -> tuple[str, bool]:
    engine = engine_of(plan, tiny(), exchange=choice(link, candidates=codes))
    engine.step([Job(batch())])
    found = engine.coded.name if engine.coded is not None else "plain"
    if engine.coded is not None:
        engine.coded.exchange.close()
    return found, engine.coded is None


def test_the_same_choice_on_every_process(pool):
    plain, zero = plan_of(tiny(), batch(), (2,), 0), plan_of(tiny(), batch(), (2,), 1)
    assert pool(2).run(chosen, plain, SLOW) == [("top-k", False)] * 2
    assert pool(2).run(chosen, plain, FAST) == [("plain", True)] * 2
    assert pool(2).run(chosen, zero, SLOW) == [("top-k", False)] * 2


def saved_and_resumed(plan: HandPlan, path: Path) -> tuple[bool, str]:
    """Chosen and saved over a slow link; resumed where the prediction says plain: the memories are not lost."""
    found = []
    engine = engine_of(plan, tiny(), exchange=choice(SLOW, candidates=codes))
    for number in range(4):
        if number == 2:
            checkpoint.save(engine, path, {})
        engine.step([Job(batch(seed=number))])
    found.append({name: engine.whole(name).clone() for name in engine.names})
    assert engine.coded is not None
    engine.coded.exchange.close()
    engine = engine_of(plan, tiny(seed=3), exchange=choice(FAST, candidates=codes))
    assert engine.coded is None
    remark = checkpoint.load(engine, path)["remark"]
    for number in range(2, 4):
        engine.step([Job(batch(seed=number))])
    assert engine.coded is not None and engine.coded.name == "top-k"
    engine.coded.exchange.close()
    return all(torch.equal(engine.whole(name), value) for name, value in found[0].items()), remark


def test_a_resumed_run_takes_what_the_first_one_chose(pool, tmp_path):
    assert pool(2).run(saved_and_resumed, plan_of(tiny(), batch(), (2,), 0), tmp_path / "c") == [(True, "")] * 2


def test_from_a_plan_and_bad_values():
    model, example = torch.nn.Linear(8, 4), (torch.randn(4, 8), torch.randn(4, 4))
    loss = torch.nn.functional.mse_loss
    plan = weft.Plan.manual(model, example, loss=loss, cluster=cluster_of(Link(1e-3, 1e6)), strategy="dp")
    which = Choice.of(auto(), plan)
    cuts = find_cuts(plan.graph, finest=2)
    assert which.predict(plan.graph, plan.assignment, cuts)["plain"] == plan.prediction.seconds
    slower = Choice.of(auto(link=Link(1.0, 1e6)), plan).predict(plan.graph, plan.assignment, cuts)
    assert slower["plain"] > plan.prediction.seconds + 1.0  # the user knows the link better
    assert which.fitting(Exchange(Cast("bfloat16")).options) == "bfloat16" and which.fitting("codec of mine") == ""
    with pytest.raises(ValueError, match="'auto' or None"), weft.run(plan, model, exchange="fast"):
        pass


def velocities() -> dict[str, Exchange]:
    return {**codes(), "velocities": dgc(0.01, momentum=0.9)}


def test_velocities_are_not_clipped_whatever_is_chosen():
    """Over this fast link it would be plain."""
    arguments: dict[str, Any] = {"optimizer": torch.optim.SGD, "exchange": auto(FAST, velocities)}
    plan = plan_of(tiny(), batch(), (2,), 0)
    with (
        pytest.raises(ValueError, match=r"velocities, and clip_norm=0\.1"),
        weft.run(plan, tiny(), clip_norm=0.1, **arguments),
    ):
        pass


@pytest.mark.parametrize(
    ("exchange", "part"),
    [
        (auto(candidates=lambda: codes()), "candidates"),
        (Exchange(TopK(0.1), select=lambda spec: True), "select"),
        (Exchange(type("Local", (Cast,), {})("bfloat16")), "codec"),
    ],
)
def test_what_cannot_be_sent_is_named_before_any_process_starts(exchange, part, monkeypatch):
    monkeypatch.setattr("weft.runtime.launch.subprocess.Popen", None)
    model, example = nn.Linear(8, 4), (torch.randn(4, 8), torch.randn(4, 4))
    loss = nn.functional.mse_loss
    plan = weft.Plan.manual(model, example, loss=loss, cluster=cluster_of(FAST), strategy="dp")
    with (
        pytest.raises(ValueError, match=f"run: {part} of exchange= cannot be sent .* at the top level of the script"),
        weft.run(plan, model, torch.optim.SGD, exchange=exchange),
    ):
        pass


OF_THE_SCRIPT = """
import torch, weft
from weft.comm import Cast, Exchange, auto

class Mine(Cast):
    pass

def large(spec):
    return spec.numel > 4

def codes():
    return {"mine": Exchange(Mine("bfloat16"), select=large)}

if __name__ == "__main__":
    from torch.nn.functional import mse_loss
    model, example = torch.nn.Linear(8, 4), (torch.randn(4, 8), torch.randn(4, 4))
    gradients = torch.autograd.grad(mse_loss(model(example[0]), example[1]), [*model.parameters()])
    want = [w.detach() - 0.1 * g for w, g in zip(model.parameters(), gradients)]
    plan = weft.Plan.manual(model, example, loss=mse_loss, cluster=weft.Cluster.local(processes=2), strategy="dp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with weft.run(plan, model, sgd, loss=mse_loss, exchange=EXCHANGE) as trainer:
        trainer.step(example)
        print("name", trainer.exchange)
    weight, bias = (float((a - b).abs().max()) for a, b in zip(model.parameters(), want))
    print("weight", weight / float(0.1 * gradients[0].abs().max()))
    print("bias", bias)
"""


@pytest.mark.parametrize(
    ("exchange", "name"),
    [
        ("codes()['mine']", []),
        pytest.param("auto(weft.Link(1e-4, 1e3), codes)", ["mine"], marks=pytest.mark.slow),
    ],
)
def test_functions_and_classes_of_the_script(exchange, name, tmp_path):
    """One step has the parameters of one device, to the gradients' eight bits where the codec is for them (not the bias)."""
    (tmp_path / "script.py").write_text(OF_THE_SCRIPT.replace("EXCHANGE", exchange))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert said["name"].split() == name
    assert 1e-5 < float(said["weight"]) < 2**-7 and float(said["bias"]) < 1e-7


@pytest.mark.slow
def test_in_processes_that_weft_starts():
    model, example = torch.nn.Linear(8, 4), (torch.randn(4, 8), torch.randn(4, 4))
    loss = torch.nn.functional.mse_loss
    plan = weft.Plan.manual(model, example, loss=loss, cluster=weft.Cluster.local(processes=2), strategy="dp")
    with weft.run(plan, model, torch.optim.SGD, loss=loss, exchange="auto") as trainer:
        trainer.step(example)
        assert trainer.exchange == "plain"  # 144 bytes of gradients
