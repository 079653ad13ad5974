"""Collectives among the devices along a mesh axis: exact sizes, uneven pieces, no padding on the wire.

A `Group` is one line of devices of a mesh. All that it does is made of one primitive, `_post`: start some sends and some
receives among the members and return what waits for them. The collectives are pairwise exchanges, so that they are the same
over any transport, move the bytes of the cost table and not one more, and add in one order: every member gets the same bits,
run after run. A transport that has a better collective of its own uses that.

    collective        bytes over all links, T the whole tensor, p members
    all_gather        (p - 1) |T|
    reduce_scatter    (p - 1) |T|
    all_reduce        2 (p - 1) |T|        a reduce-scatter and an all-gather; p = 2: one exchange of the whole
    all_to_all        what the pieces say: (p - 1)/p |T| where all are equal
    broadcast         (p - 1) |T|

`TorchGroup` (torch_group.py) is a group over a `torch.distributed` process group, `ThreadGroup` one whose members are threads of
this process (for tests and for proving rows). `Comms` holds the groups of one device, one per mesh axis.
"""

from __future__ import annotations

import abc
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor

from weft.errors import PeerLost
from weft.placement.layout import Mesh, deal

__all__ = ["Comms", "Group", "Handle", "ThreadGroup", "run_threads", "thread_comms"]

Result = TypeVar("Result")

COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum,
}  # fmt: skip


class Handle(Protocol):
    """Something under way. `wait()` returns when it is done; only then may the tensors be touched."""

    def wait(self) -> Any: ...


class Done:
    """A handle of something that needed no transfer."""

    __slots__ = ()

    def wait(self) -> None:
        return None


DONE = Done()


class After:
    """A handle that waits for a transfer and then runs what is left to do."""

    __slots__ = ("pending", "then")

    def __init__(self, pending: Handle, then: Callable[[], None]):
        self.pending, self.then = pending, then

    def wait(self) -> None:
        self.pending.wait()
        self.then()


class Group(abc.ABC):
    """The devices along one line of a mesh.

    All members must call the same collectives in the same order with matching shapes. Results are new tensors unless said
    otherwise; inputs are never changed. Tensors need not be contiguous. No operation here is recorded by autograd: see
    `boxing.box` for differentiable moves.

    Attributes:
        ranks: global ranks of the members, in the order of their coordinate.
        index: this device's place among them; `size` is their number.
        sent: bytes that this device has put on the wire so far, by kind of operation.
    """

    def __init__(self, ranks: Sequence[int], index: int):
        self.ranks, self.index, self.size = tuple(ranks), index, len(ranks)
        self.peers = tuple((index + step) % self.size for step in range(1, self.size))  # nobody is everyone's first
        self.sent: Counter[str] = Counter()
        self._tag = 0

    @abc.abstractmethod
    def _post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], tag: int) -> Handle:
        """Start sending contiguous tensors to members and receiving into contiguous tensors from members.

        Messages of one (sender, receiver, tag) arrive in the order in which they were sent.
        """

    def _next_tag(self) -> int:
        """A tag for one step of a collective: two collectives under way at once never mix their messages."""
        self._tag = self._tag % 0x3FFFFFFF + 1  # 0 is for `exchange`
        return self._tag

    def _start(
        self,
        kind: str,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        tag: int | None = None,
    ) -> Handle:
        sends = [(peer, t.contiguous()) for peer, t in sends if t.numel()]
        receives = [(peer, t) for peer, t in receives if t.numel()]
        self.sent[kind] += sum(t.nbytes for _, t in sends)
        return self._post(sends, receives, self._next_tag() if tag is None else tag)

    # ---- point to point

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], kind: str = "send"
    ) -> Handle:
        """Send to and receive from some members (by index) at once; receives are contiguous tensors to be filled."""
        return self._start(kind, sends, receives, tag=0)

    def send(self, x: Tensor, to: int) -> None:
        """Send a tensor to member `to`."""
        self._start("send", [(to, x.detach())], [], tag=0).wait()

    def recv(self, out: Tensor, source: int) -> Tensor:
        """Fill the contiguous tensor `out` with what member `source` sends; returns it."""
        self._start("send", [], [(source, out)], tag=0).wait()
        return out

    # ---- collectives

    def barrier(self) -> None:
        """Return when all members are here."""
        token = torch.zeros(self.size, dtype=torch.uint8)
        tag = self._next_tag()
        self._post([(j, token[:1]) for j in self.peers], [(j, token[j : j + 1]) for j in self.peers], tag).wait()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """The tensor of member `source` at every member; the others give a tensor of the same shape and dtype."""
        if self.size == 1:
            return x
        if self.index == source:
            x = x.detach()
            self._start("broadcast", [(j, x) for j in self.peers], []).wait()
            return x
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._start("broadcast", [], [(source, out)]).wait()
        return out

    def all_reduce(self, x: Tensor, reduce: str = "sum") -> Tensor:
        """The elementwise sum ("sum"), mean ("avg"), maximum ("max") or minimum ("min") of all members' tensors."""
        check_reduce(x, reduce)
        if self.size == 1:
            return x
        x = x.detach()
        if self.size == 2:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            peer = 1 - self.index
            self._start("all_reduce", [(peer, x)], [(peer, out)]).wait()
            COMBINE[reduce](out, x, out=out)
            return out.div_(2) if reduce == "avg" else out
        flat, sizes = x.reshape(-1), deal(x.numel(), self.size)
        piece = self._reduce_scatter(flat, 0, sizes, reduce, "all_reduce")
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._all_gather_flat(out.view(-1), piece, sizes, "all_reduce").wait()
        return out

    def all_gather(self, piece: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """All members' pieces put together along `dim`.

        Args:
            sizes: length along `dim` of every member's piece; None if all are as long as this one.
        """
        if self.size == 1:
            return piece
        piece = piece.detach()
        sizes = tuple(sizes) if sizes is not None else (piece.shape[dim],) * self.size
        self._check(sizes, piece.shape[dim], "all_gather", dim)
        shape = list(piece.shape)
        if piece.shape[:dim].numel() == 1:  # pieces of the result are contiguous: receive in place
            shape[dim] = sum(sizes)
            out = torch.empty(shape, dtype=piece.dtype, device=piece.device)
            rest = piece.shape[dim + 1 :].numel()
            self._all_gather_flat(out.view(-1), piece.reshape(-1), [n * rest for n in sizes], "all_gather").wait()
            return out
        parts = [
            piece if j == self.index else piece.new_empty([*shape[:dim], n, *shape[dim + 1 :]])
            for j, n in enumerate(sizes)
        ]
        self._start("all_gather", [(j, piece) for j in self.peers], [(j, parts[j]) for j in self.peers]).wait()
        return torch.cat(parts, dim)

    def reduce_scatter(
        self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None, reduce: str = "sum"
    ) -> Tensor:
        """This member's piece, along `dim`, of the elementwise reduction of all members' tensors.

        Args:
            sizes: length along `dim` of every member's piece; None for a balanced cut.
        """
        check_reduce(x, reduce)
        if self.size == 1:
            return x
        sizes = tuple(sizes) if sizes is not None else deal(x.shape[dim], self.size)
        if sum(sizes) != x.shape[dim] or len(sizes) != self.size:
            raise ValueError(
                f"reduce_scatter: {self.size} pieces of {sizes} do not make dim {dim} of shape {tuple(x.shape)}"
            )
        return self._reduce_scatter(x.detach(), dim, sizes, reduce, "reduce_scatter")

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give `pieces[j]` to member j; the result's item j is what member j gave to this one, of shape `shapes[j]`.

        The own piece is passed through as it is.
        """
        own = pieces[self.index]
        got = [own if j == self.index else own.new_empty(shapes[j]) for j in range(self.size)]
        self._start(
            "all_to_all", [(j, pieces[j].detach()) for j in self.peers], [(j, got[j]) for j in self.peers]
        ).wait()
        return got

    # ---- in place and under way, for gradient and parameter buckets

    def all_reduce_async(self, flat: Tensor, reduce: str = "sum") -> Handle:
        """Start reducing a contiguous tensor in place."""
        check_reduce(flat, reduce)
        if self.size == 1:
            return DONE
        flat = flat.detach().view(-1)
        sizes = deal(flat.numel(), self.size)
        parts = flat.split(sizes)
        own = parts[self.index]
        landing = own.new_empty(self.size, len(own))
        pending = self._start("all_reduce", [(j, parts[j]) for j in self.peers], [(j, landing[j]) for j in self.peers])
        second = self._next_tag()

        def finish() -> None:
            combine([own if j == self.index else landing[j] for j in range(self.size)], reduce, out=own)
            self._start(
                "all_reduce", [(j, own) for j in self.peers], [(j, parts[j]) for j in self.peers], second
            ).wait()

        return After(pending, finish)

    def reduce_scatter_async(
        self, out: Tensor, source: Tensor | Sequence[Tensor], sizes: Sequence[int] | None = None, reduce: str = "sum"
    ) -> Handle:
        """Start reducing all members' `source`; this member's part lands in the contiguous flat tensor `out`.

        Args:
            source: one contiguous flat tensor, cut into `sizes` (balanced if None), or a tensor per member. It must stay as it is
                until the handle has been waited for.
            out: may be this member's part of `source`.
        """
        check_reduce(out, reduce)
        out = out.detach()
        if isinstance(source, Tensor):
            parts: Sequence[Tensor] = source.detach().split(list(sizes or deal(source.numel(), self.size)))
        else:
            parts = [part.detach() for part in source]
        own = parts[self.index]
        if self.size == 1:
            if own.data_ptr() != out.data_ptr():
                out.copy_(own)
            return DONE
        landing = out.new_empty(self.size - 1, out.numel())
        receives = [(j, landing[j - (j > self.index)]) for j in self.peers]
        pending = self._start("reduce_scatter", [(j, parts[j]) for j in self.peers], receives)
        slots = dict(receives)
        ordered = [own.view(-1) if j == self.index else slots[j] for j in range(self.size)]
        return After(pending, lambda: combine(ordered, reduce, out=out.view(-1)))

    def all_gather_async(self, flat_out: Tensor, piece: Tensor, sizes: Sequence[int] | None = None) -> Handle:
        """Start gathering all members' flat pieces into the contiguous flat tensor `flat_out`, in order.

        Args:
            piece: this member's; it may be its part of `flat_out`, and must stay as it is until the handle has been waited for.
            sizes: elements of every member's piece; None for a balanced cut.
        """
        sizes = list(sizes or deal(flat_out.numel(), self.size))
        return self._all_gather_flat(flat_out.detach(), piece.detach(), sizes, "all_gather")

    # ---- shared by the above

    def _all_gather_flat(self, out: Tensor, piece: Tensor, sizes: Sequence[int], kind: str) -> Handle:
        parts = out.split(list(sizes))
        own = parts[self.index]
        if own.data_ptr() != piece.data_ptr():
            own.copy_(piece)
        if self.size == 1:
            return DONE
        return self._start(kind, [(j, own) for j in self.peers], [(j, parts[j]) for j in self.peers])

    def _reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int], reduce: str, kind: str) -> Tensor:
        parts = list(x.split(list(sizes), dim))
        own = parts[self.index]
        receives = [(j, own.new_empty(own.shape)) for j in self.peers]
        self._start(kind, [(j, parts[j]) for j in self.peers], receives).wait()
        for j, got in receives:
            parts[j] = got
        return combine(parts, reduce, out=parts[0 if self.index else 1])

    def _check(self, sizes: tuple[int, ...], here: int, what: str, dim: int) -> None:
        if len(sizes) != self.size or sizes[self.index] != here:
            raise ValueError(
                f"{what}: member {self.index} of {self.size} holds {here} along dim {dim}, but sizes are {sizes}; give the "
                "length of every member's piece, in order"
            )


def check_reduce(x: Tensor, reduce: str) -> None:
    """Raise ValueError if the reduction is unknown or makes no sense for the tensor's dtype."""
    if reduce not in COMBINE:
        raise ValueError(f"reduce must be one of {', '.join(COMBINE)}, got {reduce!r}")
    if reduce == "avg" and not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"reduce 'avg' of {x.dtype} is not exact; convert to a floating dtype, or reduce by 'sum'")


def combine(parts: Sequence[Tensor], reduce: str, out: Tensor) -> Tensor:
    """Reduce tensors of one shape from first to last into `out`, which may be one of them."""
    together = COMBINE[reduce]
    if len(parts) == 1:
        return parts[0] if parts[0].data_ptr() == out.data_ptr() else out.copy_(parts[0])
    aliased = any(part.data_ptr() == out.data_ptr() for part in parts[2:]) and out.numel() > 0
    total = together(parts[0], parts[1]) if aliased else together(parts[0], parts[1], out=out)
    for part in parts[2:]:
        together(total, part, out=total)
    if aliased:
        out.copy_(total)
    return out.div_(len(parts)) if reduce == "avg" else out


# ---- threads


class Board:
    """Where the threads of one `run_threads` leave messages for each other."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.failed = threading.Event()
        self._boxes: dict[tuple[Any, ...], queue.SimpleQueue[Tensor]] = {}
        self._lock = threading.Lock()

    def box(self, key: tuple[Any, ...]) -> queue.SimpleQueue[Tensor]:
        with self._lock:
            return self._boxes.setdefault(key, queue.SimpleQueue())

    def put(self, key: tuple[Any, ...], message: Tensor) -> None:
        with self._lock:  # `get` may be about to drop the empty box
            self._boxes.setdefault(key, queue.SimpleQueue()).put(message)

    def get(self, key: tuple[Any, ...], source: int) -> Tensor:
        box, deadline = self.box(key), time.monotonic() + self.timeout
        while True:
            try:
                message = box.get(timeout=0.1)
                with self._lock:
                    if box.empty():
                        self._boxes.pop(key, None)
                return message
            except queue.Empty:
                if self.failed.is_set():
                    raise PeerLost(source, "receive", "another thread of the group has failed") from None
                if time.monotonic() > deadline:
                    raise PeerLost(source, "receive", f"nothing came within {self.timeout:g} s") from None


class Mail:
    __slots__ = ("group", "receives", "tag")

    def __init__(self, group: ThreadGroup, receives: Sequence[tuple[int, Tensor]], tag: int):
        self.group, self.receives, self.tag = group, receives, tag

    def wait(self) -> None:
        group, receives, self.receives = self.group, self.receives, ()
        for source, out in receives:
            message = group.board.get((group.name, source, group.index, self.tag), group.ranks[source])
            if message.numel() != out.numel() or message.dtype != out.dtype:
                raise ValueError(
                    f"rank {group.ranks[source]} sent {tuple(message.shape)} {message.dtype} where rank "
                    f"{group.ranks[group.index]} expects {tuple(out.shape)} {out.dtype}"
                )
            out.copy_(message.view(out.shape))


@final
class ThreadGroup(Group):
    """A group whose members are threads of this process; made by `thread_comms`."""

    def __init__(self, name: tuple[Any, ...], ranks: Sequence[int], index: int, board: Board):
        super().__init__(ranks, index)
        self.name, self.board = name, board

    def _post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], tag: int) -> Handle:
        for to, x in sends:
            self.board.put((self.name, self.index, to, tag), x.detach().clone())
        return Mail(self, receives, tag)


@final
class Comms:
    """What one device needs to talk to the others of its mesh: a group per mesh axis, and one of all devices.

    Attributes:
        mesh: the mesh.
        rank: this device's global rank.
        coordinates: its place in the mesh.
        world: the group of all devices of the mesh, in row-major order.
    """

    def __init__(self, mesh: Mesh, rank: int, groups: Sequence[Group], world: Group):
        self.mesh, self.rank = mesh, rank
        self.coordinates = mesh.coordinates(rank)
        self.groups, self.world = tuple(groups), world
        self.boxings: dict[Any, Any] = {}  # prepared by boxing.compile_boxing

    def group(self, axis: int) -> Group:
        """The devices that differ from this one only along `axis`."""
        return self.groups[axis]

    @property
    def sent(self) -> Counter[str]:
        """Bytes that this device has put on the wire so far, by kind."""
        return sum((group.sent for group in (*self.groups, self.world)), Counter())

    @staticmethod
    def torch(mesh: Mesh, timeout: timedelta | None = None) -> Comms:
        """The groups of this process over `torch.distributed`, whose default process group must be initialised.

        A mesh's process groups are made once per process. All processes of the default group must call this in the same order.

        Args:
            timeout: how long an operation may wait for another process. Default: the default process group's timeout.
        """
        from weft.placement.torch_group import torch_comms

        return torch_comms(mesh, timeout)


def thread_comms(mesh: Mesh | int, timeout: float = 60.0) -> list[Comms]:
    """Comms for each device of a mesh (or of n devices in a line), to be used by one thread each."""
    mesh = Mesh((mesh,)) if isinstance(mesh, int) else mesh
    board = Board(timeout)

    def comms(rank: int) -> Comms:
        here, groups = mesh.coordinates(rank), []
        for axis in range(mesh.ndim):
            ranks = mesh.group(axis, rank)
            groups.append(ThreadGroup((axis, *ranks), ranks, here[axis], board))
        return Comms(mesh, rank, groups, ThreadGroup(("world",), mesh.ranks, mesh.ranks.index(rank), board))

    return [comms(rank) for rank in mesh.ranks]


def run_threads(mesh: Mesh | int, fn: Callable[[Comms], Result], timeout: float = 60.0) -> list[Result]:
    """Run `fn(comms)` once per device of a mesh, each in a thread of its own; the results in the order of `mesh.ranks`.

    Raises:
        Whatever the first failing thread raised, with its traceback; the other threads are told to stop.
        PeerLost: a thread waited longer than `timeout` seconds for another one.
    """
    everyone = thread_comms(mesh, timeout)
    board = everyone[0].world.board  # type: ignore[attr-defined]
    results: list[Any] = [None] * len(everyone)
    errors: list[tuple[int, BaseException]] = []
    grad = torch.is_grad_enabled()

    def work(place: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                results[place] = fn(everyone[place])
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append((place, error))
            board.failed.set()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(everyone))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        place, error = next((item for item in errors if not isinstance(item[1], PeerLost)), errors[0])
        error.add_note(f"in the thread of rank {everyone[place].rank}")
        raise error
    stuck = [everyone[place].rank for place, thread in enumerate(threads) if thread.is_alive()]
    if stuck:
        raise PeerLost(stuck[0], "run_threads", f"the threads of ranks {stuck} did not end within {2 * timeout:g} s")
    return results
