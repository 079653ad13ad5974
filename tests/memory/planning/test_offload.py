from __future__ import annotations

import random

import pytest
from tests.memory.planning.traces import Builder, random_step, transformer

from weft.memory.planning.check import Tier, check
from weft.memory.planning.improve import Gaps, descend, fill
from weft.memory.planning.offload import Offload, _Link
from weft.memory.planning.retention import Retention
from weft.memory.planning.shape import Shape


def one_long_gap(middle: int = 5):
    """A value of 1000 bytes that is used at the two ends of a step and covers its peak."""
    build = Builder()
    x = build.before(0, "input")
    a = build.op((x,), (1000,), seconds=1)[0]
    for _ in range(middle):
        build.op((x,), (10,), seconds=1)
    build.op((x,), (500,), seconds=1)
    for _ in range(middle):
        build.op((x,), (10,), seconds=1)
    build.op((a,), (1,), seconds=1)
    return build.trace()


def test_a_copy_that_has_time_costs_nothing():
    trace, tier = one_long_gap(), Tier(bandwidth=500.0)  # 2 s each way
    plan = Retention(Shape(trace))
    Offload(plan, tier, 1).unload(1100)
    checked = check(trace, plan.schedule(), tier)
    assert checked.waited_seconds == 0 and checked.seconds == trace.seconds and checked.repeated == 0
    assert checked.saved_bytes == checked.loaded_bytes == 1000
    assert checked.live[6] == 500 and checked.live[1] == checked.live[11] == 1010  # copied there and back meanwhile


def test_a_copy_without_time_is_made_only_when_it_is_cheaper_than_rebuilding():
    trace = one_long_gap(middle=1)
    for bandwidth, sent in ((100.0, False), (10_000.0, True)):  # 10 s or 0.1 s each way, against 1 s of rebuilding
        plan, tier = Retention(Shape(trace)), Tier(bandwidth)
        assert descend(plan, Gaps(plan, 1), 1100) and plan.seconds == 1
        Offload(plan, tier, 1).exchange(1100)
        checked = check(trace, plan.schedule(), tier)
        assert (checked.saved_bytes > 0) == sent and checked.peak <= 1100
        assert checked.seconds == pytest.approx(trace.seconds + (0 if sent else 1), abs=0.21)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 1.0])
def test_what_a_copy_costs_the_device_is_paid_though_it_has_time(overlap):
    trace, tier = one_long_gap(), Tier(bandwidth=500.0, overlap=overlap)  # 2 s each way
    plan = Retention(Shape(trace))
    trips = Offload(plan, tier, 1)
    trips.unload(1100)
    checked = check(trace, plan.schedule(), tier)
    assert checked.saved_bytes == 1000 and checked.waited_seconds == pytest.approx(4 * (1 - overlap))
    assert trips.seconds() == pytest.approx(checked.waited_seconds) == pytest.approx(sum(checked.waits))


@pytest.mark.parametrize(("overlap", "sent"), [(1.0, True), (0.2, False)])
def test_a_copy_that_the_device_makes_itself_is_dearer_than_rebuilding(overlap, sent):
    trace, tier = one_long_gap(), Tier(bandwidth=1000.0, overlap=overlap)  # 1 s each way, against 1 s of rebuilding
    plan = Retention(Shape(trace))
    assert descend(plan, Gaps(plan, 1), 1100) and plan.seconds == 1
    Offload(plan, tier, 1).exchange(1100)
    assert (check(trace, plan.schedule(), tier).saved_bytes > 0) == sent


def test_capacity_of_the_tier_is_kept():
    trace = transformer(4)
    tier = Tier(bandwidth=1e9, capacity=500)
    plan = Retention(Shape(trace))
    Offload(plan, tier, 1).unload(int(0.4 * trace.peak))
    assert 0 < check(trace, plan.schedule(), tier).held_bytes <= 500


@pytest.mark.parametrize("share", [0.7, 0.5, 0.4])
@pytest.mark.parametrize("bandwidth", [4.0, 20.0, 1e3])
def test_copies_and_repetitions_together_beat_repetitions_alone(share, bandwidth):
    trace, tier = transformer(4), Tier(bandwidth)
    budget = int(share * trace.peak)
    alone = Retention(Shape(trace))
    assert descend(alone, Gaps(alone, 1), budget, patience=12)
    fill(alone, budget)
    before = check(trace, alone.schedule()).seconds
    trips = Offload(alone, tier, 1)
    trips.exchange(budget)
    fill(alone, budget)
    trips.recall(budget)
    after = check(trace, alone.schedule(), tier)
    assert after.peak <= budget and after.seconds <= before
    assert after.seconds <= trace.seconds + trips.seconds() + 1e-9  # no wait that was not reckoned with


def test_nothing_is_sent_that_need_not_be():
    trace, tier = transformer(3), Tier(1e3)
    plan = Retention(Shape(trace))
    trips = Offload(plan, tier, 1)
    trips.unload(int(0.5 * trace.peak))
    assert plan.trips
    trips.recall(trace.peak)
    assert not plan.trips and plan.seconds == 0
    assert check(trace, plan.schedule(), tier).live == check(trace, Retention(Shape(trace)).schedule()).live


@pytest.mark.parametrize("seed", range(30))
def test_random_steps_stay_valid_whatever_is_sent(seed):
    trace = random_step(seed, ops=16)
    tier, draw = Tier(bandwidth=64.0), random.Random(seed)
    plan = Retention(Shape(trace))
    for _ in range(4):
        budget = int(draw.uniform(0.5, 0.9) * trace.peak)
        trips = Offload(plan, tier, 1)
        draw.choice((trips.unload, trips.press, trips.exchange, trips.recall))(budget)
        descend(plan, Gaps(plan, 1), budget, work=plan.work + 5_000)
        checked = check(trace, plan.schedule(), tier)
        assert list(checked.live) == plan.peaks()[:-1].tolist()


def test_link_hands_out_disjoint_stretches():
    draw, link = random.Random(0), _Link()
    for _ in range(200):
        seconds, moment = draw.uniform(0.1, 2), draw.uniform(0, 60)
        if draw.random() < 0.5:
            begin = link.first(moment, seconds)
            assert begin >= moment
        else:
            begin = link.last(moment, seconds)
            if begin is None:
                continue
            assert 0 <= begin <= moment - seconds + 1e-12
        assert all(end <= begin + 1e-9 or start >= begin + seconds - 1e-9 for start, end in link.taken)
        link.book((begin, begin + seconds))
    assert link.first(0.0, 1e9) >= max(end for _, end in link.taken) - 1e-9
