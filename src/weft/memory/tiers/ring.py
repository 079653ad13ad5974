"""A few aligned buffers of memory through which all chunks go: read into, updated in, written from, used again."""

from __future__ import annotations

from collections import deque
from typing import final

from torch import Tensor

from weft.memory.tiers.files import Transfer, aligned

__all__ = ["Ring"]


@final
class Ring:
    """Buffers of one size; made when the first is taken.

    Args:
        number: of buffers, >= 1.
        nbytes: of each.

    Attributes:
        taken: buffers that are read into or updated in, not written from.
    """

    def __init__(self, number: int, nbytes: int):
        if not isinstance(number, int) or number < 1:
            raise ValueError(
                f"buffers must be a whole number of at least 1, got {number!r}; 3 let reading, updating and writing overlap"
            )
        self.number, self.nbytes, self.taken = number, nbytes, 0
        self._all: list[Tensor] = []
        self._free: list[Tensor] | None = None
        self._writing: deque[tuple[Transfer, Tensor]] = deque()

    def _buffers(self) -> list[Tensor]:
        if self._free is None:
            # Zeros: padding goes to disk, and what another job left in memory should not.
            self._all = [aligned(self.nbytes).zero_() for _ in range(self.number)]
            self._free = list(self._all)
        return self._free

    def has_free(self) -> bool:
        """Whether a buffer can be had without waiting for anything."""
        free = self._buffers()
        while not free and self._writing and self._writing[0][0].done():
            self._written()
        return bool(free)

    def take(self) -> Tensor:
        """A buffer; waits for the oldest writing if none is free.

        Raises:
            DiskFull, OSError: that writing has failed.
        """
        free = self._buffers()
        if not free:
            assert self._writing, "every buffer of the ring is being read into"
            self._written()
        self.taken += 1
        return free.pop()

    def give_back(self, buffer: Tensor) -> None:
        """A taken buffer is not needed after all."""
        self.taken -= 1
        self._buffers().append(buffer)

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        """A taken buffer is being written; it is free when that is done."""
        self.taken -= 1
        self._writing.append((transfer, buffer))

    def _written(self) -> None:
        transfer, buffer = self._writing.popleft()
        self._buffers().append(buffer)  # also if it failed: what it held is lost with the step
        transfer.wait()

    def drain(self) -> None:
        """Return when everything is written.

        Raises:
            DiskFull, OSError: some of it has failed.
        """
        while self._writing:
            self._written()

    def reset(self) -> None:
        """All buffers are free, wherever an interrupt left them: the step is undone, and nothing is under way any more."""
        self._writing.clear()
        self.taken = 0
        if self._free is not None:
            self._free = list(self._all)

    def close(self) -> None:
        self._writing.clear()
        self._free, self._all = None, []
