"""Plans made to fit by computing again: the trace is the memory model, and what comes out fits, costs and says so."""

from __future__ import annotations

import json

import pytest
from tests.planner.conftest import gpt, plain_cluster, tokens
from tests.zoo import ZOO, specimen

from weft.cluster import Cluster
from weft.errors import BudgetError, DoesNotFit
from weft.graph import capture
from weft.graph.graph import Graph
from weft.memory import check
from weft.placement.axes import find_cuts
from weft.planner import Constraints, Plan, plan
from weft.planner.costs import Costs
from weft.planner.optimizer import OptimizerCost
from weft.planner.prepared import Prepared
from weft.planner.price import Pricing
from weft.planner.roles import Roles
from weft.planner.squeeze import Story, squeeze, step_trace

STRATEGIES = ("dp", "zero-1", "zero-2", "zero-3", "tp", "tp+sp")


def pricing_of(graph: Graph, made: Plan) -> Pricing:
    prepared = Prepared(graph, find_cuts(graph, finest=made.mesh.size, allow_replicated=True))
    costs = Costs(made.cluster, made.mesh)
    return Pricing(prepared, Roles(prepared), costs, OptimizerCost.of("AdamW"))


def same_peak(graph: Graph, strategy: str, devices: int = 2) -> None:
    made = Plan.manual(graph, cluster=plain_cluster(devices), strategy=strategy, allow_replicated=True)
    story = Story(pricing_of(graph, made), made.assignment)
    for place, memory in enumerate(made.prediction.memory):
        trace, moments = step_trace(story, place)
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


def tight(graph: Graph, strategy: str = "dp", share: float = 0.7, **options) -> Plan:
    """A plan for two devices with this share of its activations' bytes besides the rest."""
    roomy = Plan.manual(graph, cluster=plain_cluster(2), strategy=strategy)
    use = roomy.prediction.memory[0].use
    memory = int(use.peak - (1 - share) * use.activations)
    return Plan.manual(graph, cluster=plain_cluster(2), strategy=strategy, memory=memory, **options)


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
    del old["squeezes"]
    for alternative in old["alternatives"]:
        del alternative["repeated"]
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
