"""Bring parameters from their tiers to the device, ahead of their use, and sums of gradients to their owners.

Every process moves its own 1/N over its own link (disk to host, host to device), then all gather the parts: with N processes a
parameter arrives N times as fast as over one link (bandwidth-centric partitioning).

    disk --read--> host --copy--> device --all-gather--> whole parameter            `Fetcher.fetch`
    ahead of use: own parts along the recorded order up to `ahead` bytes; of the next parameter also the all-gather
    whole gradient --exchange of parts, sum in rank order, divide by N--> own part  `Fetcher.reduce`

Own parts are read ahead without asking anybody; collectives are agreed on first (`rounds`).
Source: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, sections 6.1 and 6.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import together
from weft.memory.tiers.dense import flat_like
from weft.memory.tiers.files import Transfer, aligned
from weft.memory.tiers.prefetch import Order
from weft.memory.tiers.rounds import Rounds

__all__ = ["Fetcher", "Slot"]


@dataclass(eq=False)
class Slot:
    """A parameter that lives on a tier.

    Attributes:
        index: among all parameters of the model.
        shape, stride, dtype: of the parameter when it is whole; its memory is dense.
        start, stop: the elements that this process owns.
        tier: "device" (always whole on the device), "host" or "disk".
        home: for "host", this process's elements, padded to `each`.
        whole: the parameter's elements while they are on the device.
        users: modules that are running and want it to stay.
    """

    index: int
    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int
    each: int
    tier: str
    home: Tensor | None = None
    whole: Tensor | None = None
    users: int = 0
    version: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def shaped(self, flat: Tensor) -> Tensor:
        """A parameter's elements, in memory order, in its shape."""
        return flat[: self.numel].as_strided(self.shape, self.stride)

    def flat(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of the parameter's shape, in its memory order, 1-D; raises as `flat_like`."""
        return flat_like(tensor, self.shape, self.stride, self.name)


@dataclass
class Arriving:
    """This process's part of a parameter on its way to the device."""

    part: Tensor  # 1-D, `each` elements, on the CPU
    reading: Transfer | None
    nbytes: int
    copy: Tensor | None = None  # on the device
    ready: Any = None  # event of the copy

    def wait(self, device: torch.device) -> Tensor:
        if self.reading is not None:
            self.reading.wait()
            self.reading = None
        if device.type == "cpu":
            return self.part
        if self.copy is None:
            self.copy = self.part.to(device, non_blocking=True)
        elif self.ready is not None:
            torch.cuda.current_stream(device).wait_event(self.ready)
            self.copy.record_stream(torch.cuda.current_stream(device))
        return self.copy


class Fetcher:
    """See the file's header.

    Args:
        slots: of all parameters.
        read: (slot's index, aligned buffer) -> Transfer: starts reading this process's part from disk.
        reduced: (slot's index, own part of the averaged gradient): called when a sum is there.
        device: where parameters are used.
        group, control: process groups for the data and for the agreement; None alone.
        ahead: bytes of parameters on their way before they are asked for.
    """

    def __init__(
        self,
        slots: list[Slot],
        read: Callable[[int, Tensor], Transfer],
        reduced: Callable[[int, Tensor], None],
        device: torch.device,
        group: Any,
        control: Any,
        ahead: int,
    ):
        self.slots, self._read, self._reduced = slots, read, reduced
        self.device, self.group, self.ahead = device, group, ahead
        self.training, self.inference = Order(), Order()
        self.order = self.training
        self.world = 1
        self.rounds: Rounds | None = None
        if control is not None:
            self.rounds = Rounds(control, self._gather_now, self._gather_ahead, self._sum)
            self.world = self.rounds.world
        self._arriving: dict[int, Arriving] = {}
        self._gathering: dict[int, tuple[Any, Tensor, Tensor]] = {}  # work, whole, own part
        self._wanted: dict[int, Tensor] = {}
        self._stream: Any = None

    # ---- parameters

    def fetch(self, index: int, *, ordered: bool = True) -> Tensor:
        """All elements of a parameter on the device, 1-D (there may be padding behind them).

        Args:
            ordered: the use is part of a pass; otherwise it is not recorded, and nothing is fetched ahead.
        """
        slot = self.slots[index]
        if ordered:
            self.order.use(index)
        whole = slot.whole
        if self.rounds is not None:
            there = whole is not None or index in self._gathering
            self.rounds.fetch(index, have=there, following=self._following() if ordered else -1)
            # The round may have ended other uses of it, and with them `slot.whole`.
            whole = whole if whole is not None else self._wanted.pop(index, None)
            if whole is None:
                whole = self._gathered(index)
        elif whole is None:
            whole = self._part(index)
        if ordered:
            self.look_ahead(there=index)
        return whole

    def _following(self) -> int:
        """The next parameter, if it can be gathered ahead."""
        for index in self.order.ahead():
            slot = self.slots[index]
            if slot.tier == "device":
                continue
            return -1 if slot.whole is not None or index in self._gathering else index
        return -1

    def _start(self, index: int) -> Arriving:
        slot = self.slots[index]
        nbytes = slot.each * slot.dtype.itemsize
        if slot.home is not None:
            arriving = Arriving(slot.home, None, nbytes)
            if self.device.type == "cuda":
                if self._stream is None:
                    self._stream = torch.cuda.Stream(self.device)
                with torch.cuda.stream(self._stream):
                    arriving.copy = slot.home.to(self.device, non_blocking=True)
                    arriving.ready = self._stream.record_event()
        else:
            buffer = aligned(nbytes, pin=self.device.type == "cuda")
            reading = self._read(index, buffer) if slot.stop > slot.start else None
            arriving = Arriving(buffer[:nbytes].view(slot.dtype), reading, nbytes)
        self._arriving[index] = arriving
        return arriving

    def _part(self, index: int) -> Tensor:
        """This process's part, on the device; waits for it."""
        arriving = self._arriving.pop(index, None)
        if arriving is None:
            arriving = self._start(index)
            del self._arriving[index]
        return arriving.wait(self.device)

    def look_ahead(self, there: int = -1) -> None:
        """Start what the recorded order says comes next, and drop what it no longer says.

        Args:
            there: a parameter that has just been fetched, of which its slot does not know yet.
        """
        room, expected = self.ahead, set()
        for index in self.order.ahead():
            slot = self.slots[index]
            here = index == there or slot.tier == "device" or slot.whole is not None
            if here or index in self._gathering or index in expected:
                continue
            room -= slot.each * slot.dtype.itemsize
            if room < 0 and expected:
                break
            expected.add(index)
            if index not in self._arriving:
                self._start(index)
            if room < 0:
                break
        for index in [index for index in self._arriving if index not in expected]:
            self._drop(index)

    def _drop(self, index: int) -> None:
        arriving = self._arriving.pop(index)
        if arriving.reading is not None:
            arriving.reading.wait()

    # ---- collectives; the calls are in one order on all processes

    def _launch(self, index: int, *, wait: bool) -> tuple[Any, Tensor, Tensor]:
        import torch.distributed as dist

        slot, part = self.slots[index], self._part(index)
        whole = torch.empty(self.world * slot.each, dtype=slot.dtype, device=self.device)
        with together(f"gathering {slot.name}"):
            work = dist.all_gather_single(whole, part, group=self.group, async_op=not wait)
        return work, whole, part

    def _gather_now(self, index: int, requested: bool) -> None:
        _, whole, _ = self._launch(index, wait=True)
        if requested:
            self._wanted[index] = whole

    def _gather_ahead(self, index: int) -> None:
        self._gathering[index] = self._launch(index, wait=False)

    def _gathered(self, index: int) -> Tensor:
        work, whole, _ = self._gathering.pop(index)
        with together(f"gathering {self.slots[index].name}"):
            work.wait()
        return whole

    def reduce(self, index: int, gradient: Tensor) -> None:
        """Hand in a whole gradient, 1-D in the parameter's memory order; `reduced` is called when all have."""
        assert self.rounds is not None
        self.rounds.reduce(index, gradient, following=self._following())
        self.look_ahead()

    def _sum(self, index: int, gradient: Tensor | None) -> None:
        import torch.distributed as dist

        slot = self.slots[index]
        # Everybody sends each owner its part; owners add in the order of ranks, so that bits do not depend on timing.
        sent = torch.zeros(self.world * slot.each, dtype=slot.dtype, device=self.device)
        if gradient is not None:
            sent[: slot.numel] = gradient
        parts = torch.empty_like(sent)
        with together(f"summing the gradient of {slot.name}"):
            dist.all_to_all_single(parts, sent, group=self.group)
        rows = parts.view(self.world, slot.each)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        total /= self.world
        self._reduced(index, total[: slot.stop - slot.start])

    # ---- ends

    def settle(self) -> None:
        """The end of a pass: every process has come to it when this returns, and every sum is done."""
        if self.rounds is not None:
            self.rounds.settle()

    def finish(self) -> None:
        """The end of a step (or of a pass without gradients): what was recorded counts, what was read ahead is old."""
        self.order.finish()
        for index in list(self._arriving):
            self._drop(index)
        for index in list(self._gathering):
            self._gathered(index)
        self._wanted.clear()
