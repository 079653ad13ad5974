"""Update parameters during backward, as soon as their gradients are there, so that the disk works while the device computes.

A chunk is due when all its trained parameters have their gradients. What it needs is then already on its way: chunks are read
ahead in the order in which they were due in the step before. New values go to the other place of the chunk (or, for parameters
that live in memory, under parameters that this backward has no use for any more); `Tiered.step` makes them count.

An error in here (a full disk) is kept until `step`, where all processes hear of it.
"""

from __future__ import annotations

from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.prefetch import Order
from weft.memory.tiers.states import States

__all__ = ["Updates"]


class Updates:
    """See the file's header."""

    def __init__(self, states: States, gradients: Gradients):
        self.states, self.gradients = states, gradients
        self.order = Order()
        self.done: set[int] = set()
        self.failed: BaseException | None = None
        self._arm()

    def _arm(self) -> None:
        """Which gradients each chunk waits for."""
        self._waiting = [
            {segment.shard for segment in chunk.segments} if chunk.group >= 0 else set() for chunk in self.states.chunks
        ]
        self._left = [len(parts) for parts in self.states.of_shard]  # chunks that still need a shard's gradient

    def arrived(self, shard: int) -> None:
        """The gradient of a shard is there."""
        if self.failed is not None or self.states.shards[shard].group < 0:
            return
        try:
            for c, _ in self.states.of_shard[shard]:
                if c in self.done:
                    raise RuntimeError(
                        f"{self.states.shards[shard].name} got a second gradient after its update; update='backward' takes one "
                        "backward per step: use update='step' for several"
                    )
                self._waiting[c].discard(shard)
                if not self._waiting[c]:
                    self._update(c)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep an error for the step, which is undone; an interrupt goes on besides, perhaps from the midst of an update."""
        if isinstance(error, Exception):
            self.failed = error
            return
        self.failed = RuntimeError(
            "backward was interrupted while it updated parameters; the step is undone, run it again"
        )
        raise error

    def _update(self, c: int) -> None:
        states = self.states
        self.order.use(c)
        if not states.is_prepared(c) and states.ring.taken == states.ring.number:
            states.forget(states.prepared()[-1])  # read for a chunk that was expected first
        states.prepare(c, self.gradients)
        states.finish(c, self.gradients)
        self.done.add(c)
        for segment in states.chunks[c].segments:
            self._left[segment.shard] -= 1
            if not self._left[segment.shard]:
                self.gradients.drop(segment.shard)

    def check_unmixed(self) -> None:
        """A pass begins: the parameters that it will see are all of one step.

        Raises:
            RuntimeError: backward has updated some of those that live in memory, while others are to be updated yet.
        """
        if any(not self.states.chunks[c].on_disk for c in self.done):
            raise RuntimeError(
                "the model was called after a backward that has updated some of its parameters, and before the step that counts "
                "(update='backward'); call step() first, or zero_grad() to undo it, or use update='step'"
            )

    def read_ahead(self) -> None:
        """Begin reading what will be due next, as far as there are free buffers; waits for nothing."""
        if self.failed is not None:
            return
        try:
            for expected in self.order.ahead():
                if expected in self.done or self.states.is_prepared(expected):
                    continue
                if not self.states.ring.has_free():
                    break
                self.states.prepare(expected)
        except BaseException as error:
            self._fail(error)

    def awaits(self, shard: int) -> bool:
        """Whether some chunk is still to be updated that has a part of a shard."""
        return self._left[shard] > 0

    def finish(self) -> None:
        """The step counts, or was rolled back."""
        for c in self.states.prepared():
            self.states.forget(c)
        self.order.finish()
        self.done.clear()
        self.failed = None
        self._arm()
