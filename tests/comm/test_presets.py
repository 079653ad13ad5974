"""`dgc(...)` under DDP on two ranks: the published method end to end, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.comm.controllers.schedule import Schedule
from weft.comm.ddp import attach
from weft.comm.presets import dgc


def train(exchange, steps, nesterov=False, decay=0.0):
    """(loss by step, final weights, largest difference between ranks, settings by step) of this rank; None: plain DDP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=decay)
    handle = None if exchange is None else attach(ddp, exchange, optimizer)
    g = torch.Generator().manual_seed(dist.get_rank())
    losses, settings, apart = [], [], 0.0
    for _ in range(steps):
        x = torch.randn(32, 16, generator=g)
        loss = (ddp(x) - x[:, :4].sum(1, keepdim=True) / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        other = flat.clone()
        dist.broadcast(other, 0)
        apart = max(apart, float((flat - other).abs().max()))
        if exchange is not None:
            settings.append(exchange.report().tensors["2.weight"].setting)
    if handle is not None:
        handle.remove()
        assert optimizer.param_groups[0]["momentum"] == 0.9
    return losses, flat, apart, settings


def warm_and_cold():
    return train(dgc(0.01, warmup=[1.0, 0.25, 0.05], momentum=0.9, stage_steps=10), 60)


def test_warm_up_reaches_the_final_ratio_and_ranks_stay_equal_to_the_bit(pool):
    losses, _, apart, settings = pool(2).run(warm_and_cold)[1]
    assert apart == 0.0
    assert settings == [None] * 10 + [0.25] * 10 + [0.05] * 10 + [0.01] * 30
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def in_and_out():
    exchange = dgc(0.02, warmup=[0.1, 1.0, 0.1, 1.0], momentum=0.9, stage_steps=7)
    return train(exchange, 40)


def test_a_dense_stage_after_a_sparse_one_keeps_the_ranks_equal(pool):
    """u is each rank's own by then: delivered as if it were the momentum of the mean, it would tear the ranks apart."""
    for _, flat, apart, _ in pool(2).run(in_and_out):
        assert apart == 0.0 and flat.isfinite().all()


def dense_both_ways(nesterov, decay):
    ours = train(dgc(1.0, momentum=0.9, nesterov=nesterov), 25, nesterov, decay)
    return ours[1], train(None, 25, nesterov, decay)[1]


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("nesterov", [False, True])
def test_ratio_one_is_momentum_sgd(pool, nesterov, decay):
    """With weight decay, too: it is not exchanged, and has its momentum all the same."""
    for ours, plain in pool(2).run(dense_both_ways, nesterov, decay):
        assert torch.allclose(ours, plain, atol=1e-5)


def channels_last(ours):
    """Two steps of plain momentum SGD, three with the momentum in the memory, two more without; the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    handle, g = None, torch.Generator().manual_seed(dist.get_rank())
    for step in range(7):
        if ours and step == 2:
            handle = attach(ddp, dgc(1.0, momentum=0.9), optimizer)
        if handle is not None and step == 5:
            handle.remove()
        optimizer.zero_grad()
        ddp(torch.randn(5, 3, 8, 8, generator=g)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def channels_last_both_ways():
    return channels_last(True), channels_last(False)


def test_momentum_moves_in_the_order_in_which_buckets_hold_a_weight(pool):
    for ours, plain in pool(2).run(channels_last_both_ways):
        assert torch.allclose(ours, plain, atol=1e-5)


def by_the_card(steps, ratios, nesterov, clip, decay, lr=0.02, m=0.9):
    """DGC of two workers, written out in one process with a full sort; the final weights. `ratios`: ten steps each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    weights, draws = list(model.parameters()), [torch.Generator().manual_seed(rank) for rank in range(2)]
    u, v = ([[torch.zeros(p.numel()) for p in weights] for _ in range(2)] for _ in range(2))
    b = [torch.zeros(p.numel()) for p in weights]

    def pushed(u, g):
        u.copy_(m * (u + g) if nesterov else m * u + g)
        return u + g if nesterov else u

    for step in range(steps):
        ratio, gradients = ratios[min(step // 10, len(ratios) - 1)], []
        for g in draws:
            x = torch.randn(32, 16, generator=g)
            loss = (model(x) - x[:, :4].sum(1, keepdim=True) / 2).square().mean()
            gradients.append([part.flatten() for part in torch.autograd.grad(loss, weights)])
        for i, p in enumerate(weights):
            if p.dim() > 1:
                out = torch.zeros(p.numel())
                for rank in range(2):
                    g = gradients[rank][i]
                    v[rank][i] += pushed(u[rank][i], g * min(1.0, clip / 2**0.5 / float(g.norm())))
                    sent = v[rank][i].abs().argsort(descending=True)[: math.ceil(ratio * p.numel())]
                    out[sent] += v[rank][i][sent] / 2
                    u[rank][i][sent], v[rank][i][sent] = 0.0, 0.0
            else:
                out = pushed(u[0][i], (gradients[0][i] + gradients[1][i]) / 2)
            flat = p.detach().view(-1)
            flat -= lr * (out + pushed(b[i], decay * flat))
    return torch.cat([p.detach().flatten() for p in weights])


def beside_the_card(nesterov, clip, decay):
    exchange = dgc(0.05, [0.25], stage_steps=10, nesterov=nesterov, clip=clip, selection="exact")
    return train(exchange, 40, nesterov, decay)[1]


@pytest.mark.parametrize(("nesterov", "clip", "decay"), [(False, 1e9, 0.0), (False, 0.5, 0.05), (True, 1e9, 0.05)])
def test_is_the_published_method(pool, nesterov, clip, decay):
    """Clipping, momentum, masking, dense biases, weight decay, warm-up: all of it, step by step."""
    expected = by_the_card(40, (0.25, 0.05), nesterov, clip, decay)
    for ours in pool(2).run(beside_the_card, nesterov, clip, decay):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_options_end_up_where_they_belong():
    exchange = dgc(0.01, [0.25, 0.05], 0.8, stage_steps=7, clip=1.0, nesterov=True, values=torch.float16)
    assert (exchange.memory.momentum, exchange.memory.clip, exchange.memory.nesterov) == (0.8, 1.0, True)
    assert exchange.codec.values == torch.float16
    assert exchange.controller == Schedule((0.25, 0.05), 0.01, stage_steps=7)
    assert dgc().controller is None


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"ratio": 0.0}, "ratio"), ({"ratio": 1.1}, "ratio"), ({"warmup": []}, "warmup"), ({"warmup": [0.25, 0.0]}, "warmup"),
     ({"momentum": 1.0}, "momentum"), ({"clip": -1.0}, "clip"), ({"warmup": [0.1], "stage_steps": 0}, "stage_steps"),
     ({"selection": "first"}, "selection"), ({"values": torch.int32}, "values")],
    ids=str,
)  # fmt: skip
def test_bad_options_are_named(options, argument):
    with pytest.raises(ValueError, match=argument):
        dgc(**options)


def adam():
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"optimizer must be torch.optim.SGD .*got AdamW"):
        attach(ddp, dgc(0.5), torch.optim.AdamW(ddp.parameters()))
    with pytest.raises(ValueError, match="momentum must be in one place"):
        attach(ddp, dgc(0.5, momentum=0.5), torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="optimizer must be given"):
        attach(ddp, dgc(0.5))


def test_adam_and_momentum_in_two_places_are_refused(pool):
    pool(2).run(adam)
