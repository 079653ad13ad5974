"""Training loops that are run with and without a limit, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from tests.memory.models import Made, make, snapshot
from torch import Tensor

from weft.graph import call
from weft.memory.execute.limit import Limit, limit
from weft.memory.execute.replay import Replay


class Run(NamedTuple):
    """Losses of every step, everything of the model at the end, and per step whether it was replayed."""

    losses: list[Tensor]
    model: dict[str, Tensor]
    replayed: list[bool]


def train(
    made: Made,
    steps: int = 5,
    optimizer: Callable[..., Any] = torch.optim.AdamW,
    within: AbstractContextManager[Any] | None = None,
    seed: int = 1,
) -> Run:
    """A loop as users write it; gradients are compared too, since the last step leaves them."""
    torch.manual_seed(seed)
    opt = optimizer(made.model.parameters(), lr=1e-3)
    losses, replayed = [], []
    with within or nullcontext() as manager:
        for _ in range(steps):
            opt.zero_grad()
            loss = call(made.model, made.batch, made.loss)
            loss.backward()
            opt.step()
            losses.append(loss.detach().clone())
            if isinstance(manager, Limit):
                replayed.append(isinstance(manager._executor, Replay))
    return Run(losses, snapshot(made.model), replayed)


def assert_same(one: Run, other: Run) -> None:
    """Bit for bit."""
    assert len(one.losses) == len(other.losses)
    assert all(torch.equal(a, b) for a, b in zip(one.losses, other.losses, strict=True)), "losses differ"
    assert one.model.keys() == other.model.keys()
    different = [name for name in one.model if not torch.equal(one.model[name], other.model[name])]
    assert not different, different


def kept_and_peak_of(name: str) -> tuple[int, int]:
    """Bytes between two steps, and the most that a step takes when nothing is dropped or written over, as in eager."""
    made = make(name)
    manager = limit("1 GiB", model=made.model, replay=False)
    with mock.patch("weft.memory.execute.online.over_its_gradient", lambda *call: None), manager:
        opt = torch.optim.AdamW(made.model.parameters())
        for _ in range(2):
            opt.zero_grad()
            call(made.model, made.batch, made.loss).backward()
            opt.step()
        opt.zero_grad()
        arena = manager._executor.core.arena
        return arena.used, arena.most


def peak_of(name: str) -> int:
    """The second of `kept_and_peak_of`."""
    return kept_and_peak_of(name)[1]
