"""Buckets: parameters whose gradients, or whose pieces, travel together in one flat tensor.

One collective per parameter would pay its latency a hundred times per step. A bucket holds parameters that are owed the same
thing (`pieces.Holding`), and does it in one collective, under way while backward computes the next bucket:

    LocalBucket      nothing: every process of the mesh holds another shard
    SumBucket        gradients all-reduced; each `leaf.grad` is then a view of the bucket's flat gradient (data parallel)
    ScatterBucket    gradients reduce-scattered (and summed over further axes); the optimizer sees pieces, which are
                     gathered back after its step (ZeRO-1, ZeRO-2) or before every use (ZeRO-3)

In place of all-reduce and reduce-scatter an exchange may `send` gradients (see coded.py). It takes one gradient per step, also
where micro-batches would be scattered one by one: they add up whole before. Where it goes along other axes than those that cut
(`cut_first`), pieces are scattered as ever, and it sends a piece in place of summing it over further axes.

A bucket does not decide when: `store.ParameterStore` calls it, in an order that is the same on every process.
Source: Li et al., PyTorch Distributed, arXiv:2006.15704 (buckets); Rajbhandari et al., ZeRO, arXiv:1910.02054; Zhao et al.,
PyTorch FSDP, arXiv:2304.11277 (freeing storage under live views).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from weft.placement.comms import DONE, After, Group, Handle
from weft.runtime.pieces import Holding

__all__ = ["Bucket", "LocalBucket", "ScatterBucket", "SumBucket"]


class Bucket(abc.ABC):
    """Parameters that travel together.

    Attributes:
        holdings: of its parameters, in order of first use.
        leaves: by name, the tensors that the local program reads.
        pieces: by name, what the optimizer updates: the leaf itself, or this process's piece of it.
        waiting: trainable leaves whose gradient has not yet come in this backward.
        send: starts to sum a flat tensor of the trainable parameters' gradients over the processes, in place, as soon as a
            handle is done; after that it holds the result as far as this process keeps it. None: the bucket's own collective.
        cut_first: what is sent is this process's piece, and not the whole.
    """

    def __init__(self, holdings: Sequence[Holding], leaves: Mapping[str, nn.Parameter]):
        self.holdings = tuple(holdings)
        self.leaves = {h.name: leaves[h.name] for h in holdings}
        self.pieces: dict[str, nn.Parameter] = dict(self.leaves)
        self.trainable = tuple(h for h in self.holdings if h.trainable)
        self._grown = [leaves[h.name] for h in self.trainable]  # leaves that get a gradient
        self.waiting = 0
        self.send: Callable[[Bucket, Tensor, Handle], Handle] | None = None
        self.cut_first = False

    def flats(self) -> list[Tensor]:
        """Flat tensors that are held besides leaves and pieces."""
        return []

    def arm(self) -> None:
        """Before a backward."""
        self.waiting = len(self.trainable)

    def collect(self, last: bool) -> None:  # noqa: B027 - nothing is owed
        """All gradients of this backward are here. Start what is owed; `last` says that it is the step's last micro-batch."""

    def finish(self) -> None:  # noqa: B027
        """Wait for what `collect` started; afterwards `pieces[...].grad` hold the gradients, if it was the last."""

    def updated(self) -> None:
        """The optimizer has changed the pieces: start making the leaves agree, and forget the gradients."""
        self.forget()

    def forget(self) -> None:
        """Drop the gradients of this step, whatever has become of it."""
        for leaf in self._grown:
            leaf.grad = None

    def settle(self) -> None:  # noqa: B027
        """Wait for what `updated` started."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor]:
        """The tensors that together hold every gradient element of this process's pieces once."""

    def fill(self) -> None:
        """Give a zero gradient to each trainable leaf that backward did not reach."""
        for leaf in self._grown:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)


@final
class LocalBucket(Bucket):
    """Nothing is owed: gradients and updates stay where they are."""

    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in self._grown if leaf.grad is not None]


@final
class SumBucket(Bucket):
    """Gradients are summed over the group and kept whole.

    The first backward of a step leaves gradients of autograd's own making; `collect` copies them into the flat tensor and puts
    views of it in their place, into which later micro-batches accumulate. That is one pass over memory, where zeroing
    and adding in place would be two.
    """

    def __init__(self, holdings: Sequence[Holding], leaves: Mapping[str, nn.Parameter], group: Group):
        super().__init__(holdings, leaves)
        self.group = group
        self.flat = torch.empty(
            sum(h.numel for h in self.trainable), dtype=self.holdings[0].dtype, device=self._grown[0].device
        )
        parts = self.flat.split([h.numel for h in self.trainable])
        self._views = [part.view(h.local) for part, h in zip(parts, self.trainable, strict=True)]
        self._pending: Handle | None = None

    def flats(self) -> list[Tensor]:
        return [self.flat]

    def collect(self, last: bool) -> None:
        leaves, views = self._grown, self._views
        fresh = [i for i, (leaf, view) in enumerate(zip(leaves, views, strict=True)) if leaf.grad is not view]
        if fresh:
            torch._foreach_copy_([views[i] for i in fresh], [leaves[i].grad for i in fresh])
            for i in fresh:
                leaves[i].grad = views[i]
        if last:
            self._pending = self.send(self, self.flat, DONE) if self.send else self.group.all_reduce_async(self.flat)

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def gradients(self) -> list[Tensor]:
        return [self.flat]


@final
class ScatterBucket(Bucket):
    """Gradients are summed over the scatter group and cut; each member keeps, and updates, its piece of every parameter.

    `stored_cut` buckets keep nothing but pieces between uses: `gather` fills the flat tensor behind the leaves, `free` gives its
    memory back while the leaves, and what autograd has saved of them, stay in place as views.

    Attributes:
        full: whether the leaves hold their values now.
        reread: whether backward reads the leaves (`store` says; an embedding's backward does not).
    """

    def __init__(
        self,
        holdings: Sequence[Holding],
        leaves: Mapping[str, nn.Parameter],
        reducing: Group,
        gathering: Group,
        summing: Group | None,
    ):
        super().__init__(holdings, leaves)
        first = self.holdings[0]
        self.stored_cut, self.every_micro_batch = first.stored_cut, first.owed.every_micro_batch
        self.reducing, self.gathering, self.summing = reducing, gathering, summing
        self.member, self.members = first.member, len(first.boxes)
        device = next(iter(leaves.values())).device
        self.full, self.reread = not self.stored_cut, True
        self._numels = [[_numel(h, j) for h in self.holdings] for j in range(self.members)]
        self._grad_numels = [[_numel(h, j) for h in self.trainable] for j in range(self.members)]
        self._grad_sizes = [sum(numels) for numels in self._grad_numels]
        self.gradient = torch.zeros(self._grad_sizes[self.member], dtype=first.dtype, device=device)
        self._shard: Tensor | None = None
        self._whole: Tensor | None = None
        if self.stored_cut:
            self._build_stored(first.dtype, device)
        else:
            self._build_views()
        self._link_gradients()
        self._others = [j for j in range(self.members) if j != self.member]
        self._landed = [
            [h.piece(self.leaves[h.name].data, j) for h in self.holdings] for j in range(self.members)
        ]  # where each member's pieces stand in the leaves
        self._gathering: tuple[Handle, list[Tensor], Tensor] | None = None
        self._reducing: tuple[Handle, list[Tensor]] | None = None
        self._sending: tuple[Handle, Tensor | None] | None = None  # None: the gradient's piece
        self._accumulated = False
        if self.stored_cut:
            self.free()

    # ---- memory

    def flats(self) -> list[Tensor]:
        return [self.gradient, *(t for t in (self._shard, self._whole) if t is not None)]

    def _build_stored(self, dtype: torch.dtype, device: torch.device) -> None:
        """Pieces are views of one flat shard, leaves views of one flat tensor whose storage comes and goes."""
        self._shard = torch.empty(sum(self._numels[self.member]), dtype=dtype, device=device)
        self._whole = torch.empty(sum(h.numel for h in self.holdings), dtype=dtype, device=device)
        self._storage = self._whole.untyped_storage()  # asked for once: whoever asks a tensor may write there
        shards = self._shard.split(self._numels[self.member])
        wholes = self._whole.split([h.numel for h in self.holdings])
        for h, shard, whole in zip(self.holdings, shards, wholes, strict=True):
            self.pieces[h.name] = nn.Parameter(shard.data.view(h.piece_shape()), requires_grad=h.trainable)
            self.leaves[h.name].data = whole.data.view(h.local)

    def _build_views(self) -> None:
        """Pieces are views of the leaves where those are contiguous (an optimizer may need that), else tensors of their own."""
        for h in self.holdings:
            view = h.piece(self.leaves[h.name].data)
            own = view if view.is_contiguous() else view.clone(memory_format=torch.contiguous_format)
            self.pieces[h.name] = nn.Parameter(own, requires_grad=h.trainable)

    def _link_gradients(self) -> None:
        parts = self.gradient.split(self._grad_numels[self.member])
        for h, part in zip(self.trainable, parts, strict=True):
            self.pieces[h.name].grad = part.view(h.piece_shape())

    # ---- parameters

    def start_gather(self) -> None:
        """Start bringing all members' pieces here."""
        if self.full or self._gathering is not None:
            return
        assert self._shard is not None
        self._gathering = self._start_gather(self._shard)

    def _start_gather(self, own: Tensor) -> tuple[Handle, list[Tensor], Tensor]:
        group, sizes = self.gathering, [sum(numels) for numels in self._numels]
        if getattr(group, "native", False):  # the backend's own collective wants one result in order
            result = own.new_empty(sum(sizes))
            return group.all_gather_async(result, own, sizes), list(result.split(sizes)), own
        landing = own.new_empty(sum(sizes) - own.numel()).split([sizes[j] for j in self._others])
        parts = [own] * self.members
        for j, part in zip(self._others, landing, strict=True):
            parts[j] = part
        pending = group.exchange(
            [(j, own) for j in self._others if own.numel()],
            [(j, parts[j]) for j in self._others if parts[j].numel()],
            "all_gather",
        )
        return pending, parts, own

    def finish_gather(self) -> None:
        """Wait for `start_gather`; the leaves then hold their values."""
        if self._gathering is None:
            return
        assert self._whole is not None
        self._storage.resize_(self._whole.nbytes)
        self._land(range(self.members))
        self.full = True

    def _land(self, members: Sequence[int]) -> None:
        assert self._gathering is not None
        pending, parts, _ = self._gathering
        pending.wait()
        targets, sources = [], []
        for j in members:
            for target, source in zip(self._landed[j], parts[j].split(self._numels[j]), strict=True):
                if target.numel():
                    targets.append(target)
                    sources.append(source.view(target.shape))
        if targets:  # the others may hold nothing
            torch._foreach_copy_(targets, sources)
        self._gathering = None

    def drop_gather(self) -> None:
        """Wait for a gather that turned out not to be needed, and forget it."""
        if self._gathering is not None:
            self._gathering[0].wait()
            self._gathering = None

    def free(self) -> None:
        """Give back the memory of the leaves' values."""
        if self.stored_cut:
            self._storage.resize_(0)
            self.full = False

    # ---- gradients

    def collect(self, last: bool) -> None:
        whole = self.send is not None and not self.cut_first
        if not self.trainable or not (last or (self.every_micro_batch and not whole)):
            return
        if self.send is not None and whole:
            flat = torch.cat([leaf.grad.reshape(-1) for leaf in self._grown])  # type: ignore[union-attr]
            for leaf in self._grown:
                leaf.grad = None
            self._sending = (self.send(self, flat, DONE), flat)
            return
        grads = [leaf.grad for leaf in self._grown]
        parts = list(self.gradient.new_empty(sum(self._grad_sizes)).split(self._grad_sizes))
        targets, sources = [], []
        for j, part in enumerate(parts):
            for h, grad, slot in zip(self.trainable, grads, part.split(self._grad_numels[j]), strict=True):
                if slot.numel():
                    source = h.piece(grad, j)
                    targets.append(slot.view(source.shape))
                    sources.append(source)
        torch._foreach_copy_(targets, sources)
        for leaf in self._grown:
            leaf.grad = None
        if self._accumulated:
            parts[self.member].add_(self.gradient)
        self._accumulated = True
        pending = self.reducing.reduce_scatter_async(self.gradient, parts)
        if last and self.send is not None:
            self._sending = (self.send(self, self.gradient, After(pending, parts.clear)), None)
            self._accumulated = False
            return
        self._reducing = (pending, parts)
        self._last = last

    def finish(self) -> None:
        if self._sending is not None:
            pending, flat = self._sending
            pending.wait()
            self._sending = None
            parts = (
                () if flat is None else zip(self.trainable, flat.split([h.numel for h in self.trainable]), strict=True)
            )
            for h, part in parts:
                self.pieces[h.name].grad.copy_(h.piece(part.view(h.local)))  # type: ignore[union-attr]
        if self._reducing is None:
            return
        self._reducing[0].wait()
        self._reducing = None
        if self._last:
            self._accumulated = False
            if self.summing is not None:
                self.summing.all_reduce_async(self.gradient).wait()

    def forget(self) -> None:
        super().forget()
        self._accumulated, self._reducing, self._sending = False, None, None

    def updated(self) -> None:
        super().updated()
        if not self.stored_cut:
            own = torch.cat([self.pieces[h.name].data.reshape(-1) for h in self.holdings])
            self._gathering = self._start_gather(own)

    def settle(self) -> None:
        if not self.stored_cut and self._gathering is not None:
            separate = any(not h.piece(self.leaves[h.name].data).is_contiguous() for h in self.holdings)
            self._land(range(self.members) if separate else self._others)

    def gradients(self) -> list[Tensor]:
        return [self.gradient]


def _numel(h: Holding, member: int) -> int:
    numel = 1
    for size in h.piece_shape(member):
        numel *= size
    return numel
