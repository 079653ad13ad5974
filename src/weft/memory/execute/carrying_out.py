"""What the policy core decides, carried out on the bytes of real tensors: the machine of an online core."""

from __future__ import annotations

from typing import final

import torch

from weft.memory.core import Block, Step
from weft.memory.execute.backends import Backend, Hold
from weft.memory.execute.calls import Call
from weft.memory.execute.leaves import Leaves, is_soft

__all__ = ["Bytes"]


@final
class Bytes:
    """Takes bytes away, brings them back and moves them, as `core.Machine` says.

    Attributes:
        backend: holds the bytes.
        leaves: what is held because something that is gone would be made from it.
        dropped: not there, but a storage of the user's shows them.
    """

    def __init__(self, backend: Backend, leaves: Leaves):
        self.backend, self.leaves = backend, leaves
        self.dropped: dict[Block, None] = {}

    def drop(self, block: Block) -> None:
        if type(block.payload) is Hold:
            self.dropped[block] = None
            if is_soft(block):
                self.leaves.gone(block)
        self.backend.drop(block)

    def place(self, block: Block) -> None:
        pass

    def again(self, step: Step) -> None:
        call: Call = step.payload
        makes, num_over, places = step.makes, len(step.overwrites), []
        if self.backend.addresses:
            places = list(zip(step.sizes, step.places, strict=True))[num_over:]
        made = call.again(self.backend.run, places, (step.offset, step.workspace))
        for old, position in step.overwrites:
            scratch, old.payload = old.payload, None
            self._come_back(makes[position], scratch)
        for block, storage in zip(makes[num_over:], made, strict=True):
            self._come_back(block, storage)
        self.backend.bound()

    def _come_back(self, block: Block | None, storage: torch.UntypedStorage) -> None:
        if block is not None:
            self.dropped.pop(block, None)
            self.backend.back(block, storage)
            self.leaves.back(block)

    def move(self, block: Block, old_offset: int) -> None:
        self.backend.move(block)

    def describe(self, step: Step | None, block: Block) -> str:
        call = (step or block.step).payload if step is not None or block.step is not None else None
        if call is not None:
            return repr(call)
        return block.payload if isinstance(block.payload, str) else "a tensor that came from outside"
