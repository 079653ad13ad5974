"""What a recorder sees is what runs: lifetimes against torch's profiler, operator by operator, and the facts of each operator."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.memory.models import MODELS, make, run, snapshot
from tests.memory.tracing.profiled import profiled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.memory.record import Trace
from weft.memory.tracing.costs import gauge
from weft.memory.tracing.recorder import Recorder


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Garbage collected in the middle of a step would free bytes at another operator."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def recorded(model: nn.Module, step: Callable[[], Any], **options: Any) -> Trace:
    model.zero_grad()
    with Recorder(model, **options) as recorder:
        held = step()
    del held
    found = recorder.trace()
    found.check()
    return found


def agree(trace: Trace, step: Callable[[], Any], model: nn.Module, *, plain: bool = False, slack: int = 0) -> None:
    """Bytes while each operator runs are those that the profiler counts without a recorder."""
    model.zero_grad()
    seen = profiled(step, trace, plain=plain)
    for index, (op, live, most) in enumerate(zip(trace.ops, trace.live, seen.most, strict=True)):
        assert 0 <= most - (live - trace.fixed) <= slack, f"operator {index}, {op.name} in {op.module}"


needs_gauge = pytest.mark.skipif(
    gauge() is None, reason="workspace is counted by the native library, which needs a compiler"
)


@needs_gauge
@pytest.mark.parametrize("name", MODELS)
def test_live_bytes_are_the_profilers(name):
    made = make(name)
    run(made)  # lazily made constants of torch are no part of a step
    trace = recorded(made.model, lambda: run(made), gauge=gauge())
    # Autograd keeps numbers that it multiplies by as tensors of 8 bytes, which no dispatch mode sees: stochastic depth does so.
    agree(trace, lambda: run(made), made.model, slack=64 if name == "swin" else 0)


@needs_gauge
@pytest.mark.parametrize("name", ["unet"])
def test_live_bytes_without_any_mode(name):
    """Where torch runs the same program under a dispatch mode, the curve is plain eager torch's."""
    made = make(name)
    run(made)
    trace = recorded(made.model, lambda: run(made), gauge=gauge())
    agree(trace, lambda: run(made), made.model, plain=True)


@needs_gauge
def test_a_mode_costs_temporaries_only():
    """Gradients that meet are added out of place under a mode and in place without: never less, the same at the peak."""
    made = make("resnet")
    run(made)
    trace = recorded(made.model, lambda: run(made), gauge=gauge())
    made.model.zero_grad()
    seen = profiled(lambda: run(made), trace, plain=True)
    assert all(live - trace.fixed >= most for live, most in zip(trace.live, seen.most, strict=True))
    assert trace.peak - trace.fixed == max(seen.most)


@needs_gauge
def test_an_optimizer_and_two_backward_passes():
    made = make("gpt")
    optimizer = torch.optim.AdamW(made.model.parameters())
    run(made)
    optimizer.step()

    def step() -> None:
        run(made)
        run(made, seed=2)
        optimizer.step()

    made.model.zero_grad()
    recorder = Recorder(made.model, gauge=gauge())
    recorder.expect_state(optimizer)
    with recorder:
        step()
    trace = recorder.trace()
    trace.check()
    agree(trace, step, made.model)
    assert {op.phase for op in trace.ops} == {"forward", "backward", "optimizer"}
    states = [v for v in trace.values if v.category == "optimizer" and v.born < 0]
    assert sum(v.nbytes for v in states) == sum(2 * p.nbytes + 4 for p in made.model.parameters())
    assert {v.name for v in states} >= {"norm.weight.exp_avg", "norm.weight.step"}
    # accumulated gradients are written in place, and so is what the update changes: never again
    for op in trace.ops:
        changed = [trace.values[old].category for old, _ in op.overwrites]
        assert op.repeatable is not (any(c != "activation" for c in changed) or not op.makes), op


@needs_gauge
def test_checkpoints_recompute_inside_backward():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(4)))
    x = torch.randn(16, 24)

    def step() -> Tensor:
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False, preserve_rng_state=False)
        y.sum().backward()
        return y

    step()
    trace = recorded(model, step, gauge=gauge())
    agree(trace, step, model)
    again = [op for op in trace.ops if op.phase == "backward" and op.name == "aten.addmm.default"]
    assert [op.module for op in again] == ["3.0", "2.0", "1.0", "0.0"]


class Halves(torch.autograd.Function):
    """Frees one of its two saved tensors in the middle of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = [x * 2, x * 3]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient * ctx.kept.pop()
        gradient = gradient + 1.0
        return gradient * ctx.kept.pop()


def test_bytes_freed_in_the_middle_of_an_autograd_node():
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def step() -> None:
        Halves.apply(model(x)).sum().backward()

    trace = recorded(model, step)
    first, second = (
        v
        for v in trace.values
        if v.born >= 0 and trace.ops[v.born].name == "aten.mul.Tensor" and trace.ops[v.born].phase == "forward"
    )
    products = [i for i, op in enumerate(trace.ops) if op.name == "aten.mul.Tensor" and op.phase == "backward"]
    assert (first.dies, second.dies) == (products[1], products[0])


def test_bytes_freed_while_a_call_runs():
    """Here by an operator that empties a list; they die with that call, which may have read them."""
    cache: list[Tensor] = []

    @torch.library.custom_op("weft_tests::last_use", mutates_args=())
    def last_use(x: Tensor) -> Tensor:
        cache.clear()
        return x + 1

    x = torch.randn(5)
    with Recorder() as recorder:
        cache.append(x * 2)
        last_use(x)
        torch.relu(x)
    trace = recorder.trace()
    call = [op.name for op in trace.ops].index("weft_tests.last_use.default")
    assert trace.values[trace.ops[0].makes[0]].dies == call


def test_recording_changes_no_bit():
    for name in MODELS:
        one, other = make(name), make(name)
        loss = run(one)
        with Recorder(other.model):
            recorded_loss = run(other)
        assert torch.equal(loss, recorded_loss), name
        for key, value in snapshot(one.model).items():
            assert torch.equal(value, snapshot(other.model)[key]), (name, key)


# -- what an operator is ----------------------------------------------------------------------------------------------


def test_in_place_writes_are_new_values_of_one_storage():
    x = torch.randn(6, 4)
    with Recorder() as recorder:
        y = x * 2
        z = y[1:]
        z.relu_()
        w = y + 1
        torch._foreach_mul_([y, w], 3.0)
    trace = recorder.trace()
    trace.check()
    names = [op.name for op in trace.ops]
    assert names == ["aten.mul.Tensor", "aten.relu_.default", "aten.add.Tensor", "aten._foreach_mul_.Scalar"]
    (y0,) = trace.ops[0].makes
    ((old, y1),) = trace.ops[1].overwrites
    assert old == y0 and trace.values[y0].dies == 1 and trace.values[y1].storage == trace.values[y0].storage
    assert trace.ops[2].reads == (y1,)
    assert [trace.values[old].born for old, _ in trace.ops[3].overwrites] == [1, 2]
    assert all(op.repeatable for op in trace.ops)
    assert max(trace.live) == 3 * x.nbytes + trace.ops[trace.live.index(max(trace.live))].workspace


def test_views_are_no_operators_and_shapes_need_no_bytes():
    x = torch.randn(6, 4)
    with Recorder() as recorder:
        y = (x.t().reshape(4, 6)[None] * 1).squeeze(0).detach()
        z = torch.zeros_like(y)
        assert z.shape == y.t().t().size()
    trace = recorder.trace()
    assert [op.name for op in trace.ops] == ["aten.mul.Tensor", "aten.zeros_like.default"]
    assert trace.ops[1].reads == ()


def test_flags():
    convolution = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 6, 6)
    with Recorder(convolution) as recorder:
        y = convolution(x)
        y = F.dropout(y, 0.5)
        if y.sum().item() > 1e9:
            y = y + 1
        constant = torch.tensor([1.0] * 7)
        y = F.scaled_dot_product_attention(*(y.new_ones(1, 1, 4, 8) for _ in range(3))) * constant[0]
    ops = {op.name: op for op in recorder.trace().ops}
    assert ops["aten.convolution.default"].dense and not ops["aten.convolution.default"].random
    assert ops["aten.bernoulli_.float"].random
    attention = ops["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    assert attention.dense and not attention.random  # its schema says it draws, but there is no dropout
    assert not ops["aten._local_scalar_dense.default"].repeatable
    assert [(v.category, v.born) for v in recorder.trace().values if v.nbytes == 28] == [("input", -1)]  # the constant


def test_running_statistics_do_not_forbid_another_run():
    made = make("resnet")
    trace = recorded(made.model, lambda: run(made))
    norms = [op for op in trace.ops if op.name == "aten.native_batch_norm.default"]
    assert norms and all(op.repeatable and not op.overwrites for op in norms)
    counters = [op for op in trace.ops if op.overwrites and trace.values[op.overwrites[0][0]].category == "buffer"]
    assert len(counters) == len(norms) and not any(op.repeatable for op in counters)


def test_modules_are_named_in_forward_and_backward():
    made = make("gpt")
    trace = recorded(made.model, lambda: run(made))
    products = [op for op in trace.ops if op.name in ("aten.addmm.default", "aten.mm.default")]
    forward = [op.module for op in products if op.phase == "forward"]
    linear = [name for name, module in made.model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(forward) == sorted(linear)
    backward = [op.module for op in products if op.phase == "backward"]
    assert backward == [name for name in reversed(forward) for _ in range(2)]  # for the input and for the weight
    gradients = {v.name: v.nbytes for v in trace.values if v.category == "gradient"}
    assert gradients == {name: p.nbytes for name, p in made.model.named_parameters()}


class Aside(nn.Module):
    """Computes something that has no gradient before it passes its input on."""

    def forward(self, x: Tensor) -> Tensor:
        self.norm = (x.detach() * 2).sum()
        return x + 1


def test_calls_without_a_gradient_do_not_take_over_a_node():
    model = nn.Sequential(nn.Linear(4, 4), Aside())
    x = torch.randn(2, 4)
    trace = recorded(model, lambda: model(x).sum().backward())
    assert [op.module for op in trace.ops if op.name == "aten.mul.Tensor"] == ["1"]
    assert [op.module for op in trace.ops if op.name == "aten.mm.default" and op.phase == "backward"] == ["0"]


def test_every_parameter_counts_once_and_ties_are_one():
    made = make("tied")
    trace = recorded(made.model, lambda: run(made))
    names = {v.name for v in trace.values if v.category == "parameter"}
    assert names == {"embed.weight", "inner.bias"}
    batch = sum(t.nbytes for t in made.batch)
    assert trace.fixed == batch + sum(t.nbytes for t in (*made.model.parameters(), *made.model.buffers()))


def test_sparse_gradients_and_resized_storages():
    table = nn.Embedding(50, 4, sparse=True)
    with Recorder(table) as recorder:
        table(torch.tensor([1, 2, 3])).sum().backward()
        out = torch.empty(0)
        torch.add(torch.ones(5), 1.0, out=out)
    trace = recorder.trace()
    trace.check()
    gradients = [v for v in trace.values if v.category == "gradient"]
    assert sorted(v.nbytes for v in gradients) == [3 * 8, 3 * 4 * 4]
    assert [v.nbytes for v in trace.values if v.dies == len(trace.ops) and v.born == len(trace.ops) - 1] == [20]


def test_wrapped_tensors_are_seen_through():
    from torch.testing._internal.two_tensor import TwoTensor

    one = TwoTensor(torch.ones(4), torch.ones(4))
    with Recorder() as recorder:
        one.add(1.0).sum()
    assert [op.name for op in recorder.trace().ops] == ["aten.add.Tensor"] * 2 + ["aten.sum.default"] * 2


def test_an_exception_leaves_nothing_behind():
    model = nn.Linear(3, 3)

    def fails(*_: Any) -> None:
        raise KeyError("on purpose")

    model.register_forward_hook(fails)
    x = torch.ones(2, 3)
    with pytest.raises(KeyError), Recorder(model) as recorder:
        model(x)
    assert recorder.trace().ops[0].name == "aten.addmm.default"
    before = len(recorder.trace().ops)
    F.relu(torch.ones(3))
    assert len(recorder.trace().ops) == before
    from torch.nn.modules import module

    assert not module._global_forward_pre_hooks and not module._global_forward_hooks


def test_one_block_once():
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="leave the with-block"):
        recorder.trace()
    with recorder:
        pass
    with pytest.raises(RuntimeError, match="one block once"):
        with recorder:
            pass
