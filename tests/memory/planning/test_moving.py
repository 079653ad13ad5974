from __future__ import annotations

import random

import numpy as np
import pytest
from tests.memory.execute.loops import assert_same, peak_of, train
from tests.memory.execute.test_limit import usable
from tests.memory.models import make
from tests.memory.planning.test_packing import some_boxes
from tests.memory.planning.test_retention import moves as change
from tests.memory.planning.traces import Builder, random_step, training

from weft.memory.core import MOVE_RATE
from weft.memory.execute.limit import limit
from weft.memory.planning import moving, packing
from weft.memory.planning.check import check
from weft.memory.planning.moving import keep_below
from weft.memory.planning.packing import Boxes, boxes, load, pack, place
from weft.memory.planning.retention import Retention
from weft.memory.planning.shape import Shape
from weft.memory.schedule import Action, Schedule


@pytest.mark.parametrize("seed", range(60))
def test_boxes_that_fit_by_bytes_always_find_addresses_and_lie_alone(seed):
    found = some_boxes(seed, 25, times=15)
    room = load(found)
    packed, top = pack(found, 2**30, tries=1)  # the first that comes, however high
    came, moved = keep_below(found, packed, room)
    where, pending = came.copy(), list(moved)
    for now in range(15):
        there = [b for b in range(25) if found.first[b] <= now <= found.last[b]]
        while pending and pending[0].action == now:
            _, box, address = pending.pop(0)
            assert found.first[box] < now <= found.last[box]
            others = [b for b in there if b != box and found.first[b] < now]
            assert apart(found, where, others, box, address)  # its own bytes it may run over
            where[box] = address
        for box in there:
            assert 0 <= where[box] <= room - found.nbytes[box]
            assert apart(found, where, [b for b in there if b != box], box, where[box])
    assert not pending
    assert top > room or (not moved and (came == packed).all())


def apart(found, where, others, box, address) -> bool:
    return all(address + found.nbytes[box] <= where[b] or where[b] + found.nbytes[b] <= address for b in others)


@pytest.mark.parametrize("seed", range(30))
def test_schedules_with_moves_pass_the_judge_in_as_many_bytes_as_are_there_at_once(seed):
    trace = random_step(seed, ops=20)
    plan, draw = Retention(Shape(trace, arena=True, align=64)), random.Random(seed)
    for _ in range(12):
        change(plan, draw)
    least = int(plan.peaks().max())
    room = least - plan.shape.outside + seed % 3 * 21  # budgets are any number of bytes
    schedule, _ = place(trace, plan.schedule(), room, 64, tries=1)
    checked = check(trace, schedule)
    assert all(address % 64 == 0 for action in schedule.actions for _, address in action.places)
    assert schedule.arena == least - plan.shape.outside and checked.reserved <= least
    assert checked.seconds - trace.seconds - plan.seconds == pytest.approx(checked.moved_bytes / MOVE_RATE, abs=1e-12)


def test_a_hole_that_no_fixed_address_fills_is_filled_by_one_move():
    build = Builder()
    x = build.before(0, "input")
    a, b, c = (build.op((x,), (64,))[0] for _ in range(3))
    build.op((a,))
    build.op((c,))  # a and c are gone, b lies between
    d = build.op((x,), (128,))[0]
    build.op((b, d))
    trace = build.trace()
    plan = Schedule(tuple(Action("run", i) for i in range(len(trace.ops))))
    found = boxes(trace, plan)
    came, moved = keep_below(found, np.array([0, 64, 128, 2**20]), 192)
    assert came.tolist() == [0, 64, 128, 64] and [(m.action, m.box, m.address) for m in moved] == [(5, 1, 0)]


def test_the_fewest_bytes_are_pushed_together():
    #                   a at 0, b at 128, c at 256, each after and before a gap of 64; d needs two of them
    found = Boxes(np.array([64, 64, 256, 128]), np.array([0, 0, 0, 1]), np.array([2, 2, 2, 2]), ())
    came, moved = keep_below(found, np.array([0, 128, 256, 2**20]), 576)
    assert came[3] == 128 and [(m.box, m.address) for m in moved] == [(1, 64)]


@pytest.mark.parametrize("seed", range(20))
def test_of_two_ways_the_one_that_copies_less_is_taken(seed, monkeypatch):
    def copied(ways):
        return sum(int(found.nbytes[move.box]) for move in ways[1])

    found = some_boxes(seed, 25, times=15)
    packed, _ = pack(found, 2**30, tries=1)
    hops, taken = moving._hop(found, packed, load(found)), keep_below(found, packed, load(found))
    monkeypatch.setattr(moving, "_hop", lambda *_: None)
    assert copied(taken) == min(copied(ways) for ways in (hops, keep_below(found, packed, load(found))) if ways)


def one_above_the_other(found, enough=0, tries=0):
    """A packing after which nearly everything has to move at some time."""
    return np.cumsum(found.nbytes) - found.nbytes, int(found.nbytes.sum())


def test_what_is_copied_to_a_lower_tier_does_not_move(monkeypatch):
    monkeypatch.setattr(packing, "pack", one_above_the_other)
    trace = training(1)
    plan = Retention(Shape(trace, arena=True, align=64))
    schedule, room = plan.schedule(), int(plan.peaks().max()) - plan.shape.outside
    sent = next(v for v, value in enumerate(trace.values) if value.born == 0)
    saving = Schedule((schedule.actions[0], Action("save", sent), *schedule.actions[1:]))
    for given, moves in ((schedule, True), (saving, False)):
        assert any(action.kind == "move" for action in place(trace, given, room)[0].actions) == moves


@pytest.mark.parametrize("backend", ["copy", pytest.param("native", marks=pytest.mark.slow)])
def test_steps_whose_values_move_are_replayed_bit_for_bit(backend, monkeypatch):
    def counted(*given):
        ways = keep_below(*given)
        moves.append(len(ways[1]))
        return ways

    moves: list[int] = []
    monkeypatch.setattr(packing, "pack", one_above_the_other)
    monkeypatch.setattr(packing, "keep_below", counted)
    eager, made = train(make("unet")), make("unet")
    share = 1.1 if backend == "copy" else 0.85  # beside its arena there is what an operator makes
    limited = limit(int(share * peak_of("unet")), model=made.model, backend=usable(backend))
    found = train(made, within=limited)
    assert_same(eager, found)
    assert found.replayed[2:] == [True] * 3 and moves and min(moves) > 0
