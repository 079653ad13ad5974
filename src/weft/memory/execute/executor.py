"""Who executes the operators of a limit: the one interface of `Online` and `Replay`."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.memory.execute.backends import Backend, Hold, Owner
from weft.memory.execute.facts import Facts
from weft.memory.private import storage_of
from weft.memory.record import Category

__all__ = ["Executor"]


class Executor(abc.ABC):
    """Runs the operators of a program on the device whose bytes it manages.

    One that plans nothing never raises `Deviation`; else any method may: nothing has happened then, and somebody else must.

    Args:
        backend: holds the bytes.
        device: whose bytes are counted; tensors elsewhere are left alone.
        owner: whose ties they are; another executor of the same limit may have had them before.

    Attributes:
        effects: the optimizer's step is running.
        watch: called with each leaf that wants a gradient when it is first met.
    """

    def __init__(self, backend: Backend, device: torch.device, owner: Owner | None):
        self.backend, self.device = backend, device
        self.owner = owner or Owner()
        self.owner.executor = self
        self.effects = False
        self.watch: Callable[[Tensor], None] = lambda leaf: None

    def hold_of(self, tensor: Tensor) -> Hold | None:
        """Our tie to the bytes of a tensor, None if we never met them."""
        hold = getattr(storage_of(tensor), "_weft_tie", None)
        return hold if type(hold) is Hold and hold.owner is self.owner else None

    @abc.abstractmethod
    def call(self, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator."""

    @abc.abstractmethod
    def adopt(self, tensor: Tensor, kind: Category | None = None) -> Hold:
        """Take note of a storage that was there before; it stays until it dies. `kind` is what it is to the user."""

    @abc.abstractmethod
    def died(self, hold: Hold) -> None:
        """The last tensor over a storage is gone, and its bytes with it."""

    @abc.abstractmethod
    def expose(self, tensor: Tensor) -> None:
        """Somebody is about to know the address of a tensor's bytes: they stay there as long as they live."""

    @abc.abstractmethod
    def lend(self, tensor: Tensor, nbytes: int) -> None:
        """The owner of a tensor's bytes is about to give it `nbytes`, another number."""

    @abc.abstractmethod
    def settle(self, tensor: Tensor, kind: Category | None = None) -> None:
        """A tensor's bytes are there and stay. `kind`: what it is to the user from now on."""

    def reserve(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Keep room for what the first step of an optimizer will make and keep. A plan has it already."""

    def spend(self) -> None:  # noqa: B027
        """That step begins: it may have what was reserved."""

    @abc.abstractmethod
    def optimizing(self, yes: bool) -> None:
        """The optimizer's step begins or ends."""

    @abc.abstractmethod
    def skip_optimizer(self) -> bool:
        """Whether the optimizer's step may run without us, since nothing is to be done in it; then it counts as done."""

    @property
    @abc.abstractmethod
    def begun(self) -> bool:
        """Whether the step has begun, so that it can end."""

    @property
    @abc.abstractmethod
    def midway(self) -> bool:
        """Whether it is known that more of the step is to come."""

    @abc.abstractmethod
    def rest(self) -> None:
        """Between two steps: everything that is alive is there when this returns."""
