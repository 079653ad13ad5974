"""What a client does: against plain SGD in a loop, one client at a time."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from weft.federated import LocalSGD
from weft.federated.local import Trainer, flatten, unflatten


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()


class Recurrent(nn.Module):
    """vmap has no rule for its layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cells(x[:, :, None])[0][:, -1])


def people(*sizes: int):
    random = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 3, generator=random, dtype=torch.float64), torch.randint(2, (n,), generator=random))
        for n in sizes
    ]


@pytest.mark.parametrize(
    "work", [LocalSGD(4, 0.2, 0.9, 4), LocalSGD(3, 0.1, 0.0, None), LocalSGD(4, 0.5, 0.9, 5, 0.05)]
)
@pytest.mark.parametrize("make", [network, lambda: Recurrent().double()], ids=["network", "recurrent"])
def test_stacked_clients_do_what_each_would_do_alone(work, make):
    model, data = make(), people(7, 4, 7)
    trainer = Trainer(model, nn.functional.cross_entropy, data, work, seed=5)
    starts = flatten(model) + 0.1 * torch.randn(3, len(flatten(model)), dtype=torch.float64)
    found = trainer.changes(starts, [0, 1, 2], [0, 3, 1])
    for i, job in ((0, 0), (1, 3), (2, 1)):
        alone = unflatten(starts[i], copy.deepcopy(model))
        velocity = [torch.zeros_like(p) for p in alone.parameters()]
        for rows in trainer._order(i, job):
            gradients = torch.autograd.grad(
                nn.functional.cross_entropy(alone(data[i][0][rows]), data[i][1][rows]), list(alone.parameters())
            )
            norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
            with torch.no_grad():
                for p, v, g in zip(alone.parameters(), velocity, gradients, strict=True):
                    v.mul_(work.momentum).add_(g * min(1.0, work.clip / float(norm)))
                    p.sub_(work.lr * v)
        assert torch.allclose(found[i], flatten(alone) - starts[i], rtol=1e-9, atol=1e-12)


def test_momentum_starts_fresh_in_every_job():
    trainer = Trainer(network(), nn.functional.cross_entropy, people(6), LocalSGD(2, 0.1, 0.9, None))
    start = flatten(network())[None]
    assert torch.equal(trainer.changes(start, [0], [0]), trainer.changes(start, [0], [1]))


def test_batches_pass_over_the_data_and_depend_on_nobody_else():
    trainer = Trainer(network(), nn.functional.cross_entropy, people(6, 9), LocalSGD(5, 0.1, 0.9, 3), seed=1)
    order = trainer._order(1, 4).flatten().tolist()
    assert sorted(order[:9]) == list(range(9))
    assert trainer._order(1, 4).flatten().tolist() == order
    kinds = {tuple(trainer._order(c, j).flatten().tolist()) for c, j in itertools.product((0, 1), range(4))}
    assert len(kinds) == 8


@pytest.mark.parametrize("work", [LocalSGD(steps=0), LocalSGD(lr=0.0, batch_size=4)])
def test_no_work_changes_exactly_nothing(work):
    trainer = Trainer(network(), nn.functional.cross_entropy, people(6), work)
    start = torch.randn(1, len(flatten(network())), dtype=torch.float64) * 1e3
    assert torch.equal(trainer.changes(start, [0], [0]), torch.zeros_like(start))


def test_frozen_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    trainer = Trainer(model, nn.functional.cross_entropy, people(6), LocalSGD(2, 0.1, 0.9, 3))
    changed = unflatten(flatten(model) + trainer.changes(flatten(model)[None], [0], [0])[0], copy.deepcopy(model))
    assert torch.equal(changed[0].weight, model[0].weight)
    assert not torch.equal(changed[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LocalSGD(steps=-1), "steps must be >= 0"),
        (lambda: LocalSGD(lr=float("nan")), "lr must be >= 0"),
        (lambda: LocalSGD(momentum=1.0), "momentum must be in"),
        (lambda: LocalSGD(batch_size=0), "batch_size must be >= 1"),
        (lambda: LocalSGD(clip=0.0), "clip must be > 0"),
        (lambda: Trainer(nn.ReLU(), nn.functional.mse_loss, people(3), LocalSGD()), "must have trained parameters"),
        (lambda: Trainer(nn.BatchNorm1d(3), nn.functional.mse_loss, people(3), LocalSGD()), "no batch statistics"),
        (
            lambda: Trainer(network(), nn.functional.mse_loss, people(0), LocalSGD()),
            "client 0 must have as many inputs",
        ),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ValueError, match=says):
        make()
