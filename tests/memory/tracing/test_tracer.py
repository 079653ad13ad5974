"""`trace`: fake and real traces are one, nothing of the user's is changed, devices one does not have, what goes wrong."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from tests import zoo
from tests.memory.models import MODELS, make, run, snapshot
from torch import nn
from torch.nn import functional as F

from weft.cluster import Cluster
from weft.cluster.library import device as library_device
from weft.memory.record import Trace
from weft.memory.tracing.tracer import trace

RATES = "cpu-core"


def shape_of(found: Trace) -> tuple[Any, ...]:
    """A trace without what depends on how it was made: costs, workspace, who refers to gradients."""
    return tuple(replace(op, seconds=0.0, workspace=0, over="") for op in found.ops), found.values


def same(one: Trace, other: Trace) -> None:
    """Operator by operator and value by value, so that a failure names the first difference."""
    for index, (a, b) in enumerate(zip(shape_of(one)[0], shape_of(other)[0], strict=False)):
        assert a == b, index
    assert shape_of(one) == shape_of(other)


def dares_no_more(fake: Trace, real: Trace) -> None:
    """What the fake step would write over its gradient, the real one would, too: at least half of that."""
    marks = [(f.over, r.over) for f, r in zip(fake.ops, real.ops, strict=True) if f.over or r.over]
    assert all(f in ("", r) for f, r in marks) and 2 * sum(bool(f) for f, _ in marks) >= len(marks)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("halting", "tied")])
def test_fake_is_real(name):
    made = make(name)
    fake, real = trace(*made, fake=True, costs=RATES), trace(*made, fake=False, costs=RATES)
    fake.check()
    same(fake, real)
    dares_no_more(fake, real)
    assert fake.seconds == pytest.approx(real.seconds)


def test_fake_is_real_but_for_views_written_in_place():
    """There autograd takes another way for fake tensors (see the head of fakes.py): the same forward and the same peak."""
    made = make("tied")
    fake, real = trace(*made, fake=True, costs=RATES), trace(*made, fake=False, costs=RATES)
    forward = [[op for op in shape_of(t)[0] if op.phase == "forward"] for t in (fake, real)]
    assert forward[0] == forward[1] and fake.peak == real.peak
    assert fake.notes[0].startswith("views are written in place 1 times") and not real.notes


class Experts(nn.Module):
    """Rows sorted by expert, and one grouped product for all of them."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width, width + 4) / width)

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        order = expert.argsort()
        ends = (expert[:, None] <= torch.arange(len(self.weight))).sum(0).to(torch.int32)
        return F.gelu(F.grouped_mm(x[order], self.weight, offs=ends)).square().mean()


def test_fake_is_real_for_experts():
    """torch checks fakes of a grouped product for what CUDA can do."""
    model, batch = Experts(12, 4), (torch.randn(40, 12), torch.randint(4, (40,)))
    fake, real = trace(model, batch, fake=True, costs=RATES), trace(model, batch, fake=False, costs=RATES)
    same(fake, real)
    assert sum("grouped_mm" in op.name for op in fake.ops) == 2  # rows by matrices, and the gradient of these


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_fake_is_real_with_an_optimizer(name):
    made = make(name)
    fake = trace(*made, optimizer=torch.optim.AdamW, fake=True, costs=RATES)
    real = trace(*made, optimizer=torch.optim.AdamW(made.model.parameters()), fake=False, costs=RATES)
    # steps are counted in tensors of one number, which fake mode knows: it does not ask the device for them
    same(fake, real)
    again = trace(*made, optimizer=torch.optim.AdamW, fake=False)  # several times over, to take times
    assert again.values == real.values
    update = [op for op in real.ops if op.phase == "optimizer"]
    assert update and not any(
        op.repeatable for op in update if any(real.values[o].category == "parameter" for o, _ in op.overwrites)
    )
    parameters = list(made.model.parameters())
    fixed = (
        sum(p.nbytes for p in parameters)
        + sum(b.nbytes for b in made.model.buffers())
        + sum(t.nbytes for t in made.batch)
    )
    assert real.fixed == fixed + sum(2 * p.nbytes + 4 for p in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name != "Mixtral"])  # grouped_mm has no fake float32
def test_fake_is_real_in_the_zoo(name):
    torch.manual_seed(0)
    model, batch, loss = zoo.ZOO[name]()
    model.train()
    fake, real = trace(model, batch, loss, fake=True, costs=RATES), trace(model, batch, loss, fake=False, costs=RATES)
    same(fake, real)
    dares_no_more(fake, real)


# -- nothing is changed -----------------------------------------------------------------------------------------------


class Careless(nn.Module):
    """Counts its calls, caches tensors, exchanges a buffer, draws from three generators, writes its input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("last", torch.zeros(4))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        x.add_(1.0)
        self.seen.append(x)
        self.cache = x * random.random() * numpy.random.rand()
        y = self.norm(F.dropout(self.inner(x)[0][0], 0.5))
        self.last = y.detach().mean(0)
        return y.sum()


@pytest.mark.parametrize("fake", [True, False])
def test_nothing_of_the_users_is_changed(fake):
    model = Careless()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(3, 5, 4)
    model(x.clone()).backward()
    optimizer.step()
    before = snapshot(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    seen, flat = list(model.seen), list(model.inner._flat_weights)
    state, given = copy.deepcopy(optimizer.state_dict()), x.clone()
    generators = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())

    trace(model, x, optimizer=optimizer, fake=fake, costs=RATES)

    for key, value in snapshot(model).items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    for name, module in model.named_modules():
        assert all(vars(module)[key] is value for key, value in attributes[name].items()) and len(vars(module)) == len(
            attributes[name]
        )
    assert len(model.seen) == len(seen) and all(a is b for a, b in zip(model.seen, seen, strict=True))
    assert all(a is b for a, b in zip(model.inner._flat_weights, flat, strict=True))
    assert torch.equal(x, given)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    now = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    assert torch.equal(now[0], generators[0]) and now[1:] == generators[1:]


def test_an_optimizer_that_has_not_run_stays_so():
    made = make("unet")
    optimizer = torch.optim.AdamW(made.model.parameters())
    before = snapshot(made.model)
    for fake in (True, False):
        trace(*made, optimizer=optimizer, fake=fake, costs=RATES)
        assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in snapshot(made.model).items())
    run(made)
    optimizer.step()


def test_a_failing_step_is_undone_too():
    model = Careless()
    model.norm.register_forward_hook(lambda *_: 1 / 0)
    x = torch.randn(3, 5, 4)
    before, calls = snapshot(model), model.calls
    with pytest.raises(ZeroDivisionError):
        trace(model, x, fake=False)
    assert model.calls == calls and all(torch.equal(value, before[key]) for key, value in snapshot(model).items())
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        trace(model, x, fake=True)
    assert isinstance(model.inner.weight_ih_l0, nn.Parameter) and type(model.inner.weight_ih_l0) is nn.Parameter


# -- devices and data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_traced_really(layer):
    """Fake ones have no entries, and a plan of them knew nothing of the largest tensors of the step."""
    model, x = nn.Sequential(layer(400, 16, sparse=True), nn.Tanh()), torch.randint(400, (24, 10))
    loss = lambda output, target: (output.sum() - target).square()
    batch = (x, torch.zeros(()))
    real, asked = trace(model, batch, loss, fake=False), trace(model, batch, loss, fake=True)
    found = trace(model, batch, loss)
    assert found.peak == real.peak > asked.peak
    assert any("sparse" in note for note in found.notes) and any("sparse" in note for note in asked.notes)


def test_a_model_that_looks_at_its_data_runs_really():
    made = make("halting")
    found = trace(*made)
    found.check()
    assert found.measured and "_local_scalar_dense" in found.notes[0]
    assert shape_of(found) == shape_of(trace(*made, fake=False, costs=RATES))
    assert "aten._local_scalar_dense.default" in {op.name for op in found.ops}
    with pytest.raises(ValueError, match="Use fake=False"):
        trace(*made, fake=True)
    with pytest.raises(ValueError, match="A100-80GB is not at hand"):
        trace(*made, device="A100-80GB")


def test_a_model_without_bytes():
    """On the meta device, for this CPU: what the real one would do."""
    made = make("gpt")
    with torch.device("meta"):
        model = type(made.model)(made.model.options)
    found = trace(model, made.batch, costs=RATES)
    same(found, trace(*made, fake=False, costs=RATES))
    with pytest.raises(ValueError, match="fake=False"):
        trace(model, made.batch, fake=False, device="cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA its own operators are traced")
def test_cuda_is_imitated():
    made = make("gpt")
    cpu = trace(*made, costs=RATES)
    found = trace(*made, device="A100-80GB", optimizer=torch.optim.AdamW)
    found.check()
    assert found.device == "A100-80GB" and not found.measured and "imitated" in found.notes[0]
    names = [op.name for op in found.ops]
    assert names.count("aten._scaled_dot_product_efficient_attention.default") == 3
    assert names.count("aten._scaled_dot_product_efficient_attention_backward.default") == 3
    assert "aten.bernoulli_.float" not in names and names.count("aten.native_dropout.default") == 7
    assert any(name.startswith("aten._foreach_addcdiv_") for name in names)
    scores = 3 * 2 * 20 * 20 * 4
    assert (
        sum(v.nbytes == scores for v in cpu.values)
        >= 9
        > 0
        == sum(v.nbytes == scores for v in found.values if v.category == "activation")
    )


def test_costs_come_from_where_one_says():
    made = make("unet")
    fast = trace(*made, costs="H100")
    slow = trace(*made, costs=library_device("cpu-core"))
    assert fast.device == "H100" and fast.seconds < slow.seconds and not slow.measured
    local = Cluster.local(processes=1).devices[0]
    assert trace(*made, device=local).device == local.name
    measured = trace(*made)
    assert measured.measured and measured.device == "cpu" and all(op.seconds > 0 for op in measured.ops)
    assert any(op.workspace > 2**10 for op in measured.ops) or not any(op.workspace for op in measured.ops)


def test_inference_has_no_backward():
    made = make("resnet")
    made.model.eval().requires_grad_(False)
    found = trace(*made, costs=RATES)
    assert {op.phase for op in found.ops} == {"forward"}
    assert not any(v.category == "gradient" for v in found.values)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy, F.soft_margin_loss])
def test_a_loss_that_keeps_the_bytes_of_its_summands_does_so_on_paper(loss):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    batch = (torch.rand(16, 8), torch.rand(16, 8))
    fake, real = (trace(model, batch, loss=loss, fake=fake, costs=RATES) for fake in (True, False))
    same(fake, real)
    assert max(v.nbytes for v in fake.values if not fake.ops[v.born].makes[1:] and v.born >= 0) >= 16 * 8 * 4


def test_what_was_not_measured_is_noted():
    """The same model here and on the meta device: only here operators are tried, and tell their workspace."""
    here, nowhere = nn.Linear(8, 8), nn.Linear(8, 8, device="meta")
    assert trace(here, torch.ones(4, 8), lambda out, _: out.sum()).notes == ()
    (note,) = trace(nowhere, torch.ones(4, 8), lambda out, _: out.sum()).notes
    assert "nothing was measured" in note and "workspace of operators is unknown" in note
