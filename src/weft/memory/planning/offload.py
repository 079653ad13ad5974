"""Activations that wait in a lower tier: which, and when they are copied there and back.

Problem    a gap of a `Retention` may be spent in host memory or on a disk instead of being kept or rebuilt. The copies take
           link time, which is free as long as the device computes meanwhile and nobody else uses the link.
Method     the link is a time line on the clock of the step; each trip books two free stretches of it, the first after the
           value's last use and the last before its next one                                               `_Link`
           `unload`   trips that cost nothing, largest byte x time first, until a budget is met (or nothing is left to send)
           `exchange` of what is rebuilt, the dearest per second of copying first, send instead whatever lowers the seconds:
                      for nothing where the link is free in time, else by waiting 2 (latency + bytes / bandwidth);
                      what the device itself spends on a copy (`Tier.overlap`) it spends in any case
           `press`    trips that the step waits for, where the budget cannot be met otherwise
           `recall`   trips that are not needed in the end are taken back
           what a set of trips costs is found by running the two clocks of `check` over them                 `seconds`
Guarantee  the budget holds as for any plan: a value counts while it is copied. Bookings are made on the clock of the step
           without repetitions, so that copies have at least the time that they were given.
Source     the three-way choice keep / recompute / offload: Rajbhandari et al., "ZeRO-Infinity", SC 2021 (arXiv:2104.07857) for
           the bandwidth model; the booking is ours.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from typing import final

import numpy as np

from weft.memory.planning.check import Tier
from weft.memory.planning.retention import Retention, Trip

__all__ = ["Offload"]


@final
class Offload:
    """Trips of the values of one plan to one tier.

    Args:
        grain: values of fewer bytes stay.
    """

    def __init__(self, plan: Retention, tier: Tier, grain: int):
        self.plan, self.tier, self.grain = plan, tier, grain
        shape = plan.shape
        # when each stage begins if nothing is repeated: copies have at least as much time as between these
        self.clock = np.concatenate(([0.0], np.cumsum(shape.seconds))).tolist()
        self.link = _Link()
        self.held = np.zeros(shape.end + 1)  # bytes in the tier, per stage
        self.booked: dict[int, tuple[Trip, list[tuple[float, float]]]] = {}
        for v, trip in plan.trips.items():
            self._book(v, trip, self._copies(v, trip.start, trip.stop) or [])

    def unload(self, budget: int) -> None:
        """Send away for nothing what covers most of the excess over `budget`, until there is none."""
        plan, shape = self.plan, self.plan.shape
        gaps = [(v, a, b) for v, a, b in self._gaps() if b - a > 2]
        until = np.zeros(shape.end + 2)
        while gaps:
            excess = np.maximum(plan.peaks() - budget, 0)
            if not excess.any():
                return
            np.cumsum(excess > 0, out=until[1:])
            gaps = [gap for gap in gaps if plan.is_kept(*gap) and gap[0] not in plan.trips]
            gaps.sort(key=lambda gap: -shape.bytes[gap[0]] * (until[gap[2]] - until[gap[1] + 1]))
            while gaps:
                v, start, stop = gaps.pop(0)
                if until[stop] > until[start + 1] and self._send(v, start, stop, waiting=False):
                    break

    def exchange(self, budget: int) -> None:
        """Send away instead of rebuilding wherever that lowers the seconds within `budget`."""
        plan, shape = self.plan, self.plan.shape
        found = []
        for v, stop in plan.rebuilt():
            start = plan.before(v, stop)
            if self._may_go(v, start, stop) and shape.keepable(v, start, stop):
                found.append((-shape.effort[shape.recipe[v]] / self.tier.seconds(shape.bytes[v]), v, start, stop))
        seconds = self.seconds()
        for _, v, start, stop in sorted(found):
            if stop not in plan.reasons[v] or stop in plan.kept[v] or v in plan.trips or plan.before(v, stop) != start:
                continue
            for waiting in (False, True):
                mark = plan.mark()
                plan.keep(v, stop)
                if not plan.is_kept(v, start, stop) or not self._send(v, start, stop, waiting):
                    plan.undo(mark)
                elif plan.peaks().max() <= budget and self.seconds() < seconds - 1e-12:
                    seconds = self.seconds()
                    break
                else:
                    plan.undo(mark)
                    self._unbook(v)

    def press(self, budget: int) -> None:
        """Send away whatever is above `budget`, and wait for the copies, the largest first."""
        plan, shape = self.plan, self.plan.shape
        gaps = [*self._gaps(), *((v, trip.start, trip.stop) for v, trip in plan.trips.items())]
        for v, start, stop in sorted(gaps, key=lambda gap: (-shape.bytes[gap[0]], gap)):
            if not ((plan.peaks() - budget)[start + 1 : stop] > 0).any():
                continue
            if v in plan.trips:
                plan.recall(v)
                self._unbook(v)
            if plan.is_kept(v, start, stop):
                self._send(v, start, stop, waiting=True)

    def seconds(self) -> float:
        """Of repetitions and of waiting for copies, as the judge counts them."""
        plan, shape = self.plan, self.plan.shape
        repeated = [0.0]  # seconds of repetitions before each stage
        for wanted in plan.again:
            repeated.append(repeated[-1] + sum(shape.effort[op] for op in wanted))
        leave, gone, back, needed = (defaultdict(list) for _ in range(4))
        for v, trip in sorted(plan.trips.items()):
            leave[trip.leave].append(v)
            gone[trip.gone].append(v)
            back[trip.back].append(v)
            needed[plan.stages[v][bisect_left(plan.stages[v], trip.back + (trip.back < trip.stop))]].append(v)
        waited = link = 0.0
        hidden = self.tier.hidden
        done: dict[int, float] = {}  # when the copy asked for last is complete
        for stage in sorted({*leave, *gone, *back, *needed}):
            now = self.clock[stage] + repeated[stage] + waited
            for v in back[stage]:
                seconds = self.tier.seconds(shape.bytes[v])
                now, waited = now + (1.0 - hidden) * seconds, waited + (1.0 - hidden) * seconds
                link = done[v] = max(link, now, done[v]) + hidden * seconds
            late = max((done[v] - now for v in needed[stage]), default=0.0)
            now += max(late, 0.0) + repeated[stage + 1] - repeated[stage] + shape.seconds[stage]
            for v in leave[stage]:
                seconds = self.tier.seconds(shape.bytes[v])
                now, waited = now + (1.0 - hidden) * seconds, waited + (1.0 - hidden) * seconds
                link = done[v] = max(link, now) + hidden * seconds
            late_again = max((done[v] - now for v in gone[stage]), default=0.0)
            waited += max(late, 0.0) + max(late_again, 0.0)
        return plan.seconds + waited

    def recall(self, budget: int) -> None:
        """Take back the trips without which the plan stays within `budget`."""
        plan = self.plan
        for v in sorted(plan.trips, key=lambda v: -plan.shape.bytes[v]):
            mark = plan.mark()
            plan.recall(v)
            if plan.peaks().max() <= budget:
                self._unbook(v)
            else:
                plan.undo(mark)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _may_go(self, v: int, start: int, stop: int) -> bool:
        """Whether the gap lies between two uses by the program: those stay where they are whatever is rebuilt."""
        shape = self.plan.shape
        if v in self.plan.trips or shape.bytes[v] < self.grain or shape.born[v] < 0 or stop >= shape.end:
            return False
        return stop in shape.uses[v] and (start == shape.born[v] or start in shape.uses[v])

    def _gaps(self) -> list[tuple[int, int, int]]:
        plan, found = self.plan, []
        for v, stops in enumerate(plan.kept):
            if stops and plan.shape.bytes[v] >= self.grain:
                found += [(v, plan.before(v, stop), stop) for stop in stops]
        return [gap for gap in found if self._may_go(*gap)]

    def _copies(self, v: int, start: int, stop: int) -> list[tuple[float, float]] | None:
        """Two free stretches of the link: the first after `start`, the last before `stop`."""
        seconds = self.tier.hidden * self.tier.seconds(self.plan.shape.bytes[v])
        out = self.link.first(self.clock[start + 1], seconds)
        back = self.link.last(self.clock[stop], seconds)
        if back is None or back < out + seconds:
            return None
        return [(out, out + seconds), (back, back + seconds)]

    def _send(self, v: int, start: int, stop: int, waiting: bool) -> bool:
        """Give `v` a trip in a kept gap, with the step waiting for both copies or for none; False if that cannot be."""
        size = self.plan.shape.bytes[v]
        if waiting:
            trip, copies = Trip(start, start, start, stop, stop), []
        else:
            copies = self._copies(v, start, stop) or []
            if not copies:
                return False
            leave = max(
                bisect_right(self.clock, copies[0][0] + 1e-15) - 2, start
            )  # the last to end before the copy begins
            gone = max(
                bisect_left(self.clock, copies[0][1] - 1e-15) - 1, start
            )  # the stage during which the copy is done
            back = min(
                bisect_right(self.clock, copies[1][0] + 1e-15) - 1, stop
            )  # the last to begin before the load does
            if not leave <= gone < back:
                return False
            trip = Trip(start, leave, gone, back, stop)
        if self.held[start : stop + 1].max() + size > self.tier.capacity:
            return False
        self.plan.send(v, trip)
        self._book(v, trip, copies)
        return True

    def _book(self, v: int, trip: Trip, copies: list[tuple[float, float]]) -> None:
        self.booked[v] = (trip, copies)
        self.held[trip.start : trip.stop + 1] += self.plan.shape.bytes[v]
        for copy in copies:
            self.link.book(copy)

    def _unbook(self, v: int) -> None:
        trip, copies = self.booked.pop(v)
        self.held[trip.start : trip.stop + 1] -= self.plan.shape.bytes[v]
        for copy in copies:
            self.link.free(copy)


@final
class _Link:
    """When a link is taken: disjoint stretches of time, in order."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []

    def book(self, stretch: tuple[float, float]) -> None:
        insort(self.taken, stretch)

    def free(self, stretch: tuple[float, float]) -> None:
        self.taken.remove(stretch)

    def first(self, after: float, seconds: float) -> float:
        """The earliest moment not before `after` at which `seconds` are free."""
        place = max(bisect_right(self.taken, (after, float("inf"))) - 1, 0)
        for begin, end in self.taken[place:]:
            if begin >= after + seconds:
                break
            after = max(after, end)
        return after

    def last(self, before: float, seconds: float) -> float | None:
        """The latest moment from which `seconds` are free and end by `before`; None if there is none."""
        for begin, end in reversed(self.taken[: bisect_right(self.taken, (before, float("inf")))]):
            if end <= before - seconds:
                break
            before = min(before, begin)
        return before - seconds if before >= seconds else None
