"""What the tests of several machines share: a small model, the shards of its members, a way to tune it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.comm.zeroth import SharedSeed

SAMPLES = 3


def network(seed: int = 1) -> nn.Module:
    """The same parameters for the same seed, in any process or thread."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def shard(member: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """A member's minibatches of a step, always the same ones."""
    generator = torch.Generator().manual_seed(1000 * step + member)
    x = torch.randn(SAMPLES, 16, 6, generator=generator)
    return [(xs, (xs[:, :3] + 0.3 * xs[:, 3:]).argmax(1)) for xs in x]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def tuned(**options) -> SharedSeed:
    return SharedSeed(network(), loss_fn, **{"lr": 0.05, "samples": SAMPLES, **options})


def values(ours: SharedSeed) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in ours.model.parameters()]
