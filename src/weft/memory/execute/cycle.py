"""Which steps of a loop repeat, and their plans.

Every step that runs online is written down and named by a hash of what it did. When the last ones repeat, one by one or in a
cycle of up to `LONGEST_CYCLE` (a generator's and a discriminator's, say), each step of the cycle is planned. A plan that a step
does not follow is tried once more, since that may be the whim of one step; the second time in a row it is given up for another
one. A loop whose plans do not last stays online.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from weft.cluster.device import Tier
from weft.errors import BudgetError
from weft.memory.core import simulate
from weft.memory.execute.recall import counted
from weft.memory.execute.tape import joined
from weft.memory.planning.check import check
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.record import Trace

__all__ = ["Cycle", "beside", "planned"]

RESERVE = 2**16  # bytes (a 64th of the budget at most) that plans leave for what a program does besides, if they can
LASTING = 100  # steps after which a plan that no longer holds was a good one
LONGEST_CYCLE = 4
MOST_PLANS = 4  # that are given up, until it stays online
ROUNDS = 4  # of planning at most, each of which counts what the plan before it holds


@final
class Cycle:
    """What is known of the steps that follow each other.

    Args:
        budget: bytes. addresses: whether plans place bytes. tier: where activations may wait; None if nowhere.
        given: a plan that every step is to follow.
        replay: False if nothing is ever planned.

    Attributes:
        plans: of the steps of the cycle; empty while none is known. The step that begins follows the one at `step` modulo length.
        carried: for each of them, bytes that were there when it began; empty if it was not seen online.
        watching: whether steps are to be written down.
        given_up: plans that did not hold.
        copies: operators run beside the arena, as `backends.Copy` has them; plans leave room for that (`beside`).

    Raises:
        BudgetError: the given plan leaves none, and there is none that does.
    """

    def __init__(
        self,
        budget: int,
        addresses: bool,
        tier: Tier | None,
        given: MemoryPlan | None,
        replay: bool,
        copies: bool = False,
    ):
        self.budget, self.addresses, self.tier, self.copies = budget, addresses, tier, copies
        if given is not None and copies and given.peak + self.beside(given) > budget:
            given = planned(given.trace, budget, addresses, given.tier, copies)
        self.plans: Sequence[MemoryPlan] = (given,) if given is not None else ()
        self.carried: Sequence[int] = ()
        self.watching = replay
        self.given_up = 0
        self._strayed = 0  # steps in a row that were not the planned one
        self._planned_at = 0
        self._seen: dict[int, Trace] = {}  # by its hash: the largest of the steps that did this
        self._last: list[tuple[int, Trace, int]] = []  # of the last online steps: hash, trace, bytes carried in

    def add(self, trace: Trace, carried: int, step: int) -> str:
        """A step was written down, the next one is number `step`. If the last ones repeat there are `plans` from now on.

        Returns:
            why there will be none, in a sentence; "" if there are, or may be.
        """
        mark = hash(tuple((op.name, op.reads, op.makes) for op in trace.ops))
        if mark in self._seen:
            trace = joined(trace, self._seen.pop(mark))
        self._seen[mark] = trace
        if len(self._seen) > 2 * LONGEST_CYCLE:
            del self._seen[next(iter(self._seen))]
        self._last.append((mark, trace, carried))
        del self._last[: -2 * LONGEST_CYCLE]
        marks = [mark for mark, *_ in self._last]
        for length in range(1, len(marks) // 2 + 1):
            if marks[-length:] == marks[-2 * length : -length]:
                return self._plan(length, step)
        return ""

    def _plan(self, length: int, step: int) -> str:
        """Plan the last `length` steps."""
        try:
            found = [(self._planned(trace), carried) for _, trace, carried in self._last[-length:]]
        except BudgetError as error:
            self.watching = False
            return f"no plan was found though the step runs ({error.what}); it stays online"
        first = step % length
        self.plans, self.carried = zip(*(found[(n - first) % length] for n in range(length)), strict=True)
        self._planned_at = step
        return ""

    def _planned(self, trace: Trace) -> MemoryPlan:
        """A plan for a step; with some bytes left over if there is one."""
        reserve = min(RESERVE, self.budget // 64)
        try:
            return planned(trace, self.budget - reserve, self.addresses, self.tier, self.copies)
        except BudgetError:
            return planned(trace, self.budget, self.addresses, self.tier, self.copies)

    def beside(self, plan: MemoryPlan) -> int:
        """Bytes that carrying out a plan takes besides its peak: the arena is there as a whole, and operators run beside it."""
        return plan.reserved - plan.peak + beside(plan.trace) if self.copies else 0

    def held(self) -> None:
        """A step was the planned one."""
        self._strayed = 0

    def strayed(self, step: int) -> str:
        """Step number `step` is not the planned one.

        Returns:
            that there will be no more plans, in a sentence; "" if there may be.
        """
        self._strayed += 1
        if self._strayed == 1:
            return ""  # an evaluation, a logged value, a short batch: the next one may well be
        self.plans, self.carried, self._last = (), (), []
        self.given_up += step - self._planned_at < LASTING
        if self.given_up < MOST_PLANS:
            return ""
        self.watching = False
        return f"{MOST_PLANS} plans did not hold; all further steps run online"


def planned(trace: Trace, budget: int, addresses: bool, tier: Tier | None, copies: bool = False) -> MemoryPlan:
    """The best plan for a step that counts all that replay holds for it (`recall.counted`); `copies`: see `Cycle`.

    Raises:
        BudgetError: there is none.
    """
    if copies:
        room = beside(trace)
        try:
            return planned(trace, max(budget - room, 1), addresses, tier)
        except BudgetError as error:
            what = f"{error.what}, and backend 'copy' needs {room:,} bytes for what an operator makes beside the arena"
            raise BudgetError(budget, error.least and error.least + room, what) from None
    for _ in range(ROUNDS):
        found = _best(trace, budget, addresses, tier)
        trace = counted(found.trace, found.schedule)
        if trace is found.trace:
            return found
    raise BudgetError(budget, 0, "each plan holds more, for what may be made again, than it counts")


def beside(trace: Trace) -> int:
    """Most bytes that `backends.Copy` takes at once beside the arena and what is outside anyway: what an operator makes, unless
    over something else, and its workspace; gradients, when they leave the arena after the step."""
    values, end = trace.values, len(trace.ops)
    fresh = (({*op.makes}.difference(new for _, new in op.overwrites), op.workspace) for op in trace.ops)
    leaving = sum(v.nbytes for v in values if v.category == "gradient" and v.born >= 0 and v.dies >= end)
    return max(leaving, 0, *(sum(values[v].nbytes for v in made) + workspace for made, workspace in fresh))


def _best(trace: Trace, budget: int, addresses: bool, tier: Tier | None) -> MemoryPlan:
    """The best plan that is found; where addresses do not matter, that of the pager if there is no other.

    Raises:
        BudgetError: there is none.
    """
    from weft.memory.planning.choose import plan  # here: it loads scipy

    try:
        return plan(trace, budget, tier=tier)
    except BudgetError as error:
        if addresses:
            raise
        try:
            found = simulate(trace, budget, "pager")
            return MemoryPlan(trace, budget, found.schedule, check(trace, found.schedule), "pager")
        except (BudgetError, ValueError):  # ValueError: what outlives the step is missing at its end
            raise error from None
