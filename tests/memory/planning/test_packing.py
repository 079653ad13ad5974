from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from tests.memory.planning.test_retention import moves
from tests.memory.planning.traces import chain, eager, random_step

from weft.memory.planning.check import check
from weft.memory.planning.packing import Boxes, boxes, first_fit, inside, load, outside_bytes, pack, place
from weft.memory.planning.ranges import most_between
from weft.memory.planning.retention import Retention
from weft.memory.planning.shape import Shape


def some_boxes(seed: int, count: int, times: int = 12) -> Boxes:
    draw = random.Random(seed)
    spans = [sorted((draw.randrange(times), draw.randrange(times))) for _ in range(count)]
    sizes = [64 * draw.randint(1, 5) for _ in range(count)]
    return Boxes(np.array(sizes), np.array([a for a, _ in spans]), np.array([b for _, b in spans]), ())


def disjoint(found: Boxes, addresses) -> bool:
    spans = list(zip(found.first, found.last, addresses, addresses + found.nbytes, strict=True))
    return not any(
        a[0] <= b[1] and b[0] <= a[1] and a[2] < b[3] and b[2] < a[3] for a, b in itertools.combinations(spans, 2)
    )


def lowest_free(found: Boxes, order):
    """First fit by trying every address."""
    addresses: dict[int, int] = {}
    for box in order:
        for at in itertools.count(0, 64):
            if all(
                found.first[other] > found.last[box]
                or found.last[other] < found.first[box]
                or at + found.nbytes[box] <= there
                or at >= there + found.nbytes[other]
                for other, there in addresses.items()
            ):
                addresses[box] = at
                break
    return [addresses[box] for box in range(len(order))]


@pytest.mark.parametrize("seed", range(40))
def test_first_fit_takes_the_lowest_free_address(seed):
    found = some_boxes(seed, 10)
    order = random.Random(seed).sample(range(10), 10)
    addresses = first_fit(found, order)
    assert addresses.tolist() == lowest_free(found, order)
    top = int((addresses + found.nbytes).max())
    assert first_fit(found, order, top) is not None and first_fit(found, order, top - 1) is None


def test_most_of_ranges_empty_ones_included():
    levels = np.random.default_rng(0).integers(1, 100, 9)
    first, end = np.array([(a, b) for a in range(10) for b in range(10)]).T
    expected = [max(levels[a:b], default=0) for a, b in zip(first, end, strict=True)]
    assert most_between(levels, first, end).tolist() == expected
    assert len(most_between(levels, first[:0], end[:0])) == 0


@pytest.mark.parametrize("seed", range(30))
def test_pack_is_near_the_best_of_all_orders(seed):
    found = some_boxes(seed, 6)
    addresses, top = pack(found, tries=60)
    assert disjoint(found, addresses) and (addresses >= 0).all()
    assert top == int((addresses + found.nbytes).max()) >= load(found)
    best = min(int((first_fit(found, order) + found.nbytes).max()) for order in itertools.permutations(range(6)))
    assert top == best  # some order is always optimal for first fit


def test_load_counts_both_ends_and_pack_stops_when_enough():
    found = Boxes(np.array([64, 64, 128]), np.array([0, 2, 3]), np.array([2, 4, 5]), ())
    assert load(found) == 192
    assert load(Boxes(np.array([64, 64]), np.array([0, 1]), np.array([0, 1]), ())) == 64
    empty = Boxes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), ())
    assert load(empty) == 0 and pack(empty)[1] == 0


@pytest.mark.parametrize("seed", range(40))
def test_place_makes_schedules_that_the_judge_accepts(seed):
    trace = random_step(seed, ops=14)
    plan, draw = Retention(Shape(trace, arena=True, align=64)), random.Random(seed)
    for _ in range(10):
        moves(plan, draw)
        schedule, _ = place(trace, plan.schedule(), align=64)
        checked = check(trace, schedule)
        found = boxes(trace, schedule, 64)
        assert schedule.arena >= load(found)
        # what planning for an arena counts is what the arena would need if it could be packed without a gap
        assert plan.peaks().max() == load(found) + plan.shape.outside
        assert checked.reserved <= schedule.arena + plan.shape.outside
        assert all(at % 64 == 0 for action in schedule.actions for _, at in action.places)


def test_what_stays_with_the_user_lies_outside_and_gradients_inside():
    trace = chain(2, weight=128)
    names = {v: value.category for v, value in enumerate(trace.values)}
    within = inside(trace)
    assert not any(within[v] for v, category in names.items() if category in ("parameter", "input"))
    assert any(within[v] for v, value in enumerate(trace.values) if value.born >= 0 and value.dies < len(trace.ops))
    stays = [v for v, value in enumerate(trace.values) if value.born >= 0 and value.dies >= len(trace.ops)]
    assert stays and not any(within[v] for v in stays)  # here they are activations that outlive the step
    schedule, arena = place(trace, eager(trace))
    assert schedule.arena == arena and outside_bytes(trace, within) == check(trace, schedule).reserved - arena
