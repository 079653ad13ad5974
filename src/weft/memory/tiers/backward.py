"""What happens in backward: autograd gets back what it saved, and gradients leave as they come.

what autograd saves of a parameter is replaced by a note of which one and how it was looked at; when the node runs, the
note fetches it, and it dies with the node; other tensors go to the tier of activations            `_pack`, `_unpack`
what hooks of others get, which come before ours, is left to them                                  `foreign`
a finished gradient leaves `p.grad` at once: summed to its owners, kept on its tier; what stands
there says where it is (`moved`)                                                                   `_finished`
where updates are done in backward, a parameter stays until its update, which needs its elements   `present`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.memory import private
from weft.memory.tiers.activations import Activations, Saved
from weft.memory.tiers.fetch import Fetcher, Slot
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.layout import Segment
from weft.memory.tiers.moved import Moved, MovedGradient
from weft.memory.tiers.presence import Presence
from weft.memory.tiers.standins import View
from weft.memory.tiers.updates import Updates

__all__ = ["Backward"]


@final
class Backward:
    """See the file's header.

    Args:
        activations: keeps other saved tensors; None leaves them where they are.
        updates: done in backward; None where they are done in `step`.
        moved: knows which gradients left `p.grad`; None leaves them where torch puts them.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        presence: Presence,
        fetcher: Fetcher,
        gradients: Gradients,
        activations: Activations | None,
        updates: Updates | None,
        moved: Moved | None,
    ):
        self.slots, self.presence, self.fetcher, self.gradients = slots, presence, fetcher, gradients
        self.activations, self.updates, self.moved = activations, updates, moved
        self._for_update: list[Slot] = []  # fetched by backward, and kept until their update needs them
        self._told_engine = False
        self._saving: Any = None
        self._handles: dict[int, tuple[Any, Any]] = {}  # of gradient hooks

    # ---- what autograd saves

    def begin(self) -> None:
        """A pass begins whose backward is to come."""
        self.hook_gradients()
        self._told_engine = False
        self.save()

    def save(self) -> None:
        """From now on, what autograd saves is in here."""
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._saving.__enter__()

    def unsave(self) -> bool:
        """The end of that; whether there was a beginning."""
        if self._saving is None:
            return False
        saving, self._saving = self._saving, None
        saving.__exit__(None, None, None)
        return True

    def foreign(self) -> Any:
        """The hooks of others, if they are the ones that get what autograd saves, and get parameters themselves."""
        hooks = private.hooks_on_saving() if torch.is_grad_enabled() else None
        if hooks is None or hooks[0] == self._pack or getattr(hooks[0], "ours", None) == self.presence.of:
            return None
        return hooks

    def _pack(self, tensor: Tensor) -> Any:
        view = self.presence.look(tensor)
        if view is not None:
            return view
        saved = self.activations.save(tensor) if self.activations is not None else None
        return tensor if saved is None else saved

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, Saved):
            assert self.activations is not None
            return self.activations.load(packed)
        assert isinstance(packed, View)
        self._running()
        slot, elements = self.slots[packed.slot], self.presence.again(packed)
        if self.updates is not None:
            if slot.parameter.requires_grad and slot not in self._for_update:
                slot.users += 1
                self._for_update.append(slot)
            self.updates.read_ahead()
        self.presence.trim()
        return elements

    def _running(self) -> None:
        """Ask once per backward pass to be told of its end, where all processes meet."""
        self.fetcher.order = self.fetcher.training
        if self.fetcher.world > 1 and not self._told_engine:
            self._told_engine = private.at_end_of_backward(self._through)

    def _through(self) -> None:
        self._told_engine = False
        self.fetcher.settle()

    # ---- gradients

    def hook_gradients(self) -> None:
        """See the gradients of all parameters that have some by now: one that was frozen may not be any more."""
        moved = self.moved
        if moved is None:
            return
        for slot in self.slots:
            if slot.parameter.requires_grad and slot.index not in self._handles:
                before = lambda gradient, slot=slot: moved.arriving(slot, gradient)
                after = lambda parameter, slot=slot: self._finished(slot, parameter)
                self._handles[slot.index] = (
                    slot.parameter.register_hook(before), slot.parameter.register_post_accumulate_grad_hook(after)
                )  # fmt: skip

    def _finished(self, slot: Slot, parameter: nn.Parameter) -> None:
        """A gradient is finished."""
        gradient = parameter.grad
        if gradient is None or isinstance(gradient, MovedGradient):  # nothing came
            return
        assert self.moved is not None
        parameter.grad = None
        self._running()
        elements = slot.flat(gradient)
        if self.fetcher.world > 1:
            self.fetcher.reduce(slot.index, elements)
        else:
            self.reduced(slot.index, elements)
        self.moved.left(slot)

    def reduced(self, index: int, part: Tensor) -> None:
        """This process's part of a gradient, of all processes."""
        self.gradients.add(index, part)
        if self.updates is not None:
            self.updates.arrived(index)
            self.updates.read_ahead()
            self.drop_updated()

    # ---- parameters that wait for their update

    def present(self, segment: Segment) -> Tensor | None:
        """The elements of a segment, if they are on the device."""
        whole = self.slots[segment.shard].whole
        return None if whole is None else whole[segment.start : segment.stop]

    def drop_updated(self, *, everything: bool = False) -> None:
        """Let go of parameters that have been updated, or of all."""
        for slot in list(self._for_update):
            if everything or self.updates is None or not self.updates.awaits(slot.index):
                self._for_update.remove(slot)
                slot.users -= 1
        self.presence.trim()

    def close(self) -> None:
        """Take the hooks off."""
        self.unsave()
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        if self.moved is not None:
            self.moved.close(self.slots)


private.hide_from_compiler(Backward._pack, Backward._unpack, Backward._finished)
