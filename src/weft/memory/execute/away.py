"""Sending blocks to a lower tier while operators run as they come: the copy there takes the place of the recipe.

Problem    what cannot be made again (results of operators on borrowed bytes, of what was overwritten) cannot be dropped, and
           making again what can be needs room for whatever it is made from: below some budget neither is possible.
Method     a block that must go is copied to the shelf; from then on its recipe is a step that reads nothing and loads it.
           Bringing back, rebuilding what is made from it and dropping it again are the core's business, as for any recipe.
Which      what the core would drop: always in a step that is written down (it is one of the first, and will be planned; nothing
           needs less room than a load), else if two copies take less than making it again. Before giving up, also what
           cannot be made again, the largest first (`Core._send`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, final

import torch

from weft.cluster.device import Tier
from weft.memory.core.blocks import Block, Step, price
from weft.memory.execute.backends import Hold, shown
from weft.memory.execute.shelf import Shelf

if TYPE_CHECKING:
    from weft.memory.execute.online import Online

__all__ = ["Away", "Sender"]

LEAST = 1 << 10  # bytes; a block of fewer stays


@final
class Away:
    """Bytes on a shelf, as the payload of the step that loads them; the copy goes when nobody knows that step any more."""

    __slots__ = ("__weakref__", "key", "shelf")
    soft = False  # no recipe leans on others less

    def __init__(self, shelf: Shelf, storage: torch.UntypedStorage):
        self.key, self.shelf = object(), shelf
        shelf.save(self.key, storage)
        weakref.finalize(self, shelf.forget, self.key)
        shelf.saved(self.key)

    def __repr__(self) -> str:
        return "what was offloaded"

    def again(self, run: Any = None, places: Any = (), workspace: Any = (-1, 0)) -> list[torch.UntypedStorage]:
        """The storage, as `Call.again` gives those that a call makes."""
        return [self.shelf.load(self.key)]


@final
class Sender:
    """Decides for the core of an `Online` what goes to a tier, and sends it."""

    def __init__(self, online: Online, tier: Tier):
        self.online, self.tier, self.shelf = online, tier, Shelf(online.device, tier.folder)

    def blocks(self) -> list[Block]:
        """All that the program refers to."""
        return [hold.block for hold in self.online.owner.holds.values()]

    def __call__(self, block: Block) -> bool:
        """Copy a block that somebody refers to, if that is possible and better than what else there is; then it may go.

        Raises:
            DiskFull: there is no room on the disk.
        """
        step, hold = block.step, block.payload
        if step is not None and type(step.payload) is Away:
            return True
        if (
            type(hold) is not Hold
            or hold.kind != "activation"
            or hold.exposed
            or hold.lent
            or block.nbytes < LEAST
            or self.shelf.nbytes + block.nbytes > self.tier.capacity
        ):
            return False
        seconds = self.tier.seconds(block.nbytes)
        if step is not None and self.online.tape is None and price(block) <= 2 * seconds:
            return False
        loading = Step((), 0, seconds, True, (), -1 if step is None else step.order)
        loading.payload = Away(self.shelf, shown(block))
        loading.outputs, loading.sizes = [weakref.ref(block)], [block.nbytes]
        block.step, block.seconds, block.evictable = loading, seconds, True
        return True
