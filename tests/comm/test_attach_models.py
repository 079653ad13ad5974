"""Models, optimizers and loops beyond the plain one: what DDP's users also do, under an exchange, on two processes."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from weft.comm import (
    Accordion,
    ErrorFeedback,
    Exchange,
    LayerwiseBudget,
    LowRank,
    Median,
    MomentumCorrection,
    Quantise,
    RandK,
    ScatterGather,
    Shift,
    Sign,
    Star,
    TopK,
    attach,
    dgc,
)
from weft.errors import ExchangeMismatch


def exact():
    return Exchange(TopK(0.1, selection="exact"), ErrorFeedback())


EXCHANGES = {
    "top-k": exact,
    "dgc": lambda: dgc(0.1, momentum=0.9),
    "rand-k": lambda: Exchange(RandK(0.2), Shift(0.2)),
    "sign": lambda: Exchange(Sign(), ErrorFeedback()),
    "low rank": lambda: Exchange(LowRank(2), ErrorFeedback()),
    "quantise": lambda: Exchange(Quantise(4), ErrorFeedback(), topology=ScatterGather(memory=ErrorFeedback())),
    "star": lambda: Exchange(TopK(0.1), ErrorFeedback(), topology=Star(1, down=TopK(0.2), memory=ErrorFeedback())),
    "budget": lambda: Exchange(
        TopK(0.1), ErrorFeedback(), controller=LayerwiseBudget([0.05, 0.2], 0.2, every=2, smallest=1)
    ),
    "median": lambda: Exchange(combine=Median()),
}


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def backward(model, step):
    g = torch.Generator().manual_seed(100 * step + dist.get_rank())
    loss = cross_entropy(model(torch.randn(8, 8, generator=g)), torch.randint(0, 3, (8,), generator=g))
    loss.backward()


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def alike(model):
    mine, found = weights(model), [torch.empty_like(weights(model)) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return all(torch.equal(mine, other) for other in found)


# ---- models


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.path = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3), "a"

    def forward(self, x):
        return self.head(torch.relu(getattr(self, self.path)(x)))


def unused(name, set_to_none):
    """A path that no rank takes for some steps: DDP drops its results, so its memory must not be paid out into nothing."""
    model, exchange = TwoPaths(), EXCHANGES[name]()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = sgd(ddp, momentum=0.9 if name == "dgc" else 0.0)
    attach(ddp, exchange, optimizer)
    owed = []
    for step, path in enumerate("bbaab"):
        model.path = path
        optimizer.zero_grad(set_to_none)
        backward(ddp, step)
        optimizer.step()
        owed.append({key: state for key, state in exchange.state_dict()["states"].items() if "b.weight" in key})
    assert alike(ddp)
    same = str(owed[1]) == str(owed[2]) == str(owed[3])
    return same and str(owed[1]) != str(owed[4])


@pytest.mark.parametrize("name", ["top-k", "dgc", "quantise", "star"])
def test_what_is_owed_to_an_unused_parameter_stays_owed(pool, name):
    for set_to_none in (True, False):
        assert pool(2).run(unused, name, set_to_none) == [True, True]


class Odd(nn.Module):
    """Parameters without entries, a single number, and one that lies transposed in memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale = nn.Linear(8, 16), nn.Parameter(torch.tensor(1.0))
        self.none, self.neither = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.zeros(4, 0))
        self.turned = nn.Parameter(torch.randn(3, 16).t())

    def forward(self, x):
        return torch.relu(self.first(x)) @ self.turned * self.scale + self.none.sum() + self.neither.sum()


def odd():
    for make in EXCHANGES.values():
        ddp = DistributedDataParallel(Odd())
        optimizer = sgd(ddp, momentum=0.9)
        handle = attach(ddp, make(), optimizer)
        train(ddp, optimizer, 3)
        assert alike(ddp)
        handle.remove()
    return True


def test_parameters_without_entries(pool):
    assert pool(2).run(odd) == [True, True]


def one_for_two():
    exchange = exact()
    first, second = DistributedDataParallel(network()), DistributedDataParallel(network())
    handle = attach(first, exchange)
    with pytest.raises(ValueError, match="at work already"):
        attach(second, exchange)
    train(first, sgd(first), 2)
    handle.remove()
    attach(second, exchange).remove()  # one after the other is fine, with the memories of the first
    with pytest.raises(ExchangeMismatch, match="shapes of"):
        attach(DistributedDataParallel(network(20)), exchange)
    attach(second, exchange).remove()
    with pytest.raises(TypeError, match="complex64"):
        attach(DistributedDataParallel(nn.Linear(2, 2, dtype=torch.complex64)), exact())
    return True


def test_an_exchange_is_for_one_model_at_a_time(pool):
    assert pool(2).run(one_for_two) == [True, True]


def copies():
    ddp = DistributedDataParallel(network())
    optimizer = sgd(ddp)
    attach(torch.compile(ddp, backend="eager"), exact(), optimizer)
    train(ddp, optimizer, 1)
    for other in (copy.deepcopy(ddp), pickle.loads(pickle.dumps(ddp))):
        handle = attach(other, exact())  # a copy has no hook; it is not to be taken for one that has
        train(other, sgd(other), 2, 1)
        assert handle.exchange.report().steps == 2 and alike(other)
    train(ddp, optimizer, 1, 1)
    return alike(ddp)


def test_copies_of_a_model_with_an_exchange(pool):
    assert pool(2).run(copies) == [True, True]


def biases(down):
    """What `select` leaves out goes as it is, down as well as up."""
    ddp = DistributedDataParallel(network())
    attach(ddp, Exchange(TopK(0.1), ErrorFeedback(), topology=Star(0, down=down)))
    backward(ddp, 0)
    alone = network()
    backward(alone, 0)
    mean = alone[0].bias.grad
    dist.all_reduce(mean)
    return bool(torch.allclose(ddp.module[0].bias.grad, mean / 2, rtol=1e-6, atol=1e-8))


def test_a_server_codes_only_what_is_coded(pool):
    for down in (TopK(0.1), None):
        assert pool(2).run(biases, down) == [True, True]


class Layers(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.reentrant = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), reentrant

    def forward(self, x):
        x = x.detach().requires_grad_()  # without it a reentrant checkpoint has no backward pass
        for layer in self.layers:
            x = torch.relu(checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


def passes_within(name):
    """Every checkpointed layer's backward pass is one of its own where checkpoints are reentrant; a bucket has one layer."""
    found = []
    for reentrant in (False, True):
        ddp = DistributedDataParallel(Layers(reentrant), bucket_cap_mb=1e-4)
        optimizer = sgd(ddp)
        handle = attach(ddp, Exchange() if name == "plain" else EXCHANGES[name](), optimizer)
        for step in range(4):
            optimizer.zero_grad()
            backward(ddp, step) if step < 3 else broken_behind(ddp)
            optimizer.step()
        assert handle.exchange.skipped == 1 and handle.step == 4
        found.append(weights(ddp))
        handle.remove()
    return torch.equal(*found) and bool(found[0].isfinite().all())


def broken_behind(ddp):
    """A gradient that is not finite on one rank, in the last layer alone."""
    layer = ddp.module.layers[-1]
    hook = layer.weight.register_hook(lambda gradient: gradient * torch.nan) if dist.get_rank() else None
    ddp(torch.ones(2, 8)).sum().backward()
    if hook is not None:
        hook.remove()


@pytest.mark.parametrize("name", ["plain", "top-k"])
def test_reentrant_checkpoints_make_one_step_of_a_backward_pass(pool, name):
    assert pool(2).run(passes_within, name) == [True, True]


class TwoTypes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8).double(), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x.double()).float())


def static(name):
    found = []
    for graph in (False, True):
        ddp = DistributedDataParallel(TwoTypes(), static_graph=graph)
        optimizer = sgd(ddp)
        handle = attach(ddp, EXCHANGES[name](), optimizer)
        train(ddp, optimizer, 3)
        assert handle.step == 3
        found.append(torch.cat([p.detach().double().flatten() for p in ddp.parameters()]))
    return torch.equal(*found)


@pytest.mark.parametrize("name", ["top-k", "median"])
def test_a_static_graph_of_two_dtypes(pool, name):
    """Its first backward pass hands over all buckets as the first of several."""
    assert pool(2).run(static, name) == [True, True]


# ---- optimizers and loops


def optimizers():
    ddp = DistributedDataParallel(network())
    parts = list(ddp.parameters())
    both = [torch.optim.SGD(parts[:2], lr=0.1), torch.optim.Adam(parts[2:])]
    handle = attach(ddp, exact(), both)
    for step in range(3):
        for optimizer in both:
            optimizer.zero_grad()
        backward(ddp, step)
        for optimizer in both:
            optimizer.step()
    for optimizer in both:
        optimizer.zero_grad()
    x = torch.full((2, 8), torch.nan if dist.get_rank() else 1.0)
    before = weights(ddp)
    ddp(x).sum().backward()
    for optimizer in both:
        optimizer.step()
    assert handle.exchange.skipped == 1 and torch.equal(weights(ddp), before)
    handle.remove()

    other = nn.Linear(2, 2)
    shared = torch.optim.SGD([*ddp.parameters(), *other.parameters()], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="optimizer of its own"):
        attach(ddp, dgc(0.1, momentum=0.9), shared)
    groups = [{"params": parts[:2], "momentum": 0.9}, {"params": parts[2:], "momentum": 0.0}]
    with pytest.raises(ValueError, match="same in all parameter groups"):
        attach(ddp, dgc(0.1, momentum=0.9), torch.optim.SGD(groups, lr=0.1))
    ddp = DistributedDataParallel(network())
    attach(ddp, dgc(0.1, momentum=0.9), torch.optim.SGD(list(ddp.parameters())[:2], lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="hold all trained parameters with MomentumCorrection"):
        backward(ddp, 0)
    ddp = DistributedDataParallel(network())
    parts = list(ddp.parameters())
    late = torch.optim.SGD(parts[:2], lr=0.1, momentum=0.9)
    handle = attach(ddp, dgc(0.1, momentum=0.9), late)
    late.add_param_group({"params": parts[2:], "momentum": 0.0})
    train(ddp, late, 2)
    handle.remove()
    return [group["momentum"] for group in late.param_groups]


def test_several_optimizers_and_groups(pool):
    assert pool(2).run(optimizers) == [[0.9, 0.9], [0.9, 0.9]]


def not_finite(ddp):
    ddp(torch.full((2, 8), torch.nan if dist.get_rank() else 1.0)).sum().backward()


def skipped():
    """Steps that are not finite reach nobody: no optimizer that attach does not know, and none that calls a closure."""
    for exchange in (exact(), Exchange()):
        ddp = DistributedDataParallel(network())
        parts = list(ddp.parameters())
        known, unknown = torch.optim.SGD(parts[:2], lr=0.1), torch.optim.Adam(parts[2:])
        handle = attach(ddp, exchange, known)
        before = weights(ddp)
        not_finite(ddp)
        unknown.step()
        known.step()
        assert torch.equal(weights(ddp), before)
        known.step(partial(not_finite, ddp))
        known.step(closure=partial(not_finite, ddp))
        assert torch.equal(weights(ddp), before)
        assert handle.exchange.skipped == 3
        handle.remove()
    return True


def test_a_step_that_is_not_finite_reaches_no_optimizer(pool):
    assert pool(2).run(skipped) == [True, True]


def skipped_once():
    """What is skipped is one step, not those after it that nothing is exchanged in."""
    ddp = DistributedDataParallel(network())
    optimizer = sgd(ddp)
    attach(ddp, exact(), optimizer)
    not_finite(ddp)
    optimizer.step()
    before = weights(ddp)
    with ddp.no_sync():
        backward(ddp, 0)
    optimizer.step()
    return not torch.equal(weights(ddp), before)


def test_a_local_step_after_a_skipped_one_is_made(pool):
    assert pool(2).run(skipped_once) == [True, True]


def passes(name, how):
    """Two synchronised backward passes before a step; what the loop hears."""
    ddp = DistributedDataParallel(network())
    optimizer = sgd(ddp, momentum=0.9 if name == "dgc" else 0.0)
    attach(ddp, EXCHANGES[name](), optimizer)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            for step in range(3):
                optimizer.zero_grad()
                with ddp.no_sync() if how == "locally" else contextlib.nullcontext():
                    backward(ddp, 2 * step)
                if how == "thrown away":
                    optimizer.zero_grad()
                backward(ddp, 2 * step + 1)
                optimizer.step()
        except ValueError as error:
            return str(error)
    return [str(warning.message) for warning in heard if "exchanged twice" in str(warning.message)]


def test_every_synchronised_pass_is_a_step_of_the_memory_and_the_loop_hears_of_it(pool):
    for name in ("dgc", "top-k"):
        assert pool(2).run(passes, name, "locally") == [[], []]
        for heard in pool(2).run(passes, name, "thrown away"):
            assert len(heard) == 1 and "ddp.module" in heard[0]
    assert pool(2).run(passes, "top-k", "added") == [[], []]
    for heard in pool(2).run(passes, "dgc", "added"):
        assert "Accumulate under ddp.no_sync()" in heard


def not_removed():
    """Another rank does not come when the momentum is to be given back."""
    ddp = DistributedDataParallel(network())
    optimizer, exchange = sgd(ddp, momentum=0.9), dgc(0.1, momentum=0.9)
    handle = attach(ddp, exchange, optimizer)
    train(ddp, optimizer, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr(dist, "all_reduce", gone)
        handle.remove()
    kept = exchange.state_dict()["states"]["0.weight"]
    assert optimizer.param_groups[0]["momentum"] == 0 and kept[MomentumCorrection.buffer].any()
    train(ddp, optimizer, 1)  # plain DDP
    return alike(ddp)


def gone(*_args, **_options):
    raise RuntimeError("gone")


def test_a_remove_that_fails_loses_no_momentum(pool):
    assert pool(2).run(not_removed) == [True, True]


def given_back(nesterov):
    """An optimizer saved while a memory has its momentum: it has it again, in the next run's memory or without one."""

    def make():
        ddp = DistributedDataParallel(network())
        return (
            ddp,
            sgd(ddp, momentum=0.9, nesterov=nesterov, weight_decay=0.1),
            dgc(0.2, momentum=0.9, nesterov=nesterov),
        )

    ddp, optimizer, exchange = make()
    handle = attach(ddp, exchange, optimizer)
    train(ddp, optimizer, 3)
    kept = copy.deepcopy((ddp.module.state_dict(), optimizer.state_dict(), exchange.state_dict()))
    optimizer.step()  # nothing new has been exchanged: the momentum of the weight decay stays
    assert str(exchange.state_dict()["states"]) == str(kept[2]["states"])
    ddp.module.load_state_dict(kept[0])
    handle.remove()
    train(ddp, optimizer, 2, 3)
    for order in ("optimizer first", "attach first"):
        again, other, exchange = make()
        again.module.load_state_dict(kept[0])
        exchange.load_state_dict(kept[2])
        if order == "optimizer first":
            other.load_state_dict(kept[1])
            assert other.param_groups[0]["momentum"] == 0.9
        else:
            other.param_groups[0].update(momentum=0.0, nesterov=False)  # it has none to give before it is loaded
        handle = attach(again, exchange, other)
        other.load_state_dict(kept[1])
        assert other.param_groups[0]["momentum"] == 0
        handle.remove()
        train(again, other, 2, 3)
        assert torch.equal(weights(ddp), weights(again)) and other.param_groups[0]["momentum"] == 0.9
    return True


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_given_back_after_a_resume(pool, nesterov):
    assert pool(2).run(given_back, nesterov) == [True, True]


def loaded(name, after):
    def make():
        ddp = DistributedDataParallel(network())
        return ddp, sgd(ddp, momentum=0.9), EXCHANGES[name]()

    ddp, optimizer, exchange = make()
    attach(ddp, exchange, optimizer)
    train(ddp, optimizer, 3)
    file = io.BytesIO()
    torch.save((ddp.module.state_dict(), optimizer.state_dict(), exchange.state_dict()), file)
    train(ddp, optimizer, 3, 3)
    file.seek(0)
    kept = torch.load(file)  # weights_only: plain values and tensors alone
    again, optimizer, exchange = make()
    again.module.load_state_dict(kept[0])
    if not after:
        exchange.load_state_dict(kept[2])
    handle = attach(again, exchange, optimizer)
    optimizer.load_state_dict(kept[1])
    if after:
        exchange.load_state_dict(kept[2])
    train(again, optimizer, 3, 3)
    return torch.equal(weights(ddp), weights(again)) and handle.step == 6


@pytest.mark.parametrize("name", ["dgc", "rand-k", "budget"])
def test_a_checkpoint_may_be_loaded_before_or_after_attach(pool, name):
    for after in (False, True):
        assert pool(2).run(loaded, name, after) == [True, True]


def uneven(name):
    ddp = DistributedDataParallel(network())
    optimizer = sgd(ddp)
    handle = attach(ddp, EXCHANGES[name](), optimizer)
    with ddp.join():
        train(ddp, optimizer, 2 + 3 * dist.get_rank())
    assert alike(ddp) and handle.step == 5
    train(ddp, optimizer, 2, 5)
    return alike(ddp)


@pytest.mark.parametrize("name", ["top-k", "low rank", "median"])
def test_ranks_with_unlike_numbers_of_batches(pool, name):
    """DDP's `join`: a rank whose data have ended goes through the others' steps with zeros."""
    assert pool(2).run(uneven, name) == [True, True]


# ---- options


def budgets():
    exchange = Exchange(TopK(0.1), controller=LayerwiseBudget([0.05, 0.2], 0.2, every=2 + dist.get_rank()))
    with pytest.raises(ExchangeMismatch, match=r"every=2.*every=3|every=3.*every=2"):
        attach(DistributedDataParallel(network()), exchange)
    return True


def test_options_of_controllers_are_compared(pool):
    """Ranks that decide at different steps would wait for each other for ever."""
    assert pool(2).run(budgets) == [True, True]


@pytest.mark.parametrize("controller", [LayerwiseBudget([0.05, 0.2], 0.2), Accordion(0.2, 0.05)])
def test_a_controller_says_what_holds_before_it_decides(controller):
    from weft.comm import Spec

    copied = pickle.loads(pickle.dumps(Exchange(TopK(0.1), controller=controller)))
    spec = Spec("w", (100, 100))
    assert copied.wire([spec], 2) == Exchange(TopK(0.2)).wire([spec], 2)


def test_owners_memories_keep_what_was_not_sent():
    for memory in (Shift(0.5), MomentumCorrection(0.9)):
        with pytest.raises(ValueError, match="must keep what was not sent"):
            Exchange(Quantise(8), topology=ScatterGather(memory=memory))
