"""A `Group` over a `torch.distributed` process group.

What moves the bytes (gloo of torch 2.13, measured on loopback, 6 MiB, CPU time summed over processes):
    gloo's reduce_scatter is an all-reduce inside: twice the bytes of the table, and 34 ms where a pairwise exchange takes 10;
    its all_gather copies once more than needed (15 against 8 ms) and takes no uneven pieces; its all_to_all is as good as ours;
    its all-reduce, a ring, is good: between two devices one exchange of the whole is better, from three on the ring is.
    So on gloo everything but the all-reduce goes by `send` and `recv`, straight from and into the tensors, any dtype.
    NCCL (`native`): its own collectives where all pieces are equal, grouped sends and receives where they are not.

A process that dies or hangs shows as an error of the transport after at most the process group's timeout; it is raised as
`PeerLost`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import PeerLost, first_line
from weft.placement.comms import DONE, Comms, Group, Handle, check_reduce
from weft.placement.layout import Mesh, deal

__all__ = ["TorchGroup", "torch_comms"]

OPS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

PROBE = 0x7FFFFFFF  # a tag that nobody sends

# How the transports say that the other side is gone.
LOST = (
    "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "socket",
    "remote process", "peer", "aborted", "unavailable", "no route to host", "application timeout", "read error", "write error",
)  # fmt: skip


def lost(error: BaseException, rank: int, doing: str) -> BaseException:
    """`PeerLost` in place of a transport's error if it means that; else the error itself."""
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST):
        return PeerLost(rank, doing, first_line(error))
    return error


class Works:
    """Sends and receives under way."""

    __slots__ = ("group", "items")

    def __init__(self, group: TorchGroup, items: list[tuple[int, Any]]):
        self.group, self.items = group, items

    def wait(self) -> None:
        items, self.items = self.items, []
        limit = self.group.timeout
        for peer, work in items:
            try:
                if limit is None:
                    work.wait()
                else:
                    work.wait(limit)
            except RuntimeError as error:
                raise lost(error, self.group.ranks[peer] if peer >= 0 else -1, "an exchange of tensors") from error


class NativeWork:
    """A collective of the backend under way."""

    __slots__ = ("doing", "group", "then", "work")

    def __init__(self, group: TorchGroup, work: Any, doing: str, then: Callable[[], object] | None = None):
        self.group, self.work, self.doing, self.then = group, work, doing, then

    def wait(self) -> None:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise lost(error, self.group.closed(), self.doing) from error
        if self.then is not None:
            self.then()


@final
class TorchGroup(Group):
    """A group over a process group.

    Args:
        process_group: whose ranks, in order, are the members.
        native: use the backend's own collectives where pieces are equal. Default: unless the backend is gloo.
        timeout: how long an operation on gloo may wait for another member. Default: the process group's timeout.
    """

    def __init__(self, process_group: dist.ProcessGroup, native: bool | None = None, timeout: timedelta | None = None):
        super().__init__(dist.get_process_group_ranks(process_group), dist.get_rank(process_group))
        self.pg = process_group
        self.direct = dist.get_backend(process_group) == "gloo"  # sends and receives may be started one by one
        self.native = not self.direct if native is None else native
        self.timeout = timeout if self.direct else None

    def _post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], tag: int) -> Handle:
        pg = self.pg
        peer = -1
        try:
            if self.direct:
                items = []
                for peer, x in sends:  # before the receives, which takes a tenth less time of CPU and clock
                    items.append((peer, pg.send([x], peer, tag)))
                for peer, out in receives:
                    items.append((peer, pg.recv([out], peer, tag)))
                return Works(self, items)
            calls = [dist.P2POp(dist.irecv, out, group=pg, group_peer=peer) for peer, out in receives]
            calls += [dist.P2POp(dist.isend, x, group=pg, group_peer=peer) for peer, x in sends]
            return Works(self, [(-1, work) for work in dist.batch_isend_irecv(calls)] if calls else [])
        except RuntimeError as error:
            raise lost(error, self.ranks[peer] if peer >= 0 else -1, "an exchange of tensors") from error

    def _native(
        self, kind: str, nbytes: int, start: Callable[[], Any], then: Callable[[], object] | None = None
    ) -> Handle:
        self.sent[kind] += nbytes
        try:
            return NativeWork(self, start(), kind, then)
        except RuntimeError as error:
            raise lost(error, self.closed(), kind) from error

    def closed(self) -> int:
        """Global rank of a member whose connection is closed, after an operation has failed; -1 if none is known to be."""
        if self.direct:
            for peer in self.peers:
                try:
                    self.pg.recv([torch.empty(1)], peer, PROBE)
                except RuntimeError:  # gloo refuses at once on a connection that has failed; a sound one would wait
                    return self.ranks[peer]
        return -1

    def barrier(self) -> None:
        if self.direct:
            super().barrier()
        else:
            self._native("barrier", 0, lambda: self.pg.barrier()).wait()

    def all_reduce(self, x: Tensor, reduce: str = "sum") -> Tensor:
        if self.size == 1 or (self.direct and (self.size == 2 or x.dtype not in REDUCED_BY_GLOO)):
            return super().all_reduce(x, reduce)
        out = x.detach().clone(memory_format=torch.contiguous_format)
        self.all_reduce_async(out, reduce).wait()
        return out

    def all_reduce_async(self, flat: Tensor, reduce: str = "sum") -> Handle:
        check_reduce(flat, reduce)
        if self.size == 1:
            return DONE
        if self.direct and flat.dtype not in REDUCED_BY_GLOO:
            return super().all_reduce_async(flat, reduce)
        flat = flat.detach()
        own = deal(flat.numel(), self.size)[self.index]
        nbytes = (flat.numel() + (self.size - 2) * own) * flat.element_size()  # summed over members: 2 (p - 1) |T|
        options = dist.AllreduceOptions()
        if self.timeout is not None:
            options.timeout = self.timeout
        options.reduceOp = OPS["sum"] if self.direct and reduce == "avg" else OPS[reduce]
        then = (lambda: flat.div_(self.size)) if self.direct and reduce == "avg" else None
        return self._native("all_reduce", nbytes, lambda: self.pg.allreduce([flat], options), then)

    def _all_gather_flat(self, out: Tensor, piece: Tensor, sizes: Sequence[int], kind: str) -> Handle:
        if not self.native or self.size == 1 or len(set(sizes)) > 1 or out.numel() == 0:
            return super()._all_gather_flat(out, piece, sizes, kind)
        nbytes = (self.size - 1) * piece.nbytes
        return self._native(kind, nbytes, lambda: self.pg._allgather_base(out, piece.contiguous()))

    def reduce_scatter_async(
        self, out: Tensor, source: Tensor | Sequence[Tensor], sizes: Sequence[int] | None = None, reduce: str = "sum"
    ) -> Handle:
        flat = isinstance(source, Tensor) and self.native and self.size > 1 and out.numel() > 0
        if not flat or len(set(sizes or deal(source.numel(), self.size))) > 1:  # type: ignore[union-attr]
            return super().reduce_scatter_async(out, source, sizes, reduce)
        check_reduce(out, reduce)
        options = dist.ReduceScatterOptions()
        options.reduceOp = OPS[reduce]
        whole, piece = source.detach(), out.detach()  # type: ignore[union-attr]
        nbytes = (self.size - 1) * piece.nbytes
        return self._native("reduce_scatter", nbytes, lambda: self.pg._reduce_scatter_base(piece, whole, options))

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int], reduce: str, kind: str) -> Tensor:
        if not self.native or len(set(sizes)) > 1 or x.numel() == 0:
            return super()._reduce_scatter(x, dim, sizes, reduce, kind)
        parts = x.contiguous() if x.shape[:dim].numel() == 1 else torch.stack(x.split(list(sizes), dim))
        shape = (*x.shape[:dim], sizes[0], *x.shape[dim + 1 :])
        out = x.new_empty(shape)
        self.reduce_scatter_async(out.view(-1), parts.view(-1), None, reduce).wait()
        return out


REDUCED_BY_GLOO = frozenset((
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.int8,
))  # fmt: skip

_MADE: dict[
    tuple[Mesh, timedelta | None], tuple[object, Comms]
] = {}  # with the default process group that it belongs to


def torch_comms(mesh: Mesh, timeout: timedelta | None = None) -> Comms:
    """See `Comms.torch`. One process group per line of the mesh along each axis, and one of the whole mesh.

    Raises:
        ValueError: the mesh has ranks that the default process group lacks, or lacks this process's.
        RuntimeError: `torch.distributed` is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group: call torch.distributed.init_process_group first, or use weft.run, which does"
        )
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if max(mesh.ranks) >= world_size:
        raise ValueError(f"mesh {mesh.shape} needs rank {max(mesh.ranks)}, but there are only {world_size} processes")
    everyone, made = _MADE.get((mesh, timeout), (None, None))
    if made is not None and everyone is dist.group.WORLD:
        return made
    groups: list[Group | None] = []
    for axis in range(mesh.ndim):
        lines = sorted({mesh.group(axis, member) for member in mesh.ranks})
        groups.append(_own_line(lines, rank, timeout))
    world = _own_line([mesh.ranks], rank, timeout)
    if rank not in mesh.ranks:
        raise ValueError(f"this process is rank {rank}, which is not in the mesh {mesh.shape} of ranks {mesh.ranks}")
    comms = Comms(mesh, rank, [group for group in groups if group is not None], world)  # type: ignore[arg-type]
    _MADE[mesh, timeout] = (dist.group.WORLD, comms)
    return comms


def _own_line(lines: Sequence[tuple[int, ...]], rank: int, timeout: timedelta | None) -> Group | None:
    """Make a process group of each line, as every process must, and keep the one that has this rank."""
    own = None
    for ranks in lines:
        # torch would sort the ranks, and would give new groups half an hour whatever the default group was given
        process_group = dist.new_group(list(ranks), timeout=default_timeout(), sort_ranks=False)
        if rank in ranks:
            own = TorchGroup(process_group, timeout=timeout)
    return own


def default_timeout() -> timedelta | None:
    """The timeout of the default process group; None if it does not say."""
    world = dist.group.WORLD
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    options = getattr(world._get_backend(torch.device(kind)), "options", None)  # type: ignore[union-attr]
    return getattr(options, "_timeout", None)
