"""What runs in a model at the moment, seen by hooks on its modules.

a module runs         its own parameters are held until it has run                                  `_enter`, `_leave`
a pass                from the moment at which somebody outside calls the model, or a part of it, until that returns;
                      what is computed a second time within backward is none                        `_begins`
an access             to a parameter from elsewhere (tied weights, `self.other.weight`) holds it while the module that
                      reached for it runs; from outside the model, until the step ends              `_seen`
a use                 of one that is not there, which somebody has kept, is an access; between steps, an error   `_reached`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn

from weft.errors import ParameterReleased
from weft.memory import private
from weft.memory.tiers.fetch import Slot
from weft.memory.tiers.presence import Presence
from weft.memory.tiers.standins import Released, Watched

__all__ = ["Passes"]


@final
class Passes:
    """See the file's header.

    Args:
        model: whose modules get hooks.
        presence: of its parameters.
        begin, end: called with `again` when a pass begins, and when it is over, well or not.

    Attributes:
        in_step: some pass with gradients has begun since the last step.
        saving: state dicts that are being made; what they take of released parameters is replaced afterwards.
    """

    def __init__(
        self, model: nn.Module, presence: Presence, begin: Callable[[bool], None], end: Callable[[bool], None]
    ):
        self.model, self.presence, self._begin, self._end = model, presence, begin, end
        self._root = id(model)  # dynamo, which looks into hooks, must not meet the model a second time
        self.in_step = self._running = self._again = False
        self.saving = 0
        self._frames: list[list[Slot]] = []  # what each running module holds
        self._outside: list[Slot] = []
        presence.reached = self._reached
        self._handles: list[Any] = []
        for module in model.modules():
            if module._parameters:
                module.__dict__["_parameters"] = Watched(module._parameters, self._seen)
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if id(module) == self._root or not self._frames:
            self._again = private.in_backward()
            if not self._again:
                self._forget_frames()
            self._running, self.saving = True, 0
            self._begin(self._again)
        frame: list[Slot] = []
        self._frames.append(frame)
        for parameter in module._parameters.values():
            slot = self.presence.of(parameter)
            if slot is not None and slot not in frame:
                frame.append(slot)
                self.presence.hold(slot)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.presence.let_go(self._frames.pop())
        self.presence.trim()
        if self._running and not self._frames:
            self._running = False
            self._end(self._again)

    def _forget_frames(self) -> None:
        """What a pass holds that was interrupted from outside."""
        for frame in self._frames:
            for slot in frame:
                slot.users = 0
        self._frames.clear()

    def _seen(self, parameter: nn.Parameter) -> None:
        """A parameter is reached for."""
        slot = self.presence.of(parameter)
        if slot is None or (slot.users and not isinstance(parameter, Released)):
            return
        if self._frames:
            self._frames[-1].append(slot)
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
