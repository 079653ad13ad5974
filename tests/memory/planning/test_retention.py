from __future__ import annotations

import random

import numpy as np
import pytest
from tests.memory.planning.traces import chain, eager, random_step

from weft.memory.planning.check import Tier, check
from weft.memory.planning.retention import Retention, Trip
from weft.memory.planning.shape import Shape


def state(plan: Retention):
    """Everything that decides what a plan is, comparable."""
    return (
        plan.stages, plan.reasons, plan.kept, plan.stays, plan.again, plan.trips, plan.loads,
        plan.base.tolist(), plan.peaks().tolist(), round(plan.seconds, 9),
    )  # fmt: skip


def copied(plan: Retention):
    import copy

    return copy.deepcopy(state(plan))


def judged(trace, plan: Retention):
    """The judge's bytes per operator and seconds must be those that the plan claims."""
    checked = check(trace, plan.schedule(), Tier(1e9))
    peaks = plan.peaks()
    assert list(checked.live) == peaks[:-1].tolist()
    assert checked.peak == peaks.max()
    assert checked.repeated_seconds == pytest.approx(plan.seconds)


def moves(plan: Retention, draw: random.Random):
    """One random legal move; False if there is none."""
    drops = [(True, v, stop) for v, _, stop in plan.droppable(0)]
    keeps = [(False, v, t) for v, t in plan.rebuilt() if plan.shape.keepable(v, plan.before(v, t), t)]
    if not drops + keeps:
        return False
    drop, v, stop = draw.choice(drops + keeps)
    (plan.drop if drop else plan.keep)(v, stop)
    return True


def trips(plan: Retention, draw: random.Random):
    """Send a random value away in a random part of a gap between two uses by the program, or take a trip back."""
    shape = plan.shape
    gaps = [
        (v, start, stop)
        for v, stops in enumerate(plan.kept)
        for stop in stops
        for start in (plan.before(v, stop),)
        if v not in plan.trips and shape.free[v] and shape.born[v] >= 0 and stop < shape.end and stop in shape.uses[v]
        if start == shape.born[v] or start in shape.uses[v]
    ]
    if plan.trips and draw.random() < 0.3:
        plan.recall(draw.choice(sorted(plan.trips)))
    elif gaps:
        v, start, stop = draw.choice(sorted(gaps))
        gone = draw.randint(start, stop - 1)
        plan.send(v, Trip(start, draw.randint(start, gone), gone, draw.randint(gone + 1, stop), stop))


@pytest.mark.parametrize(("seed", "linger"), [(s, 0.0) for s in range(60)] + [(s, 0.5) for s in range(110)])
def test_random_moves_are_priced_as_the_judge_prices_them(seed, linger):
    trace = random_step(seed, ops=20 if linger else 14, linger=linger)
    plan, draw = Retention(Shape(trace)), random.Random(seed)
    judged(trace, plan)
    for _ in range(40):
        if not moves(plan, draw):
            break
        judged(trace, plan)


@pytest.mark.parametrize("seed", range(30))
def test_an_excess_that_is_too_large_is_known_early_and_any_other_exactly(seed):
    trace = random_step(seed, ops=20)
    plan, draw = Retention(Shape(trace)), random.Random(seed)
    budget = int(0.7 * plan.peaks().max())
    for _ in range(20):
        moves(plan, draw)
        most = draw.randint(1, 2 * int(plan.copy().excess(budget).sum()) + 1)
        moves(plan, draw)
        found = plan.excess_below(most, budget)
        whole = np.maximum(plan.copy().peaks() - budget, 0)
        assert (found is None) == (whole.sum() >= most)
        assert found is None or found.tolist() == whole.tolist()


@pytest.mark.parametrize("seed", range(30))
def test_undo_takes_back_everything(seed):
    trace = random_step(seed, ops=20)
    plan, draw = Retention(Shape(trace)), random.Random(seed)
    for _ in range(8):
        moves(plan, draw)
    before, mark = copied(plan), plan.mark()
    for _ in range(8):
        moves(plan, draw)
    plan.undo(mark)
    assert state(plan) == before


@pytest.mark.parametrize("seed", range(60))
def test_trips_to_the_lower_tier_mix_with_all_other_moves(seed):
    trace = random_step(seed, ops=14)
    plan, draw = Retention(Shape(trace)), random.Random(seed)
    for _ in range(30):
        before, mark = copied(plan), plan.mark()
        (trips if draw.random() < 0.4 else moves)(plan, draw)
        judged(trace, plan)
        if draw.random() < 0.3:
            plan.undo(mark)
            assert state(plan) == before


@pytest.mark.parametrize("seed", range(30))
def test_keeping_that_entails_too_much_is_undone_whole(seed):
    trace = random_step(seed, ops=30)
    plan, draw = Retention(Shape(trace)), random.Random(seed)
    for _ in range(12):
        moves(plan, draw)
    before, mark = copied(plan), plan.mark()
    for v, stage in plan.rebuilt():
        if plan.shape.keepable(v, plan.before(v, stage), stage):
            whole = plan.keep(v, stage, most=2)
            if whole:
                judged(trace, plan)
            plan.undo(mark)
            assert state(plan) == before
    judged(trace, plan)


def test_a_new_plan_keeps_what_is_needed_and_no_longer():
    trace = chain(4)
    plan = Retention(Shape(trace))
    assert plan.seconds == 0 and plan.peaks()[:-1].tolist() == list(trace.live)
    assert [a.kind for a in plan.schedule().actions] == ["run"] * len(trace.ops)
    assert check(trace, eager(trace)).live == trace.live


def test_dropping_a_value_rebuilds_its_chain_once_and_holds_it():
    trace = chain(4)  # values: x0; four weights; x1..x4 = 5..8
    plan = Retention(Shape(trace))
    x1, x2, x3 = 5, 6, 7
    stop = plan.stages[x1][-1]
    plan.drop(x1, stop)
    assert plan.seconds == 1
    plan.drop(x2, plan.stages[x2][-1])  # rebuilt one stage earlier, from x1, which now comes back earlier and stays
    assert plan.seconds == 2
    plan.drop(x3, plan.stages[x3][-1])
    assert plan.seconds == 3
    assert len({stage for _, stage in plan.rebuilt()}) == 1
    judged(trace, plan)
    plan.drop(x1, stop)  # do not hold it: a second rebuild
    assert plan.seconds == 4
    judged(trace, plan)
    plan.keep(x1, plan.before(x1, stop))
    judged(trace, plan)
    assert np.all(plan.base >= 0)
