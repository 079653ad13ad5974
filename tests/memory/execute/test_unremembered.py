"""Tensors that are no plain bytes, and threads that read what is not there: right, or an error that says what to do."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from weft.memory import native
from weft.memory.execute.limit import limit
from weft.memory.meters import meter

KIB = 1024


class Nothing(TorchDispatchMode):
    """torch derives some functions by other formulas where a dispatch mode is active, whatever that does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replay", [False, True])
def test_forward_mode_derivatives_know_zeros_that_have_no_bytes(replay):
    """Weights have no tangent: for it stands a tensor that is known to be zero."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(4)])
    x, direction = torch.randn(64, 32), torch.randn(64, 32)

    def derivative():
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(x, direction)
            values = [dual := layer(dual) for layer in net]
            return [part for value in values for part in forward_ad.unpack_dual(value)]

    with Nothing():
        expected = derivative()
    with limit(112 * KIB, model=net, replay=replay) as limited:
        for _ in range(1 + 4 * replay):
            found = []
            found = derivative()
            assert replay or limited._executor.core.evictions
            limited.step()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("replay", [False, True])
def test_evaluation_of_an_encoder_runs_on_nested_tensors(replay):
    """`nn.TransformerEncoder` turns a padded batch into a nested tensor where no gradient is wanted."""
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    x, mask = torch.randn(8, 12, 32), torch.zeros(8, 12, dtype=torch.bool)
    mask[:, 9:] = True
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def run(context):
        net.load_state_dict(before)
        found = []
        with context:
            for _ in range(6):
                net.train()
                opt.zero_grad()
                loss = net(x, src_key_padding_mask=mask).square().mean()
                loss.backward()
                opt.step()
                net.eval()
                with torch.no_grad():
                    found += [loss.detach().clone(), net(x, src_key_padding_mask=mask).clone()]
        return found

    expected = run(limit("1 GiB", model=net, replay=False))
    found = run(limit(500 * KIB, model=net, replay=replay))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_quantized_tensors_pass_by():
    x = torch.randn(64, 64)
    expected = torch.quantize_per_tensor(x * 2, 0.1, 10, torch.quint8).dequantize()
    with limit(100 * KIB, replay=False) as limited:
        core = limited._executor.core
        q = torch.quantize_per_tensor(x * 2, 0.1, 10, torch.quint8)
        assert core.evict(limited._executor.hold_of(q).block)
        back = q.dequantize()  # made again, it has its scale and zero point
        assert torch.equal(back, expected)
        core.evict(limited._executor.hold_of(back).block)
        assert torch.equal(back, expected)


def test_sparse_gradients_count():
    if native.problem():
        pytest.skip(native.problem())
    table = nn.Embedding(500, 64, sparse=True)
    tokens = torch.randint(500, (300,))
    with limit("1 MiB", model=table, replay=False) as limited:
        with meter(table) as seen:
            F.silu(table(tokens)).sum().backward()
        gradient = table.weight.grad
        summed = gradient.coalesce()  # other bytes
        there = sum(g._values().nbytes + g._indices().nbytes for g in (gradient, summed))
        assert limited._executor.core.arena.used >= table.weight.nbytes + there
        assert seen.live > gradient._values().nbytes


def test_a_thread_that_reads_what_is_not_there_is_told_so():
    if native.problem():
        pytest.skip(native.problem())
    said = []

    def read(tensor):
        for work in (lambda: tensor + 1, lambda: tensor.sum().item(), lambda: tensor.mul_(2), lambda: tensor @ tensor):
            try:
                work()
            except RuntimeError as error:
                said.append(str(error))

    with limit("1 MiB", replay=False) as limited:
        x = torch.ones(32, 32).exp()
        limited._executor.core.evict(limited._executor.hold_of(x).block)
        thread = threading.Thread(target=read, args=(x,))
        thread.start()
        thread.join()
        assert len(said) == 4 and all("weft.memory.limit has dropped this tensor" in text for text in said)
        assert torch.equal(x, torch.ones(32, 32).exp())  # this thread gets it back
        thread = threading.Thread(target=read, args=(x,))
        thread.start()
        thread.join()
        assert len(said) == 4
