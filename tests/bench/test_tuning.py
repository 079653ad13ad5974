"""What the benches' baselines and their tuning rest on: LoRA FedAvg keeps to its bytes, a rate is tuned by the final loss."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from weft.bench import one_byte, unlike_clients
from weft.comm.waits import All


def test_low_rank_factors_change_nothing_at_first_and_leave_the_layer_alone():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    adapted = one_byte.Adapted(layer, 2, torch.Generator().manual_seed(0))
    assert torch.equal(adapted(x), layer(x))
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == ["a", "b"]


def test_lora_fedavg_learns_and_sends_no_more_than_it_may(monkeypatch):
    monkeypatch.setattr(one_byte, "STEPS", 12)
    torch.manual_seed(0)
    x, y = torch.randn(200, 64), torch.arange(200) % 10
    data = one_byte.Digits(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), x, y, x, y)
    found = one_byte.lora_digits(data, 2, 2000, 0)
    assert 0 < found["sent_bytes"] <= 2000
    assert found["sent_bytes"] == found["averages"] * 4 * found["rank"] * (64 + 64 + 64 + 10)
    assert found["loss"] < data.loss(data.model)


def test_a_rate_is_tuned_by_the_median_final_loss_of_all_draws(monkeypatch):
    best = unlike_clients.GRID[-2]  # wins on two of three draws, is third on the first

    def train(draw, scheme, rate, seconds, tuning):
        assert tuning and seconds == unlike_clients.BUDGET
        order = sorted(unlike_clients.GRID, key=lambda r: (r == best) if draw == 0 else (r != best))
        return SimpleNamespace(loss=float("inf") if rate == unlike_clients.GRID[-1] else float(order.index(rate)))

    monkeypatch.setattr(unlike_clients, "train", train)
    monkeypatch.setattr(unlike_clients, "FINALISTS", len(unlike_clients.GRID))
    assert unlike_clients.tune([0, 1, 2], unlike_clients.Scheme("", All(), "equal")) == best
