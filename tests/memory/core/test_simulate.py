"""Simulated steps: schedules that the plain judge accepts, budgets that are kept, costs that add up."""

from __future__ import annotations

import itertools

import pytest
from tests.memory.core.synthetic import Draft, chain, scramble, transformer

from weft.errors import BudgetError
from weft.memory.core import MOVE_RATE, POLICIES, simulate
from weft.memory.planning.check import check
from weft.memory.record import Trace

TRACES = {
    "chain": chain(40, 1 << 12),
    "transformer": transformer(4, 1 << 14),
    "out of place": transformer(4, 1 << 14, in_place=False),
    **{f"scramble {seed}": scramble(seed, 40) for seed in range(12)},
}


def within(trace, percent):
    return trace.fixed + (trace.peak - trace.fixed) * percent // 100


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TRACES)
def test_schedules_pass_the_judge(name, policy):
    trace, feasible = TRACES[name], 0
    for percent, moves in itertools.product((103, 90, 75, 60, 45), (False, True)):
        try:
            found = simulate(trace, within(trace, percent), policy, moves=moves, small=0)
        except BudgetError as error:
            assert error.budget == within(trace, percent)
            continue
        judged = check(trace, found.schedule)
        feasible += 1
        assert judged.peak <= found.peak <= found.budget and judged.reserved <= found.budget
        assert judged.repeated == found.repeats and judged.moved_bytes == found.moved_bytes
        assert found.overhead * trace.seconds == pytest.approx(judged.repeated_seconds + found.moved_bytes / MOVE_RATE)
        assert found.seconds == pytest.approx(trace.seconds * (1 + found.overhead))
        assert simulate(trace, found.budget, policy, moves=moves, small=0, log=False).overhead == found.overhead
    assert feasible


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_repeated_while_the_bytes_suffice(policy):
    """At the peak of eager execution (rounded as the arena rounds) no operator runs twice: what is apart is pushed together."""
    for trace in TRACES.values():
        rounded = Trace(
            tuple(type(op)(**{**as_dict(op), "workspace": up(op.workspace)}) for op in trace.ops),
            tuple(type(value)(**{**as_dict(value), "nbytes": up(value.nbytes)}) for value in trace.values),
        )
        found = simulate(rounded, rounded.peak, policy, small=0)
        assert (found.repeats, found.evictions) == (0, 0)
        assert found.peak == rounded.peak


def as_dict(thing):
    return {name: getattr(thing, name) for name in thing.__slots__}


def up(nbytes):
    return (nbytes + 63) & ~63


def least_cost(trace, budget):
    """The least seconds of any order of runs, repetitions and drops in `budget` bytes without addresses: all states tried.

    For traces without writes in place and with single outputs, whose activations are the only bytes. Dijkstra over (operators
    done, values there).
    """
    import heapq

    nbytes = [value.nbytes for value in trace.values]
    end = len(trace.ops)
    heap, done = [(0.0, 0, frozenset())], set()
    while heap:
        cost, at, there = heapq.heappop(heap)
        if (at, there) in done:
            continue
        done.add((at, there))
        if at == end and all(v in there for v, value in enumerate(trace.values) if value.dies >= end):
            return cost
        for index in range(min(at + 1, end)):
            op = trace.ops[index]
            (made,) = op.makes
            if made in there or any(r not in there for r in op.reads):
                continue
            if sum(nbytes[v] for v in there) + nbytes[made] + op.workspace <= budget:
                new = there | {made}
                if index == at:
                    new = frozenset(v for v in new if trace.values[v].dies != index)
                heapq.heappush(heap, (cost + op.seconds, at + (index == at), new))
        for v in there:
            heapq.heappush(heap, (cost, at, there - {v}))
    return None


@pytest.mark.parametrize("policy", POLICIES)
def test_never_below_the_optimum(policy):
    """A residual chain with backward: the simulated cost is that of some schedule, and the best is found by trying all."""
    draft = Draft()
    kept = [draft.op("x", [], [128], 1.0)]
    for i in range(4):
        kept.append(draft.op("f", kept[-2:], [128 * (1 + i % 2)], 1.0 + i))
    grad = draft.op("loss", [kept[-1]], [128], 1.0)
    for x in reversed(kept):
        grad = draft.op("df", [grad, x], [128], 2.0)
    trace = draft.trace(keep=(grad,))
    feasible = 0
    for budget in range(384, trace.peak + 128, 128):
        best = least_cost(trace, budget)
        try:
            found = simulate(trace, budget, policy, small=0)
        except BudgetError:
            assert best is None or budget < trace.peak
            continue
        feasible += 1
        assert best is not None and found.seconds >= best - 1e-9
    assert feasible >= 2


def test_gradients_outside_count_nothing():
    trace = transformer(4, 1 << 14)
    inside, outside = simulate(trace, trace.peak), simulate(trace, trace.peak, gradients_outside=True)
    gradients = sum(value.nbytes for value in trace.values if value.category == "gradient")
    assert 0 < inside.peak - outside.peak <= gradients


def test_activations_left_from_before():
    """One that dies in the step is outside the arena, and counted there; what is built from it is saved before it dies."""
    draft = Draft()
    old = draft.leaf(640, "activation")
    y = draft.op("f", [old], [640])
    draft.op("g", [y], [64])
    big = draft.op("big", [], [960])
    draft.op("last use", [old], [64])
    draft.op("h", [y, big], [64])
    draft.values[old]["dies"] = 3
    trace = draft.trace()
    assert trace.fixed == 0
    for percent in (100, 120, 150):
        budget = trace.peak * percent // 100
        try:
            found = simulate(trace, budget, "pager", small=0)
        except BudgetError:
            continue
        assert check(trace, found.schedule).reserved <= budget
    assert found.repeats == 0


def test_what_outlives_the_step_is_there_at_its_end():
    """x is kept by the user: dropped to make room for the others, it is rebuilt at the end."""
    draft = Draft()
    x = draft.op("x", [], [64], 1.0)
    y = draft.op("y", [x], [64], 50.0)
    draft.op("big", [y], [64], 50.0)
    trace = draft.trace(keep=(x,))
    found = simulate(trace, 128, "pager", small=0)
    assert [(a.kind, a.index) for a in found.schedule.actions][-1] == ("again", 0)
    check(trace, found.schedule)


def test_refusals_name_what_does_not_fit():
    trace = transformer(2, 1 << 14)
    with pytest.raises(BudgetError, match="parameters, buffers, optimizer state and inputs alone take"):
        simulate(trace, trace.fixed - 1)
    with pytest.raises(BudgetError, match=r"mm needs 49,152 bytes; .* are always taken"):
        simulate(trace, trace.fixed + (1 << 14) + 2000, small=0)
    with pytest.raises(ValueError, match="no policy is called 'lru'"):
        simulate(trace, trace.peak, "lru")


def test_arguments_of_another_kind_are_named():
    trace = transformer(2, 1 << 14)
    assert simulate(trace, f"{trace.peak} B") == simulate(trace, trace.peak)
    for wrong, named in (
        ((3, 100), "simulate: trace must be a weft.memory.Trace, got 3"),
        ((trace, "6 parsec"), "simulate: budget"),
        ((trace, -1), "simulate: budget"),
        ((trace, trace.peak, 7), "a policy must be given by its name"),
    ):
        with pytest.raises(ValueError, match=named):
            simulate(*wrong)
