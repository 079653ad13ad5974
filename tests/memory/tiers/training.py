"""Small trainings for the tests of tiers: models, fixed batches, and the same steps with everything in memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from weft.memory.tiers.tiered import Tiered
from weft.nn import GPT, GPTOptions

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
SMALL = {"keep_below": 1, "floor": 1, "chunk": 20_000}  # everything moves, in several chunks


def gpt(dropout: float = 0.1) -> GPT:
    """Tied weights, dropout, sizes that are multiples of nothing."""
    torch.manual_seed(0)
    return GPT(GPTOptions(vocabulary=61, context=16, layers=2, heads=2, width=38, dropout=dropout, tied=True))


def tokens(turn: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + turn)
    x = torch.randint(61, (2, 16), generator=generator)
    return x, x.roll(1, 1)


class Normed(nn.Module):
    """Convolution and BatchNorm: buffers, 4-d weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Branching(nn.Module):
    """Its way depends on the data: some of the experts run, in an order that the data gives."""

    def __init__(self, experts: int = 5, width: int = 24):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.out = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, way: list[int]) -> torch.Tensor:
        for choice in way:
            x = torch.tanh(self.experts[choice](x))
        return self.out(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, turns: range, rank: int = 0) -> list[float]:
    """Steps of `gpt` in memory."""
    losses = []
    for turn in turns:
        torch.manual_seed(turn)
        loss = model(*tokens(turn, rank))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def train_tiered(model: nn.Module, tiered: Tiered, turns: range, rank: int = 0) -> list[float]:
    """The same on tiers."""
    losses = []
    for turn in turns:
        torch.manual_seed(turn)
        loss = model(*tokens(turn, rank))
        losses.append(loss.item())
        loss.backward()
        tiered.step()
    return losses


def in_memory(steps: int, optimizer=ADAMW) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = gpt()
    losses = train(model, optimizer(model.parameters()), range(steps))
    return losses, model.state_dict()


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
