"""`meter()` on training steps: totals against torch's profiler, categories against the tensors themselves."""

from __future__ import annotations

import gc

import pytest
import torch
from tests.memory.models import make, run
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks

from weft.bench.meters import peak_bytes, tensor_bytes
from weft.memory import meters
from weft.memory.counting import NativeCounter
from weft.memory.meters import meter
from weft.memory.native import NativeUnavailable, ledger, problem

native = pytest.mark.skipif(problem() is not None, reason=str(problem()))
METHODS = ["dispatch", pytest.param("native", marks=native)]


def nonzero(by: dict[str, int]) -> dict[str, int]:
    return {label: nbytes for label, nbytes in by.items() if nbytes}


def states(optimizer: torch.optim.Optimizer) -> int:
    return tensor_bytes(t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def bytes_of(model: nn.Module) -> int:
    return tensor_bytes(model.parameters())


@native
@pytest.mark.parametrize("name", ["gpt", "unet", "resnet", "bilstm", "tied"])
def test_the_peak_is_the_profilers(name):
    made = make(name)
    run(made)
    made.model.zero_grad()
    gc.collect()
    with peak_bytes() as expected, meter() as m:
        run(made)
        made.model.zero_grad()
    assert (m.peak, m.live) == (expected.peak, expected.end) and m.exact
    with meter(made.model) as m:
        run(made)
    held = tensor_bytes([*made.model.parameters(), *made.model.buffers()])
    assert m.peak == expected.peak + held
    assert sum(m.peak_by_category().values()) == m.peak


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt", "resnet", "tied"])
def test_what_stays_is_told_apart_exactly(name, method):
    made = make(name)
    optimizer = torch.optim.AdamW(made.model.parameters())
    parameters, buffers = bytes_of(made.model), tensor_bytes(made.model.buffers())
    with meter(made.model, method=method) as m:  # the optimizer is found by its parameters
        assert m.live == parameters + buffers
        for _ in range(2):
            run(made)
            gradients = tensor_bytes(p.grad for p in made.model.parameters() if p.grad is not None)
            by = m.by_category()
            assert (by["parameter"], by["gradient"], by["buffer"]) == (parameters, gradients, buffers)
            assert by["activation"] == by["workspace"] == 0
            optimizer.step()
            assert m.by_category()["optimizer"] == states(optimizer) > 0
            optimizer.zero_grad()
            assert m.by_category()["gradient"] == 0
        assert m.live == parameters + buffers + states(optimizer)
        peak = m.peak_by_category()
    assert sum(peak.values()) == m.peak and peak["parameter"] == parameters


@pytest.mark.parametrize("method", METHODS)
def test_what_is_gone_when_asked_was_told_apart_in_time(method):
    """Nobody reads the meter between the peak and the end of the gradient and of the optimizer's state."""
    layer = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = torch.ones(1, 100)
    with meter(layer, optimizer, method=method) as m:
        m.count(x, "input")
        layer(x).sum().backward()
        optimizer.step()
        big = torch.zeros(20_000)
        del big
        optimizer.zero_grad()
        optimizer.state.clear()
        assert nonzero(m.by_category()) == {"parameter": 40_000, "input": 400}
        assert nonzero(m.peak_by_category()) == {
            "parameter": 40_000,
            "gradient": 40_000,
            "optimizer": 40_000,
            "activation": 80_000,
            "input": 400,
        }


def test_a_sparse_gradient_is_a_gradient():
    embedding = nn.Embedding(50, 4, sparse=True)
    with meter(embedding) as m:
        embedding(torch.tensor([1, 2, 3])).sum().backward()
        assert m.by_category()["gradient"] == 3 * 8 + 3 * 4 * 4


def test_batches_are_counted_leaf_by_leaf_and_once():
    x = torch.zeros(10)
    batch = {"x": x, "again": [x[2:], (torch.zeros(5), 3, "text", None)]}
    with meter() as m:
        m.count(batch, "input")
        assert nonzero(m.by_category()) == {"input": 60}
        with pytest.raises(ValueError, match="'batch' is no category"):
            m.count(batch, "batch")


@native
def test_meters_nest_and_leave_nothing_behind():
    model = nn.Linear(10, 10)
    hooks = len(_global_optimizer_post_hooks)
    with meter(model) as outer:
        a = torch.zeros(100)
        with meter(model) as inner:
            assert (inner.live, outer.live) == (440, 840)
            b = torch.zeros(10)
        assert (inner.live, outer.live) == (480, 880)
        del a, b
    forgotten = meter(model, torch.optim.SGD(model.parameters()))
    assert len(_global_optimizer_post_hooks) == hooks + 1
    del forgotten
    gc.collect()
    assert len(_global_optimizer_post_hooks) == hooks
    assert not model.weight._post_accumulate_grad_hooks
    assert ledger()._watchers == 0


def test_a_closed_meter_keeps_its_figures_and_forgets_the_model():
    model = nn.Linear(10, 10)
    m = meter(model)
    m.close()
    model(torch.ones(1, 10)).sum().backward()
    m.count(torch.ones(10), "input")
    m.close()
    assert (m.live, m.peak, nonzero(m.by_category())) == (440, 440, {"parameter": 440})


def test_a_meter_that_an_exception_leaves_is_closed():
    m = meter()
    with pytest.raises(RuntimeError, match="stop"), m:
        kept = torch.zeros(10)
        raise RuntimeError("stop")
    torch.zeros(1000)
    assert (m.live, m.peak, len(kept)) == (40, 40, 10)


@native
def test_workspace_is_seen_and_named():
    x, w = torch.randn(4, 16, 64, 64), torch.randn(16, 16, 3, 3)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), meter() as m:
        y = F.conv2d(x, w)  # unfolds its input
        peak = m.peak_by_category()
    assert peak["activation"] == y.nbytes and peak["workspace"] > y.nbytes
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), meter(method="dispatch") as m:
        F.conv2d(x, w)
    assert m.peak == y.nbytes and not m.exact


@native
def test_steps_go_on_being_right_when_operators_are_no_longer_watched():
    made = make("gpt")
    optimizer = torch.optim.AdamW(made.model.parameters())

    def step() -> None:
        run(made)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with meter(made.model, optimizer) as m:
        step()
        first = (m.peak, m.peak_by_category())
        for _ in range(4):
            step()
        assert ledger()._watchers == 0
        assert (m.peak, m.peak_by_category()) == first


def test_without_the_library_it_says_what_it_does_not_see(monkeypatch):
    def none(*_):
        raise NativeUnavailable("there is no compiler")

    monkeypatch.setattr(meters, "NativeCounter", none)
    with meter() as m:
        x = torch.zeros(10)
    assert (m.live, len(x), m.exact) == (40, 10, False) and "workspace) is not seen" in m.note
    with pytest.raises(NativeUnavailable, match="there is no compiler"):
        meter(method="native")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        meter(device="meta")
    with pytest.raises(ValueError, match="method must be auto, native or dispatch, got 'magic'"):
        meter(method="magic")


def test_it_prints_itself():
    model = nn.Linear(1024, 1024, bias=False)
    with meter(model) as m:
        x = torch.zeros(1 << 18)
    assert str(m) == "5.0 MiB now, 5.0 MiB at most: parameter 4.0, activation 1.0" and len(x)


@native
def test_a_model_on_meta_has_no_bytes():
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    with meter(model) as m:
        assert m.live == 0
    assert isinstance(m._counter, NativeCounter)
