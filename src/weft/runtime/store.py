"""The parameters of one process: who gathers, reduces and scatters what, and when.

Problem    every process must start the same collectives in the same order, as early as data allows, and hold no more memory
           than the plan says. Autograd finishes gradients in an order that nobody promised.
Method     parameters are put in buckets (`placement.parameters`), and each kind of event has one fixed order:
               reductions   backward's expected order: a bucket starts when it and all before it are complete
               gathers      forward's order, then backward's; asking for a bucket starts all up to it, and the next one as
                            prefetch
           so the order on the wire depends on the plan alone. Gathers and reductions have process groups of their own, so
           that neither waits for the other nor for boxings on the same mesh axis.
Guarantee  after `end_backward(last=True)`, `pieces` hold the gradient of the whole program (see `layout.dual`); after `updated`,
           all leaves agree with the pieces.
Source     as in `buckets`; the fixed order is OneFlow's strict-order control edges, arXiv:2110.15032.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.graph.graph import Graph
from weft.placement.assignment import Assignment
from weft.placement.boxing import box
from weft.placement.comms import Comms, Group
from weft.placement.layout import Mesh, Replicate
from weft.placement.localize import ParameterHooks
from weft.placement.parameters import Readings, Traveller, buckets, largest_piece
from weft.runtime.buckets import Bucket, LocalBucket, ScatterBucket, SumBucket
from weft.runtime.pieces import Holding, holdings

__all__ = ["Groups", "ParameterStore", "plan_buckets"]

MAX_IN_FLIGHT = 2  # reduce-scatters under way, each with a copy of its bucket


def plan_buckets(held: Mapping[str, Holding], readings: Readings) -> list[list[Holding]]:
    """Parameters by bucket, in the order in which gradients are reduced (against the order of first use)."""
    travellers = [
        Traveller(h.name, h.owed, h.dtype, h.trainable, h.dtype.itemsize * largest_piece(h.shape, h.used, h.mesh))
        for h in held.values()
    ]
    return [[held[each.name] for each in bucket] for bucket in buckets(travellers, readings.block)]


class ParameterStore(ParameterHooks):
    """Leaves, pieces and buckets of one process.

    Attributes:
        holdings: by parameter name.
        leaves: what the local program reads, in the used placement.
        pieces: what the optimizer updates; `pieces[name].grad` is the gradient after `end_backward(last=True)`.
        buckets: in the order of their reductions.
        gathered: parameter names of the buckets stored cut, in forward order: the `buckets` argument of `localize`.
    """

    def __init__(self, graph: Graph, assignment: Assignment, comms: Comms, device: torch.device | str = "cpu"):
        mesh, self.comms = assignment.mesh, comms
        readings = Readings.of(graph)
        self.holdings = holdings(graph, assignment, comms.rank, readings)
        self.leaves: dict[str, nn.Parameter] = {}
        self.buckets: list[Bucket] = []
        groups = Groups(mesh, comms.rank)
        for members in plan_buckets(self.holdings, readings):
            self.buckets.append(self._build(members, groups, torch.device(device)))
        self.pieces = {name: bucket.pieces[name] for bucket in self.buckets for name in bucket.pieces}
        self.pieces = {name: self.pieces[name] for name in self.holdings}
        self._order = [bucket for bucket in self.buckets if bucket.trainable]
        self._hook_leaves()
        self._forward = [b for b in reversed(self.buckets) if isinstance(b, ScatterBucket) and b.stored_cut]
        self.gathered = [[h.name for h in bucket.holdings] for bucket in self._forward]
        self._plan_backward(readings)
        self._next_reduction = 0
        self._in_flight: list[ScatterBucket] = []
        self._last_micro_batch = True
        self._training = False

    def _build(self, members: Sequence[Holding], groups: Groups, device: torch.device) -> Bucket:
        first = members[0]
        for h in members:
            empty = torch.empty(0 if h.stored_cut else h.local, dtype=h.dtype, device=device)
            self.leaves[h.name] = nn.Parameter(empty, requires_grad=h.trainable)
        leaves = {h.name: self.leaves[h.name] for h in members}
        if first.scatter_axes:
            summing = groups.over(first.sum_axes, "reduce") if first.sum_axes else None
            scatter = first.scatter_axes
            return ScatterBucket(
                members, leaves, groups.over(scatter, "reduce"), groups.over(scatter, "gather"), summing
            )
        if first.sum_axes and any(h.trainable for h in members):
            return SumBucket(members, leaves, groups.over(first.sum_axes, "reduce"))
        return LocalBucket(members, leaves)

    def _hook_leaves(self) -> None:
        for bucket in self._order:
            for h in bucket.trainable:
                self.leaves[h.name].register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    def _plan_backward(self, readings: Readings) -> None:
        """Backward's order of gathers: against the order of last use, without buckets that backward never reads."""
        for bucket in self._forward:
            bucket.reread = any(h.name in readings.again for h in bucket.holdings)
        rank = lambda b: max(readings.last.get(h.name, -1) for h in b.holdings)
        self._backward = sorted((b for b in self._forward if b.reread), key=rank, reverse=True)
        # The bucket that forward reads last is the first that backward reads: freeing it in between would save nothing.
        self._kept = self._backward[0] if self._backward else None
        self._place_backward = {id(bucket): place for place, bucket in enumerate(self._backward)}
        self._started_forward = self._started_backward = 0

    @property
    def reduced(self) -> Sequence[Bucket]:
        """Buckets with gradients, in the order of their reductions, the same on every process."""
        return tuple(self._order)

    # ---- hooks of the local program

    def fetch(self, bucket: int) -> None:
        wanted = self._forward[bucket]
        self._started_forward = self._start(self._forward, self._started_forward, bucket)
        wanted.finish_gather()

    def release(self, bucket: int) -> None:
        if not (self._training and self._forward[bucket] is self._kept):
            self._forward[bucket].free()

    def guard(self, bucket: int, output: Tensor) -> Tensor:
        if self._training and output.requires_grad and self._forward[bucket].reread:
            output.register_hook(partial(self._refetch, self._forward[bucket]))
        return output

    def _refetch(self, bucket: ScatterBucket, gradient: Tensor) -> None:
        if not bucket.full:
            place = self._place_backward[id(bucket)]
            self._started_backward = self._start(self._backward, self._started_backward, place)
            bucket.finish_gather()

    @staticmethod
    def _start(order: Sequence[ScatterBucket], started: int, wanted: int) -> int:
        """Start the gathers of `order` up to `wanted` and one more, to be under way while the wanted one is used."""
        upto = min(wanted + 2, len(order))
        for bucket in order[started:upto]:
            bucket.start_gather()
        return max(started, upto)

    # ---- a step

    def begin_forward(self, training: bool) -> None:
        """Before the program runs, with or without a backward to follow."""
        self._training = training
        self._started_forward = self._started_backward = 0

    def begin_backward(self, last: bool) -> None:
        """Before a backward; `last` if it is the step's last micro-batch."""
        self._last_micro_batch, self._next_reduction = last, 0
        for bucket in self.buckets:
            bucket.arm()

    def _arrived(self, bucket: Bucket, leaf: Tensor) -> None:
        bucket.waiting -= 1
        if bucket.waiting == 0:
            self._reduce_ready()

    def _reduce_ready(self) -> None:
        while self._next_reduction < len(self._order) and self._order[self._next_reduction].waiting <= 0:
            bucket = self._order[self._next_reduction]
            self._next_reduction += 1
            # (where an exchange sends, at the step's end, a rule may look at its buckets all at once)
            if isinstance(bucket, ScatterBucket) and not (bucket.send and self._last_micro_batch):
                if len(self._in_flight) == MAX_IN_FLIGHT:
                    self._in_flight.pop(0).finish()
                self._in_flight.append(bucket)
            bucket.collect(self._last_micro_batch)
            if isinstance(bucket, ScatterBucket) and len(bucket.trainable) == len(bucket.holdings):
                bucket.free()

    def end_backward(self) -> None:
        """After a backward: nothing is under way any more."""
        while self._next_reduction < len(self._order):
            bucket = self._order[self._next_reduction]
            bucket.fill()
            bucket.waiting = 0
            self._reduce_ready()
        self._in_flight.clear()
        for bucket in self._order:
            bucket.finish()
        self.end_forward()

    def end_forward(self) -> None:
        """After a forward without backward, and at the end of every backward: free what is gathered before use."""
        for bucket in self._forward:
            bucket.drop_gather()
            bucket.free()

    def updated(self, frozen: bool = True) -> None:
        """After pieces have changed: bring the leaves in line; an optimizer leaves `frozen` parameters as they are."""
        changed = self.buckets if frozen else self._order
        for bucket in changed:
            bucket.updated()
        for bucket in changed:
            bucket.settle()

    def abandon(self) -> None:
        """Forget this step's gradients without an update, also after an error in its middle."""
        self._in_flight.clear()
        self.end_forward()
        for bucket in self.buckets:
            bucket.forget()

    # ---- gradients

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient: each element counted once, however many processes hold it."""
        alike = self.everything_is_whole
        counted = [torch.zeros((), dtype=torch.float64)]
        for bucket in self._order:
            axes = bucket.trainable[0].sum_axes  # along these, all hold the same: the first one counts it
            if alike or all(self.comms.coordinates[axis] == 0 for axis in axes):
                counted += [g.norm().double().cpu() ** 2 for g in bucket.gradients() if g.numel()]
        total = torch.stack(counted).sum()
        if not alike:
            total = self.comms.world.all_reduce(total.reshape(1))[0]
        return total.sqrt()

    @property
    def everything_is_whole(self) -> bool:
        """Whether every process holds every gradient whole (pure data parallel)."""
        axes = {a for a, p in enumerate(self.comms.mesh.shape) if p > 1}
        return all(set(b.trainable[0].sum_axes) == axes for b in self._order)

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_([g for bucket in self._order for g in bucket.gradients()], factor)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This process's piece of each parameter's gradient."""
        for name, piece in self.pieces.items():
            if piece.grad is not None:
                yield name, piece.grad

    # ---- values

    def set_piece(self, name: str, piece: Tensor) -> None:
        """Overwrite this process's piece of a parameter; `updated` must follow the last one."""
        self.pieces[name].data.copy_(piece)

    def whole(self, name: str, piece: Tensor | None = None) -> Tensor:
        """The whole of a parameter, or of any tensor held in pieces like it; a collective, every process must call it.

        Args:
            piece: this process's piece; the parameter's own by default.
        """
        h = self.holdings[name]
        piece = (self.pieces[name] if piece is None else piece).detach()
        if h.scatter_axes:
            bucket = next(b for b in self.buckets if name in b.pieces)
            assert isinstance(bucket, ScatterBucket)
            local = piece.new_empty(h.local)
            sizes = [math.prod(h.piece_shape(j)) for j in range(len(h.boxes))]
            flat = piece.new_empty(sum(sizes))
            bucket.gathering.all_gather_async(flat, piece.reshape(-1), sizes).wait()
            for j, part in enumerate(flat.split(sizes)):
                h.piece(local, j).copy_(part.view(h.piece_shape(j)))
            piece = local
        everywhere = (Replicate(),) * self.comms.mesh.ndim
        with torch.no_grad():
            return box(piece, h.used, everywhere, self.comms, h.shape)

    def nbytes(self) -> dict[str, int]:
        """Bytes that this process keeps between steps, by what they are."""
        stored = sum(p.nbytes for p in self.pieces.values())
        used = sum(h.nbytes for h in self.holdings.values() if not h.stored_cut and h.scatter_axes)
        whole = sum(h.nbytes for h in self.holdings.values() if not h.scatter_axes)
        gradient = sum(g.nbytes for b in self._order for g in b.gradients())
        cut = sum(p.nbytes for n, p in self.pieces.items() if self.holdings[n].stored_cut)
        return {"parameters": used + whole + cut, "gradients": gradient, "pieces": stored}


class Groups:
    """Process groups over one or several mesh axes, for gathers and for reductions; every process must ask in one order."""

    def __init__(self, mesh: Mesh, rank: int):
        self.mesh, self.rank = mesh, rank

    def over(self, axes: Sequence[int], purpose: str) -> Group:
        """The devices that differ from this one only along `axes`, numbered row by row."""
        key = (dist.group.WORLD, self.mesh, tuple(axes), purpose)  # a later default group makes new ones
        if key not in _MADE:
            _MADE[key] = self._make(tuple(axes))
        return _MADE[key]

    def _make(self, axes: tuple[int, ...]) -> Group:
        from weft.placement.torch_group import TorchGroup, default_timeout

        own = None
        for ranks in self.mesh.lines(axes):
            # torch would sort the ranks, and would give new groups half an hour whatever the default group was given
            process_group = dist.new_group(list(ranks), timeout=default_timeout(), sort_ranks=False)
            if self.rank in ranks:
                own = TorchGroup(process_group)
        assert own is not None, f"rank {self.rank} is not in the mesh of ranks {self.mesh.ranks}"
        return own


_MADE: dict[object, Group] = {}
