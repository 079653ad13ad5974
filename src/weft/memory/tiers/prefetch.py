"""The order in which a step uses parameters: recorded once, followed, and recorded anew when the model takes another way.

    RECORD      the first pass: nothing is known yet
    COMPLETE    a pass that has followed the trace so far: what comes next is known
    INVALID     a pass that has left the trace; guesses go on from the next use that the trace has, and what the pass records
                is the trace of the next one

A wrong guess costs a read that nobody uses, never a wrong value: guesses are only ever fetched ahead.
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, section 6.2 (dynamic prefetcher); modes as DeepSpeed's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

__all__ = ["Mode", "Order"]


class Mode(enum.Enum):
    RECORD = "record"
    COMPLETE = "complete"
    INVALID = "invalid"


class Order:
    """A trace of integers (which parameter), and a position in it.

    Attributes:
        mode: see the file's header.
        trace: of the last finished pass.
        rerecorded: passes that left the trace.

    >>> order = Order()
    >>> for use in (3, 1, 3): order.use(use)
    >>> order.finish(); order.mode.name, order.trace
    ('COMPLETE', (3, 1, 3))
    >>> order.use(3); list(order.ahead())
    [1, 3]
    """

    def __init__(self) -> None:
        self.mode, self.trace, self.rerecorded = Mode.RECORD, (), 0
        self._now: list[int] = []
        self._position = 0

    def use(self, index: int) -> None:
        """The pass uses `index` now."""
        self._now.append(index)
        if self.mode is Mode.RECORD:
            return
        trace, at = self.trace, self._position
        if at < len(trace) and trace[at] == index:
            self._position = at + 1
            return
        self.mode = Mode.INVALID
        # A branch that was not taken this time: go on behind it. One that is new: stay.
        for later in range(at, len(trace)):
            if trace[later] == index:
                self._position = later + 1
                return

    def ahead(self) -> Iterator[int]:
        """What is expected next, in order."""
        return iter(self.trace[self._position :])

    def finish(self) -> None:
        """The pass is over."""
        left = self.mode is Mode.INVALID or (self.mode is Mode.COMPLETE and self._position < len(self.trace))
        if self._now:
            if left:
                self.rerecorded += 1
            if left or self.mode is Mode.RECORD:
                self.trace = tuple(self._now)
            self.mode = Mode.COMPLETE
        self._now, self._position = [], 0
