"""`with weft.memory.limit("6GiB"):` around an unchanged training loop.

Given bytes      The first steps run online: the policy core decides as operators come. Each step is written down (`Tape`). When
                 they repeat (`Cycle`), they are planned, and from then on replayed. A step that does something else falls
                 back to online, in its middle if need be (`Succession`).
Given a plan     Replay from the first step on.
A step           ends with the optimizer's (`torch.optim`'s hooks say so; the next operator outside an optimizer begins another
                 one), at `Limit.step()`, or at the end of the with-block. Between two steps it may `rest`: others work meanwhile.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weft.cluster.device import Tier
from weft.cluster.units import nbytes_of
from weft.errors import BudgetError
from weft.memory.arguments import device_of, expect
from weft.memory.core import POLICIES
from weft.memory.execute.backends import check_backend
from weft.memory.execute.cycle import Cycle, planned
from weft.memory.execute.executor import Executor
from weft.memory.execute.garbage import Garbage
from weft.memory.execute.hand_back import hand_back
from weft.memory.execute.listening import Listening
from weft.memory.execute.succession import Succession
from weft.memory.planning.memory_plan import MemoryPlan
from weft.memory.private import WeakIdKeyDictionary, below, bytes_of, hide_from_compiler, plain_parts, require
from weft.memory.record import Trace
from weft.memory.tracing.lone import count_references
from weft.names import pick

__all__ = ["Limit", "limit"]

PLAN_FIRST = (
    "The first steps decide operator by operator. A plan made beforehand may need less: weft.memory.limit(budget, model=model, "
    "trace=weft.memory.trace(model, batch, loss, optimizer)) says so before anything runs."
)

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
        backend: where bytes lie: "count" (torch's allocator, which may place them anywhere), "native" (an arena of the native
            library, outside of which lies only what no plan foresees), "copy" (an arena in plain Python for planned steps; the
            budget covers all of it and the outputs of an operator besides, but for what is left of it after a step that is not
            the planned one); "auto" is "count".
        policy: what to drop online, a key of `weft.memory.core.POLICIES`; by default "coop" where addresses matter, else "pager",
            which drops 1 % of the budget beyond what is needed so as to search less often.
        device: whose bytes, on the CPU or on CUDA; by default the model's, else the CPU.
        replay: False to stay online.
        by_hand: steps end only where `Limit.step()` says so, whatever optimizers do.
        tier: where activations may wait that are not made again: pinned memory of an accelerator's host, a temporary file of a
            CPU's process. Its figures decide what is cheaper. By default that of the plan, if a plan is given.
    Raises:
        ValueError: the budget is not a positive number of bytes, there is no such backend or policy, or another argument is not
            what it must be.
        BudgetError: (with `trace`) no plan fits; `least` is what would do.
    """
    expect("limit: model", model, nn.Module, optional=True)
    expect("limit: optimizer", optimizer, torch.optim.Optimizer, optional=True)
    expect("limit: trace", trace, Trace, optional=True)
    expect("limit: tier", tier, Tier, optional=True)
    if device is None:
        first = next(model.parameters(), None) if model is not None else None
        device = first.device if first is not None else "cpu"
    found = Limit(budget, model, trace, backend, policy, device_of("limit: device", device), replay, by_hand, tier)
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
        plan = budget if isinstance(budget, MemoryPlan) else None
        self.model, self.device = model, device
        self.budget = _nbytes(budget)
        check_backend(backend)
        _check_policy(policy)
        self._by_hand = by_hand
        addresses, copies = backend in ("copy", "native"), backend == "copy"
        if plan is None and trace is not None:
            plan = planned(trace, self.budget, addresses, tier, copies)
        tier = tier or (plan and plan.tier)  # a step that is not the planned one may use it, too
        cycle = Cycle(self.budget, addresses, tier, plan if replay else None, replay, copies)
        name = type(model).__name__ if model is not None else ""
        self._garbage = Garbage()
        self._succession = Succession(cycle, backend, policy, device, name, self._garbage)
        self.optimizer: torch.optim.Optimizer | None = None
        self._listening: Listening | None = None
        self._hooks = WeakIdKeyDictionary()  # of leaves
        self._options = WeakKeyDictionary[Any, list[set[str]]]()  # of optimizers: those that were on in the last step

    @property
    def steps(self) -> int:
        return self._succession.steps

    @property
    def notes(self) -> list[str]:
        return self._succession.notes

    @property
    def _executor(self) -> Executor | None:
        return self._succession.executor

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
        count_references(Tensor)
        self._succession.begin(self._watch)
        self._adopt_model()
        if self.optimizer is not None:
            self._executor.reserve(self.optimizer)
        self._listen()

    def _listen(self) -> None:
        """Operators, optimizers and ways to tensors' bytes come to us from now on."""
        self._listening = Listening(
            self._succession.call, self._expose, self.count, self._resize, self._before_optimizer, self._after_optimizer
        )  # fmt: skip
        self._garbage.begin()

    def _stop_listening(self) -> None:
        self._garbage.end()
        if self._listening is not None:
            self._listening.stop()
        self._listening = None

    # -- resting ------------------------------------------------------------------------------------------------------

    @property
    def resting(self) -> bool:
        """Entered, and left to rest."""
        return self._executor is not None and self._listening is None

    def rest(self) -> None:
        """After `step()`: other work is none of ours until `wake`. Everything that is alive is there. Work in between may change
        tensors that we manage, and must not keep any that it makes across the next step without counting them itself. Nothing
        happens if it rests already.

        Raises:
            RuntimeError: it was not entered.
            BudgetError: what is alive does not fit at once.
        """
        self._check_entered()
        if not self.resting:
            self._executor.rest()
            self._stop_listening()
            _ACTIVE.remove(self)

    def wake(self) -> None:
        """Go on after `rest`, on the thread that calls this. Nothing happens if it does not rest.

        Raises:
            RuntimeError: it was not entered, or another limit is active.
        """
        self._check_entered()
        if self.resting:
            self._only_one()
            _ACTIVE.append(self)
            self._listen()

    def _check_entered(self) -> None:
        if self._executor is None:
            raise RuntimeError("limit: this weft.memory.limit is not entered; do that within `with limit(...):`")

    def count(self, *tensors: Tensor) -> None:
        """Take note of tensors that are there but that no operator has read yet, such as the labels of a batch.

        A limit meets what was made outside when it is read first; until then its bytes are not counted.

        Raises:
            RuntimeError: it was not entered.
        """
        self._check_entered()
        for tensor in tensors:
            expect("Limit.count: what is counted", tensor, Tensor)
            if tensor.device.type == self.device.type:
                self._executor.adopt(tensor)

    def __exit__(self, *problem: Any) -> None:
        executor = self._executor
        if executor is None:  # in a child process
            return
        if isinstance(problem[1], BudgetError) and not self._succession.cycle.plans:
            problem[1].add_note(PLAN_FIRST)
        try:
            if problem[0] is None and not executor.midway:
                self._succession.step(leaving=True)
        except BudgetError:
            pass  # what the next step could not begin with: there is none, and everything comes back below, budget or not
        finally:
            notes = self._leave()
        for note in notes:
            if problem[1] is None:
                warnings.warn(note, RuntimeWarning, stacklevel=2)
            else:  # never in the way of what was raised inside
                problem[1].add_note(note)

    def _leave(self) -> list[str]:
        """Nothing is managed any more; what the user should know, in sentences."""
        if self in _ACTIVE:
            _ACTIVE.remove(self)
        self._stop_listening()
        self._unwatch()
        online = self._succession.leave()
        return [] if online is None else hand_back(online, self.budget)

    def _stay_behind(self) -> None:
        """We are in a process that was forked: it has its own memory, and a copy of ours that nobody manages."""
        self._stop_listening()
        self._unwatch()
        self._succession.forget()

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

    def step(self) -> None:
        """A step of the loop ends here. Loops with a `torch.optim` optimizer need not say so.

        Raises:
            RuntimeError: it was not entered.
        """
        self._check_entered()
        self._succession.step()

    # -- what is not an operator --------------------------------------------------------------------------------------

    def _expose(self, tensor: Tensor) -> None:
        self._succession.tell(lambda executor: executor.expose(tensor))

    def _resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if storage.device.type == self.device.type and storage.nbytes() != nbytes:
            with below():
                whole = bytes_of(storage)
            self._succession.tell(lambda executor: executor.lend(whole, nbytes))

    def _watch(self, leaf: Tensor) -> None:
        if leaf not in self._hooks:
            self._hooks[leaf] = leaf.register_post_accumulate_grad_hook(self._finished)

    def _unwatch(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _finished(self, parameter: Tensor) -> None:
        if parameter.grad is not None and not self.resting:
            for part in _parts(parameter.grad):
                self._succession.tell(lambda executor, part=part: executor.settle(part, "gradient"))

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(callable(value) for value in (*args, *kwargs.values())):
            return  # a closure: forward and backward run inside of it
        self._succession.ended = False
        self._listening.optimizing(optimizer, self._updated)
        if optimizer is self.optimizer:
            self._executor.spend()
        self._succession.tell(lambda executor: executor.optimizing(True))
        if self._keeps_as_much(optimizer) and self._listening.can_pause() and self._executor.skip_optimizer():
            self._listening.pause()

    def _keeps_as_much(self, optimizer: Any) -> bool:
        """Whether an optimizer has the same options on as in its last step: with others (a momentum) it may keep more."""
        plain = (int, float, str)
        on = [{k for k, v in group.items() if isinstance(v, plain) and v} for group in optimizer.param_groups]
        before, self._options[optimizer] = self._options.get(optimizer, on), on
        return before == on

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._updated()

    def _updated(self) -> None:
        """The optimizer's step is over, or has failed."""
        self._listening.resume()
        self._executor.optimizing(False)
        self._succession.ended = not self._by_hand


def _forked() -> None:
    """In a child process (a worker of a `DataLoader`) nothing is limited."""
    while _ACTIVE:
        _ACTIVE.pop()._stay_behind()


os.register_at_fork(after_in_child=_forked)


def _nbytes(budget: Any) -> int:
    """Bytes of a budget as `limit` takes it."""
    if isinstance(budget, MemoryPlan):
        return budget.budget or budget.peak
    return nbytes_of(budget, "budget")


def _check_policy(policy: str | None) -> None:
    if policy is not None:
        pick(policy, POLICIES, "policy")


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """What has the bytes of a tensor: itself, or, of a sparse one, its indices and values."""
    if tensor.layout is torch.strided:
        return (tensor,)
    with below():
        return tuple(plain_parts(tensor))


hide_from_compiler(Limit._finished, Limit._before_optimizer, Limit._after_optimizer, Limit._expose, Limit._resize)
