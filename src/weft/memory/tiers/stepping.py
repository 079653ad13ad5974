"""The end of a step: gradients clipped and used, and the step complete, or undone.

advance      what `optimizer.step()` does                   clip         scale the gradients before
zero_grad    drop all gradients, wherever they are          state, take_state      of the optimizer, as state dicts have it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from weft.errors import together
from weft.memory.tiers.dense import flat
from weft.memory.tiers.fetch import Fetcher, Slot
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.moved import Moved
from weft.memory.tiers.states import scaled
from weft.memory.tiers.store import Store
from weft.memory.tiers.updates import Updates
from weft.memory.tiers.whole import Layout, packed, replace, unpacked

__all__ = ["Steps"]


@final
class Steps:
    """See the file's header; every method is a collective.

    Args:
        updates: done in backward; None where they are done here.
        moved: knows which gradients left `p.grad`; None if none do.
        over: called when a step is complete.
    """

    def __init__(
        self,
        store: Store,
        gradients: Gradients,
        fetcher: Fetcher,
        updates: Updates | None,
        moved: Moved | None,
        over: Callable[[], None],
    ):
        self.store, self.states, self.slots, self.peers = store, store.states, store.slots, store.peers
        self.gradients, self.fetcher, self.updates, self.moved, self._over = gradients, fetcher, updates, moved, over
        self._clips: list[Tensor] = []  # factors of the gradients, one after the other: torch rounds after each
        self._versions = self._now()

    @torch.no_grad()
    def advance(self) -> None:
        """Update the parameters with the gradients there are, and make it count."""
        if self.states.broken:
            raise RuntimeError(self.states.broken)
        self.fetcher.settle()
        before, edited = self.states.step, self._edited()
        try:
            self.peers.agree(self._update)
            self.states.commit(lambda: self.store.about(self.states.step + 1), self.store.extra())
            self._end()
        except BaseException as error:
            if self.states.step > before:
                if self.peers.world == 1 and not isinstance(error, Exception):
                    self._end()  # an interrupt came when the step counted already
                raise
            self._undo()
            self._versions = self._now()
            for index, values in edited.items():
                flat(self.slots[index].parameter).copy_(values)
            if self.updates is not None:
                self._drop_gradients()
            raise

    def _end(self) -> None:
        """The step counts."""
        if self.updates is not None:
            self.updates.finish()
        self.share_whole()
        self._versions = self._now()
        self._drop_gradients()
        self._over()

    def _update(self) -> None:
        self._collect()
        done: set[int] = set()
        if self.updates is not None:
            if self.updates.failed is not None:
                raise self.updates.failed
            done = self.updates.done
        versions = self._now()
        changed = {index for index in versions if versions[index] != self._versions[index]}
        shards = [slot.index for slot in self.slots if slot.index in self.gradients or slot.index in changed]
        due = {c for index in shards for c, _ in self.states.of_shard[index]} - done
        prepared = [c for c in self.states.prepared() if c in due]
        for c in set(self.states.prepared()) - due:
            self.states.forget(c)
        # Backward made gradients from the last parameter to the first; memory holds nothing of that order, so any will do.
        self.states.update([*prepared, *sorted(due - set(prepared))], self.gradients, self._clips)

    def _now(self) -> dict[int, int]:
        """Versions of the parameters that the user may change in place, where the files must tell of it."""
        there = [slot for slot in self.slots if slot.tier == "device"] if self.states.streamed else []
        return {slot.index: slot.parameter._version for slot in there}

    def _edited(self) -> dict[int, Tensor]:
        """Elements of those that the user has changed, which an undone step would otherwise read back from the files; none where
        backward changes parameters, too."""
        now = self._now() if self.updates is None else {}
        return {i: flat(self.slots[i].parameter).clone() for i in now if now[i] != self._versions[i]}

    def _collect(self) -> None:
        """Gradients that stayed under their parameters, or were put there by somebody.

        Raises:
            ValueError: one is of a parameter that no group has.
        """
        for slot in self.slots:
            left = self.moved is not None and self.moved.holds(slot)
            gradient = slot.parameter.grad if not left else None
            if gradient is None and not left and slot.index not in self.gradients:
                continue
            if self.states.shards[slot.index].group < 0:
                raise ValueError(
                    f"{slot.name} has a gradient, but was frozen when the tiers were made, so that no group has it and there is "
                    "no place for its state; name it in groups (without a gradient it is left alone), or freeze it again"
                )
            if gradient is not None and slot.index not in self.gradients:
                self.gradients.add(slot.index, slot.flat(gradient)[slot.start : slot.stop])

    def _undo(self) -> None:
        try:
            self.states.rollback()
        finally:
            if self.updates is not None:
                self.updates.finish()

    def share_whole(self) -> None:
        """Parameters that live whole on every process get the parts that the others have updated."""
        if self.peers.world == 1:
            return
        import torch.distributed as dist

        for slot in self.slots:
            if slot.tier == "device":
                own = torch.zeros(slot.each, dtype=slot.dtype, device=self.fetcher.device)
                values = slot.parameter.detach().as_strided((slot.numel,), (1,))
                own[: slot.stop - slot.start] = values[slot.start : slot.stop]
                whole = torch.empty(self.peers.world * slot.each, dtype=slot.dtype, device=self.fetcher.device)
                with together(f"gathering {slot.name}"):
                    dist.all_gather_single(whole, own, group=self.fetcher.group)
                values.copy_(whole[: slot.numel])

    # ---- gradients

    def zero_grad(self) -> None:
        """Drop all gradients, and undo the updates that backward has done with them."""
        if self.updates is not None and (self.updates.done or self.updates.failed is not None):
            self._undo()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        self.gradients.clear()
        if self.moved is not None:
            self.moved.clear()
        self._clips = []
        for slot in self.slots:
            slot.parameter.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their 2-norm is at most `max_norm`; the norm before."""
        if self.updates is not None:
            raise ValueError(
                "gradients cannot be clipped with update='backward', where parameters are updated as they come; use 'step'"
            )
        self.fetcher.settle()
        self.peers.agree(self._collect)
        alone = self.peers.world == 1
        norms = [
            self._norm(slot).to("cpu", slot.dtype)
            for slot in self.slots
            if slot.index in self.gradients and (alone or slot.stop > slot.start)
        ]
        # Each stands for its gradient, in its dtype: torch adds them dtype by dtype, and its order decides about bits.
        total = torch.nn.utils.get_total_norm(norms)
        if self.peers.world > 1:
            total = torch.linalg.vector_norm(torch.stack(self.peers.gather(total)))
        self._clips.append(torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    def _norm(self, slot: Slot) -> Tensor:
        """Of this process's part of a gradient, as clipped; of a whole one in its shape, as torch does, for the same bits."""
        parts = [self.gradients.get(self.states.chunks[c].segments[k]) for c, k in self.states.of_shard[slot.index]]
        there = [part for part in parts if part is not None] or [torch.zeros(0, dtype=slot.dtype)]
        flat = scaled(there[0] if len(there) == 1 else torch.cat(there), self._clips)
        return torch.linalg.vector_norm(flat.view(slot.shape) if flat.numel() == slot.numel and slot.shape else flat)

    # ---- the optimizer's state

    def state(self) -> dict[int, dict[str, Any]]:
        """Whole states by the parameters' places in the groups."""
        places = self._places()
        found = {place: packed(self.states, index, layout) for place, (index, layout) in places.items()}
        return {place: state for place, state in found.items() if state is not None}

    def take_state(self, given: Mapping[int, Mapping[str, Any]]) -> Callable[[], None]:
        """What puts other states in place of those there are.

        Raises:
            ValueError: they are not this optimizer's.
        """
        places = self._places()
        mine = {places[place][0]: state for place, state in given.items() if place in places}
        own = self.peers.agree(lambda: unpacked(self.states, mine, dict(places.values())))

        def take() -> None:
            try:
                self.peers.agree(lambda: replace(self.states, own))
                self.states.commit(lambda: self.store.about(self.states.step), self.store.extra(), step=False)
            except BaseException:
                self.states.rollback()
                raise

        return take

    def _places(self) -> dict[int, tuple[int, Layout]]:
        """For each parameter's place in the groups, the index of its shard, and its layout."""
        slots = {id(slot.parameter): slot for slot in self.slots}
        order = [slots[id(p)] for group in self.store.front.param_groups for p in group["params"]]
        return {place: (slot.index, (slot.shape, slot.stride)) for place, slot in enumerate(order)}
