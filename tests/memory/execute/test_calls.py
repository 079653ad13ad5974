"""Every kind of call, dropped on purpose and brought back: the same bits, and nothing else has moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weft.memory.execute.facts import facts_of
from weft.memory.execute.limit import limit
from weft.memory.execute.sizes import foresee

aten = torch.ops.aten


def randn(*size):
    return torch.randn(*size)


def batch_norm(training):
    norm = nn.BatchNorm1d(8).train(training)
    norm.running_mean.add_(1)
    return norm


def in_place():
    x = randn(8, 8).exp()
    y = x * 2
    x.relu_().add_(y)
    x[:, 1] = 3
    return x, y, x.t() @ y


def foreach():
    xs = [randn(4), randn(5)]
    ys = torch._foreach_mul(xs, 2.0)
    torch._foreach_add_(ys, xs)
    return ys


def generator():
    g = torch.Generator().manual_seed(3)
    return torch.rand(5, generator=g), randn(5).bernoulli_(0.5, generator=g), torch.randperm(9, generator=g)


def lists():
    return (
        torch.cat([randn(3), randn(4)]),
        torch.stack([randn(3), randn(3)]),
        torch.block_diag(randn(2, 2), randn(1, 1)),
    )


CASES = {
    "dropout": lambda: F.dropout(randn(50).exp(), 0.5),
    "native dropout": lambda: torch.native_dropout(randn(50), 0.5, True),
    "bernoulli": lambda: torch.bernoulli(torch.rand(50)),
    "random in place": lambda: torch.empty(30).uniform_().normal_().mul_(2),
    "random": lambda: (
        randn(20),
        torch.rand(20),
        torch.randint(0, 9, (20,)),
        torch.randperm(20),
        torch.rand_like(randn(3)),
    ),
    "multinomial": lambda: torch.multinomial(torch.rand(20), 7),
    "rrelu": lambda: F.rrelu(randn(30), training=True),
    "alpha dropout": lambda: F.alpha_dropout(randn(30), 0.3, training=True),
    "attention with dropout": lambda: F.scaled_dot_product_attention(*randn(3, 2, 2, 5, 4), dropout_p=0.3),
    "attention": lambda: F.scaled_dot_product_attention(*randn(3, 2, 2, 5, 4), is_causal=True),
    "generator": generator,
    "in place": in_place,
    "foreach": foreach,
    "several outputs": lambda: (*torch.max(randn(5, 6), 1), *torch.linalg.svd(randn(4, 3)), *torch.topk(randn(9), 3)),
    "views": lambda: (randn(4, 6).exp()[1:, ::2].t().contiguous(), randn(4, 6).exp().view(2, 12)[0].clone()),
    "lists": lists,
    "index": lambda: (randn(5, 5)[torch.tensor([1, 3])], randn(5, 5)[:, torch.tensor([0, 2])], randn(5)[randn(5) > 0]),
    "index put": lambda: randn(5).index_put_((torch.tensor([0, 1]),), torch.tensor(2.0)),
    "shape only": lambda: (torch.zeros_like(randn(3)), torch.full_like(randn(3, 4).t(), 2.0), randn(3).new_ones(4)),
    "constants": lambda: randn(4) * torch.tensor(2.5) + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "convolution": lambda: F.conv2d(randn(2, 3, 8, 8), randn(4, 3, 3, 3), randn(4), padding=1),
    "layer norm": lambda: F.layer_norm(randn(3, 8), (8,), randn(8), randn(8)),
    "batch norm": lambda: batch_norm(True)(randn(6, 8)),
    "batch norm, evaluated": lambda: batch_norm(False)(randn(6, 8)),
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True)(randn(4, 3, 8)),
    "losses": lambda: (F.cross_entropy(randn(4, 5), torch.tensor([0, 1, 2, 3])), F.mse_loss(randn(4), randn(4))),
    "conjugates": lambda: torch.fft.irfft(torch.fft.rfft(randn(16)).conj() * 2j),
    "negatives": lambda: torch.fft.rfft(randn(16)).conj().imag * 2 + 1,
    "casts": lambda: (randn(4).to(torch.bfloat16), randn(4).double(), randn(4).to(torch.float64).long()),
    "where and masks": lambda: torch.where(randn(5) > 0, randn(5), torch.zeros(())).masked_fill(randn(5) > 0, 1.0),
    "embedding": lambda: F.embedding(torch.tensor([0, 2, 2]), randn(4, 3)),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, dropout=0.5)(randn(3, 2, 4))[0],
    "einsum": lambda: torch.einsum("bij,bjk->bik", randn(2, 3, 4), randn(2, 4, 5)),
    "out": lambda: torch.add(randn(3), 1, out=torch.empty(3)),
    "named arguments": lambda: torch.add(randn(3), other=randn(3), alpha=2),
}


@pytest.mark.parametrize("name", CASES)
def test_dropped_and_brought_back(name):
    torch.manual_seed(0)
    with torch.no_grad(), limit("64 MiB", replay=False) as limited:
        online = limited._executor
        made = CASES[name]()
        made = [made] if isinstance(made, torch.Tensor) else list(made)
        recipes, fixed = [], {}
        for hold in list(online.owner.holds.values()):
            if hold.block.step is not None:
                recipes.append(hold)
            else:
                fixed[hold] = bytes(hold())
        assert any(online.hold_of(tensor) in recipes for tensor in made)
        expected = [tensor.clone() for tensor in made]
        after = torch.random.get_rng_state()
        for _ in range(2):
            for hold in recipes:
                online.core.evict(hold.block)
            assert len(online.bytes.dropped) == len(recipes)
            for hold in reversed(recipes):
                online._at_work(lambda hold=hold: online.core.ensure(hold.block))
            assert all(torch.equal(tensor, copy) for tensor, copy in zip(made, expected, strict=True))
        assert all(bytes(hold()) == copy for hold, copy in fixed.items()), "something else was written"
        assert torch.equal(torch.random.get_rng_state(), after), "the generator moved"


def test_statistics_move_once():
    norm, x = nn.BatchNorm1d(8), torch.randn(6, 8)
    with torch.no_grad(), limit("64 MiB", replay=False) as limited:
        y = norm(x)
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        online = limited._executor
        online.core.evict(online.hold_of(y).block)
        z = y + 1
        assert online.core.repeats == 1
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)
        assert norm.num_batches_tracked == 1
    assert torch.equal(z, nn.BatchNorm1d(8)(x) + 1)


def test_what_only_needs_a_shape_brings_nothing_back():
    with limit("1 MiB", replay=False) as limited:
        x = torch.exp(torch.ones(100))
        online = limited._executor
        online.core.evict(online.hold_of(x).block)
        y = torch.zeros_like(x)
        assert online.core.repeats == 0 and y.shape == (100,)
        assert x.sum() > 0 and online.core.repeats >= 1


def test_sizes_are_foreseen():
    x = torch.randn(6, 8)
    assert foresee(facts_of(aten.mm.default), (x, x.t()), {}) == (144,)
    assert foresee(facts_of(aten.max.dim), (x, 1), {}) == (24, 48)
    assert foresee(facts_of(aten.add_.Tensor), (x, 1), {}) == ()
    assert foresee(facts_of(aten.native_layer_norm.default), (x, [8], None, None, 1e-5), {}) == (192, 24, 24)
    assert foresee(facts_of(aten.nonzero.default), (x,), {}) is None  # depends on the data
    assert foresee(facts_of(aten.mm.default), (x, x), {}) is None  # the real call will say what is wrong
