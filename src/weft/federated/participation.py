"""How long clients need, and in which share of the aggregations they take part: declared at first, then counted.

    time_i     mean of what was measured, as soon as RELIABLE results have come; what the client declared until then; where it
               declared nothing, what was measured so far, or the mean of the others but at least as long as it is out already
    share_i    (m - 1)/(n_m - n_1) once RELIABLE cycles are over, with n_1 and n_m the aggregations of client i's first and m-th
               participation: one over the mean number of aggregations from one to the next, whatever law the times follow
               (renewal theorem). The schedule's own formula for the times above until then.

Counting from the first participation on, and not from the start, leaves out how all clients start at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

__all__ = ["RELIABLE", "Participation"]

RELIABLE = 5  # results of a client before its counts are believed over the declared speed
UNKNOWN = 1e-9  # seconds, where nobody's time is known: as if all were equally fast and in time for every round


@final
class Participation:
    """The books on clients 0 .. n - 1; `declared` in seconds, NaN where a client said nothing."""

    def __init__(self, declared: Sequence[float]):
        self.declared = list(declared)
        self.results = [0] * len(self.declared)  # results measured, used or not
        self.seconds = [0.0] * len(self.declared)  # their sum
        self.count = [0] * len(self.declared)  # participations
        self.first = [0] * len(self.declared)  # aggregation of the first
        self.last = [0] * len(self.declared)  # and of the last

    def measured(self, client: int, seconds: float) -> None:
        """A result has come `seconds` after the model was sent."""
        self.results[client] += 1
        self.seconds[client] += seconds

    def took_part(self, client: int, aggregation: int) -> None:
        if not self.count[client]:
            self.first[client] = aggregation
        self.count[client] += 1
        self.last[client] = aggregation

    def time(self, client: int) -> float:
        """Seconds that a client needs, NaN if nothing is known yet."""
        if self.results[client] >= RELIABLE or (self.results[client] and math.isnan(self.declared[client])):
            return self.seconds[client] / self.results[client]
        return self.declared[client]

    def longest(self, client: int) -> float:
        """What a client was ever thought to need, 0 if nothing is known: to tell who is slow, not to compute with."""
        measured = self.seconds[client] / self.results[client] if self.results[client] else 0.0
        return max(measured, 0.0 if math.isnan(self.declared[client]) else self.declared[client])

    def times(self, out: Sequence[float]) -> list[float]:
        """Seconds that each client needs, guessed where nothing is known; `out`: seconds since each was sent its model."""
        times = [self.time(client) for client in range(len(self.declared))]
        known = [t for t in times if not math.isnan(t)]
        mean = sum(known) / len(known) if known else UNKNOWN
        return [
            max(mean, out[i]) if known and math.isnan(t) else mean if math.isnan(t) else t for i, t in enumerate(times)
        ]

    def share(self, client: int, prior: float) -> float:
        """The share of aggregations that a client takes part in; call it after `took_part`."""
        cycles = self.count[client] - 1
        if cycles >= RELIABLE:
            return cycles / (self.last[client] - self.first[client])
        return prior

    def reliable(self, client: int) -> bool:
        """Whether `share` needs no prior."""
        return self.count[client] > RELIABLE
