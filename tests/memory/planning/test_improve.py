from __future__ import annotations

import pytest
from tests.memory.planning.test_retention import copied, state
from tests.memory.planning.traces import chain, random_step, transformer

from weft.errors import BudgetError
from weft.memory.planning.check import check
from weft.memory.planning.improve import Gaps, Ladder, descend, fill, search
from weft.memory.planning.optimum import optimum
from weft.memory.planning.retention import Retention
from weft.memory.planning.shape import Shape


def floor(shape: Shape) -> int:
    return max(
        int(shape.fixed[op]) + shape.own[op] + sum(shape.bytes[v] for v in shape.inputs[op]) for op in range(shape.end)
    )


def improved(trace, budget: int, work: int = 20_000) -> Retention | None:
    plan = Retention(Shape(trace))
    gaps = Gaps(plan, 1)
    if not descend(plan, gaps, budget, patience=12):
        return None
    fill(plan, budget)
    search(plan, gaps, budget, work)
    return plan


def budgets(trace, count: int = 4) -> list[int]:
    low, high = floor(Shape(trace)), int(Retention(Shape(trace)).peaks().max())
    return sorted({low + (high - low) * k // count for k in range(count + 1)})


@pytest.mark.parametrize("layers", [3, 5, 7])
def test_chains_are_planned_as_well_as_can_be(layers):
    trace = chain(layers)
    for budget in budgets(trace):
        try:
            expected = check(trace, optimum(trace, budget)).repeated_seconds
        except BudgetError:
            continue
        plan = improved(trace, budget)
        assert plan is not None and plan.peaks().max() <= budget
        assert plan.seconds == pytest.approx(expected), budget


@pytest.mark.parametrize("patience", [0, 12])
def test_what_is_banned_stays(patience):
    plan = Retention(Shape(chain(9)))
    gaps, budget = Gaps(plan, 1), int(0.8 * plan.peaks().max())
    assert not descend(plan, gaps, budget, banned={v for v, *_ in gaps.items}, patience=patience)
    assert plan.seconds == 0 and all(plan.is_kept(*gap) for gap in gaps.items)
    assert descend(plan, gaps, budget, patience=patience)


def test_random_steps_are_planned_within_a_few_percent_of_the_optimum():
    gaps, missed, cases = 0.0, 0, 0
    for seed in range(12):
        trace = random_step(seed, ops=10)
        for budget in budgets(trace, 3)[1:]:
            try:
                best = check(trace, optimum(trace, budget)).seconds
            except BudgetError:
                continue
            plan, cases = improved(trace, budget, 5_000), cases + 1
            if plan is None:
                missed += 1
            else:
                found = check(trace, plan.schedule())
                assert found.peak <= budget and found.seconds >= best - 1e-9
                gaps += found.seconds / best - 1
    assert cases > 20 and missed <= cases // 10 and gaps / cases < 0.05


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_fill_and_search_only_ever_improve_and_stay_within_the_budget(share):
    trace = transformer(4)
    budget = int(share * trace.peak)
    plan = Retention(Shape(trace))
    gaps = Gaps(plan, 1)
    assert descend(plan, gaps, budget, patience=12)
    greedy = plan.seconds
    assert plan.peaks().max() <= budget
    fill(plan, budget)
    filled = plan.seconds
    search(plan, gaps, budget, 20_000)
    assert plan.seconds <= filled <= greedy and plan.peaks().max() <= budget
    checked = check(trace, plan.schedule())
    assert checked.peak <= budget and checked.repeated_seconds == pytest.approx(plan.seconds)


def test_the_same_search_twice_gives_the_same_plan():
    trace = transformer(3)
    first, second = (improved(trace, int(0.4 * trace.peak)) for _ in range(2))
    assert first is not None and second is not None and state(first) == state(second)


def test_cheap_elementwise_results_go_before_products_are_computed_twice():
    trace = transformer(4)
    plan = improved(trace, int(0.6 * trace.peak))
    again = {trace.ops[op].name for ops in plan.again for last in ops for op in plan.shape.chain[last]}
    assert "gelu" in again and not again & {"expand", "contract", "qkv", "project"}


def test_failing_to_descend_leaves_a_valid_plan():
    trace = transformer(2)
    plan = Retention(Shape(trace))
    assert not descend(plan, Gaps(plan, 1), floor(plan.shape) - 1, patience=4, work=50_000)
    check(trace, plan.schedule())


def test_a_block_of_a_transformer_is_planned_nearly_as_well_as_can_be_and_the_least_budget_is_exact():
    trace = transformer(1)
    shape = Shape(trace)
    plan = Ladder(iter([Retention(shape)]), 1, floor(shape), 50_000).lowest().plan
    least = int(plan.peaks().max())
    assert check(trace, plan.schedule()).peak == least
    with pytest.raises(BudgetError):
        optimum(trace, least - 64)
    for budget in (least, least + 128, least + 256):
        plan = improved(trace, budget)
        assert plan is not None
        best = check(trace, optimum(trace, budget)).repeated_seconds
        assert best - 1e-9 <= plan.seconds <= 1.05 * best  # the search is a heuristic: 34 against 32.5 at one of these


def test_smallest_needs_little_more_than_one_operator():
    for trace in (chain(12), transformer(4)):
        shape = Shape(trace)
        assert (
            floor(shape)
            <= Ladder(iter([Retention(shape)]), 1, floor(shape), 150_000).lowest().peak
            <= 1.4 * floor(shape)
        )


def test_a_ladder_is_the_same_whatever_was_asked_for_first():
    trace = transformer(2)
    shape, found = Shape(trace), []
    for first in (None, 0.9, 0.5):
        ladder = Ladder(iter([Retention(shape), Retention(shape)]), 1, floor(shape), 20_000)
        if first is not None:
            assert ladder.above(int(first * trace.peak)).peak > first * trace.peak
        assert ladder.lowest() is ladder.lowest()
        found.append([(rung.peak, rung.work, rung.plan.seconds) for rung in ladder.rungs])
        assert [peak for peak, *_ in found[-1]] == [int(rung.plan.peaks().max()) for rung in ladder.rungs]
    assert found[0] == found[1] == found[2] and found[0] == sorted(found[0], reverse=True)


def test_what_was_given_up_and_taken_back_may_be_given_up_again():
    trace = transformer(2)
    plan = Retention(Shape(trace))
    gaps, mark = Gaps(plan, 1), plan.mark()
    assert descend(plan, gaps, int(0.7 * trace.peak), patience=12)
    given = [n for n, gap in enumerate(gaps.items) if not plan.is_kept(*gap)]
    plan.undo(mark)
    gaps.update()
    assert given and all(gaps.cost[n] < float("inf") for n in given)


def test_a_copy_goes_its_own_way():
    trace = chain(5)
    plan = Retention(Shape(trace))
    before = copied(plan)
    other = plan.copy()
    assert descend(other, Gaps(other, 1), int(0.8 * trace.peak))
    assert state(plan) == before and state(other) != before
