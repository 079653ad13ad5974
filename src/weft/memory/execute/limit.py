"""`with weft.memory.limit("6GiB"):` around an unchanged training loop.

Given bytes      The first steps run online: the policy core decides as operators come. Each step is written down (`Tape`). When
                 a step does what the one before it did (or the cycle of up to `LONGEST_CYCLE` steps repeats), it is planned,
                 and from then on replayed. A step that does something else falls back to online, in its middle if need be.
Given a plan     Replay from the first step on.
A step           ends with the optimizer's (`torch.optim`'s hooks say so; the next operator outside an optimizer begins another
                 one), at `Limit.step()`, or at the end of the with-block. Between two steps it may `rest`: others work meanwhile.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weft.cluster.device import Tier
from weft.cluster.units import quantity
from weft.errors import BudgetError
from weft.memory import native
from weft.memory.core import Block, simulate
from weft.memory.execute.away import Sender
from weft.memory.execute.backends import Backend, Copy, Count, Native, Owner
from weft.memory.execute.facts import Facts, facts_of
from weft.memory.execute.guards import Guards
from weft.memory.execute.hand_back import hand_back
from weft.memory.execute.online import Online
from weft.memory.execute.replay import Deviation, Replay
from weft.memory.execute.sizes import Sizes
from weft.memory.execute.takeover import take_over
from weft.memory.execute.tape import Tape, joined
from weft.memory.planning.check import check
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.private import QuickMode, below, hide_from_compiler, is_innermost, plain_parts, problem, require
from weft.memory.record import Trace
from weft.memory.tracing.state import state_to_come

__all__ = ["Limit", "limit"]

BACKENDS = ("auto", "count", "copy", "native")
RESERVE = 2**16  # bytes (a 64th of the budget at most) that plans leave for what a program does besides, if they can
LASTING = 100  # steps after which a plan that no longer holds was a good one
LONGEST_CYCLE = 4  # steps that follow each other and are planned one by one (a generator's and a discriminator's, say)
MOST_PLANS = 4  # that are given up, until it stays online

_ACTIVE: list[Limit] = []  # at most one


def limit(
    budget: Any,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    trace: Trace | None = None,
    backend: str = "auto",
    policy: str | None = None,
    device: torch.device | str | None = None,
    replay: bool = True,
    by_hand: bool = False,
    tier: Tier | None = None,
) -> Limit:
    """A context in which the bytes of tensors stay within a budget; the code inside it does not change.

    Args:
        budget: bytes, or text with a unit ("6GiB"), or a `MemoryPlan`. It covers everything on the device that the code inside
            touches: parameters, gradients, optimizer state, inputs, activations, workspace.
        model: its parameters, gradients and buffers count from the start; without, each counts when it is first used.
        optimizer: room for the state that its first step will make is kept from the start: a budget that is too small for it is
            refused before that step, not by it.
        trace: of a step of this loop: it is planned before anything runs, so that a budget that is too small is refused at
            once.
        backend: where bytes lie: "count" (torch's allocator, which may place them anywhere), "copy" (an arena in plain Python),
            "native" (an arena of the native library: nothing lies outside of it); "auto" is "count".
        policy: what to drop online, a key of `weft.memory.core.POLICIES`; by default "pager" where addresses do not matter, else
            "coop".
        device: whose bytes; by default the model's, else the CPU.
        replay: False to stay online.
        by_hand: steps end only where `Limit.step()` says so, whatever optimizers do.
        tier: where activations may wait that are not made again: pinned memory of an accelerator's host, a temporary file of a
            CPU's process. Its figures decide what is cheaper. By default that of the plan, if a plan is given.
    Raises:
        ValueError: the budget is not a positive number of bytes, or there is no such backend or policy.
        BudgetError: (with `trace`) no plan fits; `least` is what would do.
    """
    if device is None:
        first = next(model.parameters(), None) if model is not None else None
        device = first.device if first is not None else torch.device("cpu")
    found = Limit(budget, model, trace, backend, policy, torch.device(device), replay, by_hand, tier)
    found.optimizer = optimizer
    return found


@final
class Limit:
    """See `limit`. May be entered again after it was left, not inside itself.

    Attributes:
        budget: in bytes. device: whose bytes. optimizer: whose state has room from the start.
        steps: that have ended. notes: what a user should know, in sentences.
    """

    def __init__(
        self, budget: Any, model: nn.Module | None, trace: Trace | None, backend: str, policy: str | None,
        device: torch.device, replay: bool, by_hand: bool = False, tier: Tier | None = None,
    ):  # fmt: skip
        require()
        self.model, self.device, self.tier = model, device, tier
        self.optimizer: torch.optim.Optimizer | None = None
        self._reserved: Block | None = None  # for the state that it is to make
        self._backend_name, self._policy, self._may_replay, self._by_hand = backend, policy, replay, by_hand
        self._cycle: list[MemoryPlan] = []  # steps that follow each other
        if isinstance(budget, MemoryPlan):
            self.budget = budget.budget or budget.peak
            self._cycle = [budget]
            self.tier = tier or budget.tier  # a step that is not the planned one may use it as well
        else:
            nbytes = quantity(budget, "bytes")
            if not 0 < nbytes < float("inf"):
                raise ValueError(f"limit: the budget must be a positive number of bytes, got {budget!r}")
            self.budget = int(nbytes)
            if trace is not None:
                self._cycle = [_planned(trace, self.budget, backend in ("copy", "native"), tier)]
        if backend not in BACKENDS:
            raise ValueError(f"limit: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend != "count" and problem() and backend != "auto":
            raise RuntimeError(problem())
        why = native.problem() if backend == "native" else None
        if why:
            raise RuntimeError(f"limit: backend='native' cannot be used: {why}")
        self.steps = 0
        self.notes: list[str] = []
        self._owner = Owner()
        self._executor: Online | Replay | None = None
        self._hooks: list[Any] = []  # of leaves
        self._optimizer_hooks: list[Any] = []
        self._mode: _Mode | None = None
        self._guards: Guards | None = None
        self._gauge = native.ledger() if device.type == "cpu" and native.problem() is None else None
        self._sizes = Sizes()  # what operators have taken so far
        self._ended = False  # the optimizer's step is over, the next one's first operator not yet there
        self._leaving = False
        self._paused: Any = None  # while the optimizer runs without us: what ends that
        self._watched: set[int] = set()
        self._seen: dict[int, Trace] = {}  # by that hash: the largest of these steps
        self._carried: list[int] = []  # for each step of the cycle, bytes that were there when it began
        self._planned_at = 0
        self._tapes: list[
            tuple[int, Trace, int]
        ] = []  # a hash of what the last online steps did, that, and what was carried
        self._strayed = self._given_up = 0  # planned steps in a row, and plans, that did not hold

    # -- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> Limit:
        self._only_one()
        _ACTIVE.append(self)
        try:
            self._begin()
        except BaseException:
            self._leave()
            raise
        return self

    @staticmethod
    def _only_one() -> None:
        if _ACTIVE:
            raise RuntimeError(
                "limit: another weft.memory.limit is active; limits cannot be nested. Use one, with the smaller budget"
            )

    def _begin(self) -> None:
        self._ended, self._leaving, self._watched, self._owner = False, False, set(), Owner()
        self._executor = self._first_executor()
        self._adopt_model()
        self._reserve()
        self._listen()

    def _reserve(self) -> None:
        """Keep room for what the optimizer's first step will make and keep.

        Raises:
            BudgetError: there is none.
        """
        if self.optimizer is not None and isinstance(self._executor, Online):
            nbytes = state_to_come(self.optimizer)
            name = f"the state that {type(self.optimizer).__name__} will make"
            self._reserved = self._executor.core.adopt(nbytes, name, inside=True)
            self._reserved.payload = None  # it has no bytes

    def _listen(self) -> None:
        """Operators, optimizers and ways to tensors' bytes come to us from now on."""
        self._optimizer_hooks += [
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        self._guards = Guards(self._expose)
        self._guards.start()
        self._mode = _Mode(self)
        self._mode.__enter__()

    def _stop_listening(self) -> None:
        if self._mode is not None and self._paused is None:
            self._mode.__exit__(None, None, None)
        if self._paused is not None:
            self._paused.remove()
        if self._guards is not None:
            self._guards.stop()
        for hook in self._optimizer_hooks:
            hook.remove()
        self._optimizer_hooks.clear()
        self._mode = self._guards = self._paused = None

    # -- resting ------------------------------------------------------------------------------------------------------

    @property
    def resting(self) -> bool:
        """Entered, and left to rest."""
        return self._executor is not None and self._mode is None and self._paused is None

    def rest(self) -> None:
        """After `step()`: other work is none of ours until `wake`. Everything that is alive is there. Work in between may change
        tensors that we manage, and must not keep any that it makes across the next step without counting them itself."""
        self._executor.rest()
        self._stop_listening()
        _ACTIVE.remove(self)

    def wake(self) -> None:
        """Go on after `rest`.

        Raises:
            RuntimeError: another limit is active.
        """
        self._only_one()
        _ACTIVE.append(self)
        self._listen()

    def count(self, *tensors: Tensor) -> None:
        """Take note of tensors that are there but that no operator has read yet, such as the labels of a batch.

        A limit meets what was made outside when it is read first; until then its bytes are not counted.
        """
        for tensor in tensors:
            if tensor.device.type == self.device.type:
                self._executor.adopt(tensor)

    def lend(self, tensor: Tensor, nbytes: int) -> None:
        """A storage that its owner empties and fills in the course of a step: call this before it is resized to `nbytes`, and
        after it has been emptied (0). What is made from it is never made again.

        Raises:
            BudgetError: there is no room.
        """
        if self._mode is not None or self._paused is not None:
            self._executor.lend(tensor, nbytes)

    def __exit__(self, *problem: Any) -> None:
        executor = self._executor
        if problem[0] is None and not (isinstance(executor, Replay) and executor.at < len(executor.rows)):
            self._leaving = True
            self.step()
        self._leave()

    def _leave(self) -> None:
        if self in _ACTIVE:
            _ACTIVE.remove(self)
        self._stop_listening()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        executor, self._executor = self._executor, None
        if isinstance(executor, Replay):
            executor = self._to_online(executor)
        if executor is not None:
            hand_back(executor)

    def _backend(self, nbytes: int) -> Backend:
        """Memory for activations; `nbytes` of it where addresses matter."""
        if self._backend_name == "copy":
            return Copy(nbytes, self.device)
        if self._backend_name == "native":
            return Native(nbytes)
        return Count()

    def _new_online(self, backend: Backend) -> Online:
        policy = self._policy or ("coop" if backend.addresses else "pager")
        online = Online(self.budget, policy, backend, self.device, self._owner, self._gauge, self._sizes)
        online.watch = self._watch
        if self.tier is not None:
            online.core.lower = Sender(online, self.tier)
        return online

    def _first_executor(self) -> Online | Replay:
        if self._cycle and self._may_replay:
            return self._new_replay()
        online = self._new_online(self._backend(self.budget))
        self._write(online)
        return online

    def _write(self, online: Online) -> None:
        """A step begins: it is written down, if it may be replayed later."""
        online.tape = Tape(self._owner.holds.values()) if self._may_replay else None

    def _new_replay(self) -> Replay:
        plan = self._cycle[self.steps % len(self._cycle)]
        slack, folder = self.budget - plan.peak, plan.tier.folder if plan.tier is not None else ""
        backend = self._backend(plan.schedule.arena)
        replay = Replay(plan.trace, plan.schedule, backend, self.device, slack, self._owner, folder)
        replay.watch = self._watch
        return replay

    def _begin_replayed(self) -> None:
        """A planned step begins. If more is carried into it than when it was planned, and there is no room for that, it is not
        this plan's."""
        replay = self._executor
        if isinstance(replay, Replay) and self._carried and not self._leaving:
            more = replay.held - (expected := self._carried[self.steps % len(self._cycle)])
            if more > replay.slack:
                gc.collect()  # what waits for it may be of use to nobody
                more = replay.held - expected
            if more > replay.slack:
                self._fall_back(Deviation(f"{more:,} bytes more are carried into it", once=True))
                if isinstance(self._executor, Online):
                    self._write(self._executor)

    def _adopt_model(self) -> None:
        if self.model is not None:
            for parameter in self.model.parameters():
                self._executor.adopt(parameter, "parameter")
                if parameter.requires_grad and parameter.is_leaf:
                    self._watch(parameter)  # it may lie in a storage met before
                for part in _parts(parameter.grad) if parameter.grad is not None else ():
                    self._executor.adopt(part, "gradient")
            for buffer in self.model.buffers():
                self._executor.adopt(buffer, "buffer")
        for entries in self.optimizer.state.values() if self.optimizer is not None else ():
            for value in entries.values():
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    self._executor.adopt(value, "optimizer")

    # -- operators ----------------------------------------------------------------------------------------------------

    def _call(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self._ended:
            self.step()
        try:
            return self._executor.call(facts, args, kwargs)
        except Deviation as deviation:
            self._fall_back(deviation)
            return self._executor.call(facts, args, kwargs)

    def _fall_back(self, deviation: Deviation) -> None:
        """The step is not the planned one: the rest of it runs online. What may be the whim of one step is tried by the
        plan again in the next; otherwise, or a second time in a row, the plan is given up for another one."""
        self._strayed += 1
        if not self.notes:
            self._note(f"step {self.steps} is not the planned one ({deviation}); it goes on online")
        self._executor = self._to_online(self._executor)
        if self._strayed > 1 or not deviation.once:
            self._cycle, self._carried, self._tapes = [], [], []
            self._given_up += self.steps - self._planned_at < LASTING
            if self._given_up == MOST_PLANS:
                self._may_replay = False
                self._note(f"{MOST_PLANS} plans did not hold; all further steps run online")

    def _to_online(self, replay: Replay) -> Online:
        online = self._new_online(Count())
        online.effects = replay.effects
        take_over(replay, online)
        return online

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        warnings.warn(f"weft.memory.limit: {sentence}", stacklevel=4)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """A step of the loop ends here. Loops with a `torch.optim` optimizer need not say so."""
        self._ended = False
        executor = self._executor
        if isinstance(executor, Replay):
            if executor.at == 0:
                return
            self._end_replayed(executor)
        elif executor.tape is None or executor.tape.num_ops:
            self._end_online(executor)

    def _end_replayed(self, replay: Replay) -> None:
        try:
            if not replay.end_step():
                raise Deviation("something outlives it that the plan has dropped", once=True)
        except Deviation as deviation:
            self._fall_back(deviation)
            self._end_online(self._executor)
            return
        self._strayed = 0
        self.steps += 1
        if len(self._cycle) > 1:
            self._executor = self._new_replay()
        self._begin_replayed()

    def _end_online(self, online: Online) -> None:
        self.steps += 1
        if not self._may_replay:
            online.tape = None
        elif self._cycle:  # it had begun as planned
            online.hand_over()
            self._executor = self._new_replay()
            self._begin_replayed()
        else:
            if online.tape is not None:
                self._written(online.tape)
            if isinstance(self._executor, Online):
                self._write(self._executor)

    def _written(self, tape: Tape) -> None:
        """A step was written down: if the last ones repeat, plan them and replay from now on."""
        trace = tape.trace(str(self.device), type(self.model).__name__ if self.model is not None else "")
        mark = hash(tuple((op.name, op.reads, op.makes) for op in trace.ops))
        if mark in self._seen:
            trace = joined(trace, self._seen.pop(mark))
        self._seen[mark] = trace
        if len(self._seen) > 2 * LONGEST_CYCLE:
            del self._seen[next(iter(self._seen))]
        self._tapes.append((mark, trace, tape.carried))
        del self._tapes[: -2 * LONGEST_CYCLE]
        marks = [mark for mark, *_ in self._tapes]
        for length in range(1, len(marks) // 2 + 1):
            if marks[-length:] == marks[-2 * length : -length]:
                _, traces, carried = zip(*self._tapes[-length:], strict=True)
                self._plan(traces, carried)
                return

    def _plan(self, traces: Sequence[Trace], carried: Sequence[int]) -> None:
        try:
            addresses = self._backend_name in ("copy", "native")
            planned = [self._planned(trace, addresses) for trace in traces]
        except BudgetError as error:
            self._note(f"no plan was found though the step runs ({error.what}); it stays online")
            self._may_replay = False
            return
        first = self.steps % len(planned)
        self._cycle = [planned[(n - first) % len(planned)] for n in range(len(planned))]
        self._carried = [carried[(n - first) % len(planned)] for n in range(len(planned))]
        self._planned_at = self.steps
        self._executor.hand_over()
        self._executor = self._new_replay()
        self._begin_replayed()

    def _planned(self, trace: Trace, addresses: bool) -> MemoryPlan:
        """A plan for a step; with some bytes left over if there is one."""
        reserve = min(RESERVE, self.budget // 64)
        try:
            return _planned(trace, self.budget - reserve, addresses, self.tier)
        except BudgetError:
            return _planned(trace, self.budget, addresses, self.tier)

    # -- what is not an operator --------------------------------------------------------------------------------------

    def _at(self, work: Callable[[Any], None]) -> None:
        try:
            work(self._executor)
        except Deviation as deviation:
            self._fall_back(deviation)
            work(self._executor)

    def _expose(self, tensor: Tensor) -> None:
        self._at(lambda executor: executor.expose(tensor))

    def _watch(self, leaf: Tensor) -> None:
        if id(leaf) not in self._watched:
            self._watched.add(id(leaf))
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._finished))

    def _finished(self, parameter: Tensor) -> None:
        if parameter.grad is not None and not self.resting:
            for part in _parts(parameter.grad):
                self._at(lambda executor, part=part: executor.settle(part, "gradient"))

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._ended = False
        if any(callable(value) for value in (*args, *kwargs.values())):
            return  # a closure: forward and backward run inside of it
        if self._reserved is not None and optimizer is self.optimizer:
            self._executor.core.release(self._reserved)
            self._reserved = None
        self._at(lambda executor: executor.optimizing(True))
        if isinstance(self._executor, Replay) and is_innermost(self._mode) and self._executor.skip_optimizer():
            self._mode.__exit__(None, None, None)
            # an optimizer that raises does not call its post hook
            self._paused = register_module_forward_pre_hook(lambda module, args: self._resume())

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._resume()
        self._executor.optimizing(False)
        self._ended = not self._by_hand

    def _resume(self) -> None:
        """Operators come to us again."""
        if self._paused is not None:
            self._paused.remove()
            self._paused = None
            self._mode.__enter__()


def _planned(trace: Trace, budget: int, addresses: bool, tier: Tier | None) -> MemoryPlan:
    """The best plan for a step; where addresses do not matter, that of the pager if no other is found."""
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


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """What has the bytes of a tensor: itself, or, of a sparse one, its indices and values."""
    if tensor.layout is torch.strided:
        return (tensor,)
    with below():
        return tuple(plain_parts(tensor))


_PLAIN: set[Any] = {torch.Tensor, nn.Parameter}  # classes that do not handle operators themselves


def _all_plain(types: Any) -> bool:
    new = {kind for kind in types if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__}
    _PLAIN.update(new)
    return new.issuperset(types)


@final
class _Mode(QuickMode):
    """Hands every operator to the limit; views pass by."""

    def __init__(self, owner: Limit):
        super().__init__()
        self.call = owner._call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        facts = facts_of(func)
        if types and not _PLAIN.issuperset(types) and not _all_plain(types):
            return NotImplemented  # DTensor and the like: their parts come back here
        if facts.view:
            return facts.call(*args, **kwargs) if kwargs else facts.call(*args)
        return self.call(facts, args, kwargs or {})


hide_from_compiler(
    _Mode.__torch_dispatch__, Limit._finished, Limit._before_optimizer, Limit._after_optimizer, Limit._expose
)
