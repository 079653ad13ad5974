"""What runs in a model at the moment, seen by hooks on its modules.

a module runs         its own parameters are held until it has run                                  `_enter`, `_leave`
a pass                from the moment at which somebody outside calls the model, or a part of it, until that returns;
                      what is computed a second time within backward is none                        `_begins`
an access             to a parameter from elsewhere (tied weights, `self.other.weight`) holds it while the module that
                      reached for it runs; from outside the model, until the step ends              `_seen`
hooks of others       on what autograd saves get aliases of parameters while a module runs; a parameter that is reached for
                      where they get it itself is held until the step ends                          `_share`, `_seen`
a use                 of one that is not there, which somebody has kept, is an access; between steps, an error   `_reached`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn

from weft.errors import ParameterReleased
from weft.memory import private
from weft.memory.tiers.fetch import Slot
from weft.memory.tiers.presence import Presence
from weft.memory.tiers.standins import Aliased, Released, Watched

__all__ = ["Passes"]


@dataclass(eq=False)
class Frame:
    """A module that runs: what it holds, and the hooks that stand before those of others."""

    held: list[Slot] = field(default_factory=list)
    sharing: Any = None


@final
class Passes:
    """See the file's header.

    Args:
        model: whose modules get hooks.
        presence: of its parameters.
        begin, end: called with `again` when a pass begins, and when it is over, well or not.
        foreign: the hooks of others that autograd gives parameters themselves to save, if there are some.

    Attributes:
        in_step: some pass with gradients has begun since the last step.
        saving: state dicts that are being made; what they take of released parameters is replaced afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        presence: Presence,
        begin: Callable[[bool], None],
        end: Callable[[bool], None],
        foreign: Callable[[], Any],
    ):
        # First, so that who copies this meets whose they are, who says no.
        self._begin, self._end, self._foreign = begin, end, foreign
        self.model, self.presence = model, presence
        self._root = id(model)  # dynamo, which looks into hooks, must not meet the model a second time
        self.in_step = self._running = self._again = False
        self.saving = 0
        self._frames: list[Frame] = []  # of the running modules
        self._outside: list[Slot] = []
        presence.reached = self._reached
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Put the hooks on."""
        for module in self.model.modules():
            if module._parameters:
                module.__dict__["_parameters"] = Watched(module._parameters, self._seen)
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if id(module) == self._root or not self._frames:
            self._again = private.in_backward()
            if not self._again:
                self._forget_frames()
            self._running, self.saving = True, 0
            self._begin(self._again)
        frame = Frame(sharing=self._share())
        self._frames.append(frame)
        for parameter in module._parameters.values():
            slot = self.presence.of(parameter)
            if slot is not None and slot not in frame.held:
                frame.held.append(slot)
                self.presence.hold(slot)

    def _share(self) -> Any:
        """Where hooks of others get parameters themselves, have them get aliases; the context, entered, in which they do."""
        hooks = self._foreign()
        if hooks is None:
            return None
        sharing = torch.autograd.graph.saved_tensors_hooks(Aliased(hooks[0], self.presence.of), hooks[1])
        sharing.__enter__()
        return sharing

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._frames:  # the pass was refused before it began
            self._running = False
            return
        frame = self._frames.pop()
        if frame.sharing is not None:
            frame.sharing.__exit__(None, None, None)
        self.presence.let_go(frame.held)
        self.presence.trim()
        if self._running and not self._frames:
            self._running = False
            self._end(self._again)

    def _forget_frames(self) -> None:
        """What a pass holds that was interrupted from outside."""
        for frame in reversed(self._frames):
            if frame.sharing is not None:
                frame.sharing.__exit__(None, None, None)
            for slot in frame.held:
                slot.users = 0
        self._frames.clear()

    def _seen(self, parameter: nn.Parameter) -> None:
        """A parameter is reached for."""
        slot = self.presence.of(parameter)
        if slot is None:
            return
        kept = self._foreign() is not None
        if slot.users and not isinstance(parameter, Released) and not kept:
            return
        if self._frames and not kept:
            self._frames[-1].held.append(slot)
        elif self.in_step:
            self._outside.append(slot)
        else:
            return
        self.presence.hold(slot)

    def _reached(self, parameter: nn.Parameter) -> None:
        """An operator is about to use the elements of a released parameter."""
        if self.saving:
            return
        slot = self.presence.of(parameter)
        if slot is None or not (self._frames or self.in_step):
            raise ParameterReleased(slot.name if slot is not None else "", tuple(parameter.shape))
        self._seen(parameter)

    def end_step(self) -> None:
        """What was reached for from outside is not held any more."""
        self._forget_frames()
        self.presence.let_go(self._outside)
        self._outside.clear()
        self.in_step = False

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self.model.modules():
            if isinstance(module._parameters, Watched):
                module.__dict__["_parameters"] = dict(module._parameters)


private.hide_from_compiler(Passes._enter, Passes._leave, Passes._seen, Passes._reached)
