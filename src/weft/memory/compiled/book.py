"""What compiled graphs hold between their calls, so that several graphs, or several calls of one, share a budget.

Problem    each graph is planned by itself: its peak counts its inputs, and all that it makes. While one runs, others may hold
           parameters, what they saved for their backward, and gradients; the optimizer holds its state.
Method     weak references to the storages that go into and come out of graphs; alive = sum over those that still live.
           Before a call: named from outside + optimizer + alive and not the graph's own + its peak <= budget    `Book.admit`
Guarantee  no call begins that would exceed the budget by what the book knows. What it cannot tell apart (an input that another
           graph also holds, in backward) it counts twice: it errs on the side of refusing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from weft.errors import BudgetError
from weft.memory.tracing.state import state_now, state_to_come

__all__ = ["Book"]


@final
class Book:
    """Bytes held by compiled graphs and around them.

    Args:
        budget: bytes of all tensors at once.
        outside: bytes that no graph sees, named by the user.
        optimizer: whose state counts: what it is now, or what it will be after its first step.
    """

    def __init__(self, budget: int, outside: int, optimizer: torch.optim.Optimizer | None):
        self.budget, self.outside, self.optimizer = budget, outside, optimizer
        self._expected = (state_now(optimizer) or state_to_come(optimizer)) if optimizer is not None else 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def elsewhere(self) -> int:
        """Bytes outside of graphs: named ones, and the optimizer's state."""
        now = state_now(self.optimizer) if self.optimizer is not None else 0
        return self.outside + max(now, self._expected)

    def note(self, tensors: Iterable[Any]) -> None:
        """Tensors that a graph takes or leaves behind."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self._held.setdefault(ref.cdata, (ref, tensor.untyped_storage().nbytes()))

    def others(self, own: Iterable[Any] = (), parameters: Iterable[int] = ()) -> int:
        """Bytes alive in the book, without those of the tensors `own` and of the storages numbered `parameters`."""
        mine = {*parameters, *(t.untyped_storage()._cdata for t in own if isinstance(t, Tensor))}
        for key in [key for key, (ref, _) in self._held.items() if ref.expired()]:
            del self._held[key]
        return sum(nbytes for key, (_, nbytes) in self._held.items() if key not in mine)

    def admit(self, peak: int, own: Iterable[Any], parameters: Iterable[int] = ()) -> None:
        """Let a graph of `peak` bytes run on the tensors `own`.

        Raises:
            BudgetError: it would not fit beside what is held.
        """
        elsewhere, others = self.elsewhere, self.others(own, parameters)
        need = elsewhere + others + peak
        if need > self.budget:
            raise BudgetError(
                self.budget,
                need,
                f"a compiled graph needs {peak:,} bytes, other graphs and gradients hold {others:,}, and {elsewhere:,} are "
                "outside of them (optimizer state, what outside= says). Clear gradients with zero_grad() before forward; "
                "compile model and loss as one graph (torch.compile(..., fullgraph=True))",
            )
