"""Warm-up: the settings at every step, for every tensor, and the mistakes it refuses."""

from __future__ import annotations

import pytest

from weft.comm.codec import Spec
from weft.comm.controllers.schedule import Schedule

SPECS = {name: Spec(name, (4, 4)) for name in ("a", "b")}


def test_settings_step_by_step():
    schedule = Schedule([0.25, 0.0625], 0.001, stage_steps=3)
    found = [schedule.setting(step) for step in range(9)]
    assert found == [0.25] * 3 + [0.0625] * 3 + [0.001] * 3
    assert schedule.setting(10**9) == 0.001


def test_decides_on_every_change_alike_for_all_tensors_without_a_broadcast():
    schedule = Schedule([0.25, 0.0625], 0.001, stage_steps=3)
    assert schedule.agreed
    changes = [step for step in range(1, 12) if schedule.setting(step) != schedule.setting(step - 1)]
    assert all(step % schedule.every == 0 for step in changes)
    for step in (0, 3, 6):
        assert schedule.decide(step, SPECS) == dict.fromkeys(SPECS, schedule.setting(step))


@pytest.mark.parametrize("warmup", [[], (), "0.25", 0.25])
def test_an_empty_list_is_refused(warmup):
    with pytest.raises(ValueError, match="warmup must be a list"):
        Schedule(warmup, 0.001)


def test_bad_stage_steps():
    with pytest.raises(ValueError, match="stage_steps must be >= 1"):
        Schedule([0.25], 0.001, stage_steps=0)
