"""Writing over gradients: the same bits, and never a gradient that somebody else has."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tests.memory.execute.loops import train
from tests.memory.models import make
from tests.slow import slow, slow_but
from torch import nn
from torch.nn import functional as F

from weft.errors import BudgetError
from weft.memory import least, meter, plan, trace
from weft.memory.execute.limit import limit
from weft.memory.execute.online import Online
from weft.memory.execute.replay import Replay
from weft.memory.tracing.operators import OVER_GRADIENT, over_gradient

KIB = 1024


def operator(name):
    packet, overload = name.removeprefix("aten.").split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


REST = {  # arguments after the gradient, of values x of its shape
    "aten.gelu_backward.default": lambda x: (x,),
    "aten.silu_backward.default": lambda x: (x,),
    "aten.threshold_backward.default": lambda x: (x, 0),
    "aten.leaky_relu_backward.default": lambda x: (x, 0.1, False),
    "aten.elu_backward.default": lambda x: (1, 1, 1, False, x),
    "aten.hardtanh_backward.default": lambda x: (x, -1, 1),
    "aten.hardsigmoid_backward.default": lambda x: (x,),
    "aten.softplus_backward.default": lambda x: (x, 1, 20),
    "aten.sigmoid_backward.default": lambda x: (x.sigmoid(),),
    "aten.tanh_backward.default": lambda x: (x.tanh(),),
    "aten._softmax_backward_data.default": lambda x: (x.softmax(0), 0, x.dtype),
    "aten._log_softmax_backward_data.default": lambda x: (x.log_softmax(-1), -1, x.dtype),
    "aten.mul.Tensor": lambda x: (x.cos(),),
    "aten.div.Tensor": lambda x: (x[-1:],),
    "aten.neg.default": lambda x: (),
}


@pytest.mark.parametrize("name", OVER_GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_variant_makes_the_same_bits_in_no_bytes(name, dtype):
    for shape in ((129, 65), (3, 7, 5), (4096, 3)):
        g, x = (torch.randn(shape).to(dtype) for _ in range(2))
        rest, (_, variant, argument) = REST[name](x), over_gradient(operator(name))
        expected = operator(name)(g, *rest)
        with meter() as counter:
            before, _ = counter.live, counter.reset_peak()
            found = variant(g, *rest, **{argument: g})
            assert counter.peak == before
        assert found is g and torch.equal(found, expected)


# -- programs -------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers and activations; `watch(step, k, x)` sees what each activation has made, and may hook it."""

    ACTIVATIONS = (F.gelu, torch.tanh, F.relu, F.silu, torch.sigmoid, lambda x: F.dropout(x, 0.2), lambda x: -x * 0.5)

    def __init__(self, watch=lambda step, k, x: None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in self.ACTIVATIONS)
        self.watch = watch
        self.scale = nn.Parameter(torch.full((128, 40), 1.5), requires_grad=False)

    def forward(self, step, x):
        for k, (layer, activation) in enumerate(zip(self.layers, self.ACTIVATIONS, strict=True)):
            made = activation(layer(x))
            flat = made.view(64, 80)
            x = flat.view(128, 40) * self.scale + x
            for seen in (made, flat)[: 1 + k % 2]:
                self.watch(step, k, seen)
        return F.cross_entropy(x, torch.arange(128) % 40) + F.softmax(x, -1).square().mean()


def bits(found):
    """Of a tensor, an array or a function that gives one; in memory that no limit counts."""
    found = found() if callable(found) else found
    return (found.detach().clone().numpy() if isinstance(found, torch.Tensor) else found).tobytes()


def loop(net, within, steps=14, before=lambda step, net: None):
    """Losses and gradients of every step, and what executed it."""
    torch.manual_seed(1)
    x, found, kinds = torch.randn(128, 40), [], []
    with within as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            before(step, net)
            net.zero_grad()
            loss = net(step, x)
            loss.backward()
            found += [bits(loss), *(bits(p.grad) for p in net.parameters() if p.grad is not None)]
            del loss
            if manager is not None:
                manager.step()
                kinds.append(type(manager._executor))
    return found, kinds


BUDGET = 340 * KIB


def written_over(limited):
    """Names of the operators that the plan lets write over their gradients."""
    variants = {over_gradient(operator(name))[0] for name in OVER_GRADIENT}
    return [op.name for plan in limited._succession.cycle.plans for op in plan.trace.ops if op.name in variants]


@pytest.mark.parametrize("backend", ["count", "copy", "native"])
def test_a_loop_writes_over_its_gradients(backend):
    eager, _ = loop(Net(), nullcontext())
    for replay in (False, True):
        limited = limit(BUDGET, backend=backend, replay=replay)
        found, kinds = loop(Net(), limited)
        assert found == eager
        assert kinds[2:] == [Replay if replay else Online] * 12 and not limited.notes
    assert {name.split(".")[1] for name in written_over(limited)} == {
        "gelu_backward", "tanh_backward", "threshold_backward", "silu_backward", "sigmoid_backward", "mul", "neg",
        "_log_softmax_backward_data", "_softmax_backward_data",
    }  # fmt: skip


class Keeper:
    """Keeps in each step what one kind of user gets of a gradient, and says in the end what it was."""

    def __init__(self, how, steps=range(100)):
        self.how, self.steps, self.kept, self.bits = how, steps, [], []

    def __call__(self, step, k, x):
        if step in self.steps:
            self.how(self.kept, x)

    def end(self, *step):
        self.bits += map(bits, self.kept)
        self.kept.clear()


class Twice(torch.autograd.Function):
    """Reads its gradient once by an operator that others let write over it, and then again."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 0.5 + torch.neg(g) + g.sigmoid()


def keeps_retained(kept, x):
    x.retain_grad()
    kept.append(lambda: x.grad)


def keeps_by_post_hook(kept, x):
    x.grad_fn.register_hook(lambda made, given: kept.extend(g for g in given if g is not None))


KEEPERS = {
    "the gradient": lambda kept, x: x.register_hook(kept.append) and None,
    "a view": lambda kept, x: x.register_hook(lambda g: kept.append(g[1:, ::2])) and None,
    "its bytes": lambda kept, x: x.register_hook(lambda g: kept.append(g.detach())) and None,
    "numpy": lambda kept, x: x.register_hook(lambda g: kept.append(g.numpy())) and None,
    "DLPack": lambda kept, x: x.register_hook(lambda g: kept.append(torch.from_dlpack(g))) and None,
    "what a hook makes of it": lambda kept, x: x.register_hook(lambda g: (kept.append(g), g * 2)[1]) and None,
    "retain_grad": keeps_retained,
    "a node's hook": keeps_by_post_hook,
}


@pytest.mark.parametrize("how", KEEPERS)
@pytest.mark.parametrize("steps", [slow(range(100)), (5, 6, 12)], ids=["always", "at times"])
def test_a_gradient_that_somebody_keeps_stays(how, steps):
    runs = []
    for within in (nullcontext(), limit(BUDGET + (640 if how == "DLPack" else 240) * KIB)):
        keeper = Keeper(KEEPERS[how], steps)
        runs.append(loop(Net(keeper), within, before=keeper.end)[0])
        keeper.end()
        runs[-1] += keeper.bits
    assert runs[0] == runs[1]


@pytest.mark.parametrize("at", [4, 12])
def test_a_second_gradient_is_wanted_from_some_step_on(at):
    def unfreeze(step, net):
        net.scale.requires_grad_(step >= at)

    eager, _ = loop(Net(), nullcontext(), before=unfreeze)
    found, kinds = loop(Net(), limit(BUDGET + 60 * KIB), before=unfreeze)
    assert found == eager and Replay in kinds


class _Noting(torch.autograd.Function):
    """The identity, whose gradient's strides are noted."""

    strides: list[tuple[int, ...]] = []

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        _Noting.strides.append(gradient.stride())
        return gradient


@pytest.mark.parametrize("function", [F.relu, F.gelu, F.silu, F.elu, torch.sigmoid, torch.tanh, F.hardtanh, F.softplus])
def test_gradients_are_laid_out_as_ever(function):
    """The gradient is contiguous, what it meets has channels last: kernels after it sum in the order of its strides."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for context in (nullcontext(), limit("1 MiB", replay=False)):
        _Noting.strides.clear()
        with context:
            (function(_Noting.apply(x)).contiguous() * 2).sin().sum().backward()
        found.append([*_Noting.strides])
    assert found[0] == found[1] and len(found[0]) == 1


def test_functions_of_users_branches_and_graphs_of_gradients():
    x = torch.randn(64, 64, requires_grad=True)

    def step():
        y = torch.tanh(x)
        a, b = torch.sigmoid(y), F.gelu(y)
        c = Twice.apply(torch.tanh(a * b) + a)
        inner, mid = torch.autograd.grad((c * c.exp() / 3).sum(), (x, a), create_graph=True)
        return (*torch.autograd.grad(inner.square().sum() + mid.tanh().sum(), (x, b)), inner.detach(), mid.detach())

    eager = step()
    with limit("1 GiB", replay=False):
        found = step()
    assert all(map(torch.equal, eager, found))


# -- random programs ------------------------------------------------------------------------------------------------------


def random_program(seed):
    """A step of random elementwise operators that share inputs, with hooks on some of them; (step, what it kept)."""
    draw = random.Random(seed)
    unary = (torch.tanh, F.gelu, F.relu, F.silu, torch.sigmoid, torch.exp, torch.neg, lambda x: x.softmax(-1),
             lambda x: x.log_softmax(0), lambda x: x / 3, lambda x: x**2, lambda x: x[1:].mul(2), lambda x: x.t() * 0.1,
             lambda x: F.dropout(x, 0.3), lambda x: 1 - x, Twice.apply)  # fmt: skip
    plan = [
        (draw.randrange(3), draw.choice(unary), draw.random(), draw.random(), draw.choice(list(KEEPERS)))
        for _ in range(18)
    ]
    keys = [draw.random() < 0.15 for _ in plan]

    def step(x, kept):
        made = [x]
        for (kind, f, one, two, how), hooked in zip(plan, keys, strict=True):
            a, b = made[int(one * len(made))], made[int(two * len(made))]
            new = f(a) if kind or a.shape != b.shape else a * b
            if new.requires_grad and hooked:
                KEEPERS[how](kept, new)
            made.append(new.clamp(-5, 5) if kind == 2 else new)
        return sum(y.sum() * 1e-2 for y in made)

    return step


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow) if n > 5 else n for n in range(40)])
def test_random_programs(seed):
    step, runs = random_program(seed), []
    with meter() as counter:
        x = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        step(x, []).backward()
    for within in (nullcontext(), limit(int(counter.peak * 0.8))):
        torch.manual_seed(seed)
        found = []
        with within as manager, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(10):
                x.grad, kept = None, []
                step(x, kept if number != 6 else []).backward()
                found += [bits(x.grad), *map(bits, kept)]
                kept.clear()  # it may know what knows it
                if manager is not None:
                    manager.step()
        runs.append(found)
    assert runs[0] == runs[1]


# -- traces and plans -----------------------------------------------------------------------------------------------------


def marked(found):
    """Names of the operators that a trace lets write over their gradients."""
    return Counter(op.over for op in found.ops if op.over)


def test_a_trace_tells_what_the_step_writes_over():
    x, limited = torch.randn(128, 40), limit(BUDGET)
    loop(Net(), limited)
    real, fake = marked(trace(Net(), (0, x), fake=False)), marked(trace(Net(), (0, x), fake=True))
    assert real == Counter(written_over(limited)) and fake <= real and fake


@pytest.mark.parametrize("how", slow_but(["the gradient", "numpy", "retain_grad", "a node's hook"], KEEPERS))
def test_a_trace_sees_that_somebody_has_a_gradient(how):
    runs, x = [], torch.randn(128, 40)
    keeper = Keeper(KEEPERS[how])
    known = trace(Net(keeper), (0, x), fake=False)
    keeper.kept.clear()
    limited = limit(plan(known, least(known) + (640 if how == "DLPack" else 64) * KIB))
    for within in (nullcontext(), limited):
        keeper = Keeper(KEEPERS[how])
        runs.append(loop(Net(keeper), within, steps=4, before=keeper.end)[0])
        keeper.end()
        runs[-1] += keeper.bits
    assert runs[0] == runs[1]
    assert not any("somebody else has the gradient" in note for note in limited.notes)


class Wide(nn.Module):
    """Most bytes are those around its activations: more of them where results do not lie over gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)) for _ in range(3))

    def forward(self, step, x):
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


@pytest.mark.parametrize("fake", [False, True])
def test_the_least_budget_of_a_trace_is_kept(fake):
    """Where gradients are written over a smaller budget does, and the loop runs as planned from its first step on."""
    known = trace(Wide(), (0, torch.randn(128, 40)[:, :16].contiguous()), fake=fake)
    known.as_run.check()
    assert known.as_run.peak <= known.peak
    blind = replace(known, ops=tuple(replace(op, over="") for op in known.ops))
    budget = least(known)
    assert budget < least(blind)
    with pytest.raises(BudgetError):
        plan(blind, budget)
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    found, kinds = [], []
    for within in (nullcontext(), limited := limit(plan(known, budget))):
        net = Wide()
        with meter(net) as seen, within as manager:
            for step in range(6):
                net.zero_grad()
                net(step, x).backward()
                if manager is not None:
                    manager.step()
                    kinds.append(type(manager._executor))
        found.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *found)) and kinds == [Replay] * 6 and not limited.notes
    assert seen.peak <= budget


@pytest.mark.parametrize("name", [slow("swin"), "bert", slow("gpt"), "unet"])
def test_nobody_has_what_a_plan_writes_over(name):
    """Through views and sums, which a trace by itself cannot tell apart: as few references as a lone gradient has."""
    made = make(name)
    known = trace(*made, optimizer=torch.optim.AdamW)
    assert any(op.over for op in known.ops)
    limited = limit(plan(known, least(known) + (known.peak - least(known)) // 2), model=made.model)
    train(made, 3, within=limited)
    assert not any("somebody else has the gradient" in note for note in limited.notes)
