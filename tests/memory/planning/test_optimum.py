from __future__ import annotations

import itertools

import pytest
from tests.memory.planning.traces import chain, eager, random_step

from weft.errors import BudgetError
from weft.memory.planning.check import check
from weft.memory.planning.optimum import _schedule, optimum
from weft.memory.schedule import Action, Schedule


def everything(trace):
    """(peak, seconds of repetition) of every choice of up to three slots, with every value dropped as early as can be."""
    end, found = len(trace.ops), []
    slots = [(t, k) for t in range(end + 1) for k in range(min(t, end)) if trace.ops[k].repeatable]
    program = {(t, t) for t in range(end)}
    for chosen in itertools.chain.from_iterable(itertools.combinations(slots, count) for count in range(4)):
        try:
            checked = check(trace, _schedule(trace, program | set(chosen)))
        except ValueError:
            continue
        found.append((checked.peak, checked.repeated_seconds))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force_where_few_repetitions_do(seed):
    trace = random_step(seed, ops=5)
    found = everything(trace)
    peak = check(trace, eager(trace)).peak
    for budget in range(peak, min(peak for peak, _ in found) - 128, -64):
        expected = min((seconds for peak, seconds in found if peak <= budget), default=None)
        try:
            checked = check(trace, optimum(trace, budget))
        except BudgetError:
            assert expected is None
            continue
        assert checked.peak <= budget
        if checked.repeated > 3:
            assert expected is None or checked.repeated_seconds <= expected
        else:
            assert checked.repeated_seconds == pytest.approx(expected)


def test_chain_costs_what_is_known():
    trace = chain(4)  # five tensors of 100 at the peak and the gradient
    assert check(trace, optimum(trace, 600)).repeated == 0
    # one tensor less: drop x1, rebuild it when its backward comes
    assert check(trace, optimum(trace, 500)).repeated_seconds == 1
    # 400 bytes: x0, one more, two gradients; x2 and x1 are dropped, x2 is rebuilt through x1, and x1 once more or held
    assert check(trace, optimum(trace, 400)).repeated_seconds == 3
    with pytest.raises(BudgetError, match="this is exact"):
        optimum(trace, 399)


def test_budget_of_the_peak_costs_nothing_and_too_large_a_step_is_refused():
    trace = random_step(3, ops=9)
    assert check(trace, optimum(trace, trace.peak)).repeated == 0
    with pytest.raises(ValueError, match="at most 25 operators, got 26"):
        optimum(random_step(0, ops=26), 10**9)


def test_a_solver_that_gives_up_is_an_error(monkeypatch):
    import scipy.optimize

    class GaveUp:
        status, x, message = 1, None, "node limit"

    monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: GaveUp)
    with pytest.raises(RuntimeError, match=r"node limit.*more nodes"):
        optimum(chain(3), 10**6, nodes=1)


def test_schedule_of_nothing():
    trace = chain(1)
    assert optimum(trace, 10**6) == Schedule(tuple(Action("run", i) for i in range(len(trace.ops))))
