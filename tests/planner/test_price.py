"""Seconds, bytes and memory of plans small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch
from tests.planner.conftest import plain_cluster
from torch import nn

from weft.graph import capture
from weft.planner import Plan, lower_bound, price
from weft.planner.optimizer import OptimizerCost


@pytest.fixture(scope="module")
def net():
    """Two linear layers and a mean: parameters of 64 x 32 and 16 x 64."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 16, bias=False))
    return capture(model, (torch.zeros(8, 32), torch.zeros(8, 16)), nn.functional.mse_loss)


PARAMETERS = 4 * (64 * 32 + 16 * 64)  # bytes


def manual(graph, devices, strategy, **cluster):
    return Plan.manual(graph, cluster=plain_cluster(devices, **cluster), strategy=strategy)


@pytest.mark.parametrize("p", [2, 4])
def test_data_parallel_bytes_and_memory(net, p):
    plan = manual(net, p, "dp")
    assert plan.prediction.nbytes == pytest.approx(2 * (p - 1) * PARAMETERS)
    use = plan.prediction.memory[0].use
    assert use.optimizer_state == 2 * PARAMETERS
    assert use.gradients == 2 * PARAMETERS  # the bucket's sums, and autograd's own until the bucket is full
    assert use.parameters == PARAMETERS + 4 * (8 * 32 + 8 * 16)  # the batch is whole on every device


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_divide_what_they_should(net, stage):
    p = 4
    plan = manual(net, p, f"zero-{stage}")
    use = plan.prediction.memory[0].use
    batch = 4 * (8 * 32 + 8 * 16)
    assert use.optimizer_state == 2 * PARAMETERS / p
    # This device's sums; while the one bucket is scattered, autograd's own and their copy in the order of the devices.
    assert use.gradients == PARAMETERS / p + 2 * PARAMETERS
    assert use.parameters - batch == PARAMETERS / (p if stage == 3 else 1)
    assert plan.prediction.nbytes == pytest.approx(2 * (p - 1) * PARAMETERS)  # a reduce-scatter and a gather


def test_zero_3_gathers_again_for_backward_what_forward_did_not_read_last():
    """Nor does backward read an embedding's values: of an embedding and four blocks, the first three blocks go twice."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(600, 600, bias=False)

        def forward(self, x):
            return x + nn.functional.gelu(self.linear(x))

    model = nn.Sequential(nn.Embedding(600, 600), *(Residual() for _ in range(4)))
    graph = capture(model, (torch.zeros(8, dtype=torch.long), torch.zeros(8, 600)), nn.functional.mse_loss)
    assert manual(graph, 4, "zero-3").prediction.nbytes == pytest.approx((2 * 5 + 3) * 3 * 4 * 600 * 600)


def test_the_sum_of_the_loss_waits_for_the_links_too(net):
    """An all-reduce takes 2 (p - 1) latencies, whatever its size: that of the loss is as long as that of the gradients."""
    p, latency = 3, 0.1
    found = manual(net, p, "dp", latency=latency, link=1e15, bandwidth=1e15).prediction
    assert found.communication == pytest.approx(2 * 2 * (p - 1) * latency)


def test_a_steps_own_python_is_added_once(net):
    found = [manual(net, 2, "dp", step=step) for step in (0.0, 0.25)]
    for name in ("seconds", "compute", "exposed", "communication"):
        more = 0.25 * (name in ("seconds", "compute"))
        assert getattr(found[1].prediction, name) == pytest.approx(getattr(found[0].prediction, name) + more), name
    assert found[1].lower_bound == pytest.approx(found[0].lower_bound + 0.25)


def test_compute_is_divided_and_communication_hides(gpt_graph):
    alone = manual(gpt_graph, 1, "any", bandwidth=1e15)
    hidden, exposed = (manual(gpt_graph, 2, "zero-3", bandwidth=1e15, link=1e9, overlap=o) for o in (1.0, 0.0))
    assert hidden.prediction.compute == pytest.approx(alone.prediction.compute / 2, rel=1e-3)  # positions stay whole
    assert hidden.prediction.seconds < exposed.prediction.seconds
    assert exposed.prediction.exposed == pytest.approx(exposed.prediction.communication, rel=1e-3)


def test_a_slow_link_is_exposed_whatever_the_overlap(net):
    p = manual(net, 2, "dp", link=1e3).prediction
    assert p.exposed > 0.9 * p.communication


def test_the_bound_is_below_every_plan(gpt_graph):
    for devices in (1, 2, 4):
        cluster = plain_cluster(devices, overhead=1e-6)
        bound = lower_bound(gpt_graph, cluster, OptimizerCost.of("AdamW"))
        for strategy in ("dp", "zero-3", "tp", "tp+sp", "any"):
            plan = Plan.manual(gpt_graph, cluster=cluster, strategy=strategy)
            assert 0 < bound <= plan.prediction.seconds * (1 + 1e-9)
            assert plan.gap >= -1e-9


def test_price_of_a_plan_is_its_prediction(gpt_graph):
    cluster = plain_cluster(4)
    plan = Plan.manual(gpt_graph, cluster=cluster, mesh=(2, 2), strategy=("zero-3", "tp"))
    assert price(gpt_graph, plan.assignment, cluster, "AdamW") == plan.prediction


def test_layers_add_up(gpt_graph):
    plan = Plan.manual(gpt_graph, cluster=plain_cluster(2), strategy="dp")
    assert sum(layer.compute for layer in plan.prediction.layers) == pytest.approx(plan.prediction.compute)
    parameters = sum(node.outputs[0].numel for node in gpt_graph.parameters.values())
    assert sum(layer.parameters for layer in plan.prediction.layers) == parameters
    assert max(event.stop for event in plan.prediction.timeline) <= plan.prediction.seconds * (1 + 1e-9)


def test_activations_follow_the_batch():
    """Twice the batch, twice the activations; two devices, half."""
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    peaks = []
    for batch, devices in ((64, 1), (128, 1), (128, 2)):
        graph = capture(model, (torch.zeros(batch, 16), torch.zeros(batch, 16)), nn.functional.mse_loss)
        plan = Plan.manual(graph, cluster=plain_cluster(devices), strategy="dp" if devices > 1 else "any")
        peaks.append(plan.prediction.memory[0].use.activations)
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.01)
    assert peaks[2] == pytest.approx(peaks[0], rel=0.01)


def test_optimizers():
    assert OptimizerCost.of(torch.optim.AdamW) == OptimizerCost("AdamW", 2.0)
    parameter = nn.Parameter(torch.zeros(3))
    assert OptimizerCost.of(torch.optim.SGD).words == 0
    assert OptimizerCost.of(torch.optim.SGD([parameter], lr=0.1, momentum=0.9)).words == 1
    assert OptimizerCost.of(torch.optim.Adam([parameter], amsgrad=True)).words == 3
    assert not OptimizerCost.of("Muon").elementwise


def test_parameters_of_other_optimizers_stay_whole(gpt_graph):
    plan = Plan.manual(gpt_graph, cluster=plain_cluster(2, link=1e3), optimizer="Muon")
    assert {
        str(p) for placement in plan.assignment.parameters.values() for p in (*placement.stored, *placement.state)
    } == {"R"}
