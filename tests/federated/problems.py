"""Small problems with known answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.federated import Client

SPEEDS = (0.2, 0.36, 0.52, 0.68, 0.84, 1.0)
IMPORTANCE = (0.1, 0.2, 0.05, 0.3, 0.15, 0.2)


class Point(nn.Module):
    """F_i = 1/2 |theta - a_i|^2, with a_i as the client's only example."""

    def __init__(self, size: int = 2):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta - x


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * output.square().sum(-1).mean()


def centres(count: int = 6, size: int = 2) -> Tensor:
    """The a_i."""
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def clients(seconds=SPEEDS, importance=IMPORTANCE, **options) -> list[Client]:
    """Clients at the centres, that declare what they need."""
    found = []
    for i, (a, t) in enumerate(zip(centres(len(seconds)), seconds, strict=True)):
        p = None if importance is None else importance[i]
        found.append(Client((a[None], torch.zeros(1)), p, t, **{"declared": t, **options}))
    return found


class Pull:
    """Work in closed form: a small step from the model that was sent towards a_i."""

    def __init__(self, rate: float, count: int = 6):
        self.rate, self.centres = rate, centres(count)

    def __call__(self, start: Tensor, client: int, job: int) -> Tensor:
        return self.rate * (self.centres[client] - start)
