"""Gradients by an exchange in the cost model: what a plan with one predicts, and where it changes what is planned."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.cluster import Cluster, Level, Link
from weft.cluster.costs import ring_link
from weft.comm import (
    AllGather,
    Cast,
    Controller,
    ErrorFeedback,
    Exchange,
    GeometricMedian,
    LowRank,
    ScatterGather,
    Spec,
    TopK,
    auto,
    dgc,
)
from weft.errors import ImpossibleConstraint, MeshTooLarge
from weft.graph import Graph, capture
from weft.placement.assignment import Assignment
from weft.placement.axes import find_cuts
from weft.placement.layout import Mesh, Partial, Replicate, Shard
from weft.planner import OptimizerCost
from weft.planner.coding import Coding, carries, described
from weft.planner.constraints import STRATEGIES, Constraints
from weft.planner.costs import Costs
from weft.planner.explore import Explorer
from weft.planner.modes import used_for
from weft.planner.prepared import Prepared
from weft.planner.price import Pricing
from weft.planner.roles import Roles
from weft.runtime.choice import Choice

MSE = nn.functional.mse_loss
PER_ELEMENT = 2e-10  # codec seconds; measured ones would make the tests depend on the machine


@pytest.fixture(autouse=True)
def steady_codecs(monkeypatch):
    def tried(exchange: Exchange, specs: Sequence[Spec], ranks: int) -> tuple[float, float]:
        coded = sum(spec.numel for spec in specs if exchange.select(spec))
        return PER_ELEMENT * coded, 4.0 * coded

    monkeypatch.setattr("weft.comm.automatic.tried", tried)


def cluster_of(link: Link, processes: int) -> Cluster:
    ranks = tuple(range(processes))
    return Cluster(Cluster.local(processes=processes).devices, (Level("net", (ranks,), (link,)),))


def two_nodes(inner: Link) -> Cluster:
    """Of two devices each, with one slow link between them."""
    nodes = Level("node", ((0, 1), (2, 3)), (inner, inner))
    net = Level("net", ((0, 1, 2, 3),), (dataclasses.replace(SLOW, shared=True),))
    return Cluster(Cluster.local(processes=4).devices, (nodes, net))


def wide() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)]
    return nn.Sequential(*layers)


BATCH: tuple[Tensor, Tensor] = (torch.zeros(64, 256), torch.zeros(64, 256))
SLOW, FAST = Link(1e-4, 1.25e7), Link(1e-6, 1e11)
EXCHANGES: dict[str, Any] = {
    "top-k": lambda: Exchange(TopK(0.01), ErrorFeedback()),
    "dgc": lambda: dgc(0.001),
    "half": lambda: Exchange(Cast("bfloat16")),
    "low rank": lambda: Exchange(LowRank(4), ErrorFeedback()),
    "scattered": lambda: Exchange(TopK(0.05), ErrorFeedback(), topology=ScatterGather()),
}
NAMES = ["top-k", *(pytest.param(name, marks=pytest.mark.slow) for name in EXCHANGES if name != "top-k")]


def manual(strategy: str | tuple[str, ...], exchange: Exchange | None) -> weft.Plan:
    """A strategy over two processes; two of them over the axes of a mesh of two by two."""
    mesh = (2,) if isinstance(strategy, str) else (2,) * len(strategy)
    cluster = cluster_of(SLOW, math.prod(mesh))
    return weft.Plan.manual(
        wide(), BATCH, loss=MSE, cluster=cluster, mesh=mesh, strategy=strategy, optimizer="SGD", exchange=exchange
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_predicts_what_the_run_would_by_itself(name):
    """`weft.run(exchange="auto")` prices a plan that was made without; over pieces and over wholes."""
    for strategy in ("dp", "zero-1", "zero-3"):
        without, plan = manual(strategy, None), manual(strategy, EXCHANGES[name]())
        which = Choice.of(auto(candidates=lambda: {"it": EXCHANGES[name]()}), without)
        predicted = which.predict(without.graph, without.assignment, find_cuts(without.graph, finest=2))
        assert predicted["it"] == pytest.approx(plan.prediction.seconds, rel=1e-12)
        assert predicted["plain"] == without.prediction.seconds
        assert plan.exchange == EXCHANGES[name]().options and without.exchange == ""


@pytest.mark.parametrize("strategy", ["dp", "zero-1", "zero-3"])
@pytest.mark.parametrize("name", NAMES)
def test_buckets_cost_what_the_exchange_says_of_their_tensors(name, strategy):
    """`Exchange.cost` tensor by tensor, but latencies once for a bucket."""
    cluster, exchange, plan = cluster_of(SLOW, 2), EXCHANGES[name](), manual(strategy, None)
    prepared = Prepared(plan.graph, find_cuts(plan.graph, finest=2))
    coding = Coding.of(exchange, plan.graph, cluster)
    costs, optimizer = Costs(cluster, plan.mesh), OptimizerCost.of("SGD")
    buckets = Pricing(prepared, Roles(prepared), costs, optimizer, None, coding).buckets(plan.assignment)
    link = ring_link(cluster)
    specs = {n: Spec(n, tuple(p.shape)) for n, p in wide().named_parameters()}
    scatter = strategy != "dp"
    for bucket in buckets:
        hops, nbytes = exchange.wire([specs[n] for n in bucket.names], 2, scatter)
        bytes_alone = sum(
            exchange.cost(specs[n], dataclasses.replace(link, latency=0.0), 2, scatter) for n in bucket.names
        )
        assert bucket.coded and bucket.reduce.forward == pytest.approx(bytes_alone + hops * link.latency)
        assert bucket.reduce.nbytes == pytest.approx(2 * nbytes)
        assert bucket.code == pytest.approx(
            PER_ELEMENT * sum(specs[n].numel for n in bucket.names if len(specs[n].shape) > 1)
        )
    assert sum(len(bucket.names) for bucket in buckets) == len(specs)


def test_on_the_timeline_messages_hide_behind_compute_and_codecs_do_not():
    plan, plain = manual("dp", EXCHANGES["top-k"]()), manual("dp", None)
    coding = sum(e.stop - e.start for e in plan.prediction.timeline if e.kind == "code gradients")
    assert coding == pytest.approx(PER_ELEMENT * sum(p.numel() for p in wide().parameters() if p.dim() > 1))
    assert plan.prediction.compute == pytest.approx(plain.prediction.compute + coding)
    assert not any(e.kind == "sum gradients" for e in plan.prediction.timeline)
    assert 0 < plan.prediction.exposed <= plan.prediction.communication < plain.prediction.communication


def test_over_a_slow_link_a_strong_code_makes_data_parallelism_the_faster_one():
    """Without it tensor parallelism wins, over a fast link nothing changes; and the plan is never slower than without."""
    cluster = cluster_of(SLOW, 4)
    options: dict[str, Any] = {"loss": MSE, "optimizer": "SGD"}
    strong = Exchange(TopK(0.001), ErrorFeedback())
    before = weft.plan(wide(), BATCH, cluster=cluster, **options)
    after = weft.plan(wide(), BATCH, cluster=cluster, exchange=strong, **options)
    weight = next(name for name in before.assignment.parameters if name.endswith("weight"))
    whole = lambda plan: all(str(p) == "R" for p in plan.assignment.parameters[weight].used)
    assert not whole(before) and before.exchange == ""
    assert whole(after) and after.exchange == strong.options and after.prediction.seconds < before.prediction.seconds
    weak = weft.plan(wide(), BATCH, cluster=cluster, exchange=Exchange(Cast("bfloat16")), **options)
    assert weak.prediction.seconds == before.prediction.seconds and weak.exchange == ""  # tensor parallelism still


class Mixed(nn.Module):
    """Long sequences through small weights, then what is left of them through large ones: inside a node two strategies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.wide, self.out = nn.Linear(64, 8192), nn.Linear(8192, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(nn.functional.gelu(self.first(x))).mean(1)
        return self.out(nn.functional.gelu(self.wide(x)))


def mixed() -> Graph:
    return capture(Mixed(), (torch.zeros(32, 256, 64), torch.zeros(32, 64)), MSE)


HELD_OUT: dict[str, Any] = {"cluster": two_nodes(Link(2e-5, 1e9)), "optimizer": "SGD"}


def test_the_search_finds_mixtures_that_an_exchange_carries():
    """Between the nodes data parallelism with the exchange; inside them data and tensor parallelism, each where it is cheaper."""
    graph, exchange = mixed(), Exchange(TopK(0.001), ErrorFeedback())
    plan = weft.plan(graph, exchange=exchange, **HELD_OUT)
    named = [
        weft.Plan.manual(graph, mesh=(2, 2), strategy=("dp", s), exchange=exchange, **HELD_OUT) for s in ("dp", "tp")
    ]
    assert plan.exchange and plan.prediction.seconds < 0.99 * min(other.prediction.seconds for other in named)
    used = {name: placement.used for name, placement in plan.assignment.parameters.items()}
    assert used["first.weight"] == (Replicate(), Replicate()) and isinstance(used["wide.weight"][1], Shard)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Exchange(TopK(0.001), ErrorFeedback()), EXCHANGES["half"]])
def test_no_strategy_by_axis_is_faster(make):
    graph = mixed()
    best = weft.plan(graph, exchange=make(), **HELD_OUT).prediction.seconds
    for mesh in ((4,), (2, 2)):
        for strategy in itertools.product(STRATEGIES[:-1], repeat=len(mesh)):
            with contextlib.suppress(ImpossibleConstraint, MeshTooLarge):
                plan = weft.Plan.manual(graph, mesh=mesh, strategy=strategy, exchange=make(), **HELD_OUT)
                assert best <= 1.002 * plan.prediction.seconds, strategy


def every_assignment(explorer: Explorer) -> Iterator[Assignment]:
    """All states of all calls, with all storage modes of the parameters."""
    model, graph = explorer.model, explorer.model.graph
    names = [call.node.name for call in model.prepared.calls]
    for states in itertools.product(*(model.templates[name].states for name in names)):
        chosen = dict(zip(names, states, strict=True))
        if any(isinstance(signature.outputs[graph.loss.index], Shard) for signature in chosen[graph.loss.node]):
            continue
        options = []
        for name, (call, operand) in model.parameter_of.items():
            used = used_for(tuple(signature.inputs[operand] for signature in chosen[call]))
            options.append(model.modes_of(graph.parameters[name].outputs[0], used))
        for modes in itertools.product(*options):
            stored = {name: mode.placement for name, mode in zip(model.parameter_of, modes, strict=True)}
            yield Assignment(model.mesh, chosen, stored, {})


@pytest.mark.slow
@pytest.mark.parametrize("make", [EXCHANGES["top-k"], EXCHANGES["scattered"]])
@pytest.mark.parametrize("inner", [Link(2e-5, 1e9), SLOW])
def test_the_plan_is_the_best_of_all(make, inner):
    """By brute force over every assignment of a small model, at its full price, on every mesh of two nodes of two."""
    batch = (torch.zeros(4096, 64), torch.zeros(4096, dtype=torch.long))
    graph = capture(nn.Linear(64, 512, bias=False), batch, nn.functional.cross_entropy)
    cluster, exchange = two_nodes(inner), make()
    plan = weft.plan(graph, cluster=cluster, optimizer="SGD", exchange=exchange)
    coding, optimizer, best = Coding.of(exchange, graph, cluster), OptimizerCost.of("SGD"), math.inf
    for mesh in (Mesh((4,)), Mesh((2, 2))):
        prepared = Prepared(graph, find_cuts(graph, finest=4))
        explorer = Explorer(prepared, Roles(prepared), Costs(cluster, mesh), optimizer, Constraints(), None, coding)
        for assignment in every_assignment(explorer):
            best = min(best, explorer.pricing.price(assignment, details=False).seconds)
    assert plan.exchange and best <= plan.prediction.seconds <= 1.002 * best


def test_the_plan_says_so():
    exchange = Exchange(TopK(0.01), ErrorFeedback(), topology=AllGather())
    plan = manual("dp", exchange)
    assert weft.Plan.from_json(plan.to_json()) == plan
    assert "exchange    gradients by TopK(ratio=0.01" in str(plan) and "ErrorFeedback" in described(plan.exchange)
    assert "exchange" not in str(manual("dp", None))
    old = {key: value for key, value in plan.to_dict().items() if key != "exchange"}
    assert weft.Plan.from_dict(old).exchange == ""


def test_the_page_shows_it(tmp_path):
    text = manual("zero-1", EXCHANGES["top-k"]()).show(tmp_path / "plan.html").read_text()
    assert "Gradients by TopK" in text and "exchange gradients" in text and "code gradients" in text


def test_memories_count_as_memory():
    weights = 4 * sum(p.numel() for p in wide().parameters() if p.dim() > 1)
    plain, coded = (manual("dp", exchange).prediction for exchange in (None, EXCHANGES["top-k"]()))
    assert coded.peak - plain.peak >= weights  # what error feedback keeps


class Alone(Controller):
    """Decides in each group by itself."""

    def observe(self, spec: Spec, gradient: Any, step: int) -> None:
        return None

    def decide(self, step: int, specs: Any, total: Any = None) -> dict[str, Any]:
        return {}


def test_gradients_without_a_common_axis_go_plain():
    alone = lambda: Exchange(TopK(0.01), controller=Alone())
    for strategy, make in (("tp", EXCHANGES["top-k"]), (("dp", "tp"), alone)):
        plans = [manual(strategy, exchange) for exchange in (None, make())]
        assert plans[1].exchange == "" and plans[0].prediction == plans[1].prediction
    assert manual(("dp", "tp"), Exchange(combine=GeometricMedian())).exchange  # groups weigh workers as one
    assert carries([((), (0, 1)), ((0, 1), ())]) == (0, 1) and carries([((), (0, 1)), ((0,), ()), ((0,), (1,))]) == (0,)
    assert carries([((0,), (1,))]) == (0,) and carries([((1,), (0,)), ((), (0, 1))]) == (0,)
    assert carries([((1, 2), (0,)), ((1,), (0, 2))]) == (0,)
    for owed in (
        [((), (0,)), ((), (1,))],
        [((0, 1), ()), ((0,), (1,))],
        [((), (0, 1)), None],
        [((0, 1), ()), ((), (0,))],
        [((), ())],
        [],
    ):
        assert carries(owed) == ()


@pytest.mark.parametrize("inner", [FAST, SLOW])
@pytest.mark.parametrize("second", ["tp", "zero-1"])
def test_parts_and_pieces_travel_along_the_axis_of_data_parallelism(inner, second):
    """Two nodes of two: over the link between nodes, which the two groups share, after what is summed or cut inside."""
    cluster, exchange = two_nodes(inner), EXCHANGES["top-k"]()
    options: dict[str, Any] = {"loss": MSE, "cluster": cluster, "mesh": (2, 2), "optimizer": "SGD"}
    without = weft.Plan.manual(wide(), BATCH, strategy=("dp", second), **options)
    plan = weft.Plan.manual(wide(), BATCH, strategy=("dp", second), exchange=exchange, **options)
    assert plan.exchange == exchange.options and plan.prediction.seconds < without.prediction.seconds
    which = Choice.of(auto(candidates=lambda: {"it": EXCHANGES["top-k"]()}), without)
    cuts = find_cuts(plan.graph, finest=4)
    assert which.predict(plan.graph, plan.assignment, cuts)["it"] == pytest.approx(plan.prediction.seconds, rel=1e-12)
    other = which.predict(without.graph, without.assignment, cuts)["it"]  # the search with the exchange may know better
    assert plan.prediction.seconds <= other * (1 + 1e-12)
    prepared = Prepared(plan.graph, find_cuts(plan.graph, finest=4))
    costs, coding = Costs(cluster, plan.mesh), Coding.of(exchange, plan.graph, cluster)
    buckets = Pricing(prepared, Roles(prepared), costs, OptimizerCost.of("SGD"), None, coding).buckets(plan.assignment)
    link, seen = ring_link(cluster, (0, 2), concurrent=2), 0
    assert link.bandwidth == pytest.approx(SLOW.bandwidth / 2)
    for bucket in buckets:
        specs = []
        for name in bucket.names:
            shape = list(plan.graph.parameters[name].outputs[0].shape)
            cut = plan.assignment.parameters[name].state[1]
            seen += isinstance(cut, Shard)
            specs.append(Spec(name, tuple(n // 2 if cut == Shard(d) else n for d, n in enumerate(shape))))
        hops, nbytes = exchange.wire(specs, 2)
        numel = sum(plan.graph.parameters[name].outputs[0].numel for name in bucket.names)
        placements = [plan.assignment.parameters[name] for name in bucket.names]
        owing = all(placement.used == (Replicate(), Replicate()) for placement in placements)
        first = costs.flat(numel, 4, (Replicate(), Partial()), placements[0].state).forward if owing else 0.0
        expected = hops * link.latency + nbytes / link.bandwidth + first
        assert bucket.coded and bucket.reduce.forward == pytest.approx(expected)
        assert bucket.code == pytest.approx(PER_ELEMENT * sum(spec.numel for spec in specs if len(spec.shape) > 1))
    assert seen >= 6  # four weights and two biases in halves; the other biases may be whole


def test_memories_of_pieces_are_pieces():
    """Beside ZeRO a device keeps its half of what it would of whole gradients."""
    weights = 4 * sum(p.numel() for p in wide().parameters() if p.dim() > 1)
    extra = {}
    for strategy in (("zero-1", "zero-1"), ("dp", "zero-1"), ("dp", "zero-3")):
        plain, coded = (manual(strategy, exchange).prediction for exchange in (None, EXCHANGES["top-k"]()))
        extra[strategy] = coded.peak - plain.peak
    assert extra["zero-1", "zero-1"] >= weights
    for strategy in (("dp", "zero-1"), ("dp", "zero-3")):
        assert weights / 2 <= extra[strategy] <= weights / 2 * 1.1


def test_what_is_no_exchange_is_refused():
    with pytest.raises(ValueError, match=r"must be a weft\.comm\.Exchange or None, got 'auto'"):
        weft.plan(wide(), BATCH, cluster=cluster_of(SLOW, 2), loss=MSE, exchange="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "by all-reduce"),
        (lambda: Exchange(Cast()), "by Cast"),
        (lambda: Exchange(TopK(0.01), ErrorFeedback(), seed=1), "seed 1"),
    ],
)
def test_a_run_with_another_exchange_is_told(given, says):
    model, example = nn.Linear(4, 2), (torch.randn(4, 4), torch.randn(4, 2))
    alone = weft.Plan.manual(model, example, loss=MSE, cluster=Cluster.local(processes=1))
    planned = EXCHANGES["top-k"]()
    plan = dataclasses.replace(alone, exchange=planned.options)
    with pytest.warns(UserWarning, match=f"priced for gradients by TopK.*{says}"):
        with weft.run(plan, model, torch.optim.SGD, loss=MSE, exchange=None if given is None else given()):
            pass


@pytest.mark.filterwarnings("error")
def test_a_run_with_the_same_is_not():
    model, example = nn.Linear(4, 2), (torch.randn(4, 4), torch.randn(4, 2))
    alone = weft.Plan.manual(model, example, loss=MSE, cluster=Cluster.local(processes=1))
    for exchange, planned in ((EXCHANGES["top-k"](), EXCHANGES["top-k"]().options), (EXCHANGES["half"](), "")):
        plan = dataclasses.replace(alone, exchange=planned)
        with weft.run(plan, model, torch.optim.SGD, loss=MSE, exchange=exchange):
            pass
