"""Search for the cheapest plan within a budget.

Problem    choose which gaps of a `Retention` to keep so that no stage's peak exceeds the budget and repetitions cost little:
           a knapsack with one constraint per stage, whose prices change with every choice.
Method     `descend`  greedy: of all kept gaps, give up the one with the least
                          seconds to rebuild / (its bytes x weight of the stages it covers - the same of what must be held for it)
                      where only stages above the budget have weight; again until none is. When no gap helps at once, the
                      least harmful one goes and a few more tries follow.
           `fill`     the reverse: keep again whatever fits, the dearest per byte and stage first.
           `search`   large neighbourhood search: take a few decisions back (single rebuilds, those of one stage, those of a
                      run of operators) or force new ones, repair with a randomised `descend` and `fill`, and accept what is
                      cheaper or, early on, a little dearer.
           `Ladder`   `descend` to smaller and smaller budgets until it fails: every plan on the way is remembered, the last
                      one needs the least budget known.
Guarantee  each returns a plan within its budget or says that it failed; none is optimal (see `optimum`). All are deterministic:
           random draws are seeded, and what bounds them is `Retention.work`, never a clock.
Source     neighbourhoods: Shaw, "Using constraint programming and local search methods to solve vehicle routing problems", CP
           1998; the ratio is that of greedy knapsack with Lagrangian weights; the combination is ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator
from typing import NamedTuple, final

import numpy as np

from weft.memory.planning.ranges import most_between
from weft.memory.planning.retention import Retention

__all__ = ["Gaps", "Ladder", "descend", "fill", "search"]

INF = float("inf")
STEP = 0.8  # share of its peak that a rung of the ladder is from the one above, where that can be reached
FINEST = 0.998  # no steps shorter than this
DEAR = 1.1  # a repair that has come to cost so many times what was there before is given up
ENTAILED = 1000  # changes that keeping one value may entail where it is only tried


@final
class Gaps:
    """Kept gaps that may be given up, as parallel arrays, and what each was last found to cost."""

    def __init__(self, plan: Retention, grain: int):
        self.plan, self.grain = plan, grain
        self.items: list[tuple[int, int, int]] = []  # (value, from, until)
        self.slot: dict[tuple[int, int, int], int] = {}
        self.first, self.stop = (
            np.zeros(64, np.int64),
            np.zeros(64, np.int64),
        )  # the stages that it weighs upon: [first, stop)
        self.bytes, self.effort, self.cost = np.zeros(64), np.zeros(64), np.zeros(64)
        self.share = np.ones(64)  # of its bytes x weight, what is left after what must be held for rebuilding it
        self._turn = 0
        plan.fresh.clear()
        self._add(plan.droppable(grain))

    def _add(self, gaps: Collection[tuple[int, int, int]]) -> None:
        shape, slot = self.plan.shape, self.slot
        if len(self.items) + len(gaps) > len(self.first):
            for name in ("first", "stop", "bytes", "effort", "cost", "share"):
                old = getattr(self, name)
                new = np.ones(2 * (len(self.items) + len(gaps)), old.dtype)
                new[: len(old)] = old
                setattr(self, name, new)
        for gap in gaps:
            n, (v, start, stop) = slot.get(gap), gap
            if n is None:
                n = slot[gap] = len(self.items)
                self.items.append(gap)
                # what was rebuilt at `start` only to be kept leaves during that stage already
                self.first[n] = start if start > shape.born[v] else start + 1
                self.stop[n], self.bytes[n], self.cost[n] = stop, shape.bytes[v], INF
                self.effort[n] = shape.effort[shape.recipe[v]]
            if self.cost[n] == INF:
                self.cost[n], self.share[n] = self.effort[n], 1.0

    def update(self) -> None:
        """Take in the gaps that came to be since last time."""
        plan, shape, grain = self.plan, self.plan.shape, self.grain
        if plan.fresh:
            found = [
                gap
                for gap in plan.fresh
                if gap[0] not in plan.trips
                and shape.bytes[gap[0]] >= grain
                and gap[2] <= shape.rebuildable[gap[0]]
                and plan.is_kept(*gap)
            ]
            plan.fresh.clear()
            self._add(found)

    def relax(self, part: int = 1) -> None:
        """Of every `part`-th gap forget what it was found to cost: prices only rise until they are looked up anew."""
        self._turn = (self._turn + 1) % part
        some = slice(self._turn, len(self.items), part)
        self.cost[some] = np.where(self.cost[some] < INF, self.effort[some], INF)
        self.share[some] = 1.0
        self.plan.work += len(self.items) // (50 * part)

    def scores(self, until: np.ndarray) -> np.ndarray:
        """Seconds per byte and weight of each gap, as last known; `until[t]` is the weight of the stages before t."""
        n = len(self.items)
        gain = self.bytes[:n] * (until[self.stop[:n]] - until[self.first[:n]]) * self.share[:n]
        return np.where(gain > 0, self.cost[:n] / np.maximum(gain, 1e-30), INF)

    def score(self, n: int, until: np.ndarray) -> float:
        """The same of one gap as it is now."""
        plan, size = self.plan, self.plan.shape.bytes
        v, start, stop = self.items[n]
        if not plan.is_kept(v, start, stop):
            self.cost[n] = INF
            return INF
        self.cost[n], held = plan.price(v, stop)
        gross = size[v] * (until[stop] - until[self.first[n]])
        net = gross - sum(size[u] * (until[later] - until[stop]) for u, later in held)
        self.share[n] = net / gross if net > 0 else 1e-9  # looked at again when nothing else is left
        return self.cost[n] / net if net > 0 else INF


def descend(
    plan: Retention,
    gaps: Gaps,
    budget: int,
    *,
    power: float = 0.0,
    noise: np.random.Generator | None = None,
    spread: float = 0.0,
    banned: Collection[int] = (),
    patience: int = 0,
    work: float = INF,
    dear: float = INF,
) -> bool:
    """Give up gaps until no stage needs more than `budget`.

    Args:
        power: a stage above the budget weighs (bytes above it) ** power.
        noise, spread: scores are multiplied by exp(spread x a normal draw).
        banned: values whose gaps stay.
        patience: how many moves that make things worse may follow each other.
        work: stop when `plan.work` has come so far. dear: stop when `plan.seconds` have.
    Returns:
        whether it succeeded; if not, the plan is left as far down as it came.
    """
    gaps.update()
    excess = plan.excess(budget)
    total = least = int(excess.sum())
    low, waited, hopeless, fresh = plan.mark(), 0, set(), True  # hopeless: tried in vain; fresh: nothing helped since
    until = np.zeros(len(excess) + 1)
    while total > 0:
        np.cumsum(excess > 0 if power == 0 else excess.astype(float) ** power, out=until[1:])
        score = gaps.scores(until)
        if spread and noise is not None:
            score *= np.exp(noise.normal(0.0, spread, len(score)))
        if hopeless:
            score[list(hopeless)] = INF
        moved, after = _give_up(plan, gaps, budget, score, until, total, banned, hopeless)
        if not moved and hopeless and not fresh:
            hopeless.clear()  # things have changed since these were tried
            fresh = True
            continue
        if not moved and waited < patience:
            moved, after = _least_harm(plan, gaps, budget, gaps.scores(until), banned)
            waited += 1
        if not moved or plan.work > work or plan.seconds > dear:
            plan.undo(low)
            return False
        excess = after
        total = int(excess.sum())
        if total < least:
            least, low, waited, fresh = total, plan.mark(), 0, False
        gaps.update()
    return True


def _give_up(
    plan: Retention,
    gaps: Gaps,
    budget: int,
    score: np.ndarray,
    until: np.ndarray,
    total: int,
    banned: Collection[int],
    hopeless: set[int],
) -> tuple[bool, np.ndarray]:
    """Drop the gap of best score that lowers the excess `total`; those that do not are added to `hopeless`.

    Returns:
        whether one was dropped, and the excess of each stage then.
    """
    known: set[int] = set()
    plan.work += 4 + len(score) // 200
    while len(score):
        n = int(score.argmin())
        if score[n] == INF:
            break
        v, _, stop = gaps.items[n]
        if v in banned:
            score[n] = INF
            continue
        if n not in known:
            known.add(n)
            now = gaps.score(n, until)
            if now > score[n] * 1.0001:
                score[n] = now
                continue
        mark = plan.mark()
        plan.drop(v, stop)
        after = plan.excess_below(total, budget)
        if after is not None:
            gaps.cost[n] = INF
            return True, after
        plan.undo(mark)
        score[n] = INF
        hopeless.add(n)
    return False, until


def _least_harm(
    plan: Retention, gaps: Gaps, budget: int, score: np.ndarray, banned: Collection[int], tries: int = 8
) -> tuple[bool, np.ndarray]:
    """Of the `tries` gaps of best score drop the one after which least is above the budget."""
    found: list[tuple[int, int]] = []
    for n in np.argsort(score, kind="stable")[: 4 * tries].tolist():
        v, start, stop = gaps.items[n]
        if score[n] == INF or v in banned or not plan.is_kept(v, start, stop):
            continue
        mark = plan.mark()
        plan.drop(v, stop)
        found.append((int(plan.excess(budget).sum()), n))
        plan.undo(mark)
        if len(found) == tries:
            break
    if not found:
        return False, score
    n = min(found)[1]
    plan.drop(gaps.items[n][0], gaps.items[n][2])
    gaps.cost[n] = INF
    return True, plan.excess(budget)


def fill(plan: Retention, budget: int, work: float = INF) -> None:
    """Keep again what was given up, wherever there is room and it saves time. The plan is within `budget` before and after.

    Args:
        work: stop when `plan.work` has come so far.
    """
    shape, saved, vain = plan.shape, True, set()  # vain: gaps kept in vain
    while saved:
        saved = False
        gaps = [(v, plan.before(v, stage), stage) for v, stage in plan.rebuilt()]
        plan.work += len(gaps) // 4
        gaps = [gap for gap in gaps if gap not in vain and shape.keepable(*gap)]
        if not gaps:
            return
        values, starts, stops = np.array(gaps).T
        size = np.array([shape.bytes[v] for v in values.tolist()])
        fits = np.nonzero(most_between(plan.peaks(), starts + 1, stops) + size <= budget)[0]
        effort = np.array([shape.effort[shape.recipe[v]] for v in values.tolist()])
        worth = effort[fits] / np.maximum(size[fits] * (stops[fits] - starts[fits]), 1)
        for n in fits[np.argsort(-worth, kind="stable")].tolist():
            if plan.work > work:
                return
            if _keep_if_better(plan, gaps[n][0], gaps[n][2], budget):
                saved = True
            else:
                vain.add(gaps[n])


def _keep_if_better(plan: Retention, v: int, stage: int, budget: int) -> bool:
    if stage not in plan.reasons[v] or stage in plan.kept[v]:
        return False  # decided meanwhile, by another one
    start = plan.before(v, stage)
    if not plan.shape.keepable(v, start, stage):
        return False
    if plan.peaks()[start + 1 : stage].max(initial=0) + plan.shape.bytes[v] > budget:
        return False
    mark, seconds = plan.mark(), plan.seconds
    if plan.keep(v, stage, ENTAILED) and plan.seconds < seconds - 1e-12 and plan.excess_below(1, budget) is not None:
        return True
    plan.undo(mark)
    return False


def search(plan: Retention, gaps: Gaps, budget: int, work: int, seed: int = 0, heat: float = 0.003) -> None:
    """Improve a plan within `budget` for about `work` elementary steps; it ends as the best one met.

    Args:
        heat: share of the seconds of repetition by which an accepted plan may be dearer at first; falls to 0 at the end.
    """
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    begin, best, most = plan.work, plan.seconds, plan.work + work + work // 10
    plan.forget()
    while plan.work < begin + work:
        mark, seconds = plan.mark(), plan.seconds
        banned = _disturb(plan, gaps, draw)
        if banned is None:
            break
        gaps.relax(4)
        power, spread = draw.choice((0.0, 0.0, 0.5, 1.0)), draw.choice((0.0, 0.1, 0.3))
        fits = descend(
            plan,
            gaps,
            budget,
            power=power,
            noise=noise,
            spread=spread,
            banned=banned,
            patience=4,
            work=most,
            dear=DEAR * seconds,
        )
        if fits:
            fill(plan, budget, most)
        slack = heat * best * (1 - (plan.work - begin) / work) * draw.expovariate(1.0)
        if not fits or plan.seconds > seconds + max(slack, 1e-12):
            plan.undo(mark)
        elif plan.seconds < best - 1e-12:
            best = plan.seconds
            plan.forget()
    plan.undo(0)


def _disturb(plan: Retention, gaps: Gaps, draw: random.Random) -> set[int] | None:
    """Take some decisions back, or force some; returns the values concerned, or None if nothing is rebuilt."""
    shape = plan.shape
    items = [item for item in plan.rebuilt() if shape.bytes[item[0]] >= gaps.grain]
    plan.work += len(items) // 8
    if not items:
        return None
    kind, few = draw.randrange(4), draw.choice((1, 1, 2, 3, 5))
    v, stage = draw.choice(items)
    width = draw.choice((5, 10, 20, 40))
    low = shape.born[v] - draw.randrange(width)
    if kind == 0:
        chosen = draw.choices(items, [shape.effort[shape.recipe[u]] for u, _ in items], k=few)
    elif kind == 1:
        near = [item for item in items if abs(item[1] - stage) <= 10]
        chosen = draw.sample(near, min(few, len(near)))
    elif kind == 2:
        chosen = [item for item in items if low <= shape.born[item[0]] < low + width]
    else:
        return _force(plan, gaps, low, low + width)
    banned = set()
    for u, stop in chosen:
        if stop in plan.reasons[u] and stop not in plan.kept[u] and shape.keepable(u, plan.before(u, stop), stop):
            plan.keep(u, stop)
            banned.add(u)
    return banned


def _force(plan: Retention, gaps: Gaps, low: int, high: int) -> set[int]:
    """Give up the longest gap of every value made by operators `low` to `high`."""
    shape, banned = plan.shape, set()
    made = [u for op in range(max(low, 0), min(high, shape.end)) for u in shape.made[op]]
    for u in made:
        if plan.kept[u] and shape.bytes[u] >= gaps.grain and u not in plan.trips:
            length, stop = max((stop - plan.before(u, stop), stop) for stop in plan.kept[u])
            if length > 20 and stop <= shape.rebuildable[u] and plan.price(u, stop)[0] < INF:
                plan.drop(u, stop)
                banned.add(u)
    return banned


class Rung(NamedTuple):
    """A plan of a `Ladder`: its most bytes, the elementary steps that were done when it was reached, and itself."""

    peak: int
    work: int
    plan: Retention


@final
class Ladder:
    """Smaller and smaller plans of one step, made as they are asked for and the same whatever was asked for first.

    A step goes down by a fifth, filling up after it, and by less where that fails; a descent that fails but comes lower than
    before counts too, and the next one weighs stages another way. Where no way leads further down, another start is taken.

    Args:
        starts: plans to go down from, one after the other; they are used up.
        floor: bytes that no plan is below.
        work: about how many elementary steps each start may take.
    Attributes:
        rungs: from the largest to the smallest.
    """

    def __init__(self, starts: Iterator[Retention], grain: int, floor: int, work: int):
        self.starts, self.grain, self.floor, self.work = starts, grain, floor, work
        self.rungs: list[Rung] = []
        self._spent = 0  # elementary steps of the starts before this one
        self._begin(next(starts))

    def above(self, budget: int) -> Rung:
        """The lowest rung that takes more than `budget` bytes, as far down as steps of their usual length come."""
        while self._target() >= budget and self._descend():
            pass
        return next(rung for rung in reversed(self.rungs) if rung.peak > budget or rung is self.rungs[0])

    def lowest(self) -> Rung:
        """The last rung."""
        while self._descend():
            pass
        return self.rungs[-1]

    def _begin(self, plan: Retention) -> None:
        self.plan, self.gaps = plan, Gaps(plan, self.grain)
        self.peak, self.factor, self.power = int(plan.peaks().max()), STEP, 0.0
        plan.work = 0
        self._reached()

    def _reached(self) -> None:
        self.plan.forget()
        if not self.rungs or self.peak < self.rungs[-1].peak:
            self.rungs.append(Rung(self.peak, self._spent + self.plan.work, self.plan.copy()))

    def _target(self) -> int:
        return max(int(self.peak * self.factor), self.floor)

    def _descend(self) -> bool:
        """Try one step; False if there is no way further down."""
        if self.rungs[-1].peak <= self.floor:
            return False
        plan = self.plan
        if self.factor >= FINEST or plan.work >= self.work or self.peak <= self.floor:
            other = next(self.starts, None)
            if other is not None:
                self._spent += plan.work
                self._begin(other)
            return other is not None
        mark, target = plan.mark(), self._target()
        self.gaps.relax()
        fits = descend(plan, self.gaps, target, power=self.power, patience=12, work=self.work)
        if fits:
            fill(plan, target, self.work)
        else:
            self.factor, self.power = math.sqrt(self.factor), 1.0 - self.power
        reached = int(plan.peaks().max())
        if fits or reached < self.peak:
            self.peak = reached
            self._reached()
        else:
            plan.undo(mark)
            plan.fresh.clear()  # what was given up in vain is not given up again: the next descent goes another way
        return True
