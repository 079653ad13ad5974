"""Where a limit hears what the program does: operators, optimizers' steps, and ways to the bytes of tensors.

Operators come by a dispatch mode, on the thread that entered it and on those of its backward passes; views pass by. Torch calls
the hooks of optimizers and modules on every thread: what others do is none of ours. While an optimizer runs of which nothing is
to be decided, the mode is left (`pause`): its operators then cost what they cost without us. An optimizer that raises does not
call its hook: its step is over when a module runs that it does not call itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weft.memory.execute.facts import Facts, facts_of
from weft.memory.execute.guards import Guards
from weft.memory.private import QuickMode, faking, hide_from_compiler, is_entered, is_innermost

__all__ = ["Listening"]

_NONE: Mapping[str, Any] = {}  # one for all: calls are remembered
_PLAIN: set[Any] = {torch.Tensor, nn.Parameter}  # classes that do not handle operators themselves


@final
class Listening:
    """Listens to the thread that makes it, and to those of its backward passes, until `stop`.

    Args:
        call: runs an operator, (facts, args, kwargs) -> result.
        expose: called with each tensor whose address somebody, on any thread, is about to know.
        count: called with each tensor that was made without an operator, where we know.
        resize: called with each storage that is about to have another number of bytes, and this, on any thread.
        before, after: called with the optimizer and its arguments at both ends of its step.
    """

    def __init__(
        self,
        call: Callable[[Facts, Sequence[Any], Mapping[str, Any]], Any],
        expose: Callable[[Tensor], None],
        count: Callable[[Tensor], None],
        resize: Callable[[torch.UntypedStorage, int], None],
        before: Callable[[Any, Any, Any], None],
        after: Callable[[Any, Any, Any], None],
    ):
        self._thread = threading.get_ident()
        self._mode = _Mode(call)
        self._failed: Any = None  # the hook that sees that an optimizer's step has failed
        self._paused = False
        self._hooks = [
            register_optimizer_step_pre_hook(self._if_heard(before)),
            register_optimizer_step_post_hook(self._if_heard(after)),
        ]
        self._guards = Guards(expose, self._if_heard(count), resize)
        self._guards.start()
        self._mode.__enter__()

    def _here(self) -> bool:
        """Whether this is the thread that made us: a mode can only be left and entered where it was."""
        return threading.get_ident() == self._thread

    def _if_heard(self, told: Callable[..., None]) -> Callable[..., None]:
        """`told`, called only on threads whose operators we hear."""

        def call(*args: Any) -> None:
            if self._here() or is_entered(self._mode):
                told(*args)

        hide_from_compiler(call)
        return call

    def stop(self) -> None:
        """On any thread; a child process may have been forked by one that we do not know."""
        try:
            self._guards.stop()
            for hook in self._hooks:
                hook.remove()
            if self._failed is not None:
                self._failed.remove()
        finally:
            self._mode.leave()

    def can_pause(self) -> bool:
        """Whether nobody else listens more closely, who would be left with us; and no thread of autograd's asks."""
        return self._here() and is_innermost(self._mode)

    def optimizing(self, optimizer: Any, over: Callable[[], None]) -> None:
        """An optimizer's step begins. If a module runs before `resume`, and not inside it, the step has failed, and `over` is
        called."""

        def ran(module: nn.Module, args: Any) -> None:
            if self._here() and not _inside(optimizer):
                over()

        if self._failed is None and self._here():
            self._failed = register_module_forward_pre_hook(ran)

    def pause(self) -> None:
        """Operators pass by until `resume`."""
        self._mode.__exit__(None, None, None)
        self._paused = True

    def resume(self) -> None:
        """The optimizer's step is over."""
        if not self._here():
            return
        if self._failed is not None:
            self._failed.remove()
            self._failed = None
        if self._paused:
            self._paused = False
            self._mode.__enter__()


def _inside(owner: Any) -> bool:
    """Whether this is called, over however many others, by a method of `owner`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_locals.get("self") is not owner:
        frame = frame.f_back
    return frame is not None


def _all_plain(types: Any) -> bool:
    new = {kind for kind in types if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__}
    _PLAIN.update(new)
    return new.issuperset(types)


@final
class _Mode(QuickMode):
    """Hands every operator on; views pass by."""

    def __init__(self, call: Callable[[Facts, Sequence[Any], Mapping[str, Any]], Any]):
        super().__init__()
        self.call = call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.left or faking() is not None:
            return func(*args, **kwargs) if kwargs else func(*args)
        facts = facts_of(func)
        if types and not _PLAIN.issuperset(types) and not _all_plain(types):
            return NotImplemented  # DTensor and the like: their parts come back here
        if facts.view:
            return facts.call(*args, **kwargs) if kwargs else facts.call(*args)
        return self.call(facts, args, kwargs or _NONE)


hide_from_compiler(_Mode.__torch_dispatch__)
