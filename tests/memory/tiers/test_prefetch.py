"""The recorded order of uses: right guesses while nothing changes, a new trace when something does."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.memory.tiers.prefetch import Mode, Order

QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine


def go(order: Order, uses: list[int]) -> list[bool]:
    """A pass; for each use whether it was the one expected."""
    hits = []
    for use in uses:
        hits.append(next(order.ahead(), None) == use)
        order.use(use)
    order.finish()
    return hits


def test_modes():
    order = Order()
    assert order.mode is Mode.RECORD
    assert go(order, [1, 2, 3]) == [False, False, False]
    assert order.mode is Mode.COMPLETE and order.trace == (1, 2, 3)
    assert go(order, [1, 2, 3]) == [True, True, True] and order.rerecorded == 0
    order.use(1)
    order.use(3)
    assert order.mode is Mode.INVALID and list(order.ahead()) == []
    order.use(2)
    order.finish()
    assert order.mode is Mode.COMPLETE and order.trace == (1, 3, 2) and order.rerecorded == 1


def test_guesses_go_on_behind_a_branch_that_was_not_taken():
    order = Order()
    go(order, [1, 2, 3, 4, 5, 6])
    assert go(order, [1, 2, 5, 6]) == [True, True, False, True]
    go(order, [1, 2, 3])
    assert go(order, [1, 9, 2, 3]) == [True, False, True, True]  # a new one between


def test_a_shorter_pass_is_another_trace():
    order = Order()
    go(order, [1, 2, 3])
    go(order, [1, 2])
    assert order.trace == (1, 2) and order.rerecorded == 1
    order.finish()  # a pass of nothing is none
    assert order.trace == (1, 2)


@QUIET
@given(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=6))
def test_the_trace_is_always_the_last_pass(passes):
    order = Order()
    for uses in passes:
        hits = go(order, uses)
        if uses:
            assert order.trace == tuple(uses) and order.mode is Mode.COMPLETE
            again = list(order.trace)
            assert all(go(order, again)) and order.trace == tuple(uses)
        assert len(hits) == len(uses)
