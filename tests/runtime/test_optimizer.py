"""The user's optimizer over pieces: which implementation of torch it gets, and that its updates are the same."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import weft
from weft.runtime.optimizer import ELEMENTWISE, recipe


def pieces_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: nn.Parameter(p.detach().to(dtype, copy=True)) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=1e-2),
        partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
        partial(torch.optim.RMSprop, lr=1e-2),
    ],
    ids=lambda o: o.func.__name__,
)
def test_updates_equal_those_of_the_users_own_words(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    pieces, plain = pieces_of(model, torch.float64), list(pieces_of(model, torch.float64).values())
    ours, theirs = recipe(optimizer, model).build(pieces), optimizer(plain)
    for _ in range(5):
        for mine, its in zip(pieces.values(), plain, strict=True):
            its.grad = torch.randn_like(its)
            mine.grad = its.grad.clone()
        ours.step(), theirs.step()
    for mine, its in zip(pieces.values(), plain, strict=True):
        assert torch.allclose(mine, its, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
@pytest.mark.parametrize("made", [False, True])
def test_every_elementwise_optimizer_is_taken_until_it_has_stepped(name, made):
    """Some have state from the start."""
    kind, model = getattr(torch.optim, name), nn.Linear(3, 2)
    given = kind(model.parameters()) if made else kind
    assert type(recipe(given, model).build(pieces_of(model))) is kind
    if made:
        model(torch.ones(1, 3)).sum().backward()
        given.step()
        if given.state:  # SGD without momentum has none
            with pytest.raises(ValueError, match="it has state from earlier steps"):
                recipe(given, model)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "fused"),
    [
        (torch.optim.AdamW, torch.float32, True),
        (partial(torch.optim.AdamW, foreach=True), torch.float32, None),
        (partial(torch.optim.AdamW, fused=False), torch.float32, False),
        (partial(torch.optim.Adam, differentiable=True), torch.float32, None),
        (torch.optim.AdamW, torch.bfloat16, None),
        (torch.optim.NAdam, torch.float32, None),
    ],
)
def test_fused_where_the_user_leaves_it_open(optimizer, dtype, fused):
    model = nn.Linear(4, 3)
    built = recipe(optimizer, model).build(pieces_of(model, dtype))
    assert built.param_groups[0].get("fused") is fused


def test_pieces_that_do_not_lie_in_order_are_not_fused():
    model = nn.Linear(4, 4, bias=False)
    built = recipe(torch.optim.AdamW, model).build({"weight": nn.Parameter(torch.randn(4, 4).t())})
    assert built.param_groups[0]["fused"] is None


class Spectral(nn.Module):
    """A parameter that is complex: torch has no fused update for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 16), nn.Parameter(torch.randn(9, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.linear(x)) * self.scale, n=16)


@pytest.mark.parametrize("kind", ["complex", "half"])
def test_a_run_updates_as_the_user_would_where_fused_is_left_alone(kind):
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "complex" else torch.bfloat16
    model = (
        Spectral() if kind == "complex" else nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).bfloat16()
    )
    plain = copy.deepcopy(model)
    batch = torch.randn(8, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype)
    loss = nn.functional.mse_loss
    cluster = weft.Cluster.local(processes=1)
    with weft.run(weft.plan(model, batch, loss=loss, cluster=cluster), model, torch.optim.AdamW) as trainer:
        for _ in range(5):
            trainer.step(batch)
        trainer.sync()
    optimizer = torch.optim.AdamW(plain.parameters())
    for _ in range(5):
        loss(plain(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
