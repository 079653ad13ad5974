"""From a trace and a number of bytes to a plan that fits: what is kept, rebuilt and moved away, and where everything lies.

Method     a budget below what a single operator needs is refused at once; a step that fits as it is, is left as it is;
           otherwise every start that fits (greedy descents, checkpoints, simulated policies, the smallest plan known) is a
           candidate, the cheapest is improved (`weft.memory.planning.improve`), gets addresses (`packing`) and is judged
           (`check`). Where these fit only because values move while the step runs, somewhat smaller plans, which move less,
           are candidates too. The optimum of very small steps and, with a lower tier, plans that send values there (`offload`)
           are candidates as well.
Guarantee  what is returned has passed `check` and needs at most the budget, arena included. Without a lower tier every budget
           from `least` on is met: the smallest plan is a start, and a plan whose bytes fit finds addresses (`moving`). The
           search is a heuristic and is bounded by counted work, not by a clock: the same trace and budget give the same plan
           on every machine.
           Plans of the last few traces are remembered: one that needs no more and costs less than a new one takes its
           place. `frontier` makes plans from the least budget up, so that more bytes never cost more seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import final

from weft.cluster.units import nbytes_of
from weft.errors import BudgetError
from weft.graph.capture import rarely_collecting
from weft.memory.arguments import expect, shown
from weft.memory.core.core import MOVE_RATE
from weft.memory.core.policy import POLICIES, QUICK, Policy
from weft.memory.core.simulate import simulate
from weft.memory.planning import improve
from weft.memory.planning.check import Tier, check
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.planning.offload import Offload
from weft.memory.planning.optimum import optimum
from weft.memory.planning.packing import place
from weft.memory.planning.retention import Retention
from weft.memory.planning.segments import checkpoint
from weft.memory.planning.shape import Shape
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule
from weft.names import pick

__all__ = ["MemoryPlan", "frontier", "least", "plan"]

WORK_PER_SECOND = 200_000  # elementary steps of `Retention` in a second, on a core of 2020
USUAL = 0.2  # seconds of search per 650 operators
FEWEST = 0.05  # seconds of search: with less the first way down is hardly improved, and a smaller budget may cost less
LONGEST = 2.0  # seconds of search unless more is asked for
MANY = 1500  # operators from which on policies are not simulated, but for one that is quick and not told about
HOPELESS = 2  # a start that costs so many times the best one is no better either when it is filled up
EASY = 0.002  # moves that take no more than this share of the step are not worth looking for another plan
ATTEMPTS = 6  # at most, to find a smaller plan whose addresses need fewer moves
SHORT_STRIDE, LONG_STRIDE = 0.2, 0.5  # by which it is made smaller: of the bytes that addresses exceed the arena by
FEW = 300  # operators up to which short strides are taken and LOWER budgets tried: packing takes time by the square of them
LOWER = (0.98, 0.95, 0.9)  # shares of the budget to plan for as well, one after the other as long as ...
DEARER = 1.03  # ... addresses make the step take so many times what it would without
REPAIR = 200_000  # elementary steps at most for making a plan a little smaller
ON_LADDER = ("descent in steps", "smallest plan")  # starts that are rungs of the ladder
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
        effort_seconds: of searching, about, at least 0.05; counted in elementary steps, so that plans are reproducible. By
            default 0.2 s per 650 operators, 2 s at most.
        tier: lower tier that activations may be moved to.
    Raises:
        BudgetError: no way is known to run the step within the budget; it names the least budget for which one is.
        ValueError: `budget` is neither a number of bytes nor text that says one; a policy is unknown; `trace` or `tier` is none.
    """
    expect("plan: trace", trace, Trace)
    expect("plan: tier", tier, Tier, optional=True)
    limit = None if budget is None else nbytes_of(budget, "budget", least=0)
    if isinstance(policies, str):
        policies = [policies]
    names = tuple(policies) if policies is not None else (("pager",) if len(trace.ops) <= MANY else ())
    for name in names:
        pick(name, POLICIES, "policy")
    if effort_seconds is None:
        effort_seconds = min(USUAL * max(len(trace.ops) / 650, 1.0), LONGEST)
    with rarely_collecting():
        desk = _desk(trace, tier)
        if limit is None:
            schedule, _ = place(desk.shape.trace, Retention(desk.shape).schedule(), 0, desk.align)
            return desk.judged(0, schedule, "nothing has to go")
        return desk.solve(limit, names, int(max(effort_seconds, FEWEST) * WORK_PER_SECOND))


def frontier(trace: Trace, budgets: Iterable[int | str], **options: object) -> list[MemoryPlan | None]:
    """A plan for each budget, in their order; None where there is none. More bytes never cost more seconds.

    Args:
        options: as for `plan`.
    Raises:
        ValueError: as for `plan`, or `budgets` is one instead of several.
    """
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise ValueError(
            f"frontier: budgets must be several, as in [{budgets!r}], got {shown(budgets)}; plan takes one"
        )
    limits = [nbytes_of(budget, "budget", least=0) for budget in budgets]
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
    expect("least: trace", trace, Trace)
    expect("least: tier", tier, Tier, optional=True)
    with rarely_collecting():
        return _desk(trace, tier).least()


# -- parts ----------------------------------------------------------------------------------------------------------------


@final
class _Desk:
    """All that is known about planning one trace: its shape, the plans made so far, the smallest among them."""

    def __init__(self, trace: Trace, tier: Tier | None):
        self.tier = tier
        self.align = 64 if trace.device == "cpu" else 512
        self.shape = Shape(trace, arena=True, align=self.align)
        self.grain = max(trace.peak // GRAIN, 1)
        self.patience = max(60_000, 50 * self.shape.end)  # elementary steps for each way to the least budget
        self.plans: list[MemoryPlan] = []
        self.smallest: MemoryPlan | None = None

    def judged(self, limit: int, schedule: Schedule, method: str, rows: Rows = ()) -> MemoryPlan:
        checked = check(self.shape.trace, schedule, self.tier)
        return MemoryPlan(self.shape.trace, limit, schedule, checked, method, self.tier, rows)

    def solve(self, limit: int, policies: Sequence[str], work: int) -> MemoryPlan:
        """The cheapest plan found for `limit` bytes, now or earlier."""
        trace, shape = self.shape.trace, self.shape
        floor, worst = self.floor
        if floor > limit and trace.peak > limit:
            raise BudgetError(limit, self.least(), self._too_much(worst, floor))
        whole = Retention(shape)
        as_it_is = [Schedule(tuple(Action("run", op) for op in range(len(trace.ops))))] if trace.peak <= limit else []
        early = [whole.schedule()] if whole.peaks().max() <= limit else []  # what is not read again goes before it dies
        for order in as_it_is + early:
            schedule, top = place(trace, order, limit - shape.outside, self.align)
            if top + shape.outside <= limit:
                return self.judged(limit, schedule, "nothing has to go")
        for order in as_it_is:  # too little to round sizes up in an arena, but enough
            return self.judged(limit, order, "nothing has to go, bytes are counted")
        done = {name: self._simulated(limit, POLICIES[name]) for name in policies}
        rows = tuple((name, cost) for name, (cost, _) in done.items())
        starts = {name: schedule for name, (_, schedule) in done.items() if schedule is not None}
        state = self._rebuilding(limit, starts, rows, work)
        if self.tier is not None:
            self._offloaded(limit, state)
        elif shape.end <= SMALL:
            self._exact(limit)
        fitting = [found for found in self.plans if found.reserved <= limit]
        if not fitting and self.least() <= limit:  # with a lower tier that makes a plan
            fitting = [found for found in self.plans if found.reserved <= limit]
        if not fitting:
            raise BudgetError(limit, self.least(), "no order of dropping and recomputing is known that stays below it")
        return replace(min(fitting, key=lambda found: found.seconds), budget=limit, policies=rows)

    def _rebuilding(self, limit: int, starts: dict[str, Schedule], rows: Rows, work: int) -> Retention | None:
        """Remember a plan that rebuilds values and, while addresses make it much dearer, others that are made for fewer bytes.

        Returns:
            what the first gives up, None if no start comes as low as `limit`.
        """
        first, step = None, self.shape.trace.seconds
        for target, effort in ((limit, work), *((int(part * limit), work // 4) for part in LOWER)):
            state, method, spent = self._start(target, starts, effort)
            if state is None:
                break
            first = state if first is None else first
            improve.search(state, improve.Gaps(state, self.grain), target, max(effort - spent, effort // 2))
            hoped, schedule = step + state.seconds, self._placed(state, limit, effort // 3)
            if schedule is not None:
                self.plans.append(self.judged(limit, schedule, f"{method}, improved", rows))
            if self.shape.end > FEW or (schedule is not None and self.plans[-1].seconds <= DEARER * hoped):
                break
        return first

    def least(self) -> int:
        """The least bytes for which a plan is known; never more than the step takes as it is, no sizes rounded up."""
        found = [self.shape.trace.peak, self.ladder.lowest().peak, *(found.reserved for found in self.plans)]
        if self.tier is not None:
            found.append(self._least_offloaded().reserved)
        return min(found)

    @cached_property
    def ladder(self) -> improve.Ladder:
        """Smaller and smaller plans without the lower tier."""
        return improve.Ladder(self._starts(), self.grain, self.floor[0], self.patience)

    def _starts(self) -> Iterator[Retention]:
        """Where ways down begin, for the least budget."""
        yield Retention(self.shape)
        state = Retention(self.shape)
        checkpoint(state, self.floor[0], self.grain)
        yield state
        if self.shape.end <= MANY:
            schedule = self._simulated(int(0.98 * self.ladder.rungs[-1].peak), POLICIES["pager"])[1]
            if schedule is not None:
                state = Retention(self.shape)
                state.adopt(schedule)
                yield state
            yield self.ladder.rungs[-1].plan.copy()

    def _least_offloaded(self) -> MemoryPlan:
        """The smallest plan that sends values to the lower tier; what is on its way there cannot move (see `moving`)."""
        if self.smallest is None:
            floor, state = self.floor[0], Retention(self.shape)
            trips = Offload(state, self.tier, self.grain)
            trips.unload(floor)
            trips.press(floor)
            state = improve.Ladder(iter([state]), self.grain, floor, 4 * self.patience).lowest().plan
            tries = max(5, min(48, 200_000_000 // (self.shape.end + 1) ** 2))  # first fit takes quadratic time
            schedule, _ = place(self.shape.trace, state.schedule(), 0, self.align, tries=tries)
            self.smallest = self.judged(0, schedule, "smallest plan, offloading")
            self.plans.append(self.smallest)
        return self.smallest

    def _offloaded(self, limit: int, rebuilt: Retention | None) -> None:
        """Plans that send values to the lower tier: before anything is rebuilt, and instead of what `rebuilt` rebuilds. What is
        on its way cannot move: where that leaves no room for addresses, they are made for fewer bytes."""
        ways = [("free copies first", Retention(self.shape))]
        if rebuilt is not None:
            ways.append(("recomputation exchanged for copies", rebuilt))
        for method, start in ways:
            for part in (1.0, *LOWER):
                target, state = limit - int((1 - part) * (limit - self.shape.outside)), start.copy()
                if method == "free copies first":
                    Offload(state, self.tier, self.grain).unload(target)
                if not self._sent(state, target):
                    break
                schedule = self._placed(state, limit)
                if schedule is not None:
                    self.plans.append(self.judged(limit, schedule, method))
                if schedule is not None or self.shape.end > FEW:
                    break

    def _sent(self, state: Retention, target: int) -> bool:
        """Bring a plan down to `target` bytes by rebuilding and by trips that the step waits for, then exchange the one for the
        other where that saves time. False if it does not come down."""

        def comes_down() -> bool:
            gaps = improve.Gaps(state, self.grain)
            return improve.descend(state, gaps, target, patience=12, work=state.work + 200_000)

        if not comes_down():
            Offload(state, self.tier, self.grain).press(target)
            if not comes_down():
                return False
        improve.fill(state, target)
        trips = Offload(state, self.tier, self.grain)
        trips.exchange(target)
        improve.fill(state, target)
        trips.recall(target)
        return True

    def _exact(self, limit: int) -> None:
        """Remember the optimum, if it is found soon and can be placed."""
        try:
            schedule = optimum(self.shape.trace, limit, nodes=1000)
        except (BudgetError, RuntimeError):
            return
        schedule, _ = place(self.shape.trace, schedule, limit - self.shape.outside, self.align)
        found = self.judged(limit, schedule, "exact")
        if found.reserved <= limit:
            self.plans.append(found)

    @cached_property
    def floor(self) -> tuple[int, int]:
        """Bytes that a single operator cannot do without, and which operator (-1: what is always there)."""
        shape = self.shape
        needs = [
            int(shape.fixed[op]) + shape.own[op] + sum(shape.bytes[v] for v in shape.demands[op])
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
        """The cheapest of greedy descents, of checkpoints, of what the policies did and, if none of these fits, of the smallest
        plan, each filled up to `limit`.

        Returns:
            it, how it was found, and how much work that took; as soon as that is `work`, the cheapest so far will do, but one
            descent is always tried.
        """
        best, method, spent = None, "", 0
        if self.shape.end > MANY:  # where the first two fail, the others would too, and take long
            simulated = tuple(schedules) or ("quick pager",)
            order = ("checkpoints", "smallest plan", "descent", *simulated, "descent in steps", "descent by excess")
        else:
            order = ("descent", "descent in steps", "descent by excess", "checkpoints", *schedules, "smallest plan")
        for name in order:
            tried = name != "descent" or method == "smallest plan"
            if best is not None and (name == "smallest plan" or (spent > work and tried)):
                continue
            # of the work: on a long step each may take all of it, and fail
            share = max(work - spent, work // 2)
            dear = best.seconds * HOPELESS if best is not None else float("inf")
            state, before = self._begun(name, limit, schedules)
            if state is not None:
                gaps, power = improve.Gaps(state, self.grain), float(name == "descent by excess")
                fits = improve.descend(state, gaps, limit, power=power, patience=12, work=state.work + share, dear=dear)
                if fits:
                    improve.fill(state, limit, state.work + share)
                    if best is None or state.seconds < best.seconds:
                        best, method = state, name
                before += state.work
            spent += before
            if best is None and name in ON_LADDER and self.ladder.lowest().peak > limit:
                break  # what begins elsewhere comes no lower
        return best, method, spent

    def _begun(self, name: str, limit: int, schedules: dict[str, Schedule]) -> tuple[Retention | None, int]:
        """The plan that a start begins with, None if it does not come as low as `limit`; and the work done for it before."""
        if name in ON_LADDER:
            rung = self.ladder.above(limit) if name == "descent in steps" else self.ladder.lowest()
            return (rung.plan.copy() if name == "descent in steps" or rung.peak <= limit else None), rung.work
        state = Retention(self.shape)
        if name == "checkpoints":
            checkpoint(state, limit, self.grain)
        elif not name.startswith("descent"):
            schedule = schedules.get(name) or self._simulated(limit, QUICK)[1]
            if schedule is None:
                return None, 0
            state.adopt(schedule)
        return state, 0

    def _placed(self, state: Retention, limit: int, work: int = 0) -> Schedule | None:
        """The plan with addresses that need at most `limit`: they change meanwhile (see `moving`), or a smaller plan is made of
        it, and improved for `work` elementary steps, whatever takes fewer seconds."""
        shape, room = self.shape, limit - self.shape.outside
        few = shape.end <= FEW
        tries, stride = 12 if few else 8 if shape.end <= MANY else 5, SHORT_STRIDE if few else LONG_STRIDE
        target, best, least = limit, None, float("inf")  # least: seconds beyond the step's own of `best`
        for attempt in range(ATTEMPTS):
            schedule, top = place(shape.trace, state.schedule(), room, self.align, tries=tries)
            moving = sum(shape.bytes[action.index] for action in schedule.actions if action.kind == "move") / MOVE_RATE
            if schedule.arena <= room and state.seconds + moving < least:
                best, least = schedule, state.seconds + moving
            if top <= room or least - state.seconds <= EASY * (shape.trace.seconds + state.seconds):
                break
            peak = int(state.peaks().max())
            target = min(target, peak) - max(int(stride * (top - room)), limit // 200)
            gaps, most = improve.Gaps(state, self.grain), state.work + REPAIR
            if not improve.descend(state, gaps, target, patience=12, work=most, dear=improve.DEAR * least):
                target = int(state.peaks().max())  # as far down as it came
                if target >= peak:
                    break
            improve.fill(state, target, state.work + REPAIR)
            if attempt == 0 and work:
                improve.search(state, gaps, target, work)
            if state.seconds >= least:
                break
        return best


_desks: dict[tuple[int, Tier | None], _Desk] = {}  # by id of a trace, which its desk keeps alive


def _desk(trace: Trace, tier: Tier | None) -> _Desk:
    trace = trace.as_run
    key = (id(trace), tier)
    desk = _desks.get(key)
    if desk is None:
        desk = _desks[key] = _Desk(trace, tier)
        while len(_desks) > 8:
            del _desks[next(iter(_desks))]
    return desk
