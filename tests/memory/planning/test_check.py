from __future__ import annotations

from dataclasses import replace

import pytest
from tests.memory.planning.traces import Builder, chain, eager, random_step

from weft.memory.planning.check import Tier, check
from weft.memory.planning.choose import least
from weft.memory.planning.choose import plan as choose
from weft.memory.planning.optimum import optimum
from weft.memory.schedule import Action, Schedule


def run(i, *places, workspace=-1):
    return Action("run", i, tuple(places), workspace)


def again(i, *places, workspace=-1):
    return Action("again", i, tuple(places), workspace)


def drop(v):
    return Action("drop", v)


@pytest.mark.parametrize("seed", range(40))
def test_eager_schedule_costs_what_the_trace_says(seed):
    trace = random_step(seed)
    checked = check(trace, eager(trace))
    assert checked.peak == trace.peak and checked.live == trace.live
    assert checked.seconds == trace.seconds and checked.overhead == 0 and checked.repeated == 0


def test_repetition_of_a_chain_by_hand():
    trace = chain(3)  # values: x0; weights 1 2 3; x1 x2 x3 = 4 5 6; gradients from 7
    x1 = 4
    acts = (run(0), run(1), drop(x1), run(2), run(3), run(4), again(0), run(5), run(6))
    checked = check(trace, Schedule(acts))
    # x0, x2, x3 and its gradient; x0, x2 and two gradients; x0, x1 and two gradients; the input x0 and two gradients
    assert checked.live == (200, 300, 300, 400, 400, 400, 300)
    assert checked.repeated == 1 and checked.repeated_seconds == 1 and checked.seconds == trace.seconds + 1
    assert checked.overhead == pytest.approx(1 / trace.seconds)
    assert check(trace, eager(trace)).peak == 500 and checked.peak == 400


def test_a_value_that_dies_while_away_needs_no_action_and_a_temporary_needs_one():
    build = Builder()
    x = build.before(10, "input")
    a = build.op((x,), (20,))[0]
    b = build.op((a,), (30,))[0]
    c = build.op((x,), (40,))[0]
    build.op((b, c), (0,))
    build.keep(c)
    trace = build.trace()
    acts = [run(0), run(1), drop(b), run(2), again(0), again(1), drop(a), run(3)]
    assert check(trace, Schedule(tuple(acts))).peak == 10 + 40 + 20 + 30
    with pytest.raises(ValueError, match=r"temporary is left.*value 1, 20 bytes"):
        check(trace, Schedule(tuple(act for act in acts if act != drop(a))))
    with pytest.raises(ValueError, match=r"action 3, drop 1: it is not there"):
        check(trace, Schedule((run(0), run(1), drop(b), drop(a))))
    with pytest.raises(ValueError, match=r"value 3 .*outlives the step and is not there"):
        check(trace, Schedule((*acts, drop(c))))


def lasting_by_name(dies=3):
    """x -> sent (once) -> a -> total, which nobody reads and the program has until operator `dies`, after `a` is gone."""
    build = Builder()
    x = build.before(640, "input")
    sent = build.op((x,), (2560,), repeatable=False)[0]
    a = build.op((sent,), (2560,))[0]
    total = build.keep(build.op((a,), (512,))[0], dies)
    build.op((x,), (6400,))
    build.op((x,), (0,))
    return build.trace(), total


def test_what_the_program_has_goes_only_if_it_could_come_back():
    trace, total = lasting_by_name()
    gone = (run(0), run(1), run(2), drop(total), run(3), run(4))
    with pytest.raises(ValueError, match=r"drop 3: the program has it until operator 3, and .* not be made again"):
        check(trace, Schedule(gone))
    for plan in (choose(trace, trace.peak), choose(trace, least(trace))):
        assert drop(total) not in plan.schedule.actions
    assert drop(total) not in optimum(trace, trace.peak).actions
    again_at_will = replace(trace, ops=tuple(replace(op, repeatable=True) for op in trace.ops))
    assert check(again_at_will, Schedule(gone)).peak == 640 + 6400
    assert least(again_at_will) < least(trace)
    assert drop(total) in optimum(again_at_will, trace.peak - 1).actions
    assert check(lasting_by_name(dies=2)[0], Schedule((run(0), run(1), run(2), run(3), run(4))))


def test_overwritten_values_share_their_bytes_and_come_back_through_the_old_content():
    build = Builder()
    x = build.before(10, "input")
    old = build.op((x,), (100,), seconds=3)[0]
    y = build.op((old,), (50,))[0]
    new = build.op((), (), over=(old,), seconds=5)[0]
    z = build.op((x,), (7,))[0]
    build.op((new, y, z), (1,))
    trace = build.trace()
    assert check(trace, eager(trace)).peak == 10 + 100 + 50 + 7 + 1
    acts = (run(0), run(1), run(2), drop(new), run(3), again(0), again(2), run(4))
    checked = check(trace, Schedule(acts))
    assert checked.repeated_seconds == 8 and checked.peak == 10 + 100 + 50 + 7 + 1
    # y is rebuilt from the old content, which is a temporary then
    both = (run(0), run(1), run(2), drop(new), drop(y), run(3), again(0), again(1), again(2), run(4))
    assert check(trace, Schedule(both)).live == (110, 160, 160, 17, 10 + 100 + 50 + 7 + 1)
    with pytest.raises(ValueError, match=r"action 5, again 2 .*value 1, which it reads, is not there"):
        check(trace, Schedule((run(0), run(1), run(2), drop(new), run(3), again(2), run(4))))


def test_a_repetition_makes_what_is_there_a_second_time():
    build = Builder()
    x = build.before(10, "input")
    a, b = build.op((x,), (100, 20))
    build.op((b,), (5,))
    build.op((a, b), (5,))
    trace = build.trace()
    acts = (run(0), drop(a), run(1), again(0), run(2))
    checked = check(trace, Schedule(acts))
    assert checked.live[2] == 10 + 100 + 20 + 20  # the second b is thrown away
    placed = (run(0, (a, 0), (b, 100)), drop(a), run(1, (3, 120)), again(0, (a, 0), (b, 120)), run(2, (4, 140)))
    assert check(trace, Schedule(placed, arena=145)).reserved == 155
    with pytest.raises(ValueError, match=r"a second value 2 at \[110, 130\) overlaps value 2 at \[100, 120\)"):
        check(trace, Schedule((*placed[:3], again(0, (a, 0), (b, 110)), run(2)), arena=145))


REFUSED = [
    (lambda t: (run(1),), r"action 0, run 1 \(f1\): operator 0 is the next"),
    (lambda t: (run(0), run(0)), r"action 1, run 0 \(f0\): operator 1 is the next"),
    (lambda t: (run(0),), r"operator 1 \(f1\) never runs"),
    (lambda t: (again(0),), "has not run yet"),
    (lambda t: (run(99),), "there are only 5"),
    (lambda t: (drop(0),), "category input; only activations"),
    (lambda t: (drop(77),), "there are only"),
    (lambda t: (drop(3),), "is not there"),
    (lambda t: (run(0), drop(3), run(1)), "action 2, run 1.*value 3, which it reads, is not there"),
    (lambda t: (run(0), Action("save", 3)), "no lower tier"),
    (lambda t: (run(0), Action("move", 3)), "only a value that lies in the arena"),
    (lambda t: (run(0), Action("hop", 3)), "no such action"),
    (lambda t: (run(0, (4, 0)),), "gives a place to value 4"),
    (lambda t: (run(0, (3, 30)),), r"value 3 at \[30, 130\) does not lie in the arena of 120"),
    (lambda t: (run(0, (3, 0)), run(1, (4, 20))), r"value 4 at \[20, 120\) overlaps value 3 at \[0, 100\)"),
]


@pytest.mark.parametrize(("acts", "words"), REFUSED)
def test_refuses_and_names_the_first_bad_action(acts, words):
    trace = chain(2)
    with pytest.raises(ValueError, match=words):
        check(trace, Schedule(tuple(acts(trace)), arena=120))


def test_refuses_to_repeat_what_cannot_be():
    build = Builder()
    x = build.before(1, "input")
    a = build.op((x,), (10,), repeatable=False, name="item")[0]
    build.op((a,), (1,))
    with pytest.raises(ValueError, match=r"again 0 \(item\): it cannot be repeated"):
        check(build.trace(), Schedule((run(0), drop(a), again(0), run(1))))


def test_places_workspace_moves_and_what_is_outside():
    build = Builder()
    x = build.before(10, "input")
    a = build.op((x,), (100,))[0]
    b = build.op((a,), (50,), workspace=30)[0]
    build.op((a, b), (20,))
    trace = build.trace()
    good = (run(0, (a, 50)), Action("move", a, ((a, 0),)), run(1, (b, 100), workspace=150), run(2))
    checked = check(trace, Schedule(good, arena=180))
    assert checked.peak == 190 and checked.reserved == 180 + 10 + 20 and checked.moved_bytes == 100
    with pytest.raises(ValueError, match=r"the workspace at \[140, 170\) overlaps value 2"):
        check(trace, Schedule((*good[:2], run(1, (b, 100), workspace=140)), arena=180))


def test_what_has_been_loaded_for_the_last_time_leaves_its_room_in_the_tier():
    build = Builder()
    x = build.before(0, "input")
    a = build.op((x,), (100,))[0]
    build.op((a,), (1,))
    b = build.op((x,), (70,))[0]
    build.op((b,), (1,))
    trips = [(run(n), Action("save", v), drop(v), Action("load", v), run(n + 1)) for n, v in ((0, a), (2, b))]
    checked = check(build.trace(), Schedule((*trips[0], *trips[1])), Tier(100.0, capacity=100))
    assert checked.held_bytes == 100 and checked.saved_bytes == checked.loaded_bytes == 170


def test_copies_overlap_with_operators_until_they_are_needed():
    build = Builder()
    x = build.before(0, "input")
    a = build.op((x,), (100,), seconds=1)[0]
    for _ in range(3):
        build.op((x,), (1,), seconds=2)
    build.op((a,), (1,), seconds=1)
    trace = build.trace()
    tier = Tier(bandwidth=100 / 3, latency=0.5)  # 3.5 s a copy
    save, load = Action("save", a), Action("load", a)
    acts = (run(0), save, run(1), drop(a), run(2), load, run(3), run(4))
    checked = check(trace, Schedule(acts), tier)
    # saved from 1 to 4.5, so the drop after operator 1 (at 3) waits 1.5; loaded from 6.5 to 10, operator 3 ends at 8.5
    assert checked.waited_seconds == pytest.approx(1.5 + 1.5) and checked.seconds == pytest.approx(11)
    assert (checked.saved_bytes, checked.loaded_bytes, checked.held_bytes) == (100, 100, 100)
    assert checked.live == (100, 101, 1, 101, 101)
    with pytest.raises(ValueError, match=r"host\) would hold 100 bytes of its 99"):
        check(trace, Schedule(acts), Tier(1.0, capacity=99))
    with pytest.raises(ValueError, match="was not saved"):
        check(trace, Schedule((run(0), drop(a), load)), tier)
    with pytest.raises(ValueError, match="bandwidth"):
        Tier(0)
