"""A process within its bytes: its step runs under `weft.memory.limit`, and what it takes is measured.

    counted    everything that lives between steps: leaves, pieces, buckets, buffers          `Kept`
    a step     forward, backward and update of all micro-batches, buckets brought in line    `Keeper.step`
    measured   the most bytes so far, by `weft.memory.meter`                                  `Keeper.peak`

Only operators of this process are repeated, and only their results wait in the tier below, if the plan has one. What another
process takes part in runs once: the result of a collective stays until its last reader, what one is given stays where it is
while it lives, and the order on the wire is that of the program. So processes need not agree on what they repeat or move, and
a run within bytes gives the bits of one without.
ZeRO-3's whole copies come and go as `store` says (`Bucket.free`): they count while they are there, and what is made from them is
kept (or moved) rather than made again, since they may have gone by then.

What an operator takes and gives back while it runs (the workspace of a convolution) is not known before it has run. Where the
native library counts, its first run is capped by what is free, and begins anew, after room has been made, if it asks for more
(`memory.execute.online`): the first step keeps within the budget too. Elsewhere (no compiler, CUDA) the first step may exceed
it by that.

A budget that cannot be kept is a `BudgetError` that names the process. Others may wait for it by then: the run is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import final

import torch
from torch import Tensor, nn

from weft.cluster import Tier
from weft.errors import BudgetError
from weft.memory.execute.limit import Limit, limit
from weft.memory.meters import Meter, meter
from weft.runtime.store import ParameterStore

__all__ = ["Keeper", "Kept"]

ASIDE = 16 << 10  # bytes of a budget for what no operator is asked for: numbers as tensors, states of generators


@final
class Kept(nn.Module):
    """The tensors that an engine holds between steps, as a module: what limits and meters count from the start."""

    def __init__(self, store: ParameterStore, buffers: Iterable[Tensor]):
        super().__init__()
        parameters = {id(p): p for p in (*store.leaves.values(), *store.pieces.values())}
        self.all = nn.ParameterList(parameters.values())
        for number, tensor in enumerate((*buffers, *(t for b in store.buckets for t in b.flats()))):
            self.register_buffer(f"buffer{number}", tensor, persistent=False)


@final
class Keeper:
    """Keeps the steps of one process within a budget, and measures them.

    Args:
        store, buffers: what the process holds between steps.
        rank: for errors.
        budget: bytes; None for no limit.
        measure: count the most bytes so far. Always on within a budget, if the device can be measured exactly.
        tier: where activations may wait besides.
        optimizer: of the engine; there is room for the state that its first step makes from the start.
    """

    def __init__(
        self,
        store: ParameterStore,
        buffers: Iterable[Tensor],
        device: torch.device,
        rank: int,
        budget: int | None = None,
        measure: bool = False,
        tier: Tier | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.rank, self.budget = rank, budget
        self._kept = Kept(store, buffers)
        self._limit: Limit | None = None
        if budget is not None:
            self._limit = limit(
                max(1, budget - ASIDE), model=self._kept, optimizer=optimizer, device=device, by_hand=True, tier=tier
            )
        self._meter: Meter | None = None
        if measure or budget is not None:
            found = meter(self._kept, device=device)
            if found.exact or device.type != "cpu":
                self._meter = found
            else:  # watching operators is slow, and inexact
                found.close()

    @property
    def peak(self) -> int:
        """Most bytes at any moment so far; 0 if nothing measures them."""
        return self._meter.peak if self._meter is not None else 0

    @property
    def notes(self) -> list[str]:
        """What a user should know of how the budget is kept, in sentences."""
        return self._limit.notes if self._limit is not None else []

    @contextlib.contextmanager
    def step(self, batch: Iterable[Tensor] = ()) -> Iterator[None]:
        """A step, or its gradients alone, runs in here.

        Args:
            batch: what it will read, for as long as it runs.
        Raises:
            BudgetError: it cannot be done within the budget.
        """
        within = self._limit
        if within is None:
            yield
            return
        try:
            if within.resting:
                within.wake()
            else:
                within.__enter__()
            within.count(*batch)
            yield
            within.step()
        except BudgetError as error:
            within.__exit__(type(error), error, error.__traceback__)
            raise BudgetError(error.budget, error.least, f"{error.what} (rank {self.rank})") from error
        except BaseException as error:
            within.__exit__(type(error), error, error.__traceback__)
            raise
        within.rest()

    def close(self) -> None:
        """Nothing is kept or measured any more."""
        if self._limit is not None and self._limit.resting:
            self._limit.__exit__(None, None, None)
        if self._meter is not None:
            self._meter.close()
