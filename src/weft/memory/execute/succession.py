"""Which executor comes after which, through the steps of a loop under a limit.

begin     Replay if there is a plan, else Online, which writes the step down
step      Online -> Replay once the steps repeat and are planned (`Cycle`), if all that is alive fits at once
          Replay -> Replay, the next one of the cycle
midway    Replay -> Online as soon as the step is not the planned one (`Deviation`)
leave     Online, without a budget: everything comes back
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from weft.errors import BudgetError
from weft.memory import native
from weft.memory.core import QUICK
from weft.memory.execute.actions import Deviation
from weft.memory.execute.away import Sender
from weft.memory.execute.backends import Backend, Count, Owner, make_backend
from weft.memory.execute.cycle import Cycle
from weft.memory.execute.executor import Executor
from weft.memory.execute.facts import Facts
from weft.memory.execute.garbage import Garbage
from weft.memory.execute.online import Online
from weft.memory.execute.replay import Replay
from weft.memory.execute.sizes import Sizes
from weft.memory.execute.takeover import take_over
from weft.memory.execute.tape import Tape

__all__ = ["Succession"]


@final
class Succession:
    """Executes the steps of a loop, by one executor after the other.

    Args:
        cycle: what is known of the steps; it knows the budget and the tier.
        backend, policy: their names; no policy is the usual one.
        device: whose bytes. name: of the model, for traces.
        garbage: looked for between steps.

    Attributes:
        executor: whoever executes at the moment; None outside of the limit.
        steps: that have ended. notes: what a user should know, in sentences.
        ended: the optimizer's step is over, the next one's first operator not yet there.
    """

    def __init__(
        self, cycle: Cycle, backend: str, policy: str | None, device: torch.device, name: str, garbage: Garbage
    ):
        self.cycle, self.budget, self.device = cycle, cycle.budget, device
        self._backend, self._policy, self._name = backend, policy, name
        self._garbage = garbage
        self.executor: Executor | None = None
        self.steps = 0
        self.notes: list[str] = []
        self.ended = False
        self._leaving = False
        self._owner = Owner()
        # Only between `begin` and `leave`: who is called may own us.
        self._watch: Callable[[Tensor], None] | None = None
        self._gauge = native.ledger() if device.type == "cpu" and native.problem() is None else None
        self._sizes = Sizes()  # what operators have taken so far

    def begin(self, watch: Callable[[Tensor], None]) -> None:
        """Somebody executes from now on, and calls `watch` with each leaf that wants a gradient when it is first met."""
        self.ended, self._leaving, self._owner, self._watch = False, False, Owner(), watch
        if self.cycle.plans:
            self.executor = self._new_replay()
        else:
            # what is copied is for a moment there twice: plans leave room for that, who decides as operators come cannot
            backend = Count() if self.cycle.copies else make_backend(self._backend, self.budget, self.device)
            self._write(self._new_online(backend, self.budget))

    def leave(self) -> Online | None:
        """Nobody executes any more. Whoever knows all that is still managed; None if nothing has begun."""
        executor, self.executor = self.executor, None
        if isinstance(executor, Replay):
            executor = self._to_online(executor, sys.maxsize)
        self._watch = None
        return executor

    def forget(self) -> None:
        """Nobody executes any more, and nothing is managed: it is somebody else's memory."""
        self._owner.holds.clear()
        self.executor = self._watch = None

    def call(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator."""
        if self.ended:
            self.step()
        try:
            return self.executor.call(facts, args, kwargs)
        except Deviation as deviation:
            self._fall_back(deviation)
            return self.call(facts, args, kwargs)
        except BudgetError:
            gc.collect()  # what tensors in cycles hold is of use to nobody
        return self.executor.call(facts, args, kwargs)

    def tell(self, news: Callable[[Executor], None]) -> None:
        """Something happens to whoever executes that is not an operator."""
        try:
            news(self.executor)
        except Deviation as deviation:
            self._fall_back(deviation)
            news(self.executor)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self, leaving: bool = False) -> None:
        """The step ends here, if it has begun; and the next one begins, unless the limit is being left."""
        self.ended, self._leaving = False, leaving
        if self.executor.begun:
            if isinstance(self.executor, Replay):
                self._end_replayed(self.executor)
            else:
                self._end_online(self.executor)
            self._garbage.between_steps()

    def _end_replayed(self, replay: Replay) -> None:
        try:
            if not replay.end_step():
                raise Deviation("something outlives it that the plan has dropped")
        except Deviation as deviation:
            self._fall_back(deviation)
            self._end_online(self.executor)
            return
        self.cycle.held()
        self.steps += 1
        if len(self.cycle.plans) > 1:
            replay.backend.close()  # its arena is to go before there is another one
            self.executor = self._new_replay()
        self._begin_replayed(self.executor)

    def _end_online(self, online: Online) -> None:
        self.steps += 1
        if online.tape is not None and not self.cycle.plans:  # else it had begun as planned
            tape, online.tape = online.tape, None
            self._note(self.cycle.add(tape.trace(str(self.device), self._name), tape.carried, self.steps))
        if not self.cycle.plans or not self._replay_from_now_on(online):
            self._write(online)

    def _replay_from_now_on(self, online: Online) -> bool:
        """The next step begins, and it is planned. False if what the program holds, which must all be there, does not fit."""
        if not online.all_fits():
            self._note(f"what is held after step {self.steps} does not fit the budget at once; it stays online")
            self._note(self.cycle.strayed(self.steps))
            return False
        online.hand_over()
        self.executor = self._new_replay()
        self._begin_replayed(self.executor)
        return True

    def _begin_replayed(self, replay: Replay) -> None:
        """A planned step begins. If more is carried into it than when it was planned, and there is no room for that, it is not
        this plan's."""
        carried = self.cycle.carried
        if not carried or self._leaving:
            return
        expected = carried[self.steps % len(carried)]
        if replay.brought_along(expected) > replay.slack:
            gc.collect()  # what waits for it may be of use to nobody
        if (more := replay.brought_along(expected)) > replay.slack:
            self._write(self._fall_back(Deviation(f"{more:,} bytes more are carried into it")))

    def _fall_back(self, deviation: Deviation) -> Online:
        """The step is not the planned one: the rest of it runs online."""
        if not self.notes:
            self._note(f"step {self.steps} is not the planned one ({deviation}); it goes on online")
        online = self.executor = self._to_online(self.executor, self.budget)
        self._note(self.cycle.strayed(self.steps))
        return online

    def _note(self, sentence: str) -> None:
        if sentence:
            self.notes.append(sentence)
            warnings.warn(f"weft.memory.limit: {sentence}", stacklevel=5)

    # -- executors ----------------------------------------------------------------------------------------------------

    def _new_online(self, backend: Backend, budget: int) -> Online:
        policy = self._policy or ("coop" if backend.addresses else QUICK)
        online = Online(budget, policy, backend, self.device, self._owner, self._gauge, self._sizes)
        online.watch = self._watch
        if self.cycle.tier is not None:
            online.core.lower = Sender(online, self.cycle.tier)
        return online

    def _write(self, online: Online) -> None:
        """A step begins online: it is written down, if it may be replayed later."""
        self.executor = online
        online.tape = Tape(self._owner.holds.values()) if self.cycle.watching else None

    def _new_replay(self) -> Replay:
        plans = self.cycle.plans
        plan = plans[self.steps % len(plans)]
        backend = make_backend(self._backend, plan.schedule.arena, self.device)
        given = not self.cycle.carried
        budget = self.budget - self.cycle.beside(plan)
        replay = Replay(plan, budget, backend, self.device, self._owner, self._sizes, given)
        replay.watch = self._watch
        return replay

    def _to_online(self, replay: Replay, budget: int) -> Online:
        online = self._new_online(Count(), budget)
        online.effects = replay.effects
        take_over(replay, online)
        replay.backend.close()
        return online
