"""The virtual clock: order, exact sums of times, no way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.federated import VirtualClock


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5))))
def test_events_come_by_time_and_at_one_time_by_client(events):
    clock = VirtualClock()
    for when, client in events:
        clock.at(when, client)
    assert [clock.pop() for _ in events] == sorted(events)
    assert clock.peek() is None


def test_the_past_is_over():
    clock = VirtualClock()
    clock.at(5, 0)
    clock.pop()
    clock.advance(3)
    assert clock.now == 5
    with pytest.raises(ValueError, match="must be at 5 ns or later"):
        clock.at(4, 1)
