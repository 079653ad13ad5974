"""Which parameters are on the device, and for how long.

hold, let_go     for whoever uses a parameter: its elements are under `p.data` while anybody does
trim             takes away what nobody uses, unless the recorded order says that it is used again at once
look, again      a look at a parameter's elements as a note, and the elements for the note later
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import final

from torch import Tensor, nn

from weft.errors import ParameterChanged
from weft.memory.tiers.fetch import Fetcher, Slot
from weft.memory.tiers.standins import Released, View, present, release

__all__ = ["Presence"]


@final
class Presence:
    """See the file's header.

    Args:
        slots: of all parameters.
        fetcher: brings them.
        placeholder: what a released one holds.

    Attributes:
        reached: called with a released parameter when an operator is about to use its elements.
    """

    def __init__(self, slots: Sequence[Slot], fetcher: Fetcher, placeholder: Callable[[Slot], Tensor]):
        self.slots, self.fetcher, self._placeholder = slots, fetcher, placeholder
        self._of_parameter = {id(slot.parameter): slot for slot in slots if slot.tier != "device"}
        self._of_storage: dict[int, int] = {}  # id of a whole parameter's storage -> slot
        self.held: set[int] = set()  # slots whose elements are on the device
        self.reached: Callable[[nn.Parameter], None] = lambda parameter: None
        for slot in self._of_parameter.values():
            self._take_away(slot)

    def of(self, parameter: nn.Parameter | None) -> Slot | None:
        """The slot of a parameter that comes and goes."""
        return self._of_parameter.get(id(parameter))

    def hold(self, slot: Slot) -> None:
        """Put a parameter's elements under it."""
        slot.users += 1
        if slot.users > 1 and not isinstance(slot.parameter, Released):
            return
        whole = self.fetcher.fetch(slot.index)
        if slot.whole is not whole:
            self._know(slot, whole)
        if isinstance(slot.parameter, Released):
            present(slot.parameter, slot.shaped(whole))
        self.trim()

    def let_go(self, slots: Iterable[Slot]) -> None:
        """Each was held once more than it is needed now; `trim` comes next."""
        for slot in slots:
            slot.users -= 1

    def _know(self, slot: Slot, whole: Tensor) -> None:
        slot.whole, slot.version = whole, slot.parameter._version
        self.held.add(slot.index)
        self._of_storage[id(whole.untyped_storage())] = slot.index

    def trim(self) -> None:
        """Take away what nobody uses, except what is used again before `ahead` bytes of others."""
        idle = [index for index in self.held if self.slots[index].users == 0]
        if not idle:
            return
        soon, room = set(), self.fetcher.ahead
        for index in self.fetcher.order.ahead():
            if index not in soon:
                soon.add(index)
                room -= self.slots[index].nbytes
                if room < 0:
                    break
        for index in idle:
            if index not in soon:
                self._release(self.slots[index])

    def release_idle(self) -> None:
        """Take away all that nobody uses: its values are of the step before."""
        for index in list(self.held):
            if self.slots[index].users == 0:
                self._release(self.slots[index])

    def _release(self, slot: Slot) -> None:
        assert slot.whole is not None
        there = not isinstance(slot.parameter, Released) and slot.numel > 0
        if slot.parameter._version != slot.version or (there and slot.parameter.data_ptr() != slot.whole.data_ptr()):
            name, slot.version = slot.name, slot.parameter._version
            raise ParameterChanged(name)
        self._take_away(slot)  # first: an interrupt behind it leaves a released parameter, which `hold` presents again
        self._of_storage.pop(id(slot.whole.untyped_storage()), None)
        self.held.discard(slot.index)
        slot.whole = None

    def _take_away(self, slot: Slot) -> None:
        release(slot.parameter, self._placeholder(slot), lambda parameter: self.reached(parameter))

    def look(self, tensor: Tensor) -> View | None:
        """How a tensor looks at a parameter on the device; None if it does not."""
        index = self._of_storage.get(id(tensor.untyped_storage()))
        if index is None or tensor.dtype != self.slots[index].dtype:
            return None
        whole = self.slots[index].whole
        assert whole is not None
        base = whole.storage_offset()
        return View(index, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset() - base))

    def again(self, view: View) -> Tensor:
        """The elements that were looked at, which are on the device for as long as they are used again soon."""
        slot = self.slots[view.slot]
        whole = self.fetcher.fetch(slot.index)
        if slot.whole is None:
            self._know(slot, whole)
        return whole.as_strided(view.shape, view.stride, whole.storage_offset() + view.offset)
