"""Plans as values: JSON, checks, errors, words and page; and the search against the strategies that have names."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from tests.planner.conftest import gpt, plain_cluster, tokens
from tests.slow import slow
from torch import nn

from weft.cluster import Cluster
from weft.comm import Cast, Exchange
from weft.errors import DoesNotFit, ImpossibleConstraint, MeshTooLarge, PlanMismatch, UnknownOperators
from weft.graph import capture
from weft.placement.assignment import ParameterPlacement
from weft.placement.layout import Mesh, Replicate, Shard
from weft.planner import Constraints, Plan, plan
from weft.planner.choose import memory_limits, meshes_for, normalised
from weft.planner.explore import factorizations
from weft.planner.optimizer import OptimizerCost


@pytest.fixture(scope="module")
def found(gpt_graph) -> Plan:
    return plan(gpt_graph, cluster=plain_cluster(4, latency=1e-6))


def test_json_round_trip(found, tmp_path):
    again = Plan.from_json(found.to_json())
    assert again == found
    assert again.graph is None and found.graph is not None
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    assert str(again) == str(found)


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 99}', '{"format": 1, "name": "x"}'])
def test_what_is_no_plan_is_said(text):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(text)


def test_a_cut_file_is_said(found):
    with pytest.raises(ValueError, match="damaged"):
        Plan.from_json(found.to_json()[:-100])


def test_a_file_in_a_folder_that_is_not_there_is_refused(found, tmp_path):
    """By whatever writes one, in the same words, and nothing is made."""
    from weft.graph import save
    from weft.memory.record import Trace
    from weft.memory.tracing.picture import show
    from weft.runtime.export import _write

    path, trace = tmp_path / "missing" / "x.json", Trace((), ())
    writers = {
        "plan.save": found.save, "plan.show": found.show, "cluster.save": found.cluster.save, "trace.save": trace.save,
        "graph.save": partial(save, found.graph), "trace.show": partial(show, trace), "export": partial(_write, {}),
    }  # fmt: skip
    for name, write in writers.items():
        with pytest.raises(ValueError, match=f"{name}: {path}: there is no folder {path.parent}; make it first"):
            write(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [plan, Plan.manual])
def test_nothing_to_train_is_said(make):
    model = nn.Linear(4, 4).requires_grad_(False)
    batch = (torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(
        ValueError, match="nothing to train: no parameter that requires a gradient takes part in the loss"
    ):
        make(model, batch, loss=nn.functional.mse_loss, cluster=plain_cluster(2))


def test_the_file_that_is_no_plan_is_named(tmp_path):
    (tmp_path / "mymodel.py").write_text("import torch")
    for path, says in (
        (tmp_path / "mymodel.py", r"mymodel\.py: not a plan"),
        (tmp_path, "not a plan but a folder"),
        (tmp_path / "missing.json", r"missing\.json: there is no such file"),
    ):
        with pytest.raises(ValueError, match=says):
            Plan.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("assignment", {}),
        ("cluster", 3),
        ("prediction", 5),
        ("prediction", {"seconds": 1.0}),
        ("optimizer", {"x": 1}),
        ("optimizer", None),
        ("alternatives", [{}]),
        ("squeezes", [{"ranks": 1}]),
    ],
)
def test_the_part_that_is_damaged_is_named(found, key, value):
    with pytest.raises(ValueError, match=rf"the plan's {key} cannot be read .* damaged"):
        Plan.from_dict({**found.to_dict(), key: value})


@pytest.mark.parametrize("link", [1e5, slow(1e7), 1e9, slow(1e12)])
def test_never_worse_than_what_has_a_name(gpt_graph, link):
    cluster = plain_cluster(4, link=link, latency=1e-6)
    best = plan(gpt_graph, cluster=cluster)
    assert best.alternatives
    for strategy in ("dp", "zero-1", "zero-2", "zero-3", "tp", "tp+sp", ("dp", "tp"), ("zero-3", "tp+sp")):
        by_hand = Plan.manual(gpt_graph, cluster=cluster, strategy=strategy)
        assert best.prediction.seconds <= by_hand.prediction.seconds * (1 + 1e-3), strategy


def test_strategies_are_what_their_names_say(gpt_graph):
    cluster = plain_cluster(2)

    def placements(strategy):
        made = Plan.manual(gpt_graph, cluster=cluster, strategy=strategy).assignment
        weight = made.parameters["blocks.0.expand.weight"]
        cut = next(
            made.signatures[n.name][0] for n in gpt_graph.calls if n.module == "blocks.0" and n.op == "gelu"
        ).outputs[0]
        return *(str(getattr(weight, field)[0]) for field in ("used", "stored", "gradient", "state")), str(cut)

    assert placements("dp") == ("R", "R", "R", "R", "S(0)")
    assert placements("zero-1") == ("R", "R", "R", "S(0)", "S(0)")
    assert placements("zero-2") == ("R", "R", "S(0)", "S(0)", "S(0)")
    assert placements("zero-3") == ("R", "S(0)", "S(0)", "S(0)", "S(0)")
    assert placements("tp") == ("S(0)", "S(0)", "S(0)", "S(0)", "S(2)")
    assert placements("sp")[-1] == "S(1)"
    norms = [n for n in gpt_graph.calls if n.op == "layer_norm"]
    both = Plan.manual(gpt_graph, cluster=cluster, strategy="tp+sp").assignment
    assert all(str(both.signatures[n.name][0].outputs[0]) == "S(1)" for n in norms)


def test_placements_by_hand(gpt_graph):
    cluster = plain_cluster(4)
    made = Plan.manual(
        gpt_graph, cluster=cluster, mesh=(2, 2),
        parameters={"blocks.*.expand.weight": (Replicate(), Shard(0)), "norm.weight": "R R"}, inputs={"tokens": "S(0) R"},
    )  # fmt: skip
    for name in ("blocks.0.expand.weight", "blocks.1.expand.weight"):
        assert [str(p) for p in made.assignment.parameters[name].used] == ["R", "S(0)"]
    embedding = next(n for n in gpt_graph.calls if any(r.node == "x_tokens" for r in n.inputs))
    assert [str(s.inputs[1]) for s in made.assignment.signatures[embedding.name]] == ["S(0)", "R"]
    tables = Plan.manual(
        gpt_graph, cluster=plain_cluster(2), strategy="tp", parameters={"embed.weight": "R"}
    ).assignment
    assert [str(tables.parameters[n].used[0]) for n in ("embed.weight", "blocks.0.expand.weight")] == ["R", "S(0)"]
    whole = ParameterPlacement.zero((Replicate(),), {0: Shard(0)}, 2)
    by_hand = Plan.manual(gpt_graph, cluster=plain_cluster(2), parameters={"norm.weight": whole})
    assert by_hand.assignment.parameters["norm.weight"] == whole


def test_named_errors(gpt_graph):
    two, seven = plain_cluster(2), plain_cluster(7)
    with pytest.raises(MeshTooLarge, match="only 6 entries"):
        Plan.manual(gpt_graph, cluster=seven, strategy="dp")
    with pytest.raises(MeshTooLarge, match="the cluster"):
        plan(gpt_graph, cluster=two, mesh=(4,))
    with pytest.raises(ImpossibleConstraint, match=r"cannot be placed as 'S\(0\)'. It can be: R"):
        Plan.manual(gpt_graph, cluster=two, parameters={"blocks.0.norm_mlp.weight": Shard(0)})
    with pytest.raises(ValueError, match="no name matches"):
        Plan.manual(gpt_graph, cluster=two, parameters={"blocks.7.*": Shard(0)})
    with pytest.raises(ValueError, match="one placement per mesh axis"):
        Plan.manual(gpt_graph, cluster=plain_cluster(4), mesh=(2, 2), parameters={"*.weight": Shard(0)})
    with pytest.raises(ValueError, match="strategy must be one of"):
        Plan.manual(gpt_graph, cluster=two, strategy="ddp")
    with pytest.raises(ValueError, match=r"sum to 0\.8"):
        plan(gpt_graph, cluster=two, weights=(0.5, 0.3))
    with pytest.raises(ValueError, match="for 3 devices"):
        plan(gpt_graph, cluster=two, weights=(1, 1, 1))
    with pytest.raises(ValueError, match="needs one batch"):
        plan(nn.Linear(2, 2), cluster=two)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cluster": "cluster.yaml"}, "Cluster.load"),
        ({"mesh": "2x2"}, "Mesh or its shape"),
        ({"optimizer": 3}, "optimizer: must be"),
        ({"optimizer": "Adamx"}, "no optimizer is called 'Adamx'; did you mean Adam"),
        ({"constraints": Constraints(("dp", "tp"))}, "2 devices cannot be arranged"),
    ],
)
def test_what_is_of_another_kind_is_said(gpt_graph, given, says):
    with pytest.raises(ValueError, match=says):
        plan(gpt_graph, **{"cluster": plain_cluster(2), **given})


def test_does_not_fit(gpt_graph, found):
    with pytest.raises(DoesNotFit, match="The largest part is") as caught:
        plan(gpt_graph, cluster=plain_cluster(2), memory="10KiB")
    assert caught.value.need > caught.value.have == 10 * 1024
    tight = plain_cluster(4, memory=1000)
    with pytest.raises(DoesNotFit):
        found.check(tight)
    assert not Plan.manual(gpt_graph, cluster=tight, strategy="dp").prediction.fits
    found.check()


@pytest.mark.parametrize(
    "strategy", ["dp", "zero-1", slow("zero-3"), pytest.param(("zero-2", "dp"), marks=pytest.mark.slow), ("dp", "tp")]
)
@pytest.mark.parametrize("share", [0.9, slow(0.3)])
def test_parameters_stay_whole_under_a_limit(gpt_graph, strategy, share):
    """Along axes of data parallelism and ZeRO, tied ones too, so that an exchange that is priced without a limit is with one."""
    exchange = Exchange(Cast("bfloat16"))
    make = partial(Plan.manual, gpt_graph, cluster=plain_cluster(4, link=1e7), strategy=strategy)
    peak = make().prediction.peak
    for made in (make(memory=int(share * peak)), make(memory=int(share * peak), exchange=exchange)):
        for placement in made.assignment.parameters.values():
            for axis, name in enumerate((strategy,) if isinstance(strategy, str) else strategy):
                whole = isinstance(placement.used[axis], Replicate)
                assert whole or name == "tp"
                assert not whole or isinstance(placement.stored[axis], Shard) == (name == "zero-3")
    assert made.exchange == exchange.options


def test_less_memory_is_found_when_needed(gpt_graph):
    cluster = plain_cluster(4, link=1e7)
    roomy = plan(gpt_graph, cluster=cluster)
    limit = int(roomy.prediction.peak * 0.8)
    lean = plan(gpt_graph, cluster=cluster, memory=limit)
    assert lean.prediction.peak <= limit
    assert lean.prediction.seconds >= roomy.prediction.seconds


def test_check_names_the_mismatch(found, gpt_graph):
    with pytest.raises(PlanMismatch, match="cluster"):
        found.check(plain_cluster(2))
    found.check_graph(gpt_graph)
    found.check_graph(capture(gpt(), tokens(batch=10)))
    with pytest.raises(PlanMismatch, match="another model"):
        found.check_graph(capture(gpt(layers=1), tokens()))


@torch.library.custom_op("weft_planner_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """Every entry depends on all of them, and not linearly: there is no way to split it."""
    return x.flatten().sort().values.view(x.shape).clone()


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


mystery.register_autograd(lambda ctx, grad: grad)


class Mysterious(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return mystery(mystery(self.layer(x)))


def test_unknown_operators_come_first_and_all_at_once():
    batch, loss = (torch.zeros(4, 4), torch.zeros(4, 4)), nn.functional.mse_loss
    with pytest.raises(UnknownOperators) as caught:
        plan(Mysterious(), batch, loss=loss, cluster=plain_cluster(2), memory="1KiB")
    assert len(caught.value.operators) == 2
    accepted = plan(Mysterious(), batch, loss=loss, cluster=plain_cluster(2), allow_replicated=True)
    assert accepted.prediction.seconds > 0


def test_unlike_devices_get_shares_by_speed(gpt_graph):
    slow = plain_cluster(2, flops=1e8, bandwidth=1e8).devices[1]
    fast = plain_cluster(2, flops=4e8, bandwidth=4e8)
    cluster = dataclasses.replace(fast, devices=(fast.devices[0], dataclasses.replace(slow, name="slow")))
    meshes = list(meshes_for(gpt_graph, cluster, OptimizerCost.of("AdamW"), Constraints("dp"), (2,)))
    assert meshes[0].weights[0] == pytest.approx((1.0, 0.25), rel=0.01)
    made = plan(gpt_graph, cluster=cluster, mesh=(2,))
    even = plan(gpt_graph, cluster=cluster, mesh=Mesh((2,)))
    assert made.prediction.seconds < even.prediction.seconds
    assert len(made.prediction.memory) == 2


def test_one_device_cuts_nothing(gpt_graph):
    alone = plan(gpt_graph, cluster=plain_cluster(1))
    assert alone.prediction.nbytes == 0 and alone.prediction.communication == 0
    assert {str(p) for s in alone.assignment.signatures.values() for p in (*s[0].inputs, *s[0].outputs)} == {"R"}


def test_words_say_what_matters(found):
    text = str(found)
    for word in ("4 devices", "mesh", "step", "bound", "Memory per device", "Layers", "blocks.0", "Instead", "times"):
        assert word in text


class Tags(HTMLParser):
    VOID = ("meta", "line")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not any(name in ("src", "href") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)


def test_page_is_whole_and_needs_no_network(found, tmp_path):
    path = found.show(tmp_path / "plan.html")
    text = path.read_text()
    parser = Tags()
    parser.feed(text)
    assert not parser.open
    assert {"svg", "rect", "table", "style"} <= parser.seen
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_small_helpers():
    assert factorizations(8, 2) == [(2, 4), (4, 2)]
    assert factorizations(7, 2) == []
    assert factorizations(8, 3) == [(2, 2, 2)]
    assert normalised((3, 1), 2) == (3.0, 1.0)
    cluster = Cluster.local(processes=2)
    assert memory_limits("1.5GiB", cluster) == (3 * 2**29,) * 2
    assert memory_limits([10, "1KB"], cluster) == (10, 1000)
    for wrong in ("6 apples", "-1GiB", 0, [1]):
        with pytest.raises(ValueError, match="memory"):
            memory_limits(wrong, cluster)
    assert json.loads(Plan.manual(capture(gpt(1), tokens()), cluster=cluster).to_json())["format"] == 3


def test_operators_are_priced_for_the_devices_of_the_cluster():
    """Attention with dropout keeps its scores on a CPU, and not on a GPU: the model stands on the CPU in both cases."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            x = self.layer(x)
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1).sum()

    batch = (torch.zeros(2, 2, 64, 8),)
    made = [
        plan(Attention(), batch, cluster=c) for c in (Cluster.local(processes=1), Cluster.homogeneous("A100-80GB", 1))
    ]
    on_cpu, on_gpu = (next(n for n in p.graph.calls if n.kind == "attention").cost.saved for p in made)
    assert on_gpu < on_cpu
