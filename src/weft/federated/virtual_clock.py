"""A clock that is set forward from event to event: no sleeping, and no dependence on the host's speed.

Times are whole nanoseconds, so that sums of times are exact and "at the same time" means something; events of one instant come
in the order of their clients.
"""

from __future__ import annotations

import heapq
from typing import final

__all__ = ["VirtualClock"]


@final
class VirtualClock:
    """Events (when, client) in a heap. `now` never goes back.

    >>> clock = VirtualClock()
    >>> clock.at(600_000_000, client=1); clock.at(600_000_000, client=0); clock.at(200_000_000, client=2)
    >>> [clock.pop() for _ in range(3)]
    [(200000000, 2), (600000000, 0), (600000000, 1)]
    """

    def __init__(self) -> None:
        self.now = 0
        self.events: list[tuple[int, int]] = []

    def at(self, when: int, client: int) -> None:
        """Let `client` return at `when` nanoseconds, which must not have passed."""
        if when < self.now:
            raise ValueError(f"VirtualClock: an event must be at {self.now} ns or later, got {when}; the past is over")
        heapq.heappush(self.events, (when, client))

    def peek(self) -> int | None:
        """When the next event is, None if there is none."""
        return self.events[0][0] if self.events else None

    def pop(self) -> tuple[int, int]:
        """The next event; the clock is set to it."""
        when, client = heapq.heappop(self.events)
        self.now = when
        return when, client

    def advance(self, when: int) -> None:
        """Set the clock to `when`, at which something else happens."""
        self.now = max(self.now, when)
