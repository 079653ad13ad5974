"""Optimizers on pieces: the bits of the whole, and a refusal of those that look at whole tensors."""

from __future__ import annotations

import pytest
import torch

from weft.memory.tiers.elementwise import Elementwise, Piece

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "Adam foreach amsgrad": (torch.optim.Adam, {"foreach": True, "amsgrad": True, "weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {}),
    "NAdam": (torch.optim.NAdam, {"momentum_decay": 0.01}),
    "RAdam": (torch.optim.RAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "ASGD": (torch.optim.ASGD, {"t0": 2.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pieces_are_the_whole(name, dtype):
    kind, options = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(7, 31, generator=generator).to(dtype)
    whole = start.clone()
    optimizer = kind([whole], **options)
    rule, flat = Elementwise(kind, optimizer.defaults), start.clone().view(-1)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    cuts = (0, 64, 128, 217)
    states = [None] * 3
    for _ in range(4):
        gradient = torch.randn(7, 31, generator=generator).to(dtype)
        whole.grad = gradient.clone()
        optimizer.step()
        pieces = [
            Piece(flat[a:b], gradient.view(-1)[a:b].clone(), state)
            for a, b, state in zip(cuts, cuts[1:], states, strict=False)
        ]
        rule.update(pieces, group)
        states = [piece.state for piece in pieces]
    assert torch.equal(whole.view(-1), flat)
    for key, value in optimizer.state[whole].items():
        if isinstance(value, torch.Tensor) and value.dim():
            assert torch.equal(value.view(-1), torch.cat([state[key] for state in states])), key
    arrays = {key for key, _ in rule.arrays(group, dtype)}
    assert arrays == {k for k, v in optimizer.state[whole].items() if isinstance(v, torch.Tensor) and v.dim()}


class Trust(torch.optim.SGD):
    """Scales each tensor's update by its norm, as LARS does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] * p.norm() / p.grad.norm())


class Ledger(torch.optim.SGD):
    """Keeps something that is no number."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"])
                self.state[p]["history"] = [1, 2]


class Counting(torch.optim.SGD):
    """Counts its steps in the group, as many optimizers outside torch do, and is slower at each."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["turn"] = group.get("turn", 0) + 1
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] / group["turn"])


class CountingItself(torch.optim.SGD):
    turn = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.turn += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] / self.turn)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Counting, "Counting changes 'turn' at each step"),
        (CountingItself, "CountingItself changes 'turn' at each step"),
        (Trust, "not elementwise"),
        (Ledger, "neither a tensor"),
        (torch.optim.Adafactor, "not elementwise"),
        (torch.optim.LBFGS, "cannot be run on flat pieces"),
        (torch.optim.SparseAdam, "cannot be run on flat pieces"),
    ],
)
def test_what_is_not_elementwise_is_refused(kind, match):
    optimizer = kind([torch.zeros(2, requires_grad=True)], lr=0.1)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    with pytest.raises(ValueError, match=match):
        Elementwise(kind, optimizer.defaults).arrays(group, torch.float32)


def test_a_piece_is_no_step_to_those_who_count_steps():
    counted = []
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handle = register_optimizer_step_post_hook(lambda *_: counted.append(1))
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        rule = Elementwise(torch.optim.SGD, optimizer.defaults)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        piece = Piece(torch.ones(3), torch.ones(3))
        rule.update([piece], group)
        rule.update([piece], group)
    finally:
        handle.remove()
    assert counted == [] and torch.allclose(piece.value, torch.full((3,), 0.8))
