"""Where the bytes of managed tensors are: torch's allocator, an arena in plain Python, or the native arena.

One interface, `Backend`: run an operator so that its fresh outputs come to lie where their blocks belong, take a block's bytes
away, give them back, move them. Blocks say where (`offset`); a block's `payload` says which storage shows its bytes:

    Hold                  a storage of the user's (or of autograd's), weakly: it tells us when it dies
    an UntypedStorage     scratch: bytes that only recipes want
    None                  there are none
"""

from __future__ import annotations

import abc
import sys
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from weft.memory import native
from weft.memory.core import Block, Step
from weft.memory.private import (
    SWAPS,
    Tie,
    below,
    bytes_of,
    empty_out,
    fill,
    hollow,
    over,
    problem,
    storage_of,
    swap,
    tied,
)
from weft.memory.record import Category

__all__ = [
    "Backend",
    "Copy",
    "Count",
    "Hold",
    "Native",
    "Owner",
    "Places",
    "check_backend",
    "make_backend",
    "shown",
    "tie",
]

BACKENDS = ("auto", "count", "copy", "native")

MISSED = (
    "weft.memory.limit has dropped this tensor, and computes it again when the thread that entered the limit reads it. Another "
    "thread, or code that passes no operator of torch, cannot read it: give it a copy (tensor.detach().clone()) made there"
)

Places = Sequence[tuple[int, int]]
"""(bytes, address) of what an operator makes, in order."""


@final
class Owner:
    """Whose ties they are: one per limit.

    Attributes:
        executor: whoever executes at the moment; its `died(hold)` is called.
        holds: every tie to living bytes, by its id.
    """

    __slots__ = ("executor", "holds")

    def __init__(self) -> None:
        self.executor: Any = None
        self.holds: dict[int, Hold] = {}


@final
class Hold(Tie):
    """The tie between a storage of the user's and the block it shows.

    Attributes:
        owner: the limit that manages it; ties of others are stale.
        block: the present content of the storage.
        kind: what the storage is to the user; no recipe leans on a "gradient".
        exposed: its address is known outside (numpy, a collective): pinned while it lives.
        lent: its owner empties and fills it in the course of a step.
        fickle: no recipe leans on it, for that reason: it was empty at first, or what was made from it has had to come back.
        unfilled: the step that made it empty, if no operator has filled it since. It has no recipe: what it holds may have been
            written through its address.
    """

    __slots__ = ("block", "exposed", "fickle", "kind", "lent", "owner", "unfilled")

    owner: Owner
    block: Block
    exposed: bool
    kind: Category
    lent: bool
    fickle: bool
    unfilled: Step | None


def ring(hold: Hold) -> None:
    """What ties call when their bytes die."""
    owner = hold.owner
    if owner.holds.pop(id(hold), None) is not None:
        owner.executor.died(hold)


def tie(owner: Owner, storage: torch.UntypedStorage, block: Block, kind: Category) -> Hold:
    """Tie a storage to the block that it shows."""
    hold = tied(Hold, storage, ring)
    hold.owner, hold.block, hold.kind, hold.exposed, hold.lent, hold.fickle = owner, block, kind, False, False, False
    hold.unfilled = None
    block.payload = owner.holds[id(hold)] = hold
    return hold


def address(storage: torch.UntypedStorage) -> int:
    """Of a storage's bytes; 0 if it has none."""
    try:
        return storage.data_ptr()
    except RuntimeError:
        return 0


def shown(block: Block) -> torch.UntypedStorage:
    """The storage that shows the bytes of a block."""
    payload = block.payload
    storage = payload() if type(payload) is Hold else payload
    assert storage is not None, f"{block} has no storage"
    return storage


class Backend(abc.ABC):
    """Bytes for blocks.

    Attributes:
        name: for people. addresses: whether offsets of blocks mean addresses.
    """

    name: str
    addresses: bool

    def run(
        self,
        places: Places,
        workspace: tuple[int, int],
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run an operator whose fresh outputs belong at `places`, (bytes, address) each, its workspace at (address, bytes)."""
        return call(*args, **kwargs)

    def born(self, block: Block, storage: torch.UntypedStorage) -> None:  # noqa: B027
        """An operator made `storage`, whose bytes are those of `block`: put them at its address if they are not there."""

    def bound(self, room: int = 0) -> None:  # noqa: B027
        """All outputs of an operator have been told by `born` or `back`. `room`: bytes that may be taken for a moment."""

    def drop(self, block: Block) -> None:
        """Give the bytes of a block back."""
        payload = block.payload
        if type(payload) is Hold:
            storage = payload()
            if storage is not None:
                empty_out(storage)
                if SWAPS:  # and only swapping allows it again
                    native.forbid(storage, MISSED)
        else:
            block.payload = None

    def back(self, block: Block, storage: torch.UntypedStorage) -> None:
        """An operator that ran again made `storage`: its bytes are those of `block`, under the user's storage if there is one."""
        payload = block.payload
        if type(payload) is Hold:
            mine = payload()
            if mine is not None:
                fill(mine, storage)
        else:
            block.payload = storage

    @abc.abstractmethod
    def move(self, block: Block) -> None:
        """Copy a block's bytes from where they are to `block.offset`."""

    def leave(self, storage: torch.UntypedStorage, room: int = sys.maxsize) -> bool:
        """A storage outlives the step: if its bytes lie in the arena, they move to torch's own memory. False if they stay, since
        more than `room` bytes would be there for a moment besides."""
        return True

    def close(self) -> None:  # noqa: B027
        """No more operators run here. What has not left stays valid."""


@final
class Count(Backend):
    """Torch's own allocator. Blocks have no real address; bytes are given back by emptying storages."""

    name = "count"
    addresses = False

    def move(self, block: Block) -> None:
        pass


@final
class Copy(Backend):
    """An arena in plain Python: torch makes an output, its bytes are copied to their address and torch's are given back.

    At any moment the process holds the arena and what one operator makes (`cycle.beside`), for which plans leave room. The arena
    goes as a whole, when it has been closed and nothing that was put there lives: if a step turns out not to be the planned
    one, it is until then there besides the budget.
    """

    name = "copy"
    addresses = True

    def __init__(self, nbytes: int, device: torch.device):
        self.device = device
        with below():  # the arena is none of what the limit counts
            self.arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.base = self.arena.data_ptr()
        self._starts: list[int] = []  # of what was put here, in order
        self._lives: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}  # start -> (end, whose bytes)

    def _slice(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        return over(self.base + offset, self.device, nbytes)

    def _settle(self, offset: int, storage: torch.UntypedStorage, owner: torch.UntypedStorage) -> None:
        """Copy the bytes of a storage to an address, and show them from there; unless somebody lives there, against the plan."""
        nbytes = storage.nbytes()
        if nbytes and 0 <= offset <= len(self.arena) - nbytes and self._clear(offset, offset + nbytes):
            place = self._slice(offset, nbytes)
            bytes_of(place).copy_(bytes_of(storage))
            swap(storage, place)
            self._take(offset, nbytes, owner)

    def _take(self, offset: int, nbytes: int, owner: torch.UntypedStorage) -> None:
        insort(self._starts, offset)
        self._lives[offset] = (offset + nbytes, weakref.ref(owner))

    def _forget(self, start: int) -> None:
        """Whoever lies at an address is about to go."""
        at = bisect_left(self._starts, start)
        if self._lives.pop(start, None) is not None:
            del self._starts[at]

    def _clear(self, start: int, end: int) -> bool:
        """Forget who lay between two addresses and has gone; False if somebody has not."""
        at = max(bisect_left(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            other = self._starts[at]
            until, whose = self._lives[other]
            if until <= start:
                at += 1
                continue
            storage = whose()
            if storage is not None and address(storage) == self.base + other:
                return False
            del self._starts[at], self._lives[other]
        return True

    def born(self, block: Block, storage: torch.UntypedStorage) -> None:
        self._settle(block.offset, storage, storage)

    def back(self, block: Block, storage: torch.UntypedStorage) -> None:
        payload = block.payload
        mine = payload() if type(payload) is Hold else storage
        if mine is not None:
            self._settle(block.offset, storage, mine)
        super().back(block, storage)

    def leave(self, storage: torch.UntypedStorage, room: int = sys.maxsize) -> bool:
        if self.holds(storage):  # room or not: the arena is there as a whole, and plans count on what leaves it
            with below():
                swap(storage, storage_of(bytes_of(storage).clone()))
        return True

    def close(self) -> None:
        for start, (_, whose) in self._lives.items():
            storage = whose()
            if storage is not None and address(storage) == self.base + start:
                storage._weft_arena = self.arena  # type: ignore[attr-defined]  # torch's storage over it owns nothing
        self.arena = self.arena[:0].clone()

    def holds(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage's bytes lie in the arena."""
        return self.base <= address(storage) < self.base + len(self.arena)

    def move(self, block: Block) -> None:
        if block.payload is None or not block.nbytes or not self.holds(shown(block)):
            return  # what was adopted lies elsewhere, only its bytes are taken off the arena
        start = address(shown(block)) - self.base
        self._forget(start)
        if not self._clear(block.offset, block.offset + block.nbytes):
            self._take(start, block.nbytes, shown(block))  # somebody lives there longer than planned: these bytes stay
            return
        source, target = self._slice(start, block.nbytes), self._slice(block.offset, block.nbytes)
        if abs(start - block.offset) < block.nbytes:  # they overlap: copy_ of torch is no memmove
            bytes_of(target).copy_(bytes_of(source).clone())
        else:
            bytes_of(target).copy_(bytes_of(source))
        swap(shown(block), target)
        self._take(block.offset, block.nbytes, shown(block))


@final
class Native(Backend):
    """An arena of the native library: operators allocate in it, workspace included, at the addresses that their blocks have.

    What counts is bytes alive, wherever they are. So whatever cannot lie where it belongs (somebody lives there longer than
    planned, its size was not foreseen) stays where it is: to move it through torch's memory would take its bytes twice.
    """

    name = "native"
    addresses = True

    def __init__(self, nbytes: int):
        self._astray: list[tuple[Block, torch.UntypedStorage]] = []
        self.arena = native.Arena(max(nbytes, 64), stray="malloc")  # what was not foreseen is foreseen the next time

    def run(
        self,
        places: Places,
        workspace: tuple[int, int],
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        arena = self.arena
        arena.expect(
            [place for place in places if place[0] and place[1] >= 0],
            workspace if workspace[1] and workspace[0] >= 0 else None,
        )
        try:
            return call(*args, **kwargs)
        finally:
            arena.done()

    def born(self, block: Block, storage: torch.UntypedStorage) -> None:
        """It lies there already, unless its size was not foreseen, or outputs of one size were allocated in another order."""
        if block.nbytes and block.offset >= 0 and self.arena.offset(storage) != block.offset:
            self._astray.append((block, storage))

    def back(self, block: Block, storage: torch.UntypedStorage) -> None:
        super().back(block, storage)
        payload = block.payload
        mine = payload() if type(payload) is Hold else storage
        if mine is not None:
            self.born(block, mine)

    def bound(self, room: int = 0) -> None:
        astray, self._astray = self._astray, []
        for block, storage in astray:
            at = self.arena.offset(storage)
            if at < 0:
                if block.nbytes <= room:
                    self._enter(block, storage)
            elif at != block.offset and not self._moved(block, storage):
                there = [other for _, other in astray if self.arena.offset(other) == block.offset]
                if there and there[0].nbytes() == block.nbytes:
                    _exchange(storage, there[0])

    def _enter(self, block: Block, storage: torch.UntypedStorage) -> None:
        """Bytes outside of the arena move there, if their place is free; for a moment there are twice as many."""
        place = hollow(block.nbytes, storage.device)
        try:
            self.arena.place(place, block.nbytes, block.offset)
        except ValueError:
            return
        with below():
            bytes_of(place).copy_(bytes_of(storage))
        swap(storage, place)

    def _moved(self, block: Block, storage: torch.UntypedStorage) -> bool:
        """Move bytes within the arena to their place; False if it is not free."""
        try:
            self.arena.move(storage, block.offset)
        except ValueError:
            return False
        return True

    def leave(self, storage: torch.UntypedStorage, room: int = sys.maxsize) -> bool:
        if address(storage) and self.arena.offset(storage) >= 0:
            if storage.nbytes() > room:
                return False
            with below():
                swap(storage, storage_of(bytes_of(storage).clone()))
        return True

    def move(self, block: Block) -> None:
        if block.payload is not None and block.nbytes:
            storage = shown(block)
            if self.arena.offset(storage) not in (-1, block.offset):
                self._moved(block, storage)

    def close(self) -> None:
        self.arena.close()  # what lives in it stays valid


def _exchange(one: torch.UntypedStorage, other: torch.UntypedStorage) -> None:
    """Two storages of one size exchange their addresses and keep their bytes, without memory for a third."""
    with below():
        a, b = bytes_of(one), bytes_of(other)
        a.bitwise_xor_(b)
        b.bitwise_xor_(a)
        a.bitwise_xor_(b)
    swap(one, other)


def check_backend(name: str) -> None:
    """Raise `ValueError` if there is no such backend, `RuntimeError` if it cannot be used here."""
    if name not in BACKENDS:
        raise ValueError(f"limit: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name in ("copy", "native") and problem():
        raise RuntimeError(problem())
    why = native.problem() if name == "native" else None
    if why:
        raise RuntimeError(f"limit: backend='native' cannot be used: {why}")


def make_backend(name: str, nbytes: int, device: torch.device) -> Backend:
    """Memory for activations; `nbytes` of it where addresses matter."""
    if name == "copy":
        return Copy(nbytes, device)
    return Native(nbytes) if name == "native" else Count()
