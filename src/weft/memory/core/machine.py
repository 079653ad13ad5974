"""What the policy core asks of whoever holds the bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from weft.memory.core.blocks import Block, Step

__all__ = ["Lower", "Machine"]


class Machine(Protocol):
    """What the core asks of whoever holds the bytes. Every call is to be carried out before it returns."""

    def drop(self, block: Block) -> None:
        """Give the bytes of `block` (at `block.offset`) back."""

    def place(self, block: Block) -> None:
        """`block` is about to come back: its bytes belong at `block.offset` from now on."""

    def again(self, step: Step) -> None:
        """Run `step` again. All its reads are there. `step.makes` has the block that each output goes to, or None for one that
        is to be thrown away; `step.places` has the address of every output, thrown away or not. An overwritten read ends:
        its bytes, where they are, become the output's (`place` is not called for that one)."""

    def move(self, block: Block, old_offset: int) -> None:
        """Copy `block` from `old_offset` to `block.offset`; the two ranges may overlap (memmove)."""

    def describe(self, step: Step | None, block: Block) -> str:
        """Who needs `block`, for errors: "aten.addmm in h.3.mlp"."""


class Lower(Protocol):
    """What the core asks of whoever can copy blocks to a lower tier."""

    def __call__(self, block: Block) -> bool:
        """Copy a block that somebody refers to there, and make loading it its recipe; False if it would rather not."""

    def blocks(self) -> Iterable[Block]:
        """All that somebody refers to."""
