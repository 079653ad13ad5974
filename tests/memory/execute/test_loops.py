"""Loops as people write them: what outlives a step, batches of many sizes, tensors that are read without an operator."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weft.memory import native
from weft.memory.execute.limit import limit
from weft.memory.execute.replay import Replay
from weft.memory.meters import meter

KIB = 1024


def loop(share, body, steps=8, seed=0):
    """Losses, parameters, and the meter's peak of a loop; within a share of the eager peak, which comes first then."""
    if share is not None:
        eager, _, peak, _ = loop(None, body, steps, seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(32, 64), *[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(5)]
    )
    opt, losses = torch.optim.AdamW(net.parameters()), []
    budget = 2**30 if share is None else int(share * peak)
    kinds = []
    with meter(net, opt) as seen:
        with limit(budget, model=net, replay=share is not None) as limited:
            for number in range(steps):
                losses.append(body(net, opt, number).detach())
                kinds.append(type(limited._executor))
            most = seen.peak
    found = [*losses, *net.parameters(), torch.get_rng_state()]
    if share is not None:
        assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
        assert most <= budget or native.problem(), f"{most - budget:,} bytes too many"
    return found, kinds, most, limited


def step(net, opt, x):
    loss = net(x).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


@pytest.mark.parametrize("share", [0.9, 0.7])
def test_what_a_step_leaves_behind_counts_in_the_next(share):
    left = {}

    def body(net, opt, number):
        hidden = net(torch.randn(256, 32))
        opt.zero_grad()
        loss = hidden.square().mean()
        loss.backward()
        opt.step()
        left["outputs"] = [hidden, hidden * 2]  # until they are replaced, after the next forward pass
        return loss

    _, kinds, *_ = loop(share, body)
    assert kinds[-1] is Replay


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_what_hooks_keep_is_held_no_longer_than_they_keep_it(share):
    """It is read at the beginning of the next step, and replaced in its course."""
    kept = {}

    def body(net, opt, number):
        if not number:
            kept.clear()
            for n, layer in enumerate(net):
                layer.register_forward_hook(lambda module, given, made, n=n: kept.update({n: made.detach()}))
        loss = step(net, opt, torch.randn(256, 32))
        return loss + sum(value.abs().mean() for value in kept.values())

    _, kinds, *_ = loop(share, body, steps=12)
    assert kinds[-1] is Replay


def test_the_history_of_lbfgs_is_not_held_beyond_the_budget():
    """The step lets go of the oldest, which others were made from that the plan drops and the optimizer still has."""

    def run(budget):
        torch.manual_seed(0)
        net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(24, 24), nn.Tanh())])
        opt = torch.optim.LBFGS(net.parameters(), 0.5, 6, history_size=5, line_search_fn="strong_wolfe")
        x, y = torch.randn(256, 24), torch.randn(256, 24)

        def closure():
            opt.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            return loss

        with meter(net) as seen:
            seen.count((x, y), "input")
            with limit(budget, model=net) if budget else nullcontext() as limited:
                if limited is not None:
                    limited.count(x, y)
                losses = [opt.step(closure).item() for _ in range(5)]
                most = seen.peak
        return [torch.tensor(losses), *net.parameters()], most

    eager, peak = run(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, most = run(budget := int(0.95 * peak))
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
    assert most <= budget or native.problem()


@pytest.mark.parametrize(("when", "logged"), [(6, False), (12, True)])  # while everything is remembered, and later
def test_copies_of_the_model_between_replayed_steps_count(when, logged):
    copies = []

    def body(net, opt, number):
        if not number:
            copies.clear()
        loss = step(net, opt, torch.randn(256, 32))
        if logged:
            loss.item()
        if number in (when, when + 2):
            copies.append([parameter.detach().clone() for parameter in net.parameters()])
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(0.7, body, steps=when + 6)


def test_micro_batches_from_outside_go_while_the_step_is_written_down():
    def run(budget):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16))
        opt, draw = torch.optim.SGD(net.parameters(), 0.01), np.random.default_rng(0)
        losses, live = [], []
        with meter(net, opt) as seen:
            with limit(budget, model=net) if budget else nullcontext() as limited:
                for _ in range(2):
                    opt.zero_grad()
                    for _ in range(8):
                        x = torch.from_numpy(draw.standard_normal((512, 64), np.float32))
                        seen.count(x, "input")
                        if limited is not None:
                            limited.count(x)
                        loss = net(x).square().mean()
                        loss.backward()
                        losses.append(loss.item())
                        live.append(seen.live)  # read: then a meter notices that what numpy made has gone
                    opt.step()
                most = seen.peak
        assert len(set(live[:8])) == 1
        return [torch.tensor(losses), *net.parameters()], most

    eager, peak = run(None)
    found, most = run(budget := int(1.15 * peak))
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
    assert most <= budget or native.problem()


def test_what_a_loop_collects_ends_a_plan_that_has_no_room_for_it():
    collected = []

    def body(net, opt, number):
        if not number:
            collected.clear()
        loss = step(net, opt, torch.randn(256, 32))
        collected.append(torch.randn(64, 64))
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, limited = loop(0.9, body, steps=14)
    assert any("carried" in note for note in limited.notes)


def test_short_batches_and_longer_ones_after_them():
    def body(net, opt, number):
        return step(net, opt, torch.randn(80 if number < 4 or number % 3 == 2 else 256, 32))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, kinds, *_ = loop(0.7, body, steps=14)
    assert kinds[-1] is Replay


def test_evaluation_between_steps_is_kept_to_the_budget_too():
    def body(net, opt, number):
        loss = step(net, opt, torch.randn(128, 32))
        if number > 4:
            with torch.no_grad():
                loss = loss + net((torch.rand(400, 32) - 0.5) * 2).mean()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(0.9, body)


def test_packed_sequences_are_read_without_an_operator():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.out = nn.Embedding(30, 16), nn.GRU(16, 24, batch_first=True), nn.Linear(24, 30)

        def forward(self, x):
            lengths = (x != 0).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
            hidden, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return F.cross_entropy(self.out(hidden).flatten(0, 1), x[:, : hidden.shape[1]].flatten(), ignore_index=0)

    x = torch.randint(1, 30, (8, 12))
    for row in range(8):
        x[row, 4 + row :] = 0

    def run(budget):
        torch.manual_seed(0)
        net = Tagger()
        opt, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
        with limit(budget, model=net) as limited:
            for _ in range(5):
                opt.zero_grad()
                loss = net(x)
                loss.backward()
                opt.step()
                losses.append(loss.detach())
            kind = type(limited._executor)
        return [*losses, *net.parameters()], kind

    eager, _ = run(2**30)
    found, kind = run(150 * KIB)
    assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True)) and kind is Replay
    assert torch._VF.gru.__name__ == "gru" and "gru" not in vars(torch._VF)


def test_sparse_gradients_are_finished_like_others():
    def run(budget):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Embedding(50, 16, sparse=True), nn.Flatten(), nn.Linear(160, 32), nn.Tanh(), nn.Linear(32, 4)
        )
        opts = [torch.optim.SparseAdam(list(net[0].parameters())), torch.optim.Adam(net[2:].parameters())]
        x = torch.randint(0, 50, (64, 10))
        with limit(budget, model=net, replay=False):
            for _ in range(3):
                for opt in opts:
                    opt.zero_grad()
                net(x).square().mean().backward()
                for opt in opts:
                    opt.step()
        return list(net.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(2**30), run(400 * KIB), strict=True))


def test_torchs_default_dtype_is_part_of_a_call():
    def run(budget):
        with limit(budget, replay=False) as limited:
            torch.set_default_dtype(torch.float64)
            try:
                kept = [torch.arange(64 * 64) * (0.1 + n) for n in range(3)]
            finally:
                torch.set_default_dtype(torch.float32)
            rest = [torch.ones(64, 64) * n for n in range(4)]
            dropped = limited._executor.core.evictions
            del rest
        return kept, dropped

    (eager, _), (found, dropped) = run(2**30), run(140 * KIB)
    assert dropped
    assert all(a.dtype is b.dtype is torch.float64 and torch.equal(a, b) for a, b in zip(eager, found, strict=True))


class Images(torch.utils.data.Dataset):
    """Made by operators that need more than the budget."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((256, 4096), float(index)).sin().mean(1).repeat(64, 1)


def test_workers_of_a_loader_that_are_forked_are_not_limited():
    def losses(within):
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1)), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with within:
            for _ in range(2):
                for batch in torch.utils.data.DataLoader(
                    Images(), 2, num_workers=2, multiprocessing_context="fork", timeout=60
                ):
                    loss = model(batch).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    found.append(loss.item())
        return found

    assert losses(limit("2 MiB")) == losses(nullcontext())
