"""Plans made to fit by computing again: the trace is the memory model, and what comes out fits, costs and says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.planner.conftest import gpt, plain_cluster, tokens
from tests.zoo import ZOO, specimen
from torch import nn

from weft.cluster import Cluster, Tier
from weft.errors import BudgetError, DoesNotFit
from weft.graph import capture
from weft.graph.graph import Graph
from weft.memory import check, native
from weft.placement.axes import find_cuts
from weft.planner import Constraints, Plan, plan
from weft.planner.costs import Costs
from weft.planner.optimizer import OptimizerCost
from weft.planner.prepared import Prepared
from weft.planner.price import Prediction, Pricing
from weft.planner.roles import Roles
from weft.planner.squeeze import Moves, Squeezed, Story, least_bytes, squeeze, step_trace

STRATEGIES = ("dp", "zero-1", "zero-2", "zero-3", "tp", "tp+sp")


def pricing_of(graph: Graph, made: Plan) -> Pricing:
    prepared = Prepared(graph, find_cuts(graph, finest=made.mesh.size, allow_replicated=True))
    costs = Costs(made.cluster, made.mesh)
    return Pricing(prepared, Roles(prepared), costs, OptimizerCost.of("AdamW"))


def same_peak(graph: Graph, strategy: str, devices: int = 2) -> None:
    made = Plan.manual(graph, cluster=plain_cluster(devices), strategy=strategy, allow_replicated=True)
    story = Story(pricing_of(graph, made), made.assignment)
    for place, memory in enumerate(made.prediction.memory):
        trace, moments = step_trace(story, place, workspaces=False)
        trace.check()
        assert sorted(moments) == list(range(len(trace.ops)))
        # bytes are whole numbers there: at most one more for each value
        assert memory.use.peak - 1e-3 <= trace.peak <= memory.use.peak + len(trace.values)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_trace_is_the_memory_model(gpt_graph, strategy):
    same_peak(gpt_graph, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ZOO)
def test_the_trace_is_the_memory_model_of_the_zoo(name, strategy):
    same_peak(specimen(name).graph(), strategy)


def tight(graph: Graph, strategy: str = "dp", share: float = 0.7, cluster: Cluster | None = None, **options) -> Plan:
    """A plan for two devices with this share of its activations' bytes besides the rest."""
    cluster = cluster or plain_cluster(2)
    use = Plan.manual(graph, cluster=cluster, strategy=strategy).prediction.memory[0].use
    memory = int(use.peak - (1 - share) * use.activations)
    return Plan.manual(graph, cluster=cluster, strategy=strategy, memory=memory, **options)


@pytest.mark.parametrize("strategy", ["dp", "tp"])
def test_a_squeezed_plan_fits_and_costs_what_is_repeated(gpt_graph, strategy):
    made = tight(gpt_graph, strategy)
    whole = Plan.manual(gpt_graph, cluster=plain_cluster(2), strategy=strategy)
    (squeezed,) = made.squeezes
    assert made.prediction.fits and not tight(gpt_graph, strategy, recompute=False).prediction.fits
    assert (
        squeezed.least
        <= squeezed.peak
        <= squeezed.budget
        < squeezed.whole
        == pytest.approx(whole.prediction.peak, abs=1)
    )
    assert made.prediction.peak == pytest.approx(squeezed.peak) and squeezed.ranks == (0, 1)
    assert made.prediction.compute == pytest.approx(whole.prediction.compute + squeezed.seconds)
    assert whole.prediction.seconds < made.prediction.seconds <= whole.prediction.seconds + squeezed.seconds + 1e-12
    assert sum(part.seconds for part in squeezed.parts) == pytest.approx(squeezed.seconds)
    assert any(event.kind == "recompute" for event in made.prediction.timeline)
    assert (made.budget(0), made.budget(1), made.budget(2)) == (squeezed.budget, squeezed.budget, None)
    made.check()


def test_what_is_squeezed_passes_the_judge(gpt_graph):
    made = tight(gpt_graph)
    pricing = pricing_of(gpt_graph, made)
    pricing.memory = (made.squeezes[0].budget,) * 2
    found = squeeze(pricing, made.assignment, pricing.price(made.assignment))
    judged = check(found.plans[0].trace, found.plans[0].schedule)
    assert judged.peak <= made.squeezes[0].budget
    assert sum(float(row[0]) for row in found.repeats.values()) == pytest.approx(judged.repeated_seconds)
    pricing.memory = (made.squeezes[0].least - 1,) * 2
    with pytest.raises(BudgetError):
        squeeze(pricing, made.assignment, pricing.price(made.assignment))


DISK = Tier(bandwidth=1e9, latency=1e-7, name="disk")
ANY = Moves()


def below(tier: Tier | None, overlap: float = 1.0) -> Cluster:
    return plain_cluster(2, offload=tier, overlap=overlap)


class Bench:
    """One assignment to squeeze: what it costs within some bytes."""

    def __init__(self, graph: Graph, strategy: str, tier: Tier | None, overlap: float = 1.0):
        made = Plan.manual(graph, cluster=below(tier, overlap), strategy=strategy)
        self.pricing, self.assignment = pricing_of(graph, made), made.assignment
        self.whole = self.pricing.price(self.assignment)

    def least(self, moves: Moves = ANY) -> int:
        return least_bytes(self.pricing, self.assignment, self.whole, moves)[0]

    def within(self, budget: float, moves: Moves = ANY) -> tuple[Prediction, Squeezed]:
        self.pricing.memory = (int(budget),) * 2
        made = squeeze(self.pricing, self.assignment, self.pricing.price(self.assignment), moves)
        priced = self.pricing.price(self.assignment, repeats=made.repeats, waits=made.waits)
        self.pricing.memory = None
        return priced, made


@pytest.mark.parametrize("strategy", [pytest.param("dp", marks=pytest.mark.slow), "zero-3"])
def test_a_lower_tier_is_used_where_it_is_cheaper_or_needed(gpt_graph, strategy):
    alone, helped = Bench(gpt_graph, strategy, None), Bench(gpt_graph, strategy, DISK)
    slow = Bench(gpt_graph, strategy, Tier(1e3, 1.0, name="disk"))
    least = alone.least()
    priced, made = alone.within(least)
    cheaper, moved = helped.within(least)
    assert moved.plans[0].checked.saved_bytes and cheaper.seconds < priced.seconds
    useless, same = slow.within(least)  # dearer than any operator: as good as none
    assert useless == priced and same.plans[0].schedule == made.plans[0].schedule
    assert slow.least() < least and slow.within(least - 1)[0].waiting > 1.0  # where nothing else is left, however slow
    with pytest.raises(BudgetError):
        slow.within(least - 1, Moves(offload=False))
    assert Plan.manual(gpt_graph, cluster=below(DISK), strategy=strategy).squeezes == ()  # what fits stays as it is


@pytest.mark.parametrize(("strategy", "overlap"), [("dp", 0.4), ("tp", 1.0), ("zero-3", 0.0)])
def test_what_is_moved_passes_the_judge(gpt_graph, strategy, overlap):
    bench, moves = Bench(gpt_graph, strategy, DISK, overlap), Moves(recompute=False)
    budget = bench.least(moves)
    priced, made = bench.within(budget, moves)
    (squeezed,), plan = made.squeezes(), made.plans[0]
    judged = check(plan.trace, plan.schedule, DISK)
    assert (
        judged.peak <= squeezed.peak <= budget == squeezed.least
        and not judged.repeated
        and squeezed.tier == replace(DISK, overlap=overlap)
    )
    assert (squeezed.moved, squeezed.held) == (judged.saved_bytes, judged.held_bytes)
    saved = {plan.trace.values[action.index].category for action in plan.schedule.actions if action.kind == "save"}
    stays = {value.category for value in plan.trace.values if value.born >= 0} - {"activation", "gradient", "parameter"}
    assert saved == {"activation"} and stays == ({"buffer"} if strategy == "tp" else set())  # what is sent or received
    copies = [plan.trace.values[a.index].nbytes for a in plan.schedule.actions if a.kind in ("save", "load")]
    seconds = sum(map(DISK.seconds, copies))
    if overlap == 1.0:
        assert squeezed.waiting == pytest.approx(judged.waited_seconds)
    elif overlap == 0.0:
        assert squeezed.waiting == pytest.approx(seconds)  # nothing hides
    else:
        assert max((1 - overlap) * seconds, judged.waited_seconds) <= squeezed.waiting * (1 + 1e-9)
        assert squeezed.waiting <= judged.waited_seconds + (1 - overlap) * seconds + 1e-12
    assert priced.compute == pytest.approx(bench.whole.compute) and priced.waiting == pytest.approx(squeezed.waiting)
    assert bench.whole.seconds < priced.seconds <= bench.whole.seconds + squeezed.waiting + 1e-12


def test_workspaces_of_convolutions_are_measured_on_the_pieces():
    if native.problem():
        pytest.skip(native.problem())
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(4, 3, 20, 20)
    graph = capture(model, (x, torch.randn(4, 8, 18, 18)), lambda out, wanted: (out - wanted).square().mean())

    def found(cluster: Cluster) -> list[tuple[int, int]]:
        made = Plan.manual(graph, cluster=cluster, strategy="dp")
        trace, _ = step_trace(Story(pricing_of(graph, made), made.assignment), 0)
        of = {(op.module, op.phase): op.workspace for op in trace.ops if op.name.startswith(("conv2d", "convolution"))}
        assert not any(op.workspace for op in trace.ops if (op.module, op.phase) not in of)
        return [(of[module, "forward"], of[module, "backward"]) for module in ("0", "2")]

    ledger, piece, want = native.ledger(), x[:2], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for layer, needs in ((model[0], False), (model[2], True)):
        piece = piece.detach().requires_grad_(needs)
        out, most, left = ledger.peak_during(layer, piece)
        leaves = [*layer.parameters(), *([piece] if needs else [])]
        _, again, stays = ledger.peak_during(torch.autograd.grad, out, leaves, torch.ones_like(out))
        want.append((most - left, again - stays))
        piece = out.relu()
    torch.set_num_threads(threads)
    assert found(Cluster.local(processes=2)) == want and max(map(max, want)) > 0
    assert found(plain_cluster(2)) == [(0, 0)] * 2  # no CPU: unknown


def test_words_and_json_of_a_plan_that_offloads(gpt_graph, tmp_path):
    made = tight(gpt_graph, "dp", 0.6, below(DISK, 0.5))
    again = Plan.from_json(made.to_json())
    assert again == made and str(again) == str(made) and again.squeezes[0].tier == replace(DISK, overlap=0.5)
    assert "Infinity" not in made.to_json()
    text, page = str(made), made.show(tmp_path / "plan.html").read_text()
    for word in ("offloads", "to the disk", "of waiting", "can do with", "blocks.*"):
        assert word in text and word in page
    assert any(event.kind == "offload" for event in made.prediction.timeline)
    without = tight(gpt_graph, "dp", 0.6, below(DISK, 0.5), offload=False)
    assert without.squeezes and not any(squeeze.moved for squeeze in without.squeezes)
    assert not any(event.kind == "offload" for event in without.prediction.timeline)
    assert not tight(gpt_graph, "dp", 0.45, below(DISK), offload=False).prediction.fits


def test_what_talks_to_others_is_never_repeated(gpt_graph):
    for strategy in ("zero-3", "tp", "tp+sp"):
        made = Plan.manual(gpt_graph, cluster=plain_cluster(2), strategy=strategy)
        story = Story(pricing_of(gpt_graph, made), made.assignment)
        trace, moments = step_trace(story, 0)
        once = {
            moments[i] for i, op in enumerate(trace.ops) if op.name not in ("boxing", "gather") and not op.repeatable
        }
        assert all(not op.repeatable for op in trace.ops if op.name in ("boxing", "gather") or op.phase == "backward")
        cut = {gpt_graph.parameters[n].name for n, p in made.assignment.parameters.items() if p.stored != p.used}
        reading = {i for i, call in enumerate(story.calls) if any(ref.node in cut for ref in call.inputs)}
        assert bool(reading) == (strategy == "zero-3") and {("forward", i) for i in reading} <= once
        sums = {
            i for i, call in enumerate(story.calls) if call.node.op == "linear" and ("forward", i) in once
        } - reading
        assert bool(sums) == (strategy != "zero-3")  # partial sums, which are sent


def test_json_words_and_page(gpt_graph, tmp_path):
    made = tight(gpt_graph)
    again = Plan.from_json(made.to_json())
    assert again == made and str(again) == str(made) and again.squeezes[0].parts == made.squeezes[0].parts
    text, page = str(made), made.show(tmp_path / "plan.html").read_text()
    for word in ("recomputes", "compute; would take", "blocks.*"):
        assert word in text and word in page
    old = {**json.loads(made.to_json()), "format": 1}
    del old["squeezes"], old["prediction"]["waiting"]
    for alternative in old["alternatives"]:
        del alternative["repeated"], alternative["waiting"]
    assert Plan.from_dict(old).squeezes == ()


@pytest.fixture(scope="module")
def long_graph() -> Graph:
    """Activations outweigh parameters."""
    return capture(gpt(), tokens(batch=24))


def monotone(graph: Graph, cluster: Cluster, **options) -> None:
    """Less and less memory until nothing fits; then the bytes that the error names."""
    roomy = plan(graph, cluster=cluster, mesh=(2,), **options)
    assert not roomy.squeezes
    seconds, squeezed, limit = roomy.prediction.seconds, 0, roomy.prediction.peak
    with pytest.raises(DoesNotFit, match="leanest plan needs") as caught:
        while True:
            limit *= 0.88
            made = plan(graph, cluster=cluster, mesh=(2,), memory=int(limit), **options)
            assert made.prediction.fits and made.prediction.peak <= limit
            assert made.prediction.seconds >= seconds
            seconds = made.prediction.seconds
            squeezed += bool(made.squeezes)
    assert squeezed >= 2 and caught.value.need > caught.value.have
    least = plan(graph, cluster=cluster, mesh=(2,), memory=int(caught.value.need), **options)
    assert least.squeezes and least.prediction.peak <= caught.value.need


def test_less_memory_is_never_faster_and_the_least_is_named(long_graph):
    monotone(long_graph, plain_cluster(2, latency=1e-6), constraints=Constraints("dp"))


@pytest.mark.slow
@pytest.mark.parametrize("link", [1e7, 1e9])
def test_less_memory_is_never_faster_whatever_the_strategy(long_graph, link):
    monotone(long_graph, plain_cluster(2, latency=1e-6, link=link))


def test_recompute_can_be_ruled_out(long_graph):
    options = {"cluster": plain_cluster(2, latency=1e-6), "constraints": Constraints("dp"), "mesh": (2,)}
    limit = int(0.85 * plan(long_graph, **options).prediction.peak)
    assert plan(long_graph, memory=limit, **options).squeezes
    with pytest.raises(DoesNotFit):
        plan(long_graph, memory=limit, recompute=False, **options)
