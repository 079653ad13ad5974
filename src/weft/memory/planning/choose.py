"""From a trace and a number of bytes to a plan that fits: what is kept, rebuilt and moved away, and where everything lies.

Method     a budget below what a single operator needs is refused at once; a step that fits as it is, is left as it is;
           otherwise every start that fits (greedy descents, simulated policies, the smallest plan known) is a candidate, the
           cheapest is improved (`weft.memory.planning.improve`), gets addresses (`packing`) and is judged (`check`). The optimum
           of very small steps and, with a lower tier, plans that send values there (`offload`) are candidates as well.
Guarantee  what is returned has passed `check` and needs at most the budget, arena included. The search is a heuristic and is
           bounded by counted work, not by a clock: the same trace and budget give the same plan on every machine.
           Plans of the last few traces are remembered: one that needs no more and costs less than a new one takes its
           place. `frontier` makes plans from the least budget up, so that more bytes never cost more seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import final

from weft.cluster.units import quantity
from weft.errors import BudgetError
from weft.graph.capture import rarely_collecting
from weft.memory.core.policy import POLICIES, Greedy, Policy
from weft.memory.core.simulate import simulate
from weft.memory.planning import improve
from weft.memory.planning.check import Tier, check
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.planning.offload import Offload
from weft.memory.planning.optimum import optimum
from weft.memory.planning.packing import place
from weft.memory.planning.retention import Retention
from weft.memory.planning.shape import Shape
from weft.memory.record import Trace
from weft.memory.schedule import Schedule
from weft.names import pick

__all__ = ["MemoryPlan", "frontier", "least", "plan"]

WORK_PER_SECOND = 200_000  # elementary steps of `Retention` in a second, on a core of 2020
USUAL = 0.2  # seconds of search per 650 operators
LONGEST = 2.0  # seconds of search unless more is asked for
MANY = 1500  # operators from which on policies are not simulated, but for one that is quick and not told about
QUICK = Greedy(paged=True, ahead=0.01)
HOPELESS = 2  # a start that costs so many times the best one is no better either when it is filled up
REPAIR = 200_000  # elementary steps at most for making a plan a little smaller
SMALL = 14  # operators up to which the optimum is looked for, too
GRAIN = 20_000  # values smaller than this part of the peak are never given up

Rows = tuple[tuple[str, float], ...]


def plan(
    trace: Trace,
    budget: int | str | None = None,
    *,
    policies: Sequence[str] | None = None,
    effort_seconds: float | None = None,
    tier: Tier | None = None,
) -> MemoryPlan:
    """The cheapest way found to run a step within a budget.

    Args:
        trace: the step; what is held elsewhere is left out by `trace.without(...)`.
        budget: bytes, or text such as "6 GiB", for everything on the device at once. None: no limit; nothing is recomputed.
        policies: names of `weft.memory.core.POLICIES` to simulate; their plans are starts of the search, and their costs are
            told. By default the pager's for steps of up to 1500 operators, and none above.
        effort_seconds: of searching, about; counted in elementary steps, so that plans are reproducible. By default 0.2 s per
            650 operators, 2 s at most.
        tier: lower tier that activations may be moved to.
    Raises:
        BudgetError: no way is known to run the step within the budget; it names the least budget for which one is.
        ValueError: `budget` is neither a number of bytes nor text that says one; a policy is unknown.
    """
    limit = _bytes(budget)
    names = tuple(policies) if policies is not None else (("pager",) if len(trace.ops) <= MANY else ())
    for name in names:
        pick(name, POLICIES, "policy")
    if effort_seconds is None:
        effort_seconds = min(USUAL * max(len(trace.ops) / 650, 1.0), LONGEST)
    with rarely_collecting():
        desk = _desk(trace, tier)
        if limit is None:
            schedule = place(trace, Retention(desk.shape).schedule(), 0, desk.align)
            return desk.judged(0, schedule, "nothing has to go")
        return desk.solve(limit, names, int(effort_seconds * WORK_PER_SECOND))


def frontier(trace: Trace, budgets: Iterable[int | str], **options: object) -> list[MemoryPlan | None]:
    """A plan for each budget, in their order; None where there is none. More bytes never cost more seconds.

    Args:
        options: as for `plan`.
    """
    limits = [_bytes(budget) or 0 for budget in budgets]
    plans: dict[int, MemoryPlan | None] = {}
    best: MemoryPlan | None = None
    for limit in sorted(set(limits)):
        try:
            found = plan(trace, limit, **options)  # type: ignore[arg-type]
        except BudgetError:
            plans[limit] = None
            continue
        best = found if best is None or found.seconds < best.seconds else replace(best, budget=limit)
        plans[limit] = best
    return [plans[limit] for limit in limits]


def least(trace: Trace, tier: Tier | None = None) -> int:
    """The least budget in bytes, arena included, for which `plan` finds a way."""
    with rarely_collecting():
        return _desk(trace, tier).least()


# -- parts ----------------------------------------------------------------------------------------------------------------


def _bytes(budget: int | str | None) -> int | None:
    if budget is None:
        return None
    try:
        limit = quantity(budget, "bytes")
        if not 0 <= limit < float("inf"):
            raise ValueError(f"must be a number of bytes >= 0, got {budget!r}")
    except ValueError as error:
        raise ValueError(f"budget: {error}") from None
    return int(limit)


@final
class _Desk:
    """All that is known about planning one trace: its shape, the plans made so far, the smallest among them."""

    def __init__(self, trace: Trace, tier: Tier | None):
        self.tier = tier
        self.align = 64 if trace.device == "cpu" else 512
        self.shape = Shape(trace, arena=True, align=self.align)
        self.grain = max(trace.peak // GRAIN, 1)
        self.plans: list[MemoryPlan] = []
        self.smallest: Retention | None = None

    def judged(self, limit: int, schedule: Schedule, method: str, rows: Rows = ()) -> MemoryPlan:
        checked = check(self.shape.trace, schedule, self.tier)
        return MemoryPlan(self.shape.trace, limit, schedule, checked, method, self.tier, rows)

    def solve(self, limit: int, policies: Sequence[str], work: int) -> MemoryPlan:
        """The cheapest plan found for `limit` bytes, now or earlier."""
        trace, shape = self.shape.trace, self.shape
        floor, worst = self.floor()
        if floor > limit:
            raise BudgetError(limit, self.least(), self._too_much(worst, floor))
        whole = Retention(shape)
        if whole.peaks().max() <= limit or trace.peak <= limit:
            schedule = place(trace, whole.schedule(), limit - shape.outside, self.align)
            if schedule.arena + shape.outside <= limit:
                return self.judged(limit, schedule, "nothing has to go")
            if trace.peak <= limit:  # too little to round sizes up in an arena, but enough as it is
                return self.judged(limit, whole.schedule(), "nothing has to go, bytes are counted")
        done = {name: self._simulated(limit, POLICIES[name]) for name in policies}
        rows = tuple((name, cost) for name, (cost, _) in done.items())
        starts = {name: schedule for name, (_, schedule) in done.items() if schedule is not None}
        for target in (limit, limit - limit // 50, limit - limit // 20):  # less, if no addresses are found
            state, method, spent = self._start(target, starts, work)
            if state is None:
                break
            improve.search(state, improve.Gaps(state, self.grain), target, max(work - spent, work // 2))
            schedule = self._placed(state, limit)
            if schedule is not None:
                self.plans.append(self.judged(limit, schedule, f"{method}, improved", rows))
                break
        if self.tier is not None:
            self._offloaded(limit, state)
        elif shape.end <= SMALL:
            self._exact(limit)
        fitting = [found for found in self.plans if found.reserved <= limit]
        if not fitting:
            self.least()  # makes the smallest plan, one of `plans`
            fitting = [found for found in self.plans if found.reserved <= limit]
        if not fitting:
            raise BudgetError(limit, self.least(), "no order of dropping and recomputing is known that stays below it")
        return replace(min(fitting, key=lambda found: found.seconds), budget=limit, policies=rows)

    def least(self) -> int:
        """Bytes of the smallest plan known."""
        if self.smallest is None:
            work = max(250_000, 200 * self.shape.end)
            self.smallest = improve.smallest(self.shape, self.grain, self.floor()[0], work)
            self._keep_small(self.smallest, "smallest plan")
            if self.tier is not None:
                state = Retention(self.shape)
                trips = Offload(state, self.tier, self.grain)
                trips.unload(self.floor()[0])
                trips.press(self.floor()[0])
                improve.step_down(state, improve.Gaps(state, self.grain), self.floor()[0], state.work + work)
                self._keep_small(state, "smallest plan, offloading")
        return min(found.reserved for found in self.plans)

    def _keep_small(self, state: Retention, method: str) -> None:
        tries = max(5, min(48, 200_000_000 // (self.shape.end + 1) ** 2))  # first fit takes quadratic time
        schedule = place(self.shape.trace, state.schedule(), 0, self.align, tries=tries)
        self.plans.append(self.judged(0, schedule, method))

    def _offloaded(self, limit: int, rebuilt: Retention | None) -> None:
        """Plans that send values to the lower tier: before anything is rebuilt, and instead of what `rebuilt` rebuilds."""
        first = Retention(self.shape)
        Offload(first, self.tier, self.grain).unload(limit)
        tries = [(first, "free copies first"), *([(rebuilt, "recomputation exchanged for copies")] if rebuilt else [])]
        for state, method in tries:
            if not improve.descend(
                state, improve.Gaps(state, self.grain), limit, patience=12, work=state.work + 200_000
            ):
                Offload(state, self.tier, self.grain).press(limit)
                if not improve.descend(
                    state, improve.Gaps(state, self.grain), limit, patience=12, work=state.work + 200_000
                ):
                    continue
            improve.fill(state, limit)
            trips = Offload(state, self.tier, self.grain)
            trips.exchange(limit)
            improve.fill(state, limit)
            trips.recall(limit)
            schedule = self._placed(state, limit)
            if schedule is not None:
                self.plans.append(self.judged(limit, schedule, method))

    def _exact(self, limit: int) -> None:
        """Remember the optimum, if it is found soon and can be placed."""
        try:
            schedule = optimum(self.shape.trace, limit, nodes=1000)
        except (BudgetError, RuntimeError):
            return
        schedule = place(self.shape.trace, schedule, limit - self.shape.outside, self.align)
        found = self.judged(limit, schedule, "exact")
        if found.reserved <= limit:
            self.plans.append(found)

    def floor(self) -> tuple[int, int]:
        """Bytes that a single operator cannot do without, and which operator (-1: what is always there)."""
        shape = self.shape
        needs = [
            int(shape.fixed[op]) + shape.own[op] + sum(shape.bytes[v] for v in shape.inputs[op])
            for op in range(shape.end)
        ]
        fixed = int(shape.fixed.max())
        most = max(needs, default=fixed)
        return (most, needs.index(most)) if most > fixed else (fixed, -1)

    def _too_much(self, op: int, floor: int) -> str:
        if op < 0:
            return f"parameters, gradients, inputs and what else cannot go take {floor} bytes"
        name, module = self.shape.trace.ops[op].name, self.shape.trace.ops[op].module
        where = f" of {module}" if module else ""
        return f"{name}{where} alone takes {floor} bytes with what it reads, what it makes and what cannot go"

    def _simulated(self, limit: int, policy: Policy) -> tuple[float, Schedule | None]:
        """What a policy costs at this budget (-1: more than there is), and what it does."""
        try:
            done = simulate(self.shape.trace, limit, policy)
        except BudgetError:
            return -1.0, None
        return done.overhead, done.schedule

    def _start(self, limit: int, schedules: dict[str, Schedule], work: int) -> tuple[Retention | None, str, int]:
        """The cheapest of greedy descents, of what the policies did and of the smallest plan, each filled up to `limit`.

        Returns:
            it, how it was found, and how much work that took; as soon as that is `work`, the cheapest so far will do, but one
            descent is always tried.
        """
        best, method, spent = None, "", 0
        powers = {"descent": 0.0, "descent by excess": 1.0}
        descents = ("descent", "descent in steps", "descent by excess")
        simulated = schedules or (["quick pager"] if self.shape.end > MANY else [])
        order = (*simulated, *descents) if self.shape.end > MANY else (*descents, *simulated)
        for name in (*order, "smallest plan"):
            enough = spent > work and name != "descent"
            if best is not None and (enough or (name == "smallest plan" and self.smallest is None)):
                continue
            state = Retention(self.shape)
            # of the work: on a long step each may take all of it, and fail
            share = max(work - spent, work // 2)
            dear = best.seconds * HOPELESS if best is not None else float("inf")
            if name == "smallest plan":
                self.least()
                state = self.smallest.copy()
            elif name in simulated:
                schedule = schedules.get(name) or self._simulated(limit, QUICK)[1]
                if schedule is None:
                    continue
                state.adopt(schedule)
            gaps = improve.Gaps(state, self.grain)
            if name == "descent in steps" and not improve.step_down(state, gaps, limit, share):
                fits = False
            else:
                power = powers.get(name, 0.0)
                fits = improve.descend(state, gaps, limit, power=power, patience=12, work=state.work + share, dear=dear)
            if fits:
                improve.fill(state, limit, state.work + share)
                if best is None or state.seconds < best.seconds:
                    best, method = state, name
            spent += state.work
        return best, method, spent

    def _placed(self, state: Retention, limit: int) -> Schedule | None:
        """The plan with addresses; while they need more than `limit`, a smaller plan is made of it."""
        target = limit
        for attempt in range(8):
            room = limit - self.shape.outside
            schedule = place(
                self.shape.trace, state.schedule(), room, self.align, tries=max(5, min(12, 20_000 // self.shape.end))
            )
            excess = schedule.arena - room
            if excess <= 0:
                return schedule
            target = min(target, int(state.peaks().max())) - max(excess, attempt * limit // 200)
            if not improve.descend(
                state, improve.Gaps(state, self.grain), target, patience=12, work=state.work + REPAIR
            ):
                return None
            improve.fill(state, target, state.work + REPAIR)
        return None


_desks: dict[tuple[int, Tier | None], _Desk] = {}  # by id of a trace, which its desk keeps alive


def _desk(trace: Trace, tier: Tier | None) -> _Desk:
    key = (id(trace), tier)
    desk = _desks.get(key)
    if desk is None:
        desk = _desks[key] = _Desk(trace, tier)
        while len(_desks) > 8:
            del _desks[next(iter(_desks))]
    return desk
