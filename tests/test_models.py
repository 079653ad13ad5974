"""Models as their authors wrote them: planned for 2 and 4 processes, one step, equal to one device in float64.

`WEFT_WRITE_DOCS=1 pytest tests/test_models.py` rewrites docs/models.md from what this run measured; without it the page must
only list these models (operators and placements change with the versions of torch and transformers, and with the planner).
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tests.slow import slow
from zoo import ZOO, Specimen, one_device, specimen, worst_error

import weft
from weft.cluster import Cluster, Device, Level, Link, Rate
from weft.graph import Graph, capture
from weft.nn import GPT, GPTOptions
from weft.placement.assignment import Assignment
from weft.placement.axes import find_cuts
from weft.placement.deferred import deferred
from weft.placement.layout import Replicate, Shard

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Row:
    """What the table says of one model on one number of processes."""

    model: str
    processes: int
    calls: int
    operators: int
    mesh: str
    parameters: str
    cut: int
    error: float

    def __str__(self) -> str:
        return (
            f"| {self.model} | {self.calls} | {self.operators} | {self.processes} | {self.mesh} | {self.parameters} | "
            f"{self.cut} of {self.calls} | {self.error:.0e} |"
        )


ROWS: dict[tuple[str, int], Row] = {}


@lru_cache(maxsize=2)
def captured(name: str) -> tuple[Specimen, Graph]:
    chosen = specimen(name)
    return chosen, chosen.graph()


def splitting_cluster(processes: int) -> Cluster:
    """Slow devices on fast links: even models this small are worth splitting."""
    devices = tuple(
        Device(f"slow-{i}", "cpu", 2**33, {"default": Rate({"float32": 1e8}, 1e8)}) for i in range(processes)
    )
    return Cluster(devices, (Level("fast", (tuple(range(processes)),), (Link(latency=1e-7, bandwidth=1e11),)),))


def summary(assignment: Assignment) -> str:
    """How many parameters are used in which placement: `R 12, S(0) 9`."""
    plain = lambda p: f"S({p.dim})" if isinstance(p, Shard) else str(p)
    counts = Counter(" ".join(map(plain, p.used)) for p in assignment.parameters.values())
    return ", ".join(f"{placements} × {count}" for placements, count in sorted(counts.items()))


def number_cut(assignment: Assignment) -> int:
    """Calls that do not run whole on every device."""
    whole = lambda s: all(p == Replicate() for p in (*s.inputs, *s.outputs))
    return sum(not all(map(whole, per_axis)) for per_axis in assignment.signatures.values())


ON_FOUR = ("GPT-2", "Graph attention network", "ResNet", "weft.nn.GPT", "weft.nn.UNet")  # the quick ones


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        slow(name, processes) if processes == 4 and name not in ON_FOUR else (name, processes)
        for name in ZOO
        for processes in (2, 4)
    ],
)
def test_planned_step_equals_one_device(name, processes):
    chosen, graph = captured(name)
    assert set(find_cuts(graph).rows) == {call.name for call in graph.calls}  # none is replicated for want of a rule
    plan = weft.plan(graph, cluster=splitting_cluster(processes))
    error, where = worst_error(chosen, graph, plan.assignment)
    assert error <= TOLERANCE, where
    calls = graph.calls
    cut = number_cut(plan.assignment)
    assert cut >= len(calls) / 2
    mesh = "×".join(map(str, plan.mesh.shape))
    operators = len({call.target for call in calls})
    ROWS[name, processes] = Row(name, processes, len(calls), operators, mesh, summary(plan.assignment), cut, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_operator_has_a_rule_as_the_model_is(name):
    """The same with the model's casts to float32 left alone, as users have it."""
    chosen = specimen(name)
    graph = capture(chosen.model, chosen.batch, chosen.loss)
    assert set(find_cuts(graph).rows) == {call.name for call in graph.calls}
    plan = weft.plan(graph, cluster=splitting_cluster(2))
    error, where = worst_error(chosen, graph, plan.assignment)
    assert error <= 1e-5, where


@pytest.mark.parametrize("name", ["BERT", "ViT", "weft.nn.GPT"])
def test_planned_step_on_two_axes_equals_one_device(name):
    chosen, graph = captured(name)
    plan = weft.plan(graph, cluster=splitting_cluster(4), mesh=(2, 2))
    error, where = worst_error(chosen, graph, plan.assignment)
    assert error <= TOLERANCE, where


@pytest.mark.parametrize("strategy", ["tp", "zero-3", ("dp", "tp")], ids=str)
@pytest.mark.parametrize("name", ["Llama", pytest.param("T5", marks=pytest.mark.slow), "weft.nn.GPT"])
def test_named_strategies_equal_one_device(name, strategy):
    chosen, graph = captured(name)
    mesh = (2, 2) if isinstance(strategy, tuple) else (2,)
    plan = weft.Plan.manual(graph, cluster=splitting_cluster(4), mesh=mesh, strategy=strategy)
    error, where = worst_error(chosen, graph, plan.assignment)
    assert error <= TOLERANCE, where


def test_through_real_processes():
    """Capture, plan, run with the runtime's own processes and collectives."""
    chosen, graph = captured("weft.nn.GPT")
    loss, gradients, _ = one_device(chosen)
    plan = weft.plan(graph, cluster=splitting_cluster(2))
    with weft.run(plan, chosen.model, torch.optim.SGD) as trainer:
        found, local = trainer.gradients(chosen.batch)
    assert found == pytest.approx(loss.item(), rel=TOLERANCE)
    assert set(local) == set(gradients)
    for name, gradient in gradients.items():
        assert (local[name] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name


def test_a_model_that_was_never_whole():
    """From `deferred`: no process builds it, and training goes as from the same seed on one device."""
    build = lambda: GPT(GPTOptions(vocabulary=60, context=16, layers=1, heads=2, width=16)).double()
    batch = (torch.randint(60, (4, 9)), torch.randint(60, (4, 9)))
    torch.manual_seed(5)
    alone = build()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = alone(*batch)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    model = deferred(build, seed=5)
    plan = weft.Plan.manual(model, batch, cluster=splitting_cluster(2), strategy="zero-3", optimizer=torch.optim.SGD)
    with weft.run(plan, model, partial(torch.optim.SGD, lr=0.1)) as trainer:
        assert [trainer.step(batch) for _ in range(2)] == pytest.approx(expected, rel=1e-9)


def test_the_page_lists_every_model():
    rows = re.findall(r"^\| (.+?) \| \d+ \| \d+ \| (\d+) \|.* (\S+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {(name, int(processes)) for name, processes, _ in rows} == {(name, p) for name in ZOO for p in (2, 4)}
    assert all(float(error) <= TOLERANCE for _, _, error in rows)


@pytest.fixture(scope="module", autouse=True)
def page():
    """Rewrites the page after the last test if asked to, and if every model was measured."""
    yield
    if os.environ.get("WEFT_WRITE_DOCS") and len(ROWS) == 2 * len(ZOO):
        PAGE.write_text(written_page())


def written_page() -> str:
    import transformers

    rows = "\n".join(str(ROWS[name, processes]) for name in ZOO for processes in (2, 4))
    return f"""# Models that run unmodified

Generated by `WEFT_WRITE_DOCS=1 python -m pytest tests/test_models.py` with torch {torch.__version__} and transformers \
{transformers.__version__}; do not edit.

Each model is captured as its authors wrote it (tiny sizes, dropout off), planned by `weft.plan` for a cluster on which
splitting pays, and run for one step. *Error* is the largest difference of the loss, of any gradient and of any buffer to one
device, relative to the largest entry, in float64 (casts to float32 inside the models become casts to float64, or they would
hide it). *Cut* counts the operators that do not run whole on every process; no operator lacks a rule.
*Parameters* says in which placement they are used, per mesh axis: R replicated, S(d) cut along dim d.

| model | operators | kinds | processes | mesh | parameters | cut | error |
| --- | --: | --: | --: | --- | --- | --: | --: |
{rows}
"""
