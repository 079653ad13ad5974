"""When Python looks for garbage in cycles while a limit remembers steps.

Problem    a step that is remembered is some 20 objects an operator, which live until the backward pass is through. Python takes
           that for growth and looks at every object of the process (0.2 s with torch in it) every step or two: as long as
           everything else that is done online.
Method     new objects are looked at after some thousand operators (`YOUNG`), most of which have died by then; all objects
           between steps, and after so long that it takes at most `SHARE` of the time. (And at once where bytes are short, by
           `Succession`: what tensors in a cycle hold is of use to nobody.)
"""

from __future__ import annotations

import gc
import time
from typing import final

__all__ = ["Garbage"]

YOUNG = 100_000  # more objects made than died; a step without a limit hardly has any, since graphs are torch's own
SHARE = 0.02
NEVER = 1_000_000_000  # collections of the middle generation


@final
class Garbage:
    """Between `begin` and `end` collections are ours. A program that has switched them off does without, as before."""

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None  # the program's thresholds
        self._ours: tuple[int, int, int] | None = None
        self._next = 0.0  # not before that moment

    def begin(self) -> None:
        self._before = young, middle, _ = gc.get_threshold()
        self._ours = max(young, YOUNG) if young else 0, middle, NEVER
        gc.set_threshold(*self._ours)

    def end(self) -> None:
        """Thresholds are what they were, unless the program has set others since."""
        if self._before is not None and gc.get_threshold() == self._ours:
            gc.set_threshold(*self._before)
        self._before = None

    def between_steps(self) -> None:
        """Look at everything if it would be time without us, and has not taken too long of late."""
        before = self._before
        if before is None or gc.get_count()[2] <= before[2] or not gc.isenabled():
            return
        start = time.perf_counter()
        if start >= self._next:
            gc.collect()
            over = time.perf_counter()
            self._next = over + (over - start) / SHARE
