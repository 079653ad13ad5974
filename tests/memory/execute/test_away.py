"""A limit with a lower tier: what would have to be made again waits there instead, and what cannot be made again may wait too."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import torch
from tests.memory.execute.loops import assert_same, peak_of, train
from tests.memory.models import make
from torch import Tensor

from weft.cluster import Tier
from weft.errors import BudgetError, DiskFull
from weft.memory.execute.limit import limit
from weft.memory.planning.choose import plan
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.tracing.tracer import trace

DISK = Tier(bandwidth=1e9, latency=1e-5, name="disk")


@pytest.mark.parametrize("replay", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_tier_reaches_budgets_that_recomputation_cannot(replay):
    budget, eager = int(0.46 * peak_of("halting")), train(make("halting"))
    made = make("halting")
    with pytest.raises(BudgetError):
        train(made, within=limit(budget, model=made.model, replay=replay))
    made = make("halting")
    limited = limit(budget, model=made.model, replay=replay, tier=DISK)
    assert_same(eager, train(made, within=limited))
    assert not limited.notes
    if replay:
        (plan,) = limited._succession.cycle.plans
        assert plan.tier == DISK and plan.checked.saved_bytes and plan.peak <= budget


LIBRARY = torch.library.Library("weft_test_away", "FRAGMENT")
LIBRARY.define("once(Tensor x, Tensor(a!) counter) -> Tensor")


def once(x: Tensor, counter: Tensor) -> Tensor:
    counter.add_(1)
    return x * 2


LIBRARY.impl("once", once, "CompositeExplicitAutograd")


def chain(x: Tensor, counter: Tensor, length: int = 6) -> list[Tensor]:
    found = []
    for _ in range(length):
        x = torch.ops.weft_test_away.once(x, counter)  # writes what has no recipe, and so has none itself
        found.append(x)
    return found


@pytest.mark.parametrize("tier", [None, DISK, Tier(1e9, capacity=8192, name="disk")])
def test_what_cannot_be_made_again_goes_only_to_a_tier(tier):
    x, counter = torch.arange(1024.0), torch.zeros(1)
    within = limit(5 * 4096, tier=tier, replay=False)
    if tier is not DISK:  # none, or one that holds two of them: seven are alive
        with pytest.raises(BudgetError), within:
            chain(x, counter)
        return
    with within:
        found = chain(x, counter)
        sums = [float(each.sum()) for each in found]
    assert counter == 6 and sums == [2.0**n * float(torch.arange(1024.0).sum()) for n in range(1, 7)]
    assert all(torch.equal(each, torch.arange(1024.0) * 2**n) for n, each in enumerate(found, 1))


def test_a_step_that_is_not_the_planned_one_uses_the_tier_of_the_plan(tmp_path):
    """The plan is of another batch, so that all steps run online; without its tier they would not fit."""
    budget, made = int(0.46 * peak_of("halting")), make("halting")
    planned = plan(
        trace(made.model, made.batch, made.loss, torch.optim.AdamW), budget, tier=replace(DISK, folder=str(tmp_path))
    )
    assert MemoryPlan.from_dict(planned.to_dict()).tier == planned.tier
    eager = train(make("halting"))
    limited = limit(planned, model=made.model, replay=False)
    assert_same(eager, train(made, within=limited))
    with pytest.raises(BudgetError):
        train(made, within=limit(replace(planned, tier=None), model=made.model, replay=False))
    missing = replace(planned, tier=replace(DISK, folder=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"cannot be offloaded to .*none: No such file"):
        train(made, within=limit(missing, model=made.model, replay=False))


def test_a_full_disk_is_named_and_takes_nothing(monkeypatch):
    made = make("halting")
    before = [p.detach().clone() for p in made.model.parameters()]

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(DiskFull, match="offloading activations"):
        train(made, within=limit(int(0.46 * peak_of("halting")), model=made.model, tier=DISK))
    for now, then in zip(made.model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_what_is_no_tier():
    for _ in range(2):  # and the first leaves no limit behind
        with (
            pytest.raises(ValueError, match=r"tier must be a weft\.memory\.Tier, got 'disk'"),
            limit("1MiB", tier="disk"),
        ):
            pass
