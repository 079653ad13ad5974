"""Cyclic garbage under a limit: collected between steps and where bytes are short, and the program's settings come back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

from weft.errors import BudgetError
from weft.memory import limit
from weft.memory.execute.garbage import NEVER, SHARE, YOUNG, Garbage


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    yield before
    after = gc.get_threshold()
    gc.set_threshold(*before)
    assert after == before


def test_thresholds_come_back_when_it_rests_ends_or_fails(thresholds):
    with limit("1 MiB") as limited:
        assert gc.get_threshold() == (YOUNG, thresholds[1], NEVER)
        limited.rest()
        assert gc.get_threshold() == thresholds
        limited.wake()
        assert gc.get_threshold() == (YOUNG, thresholds[1], NEVER)
    assert gc.get_threshold() == thresholds
    with pytest.raises(KeyError), limit("1 MiB"):
        raise KeyError
    assert gc.get_threshold() == thresholds


def test_what_the_program_sets_inside_stays(thresholds):
    with limit("1 MiB"):
        gc.set_threshold(123, 4, 5)
    assert gc.get_threshold() == (123, 4, 5)
    gc.set_threshold(0)
    with limit("1 MiB"):
        assert gc.get_threshold()[0] == 0  # switched off
    assert gc.get_threshold()[0] == 0
    gc.set_threshold(*thresholds)


def test_all_objects_are_looked_at_when_it_is_time_and_not_for_long(monkeypatch):
    collected, clock = [], [0.0]

    def collect():
        collected.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr("weft.memory.execute.garbage.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(gc, "collect", collect)
    counts = [0, 0, 0]
    monkeypatch.setattr(gc, "get_count", lambda: tuple(counts))
    garbage = Garbage()
    garbage.between_steps()  # not begun
    garbage.begin()
    try:
        garbage.between_steps()
        assert not collected  # it would not be time without us either
        counts[2] = gc.get_threshold()[1] + 1000
        for _ in range(1000):
            garbage.between_steps()
            clock[0] += 0.5
        assert len(collected) <= SHARE * clock[0] + 1.0
        assert len(collected) >= SHARE * clock[0] - 1.0
        monkeypatch.setattr(gc, "isenabled", lambda: False)
        clock[0] += 1000.0
        before = len(collected)
        garbage.between_steps()
        assert len(collected) == before
    finally:
        garbage.end()


@pytest.mark.parametrize("replay", [False, True])
def test_batches_in_cycles_do_not_use_up_the_budget(replay):
    """Each step leaves a batch in a cycle, which nobody can make again: 14 of them would be more than the budget."""
    numbers = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    with limit("2 MiB", model=model, replay=replay) as limited:
        for _ in range(14):
            batch = torch.from_numpy(numbers.random((1024, 64), dtype="float32"))
            cycle = [batch]
            cycle.append(cycle)
            model(batch).square().mean().backward()
            del batch, cycle
            limited.step()
        assert limited.steps == 14


def test_a_budget_that_is_too_small_is_still_said(thresholds):
    with pytest.raises(BudgetError, match="needs"), limit("1 MiB", replay=False):
        torch.ones(1 << 20)
