"""Address space given out at offsets that the caller names. Python side of `arena.h`; see `weft.memory.native`."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from types import TracebackType
from typing import Literal, Self, final

import torch

from weft.memory.native.books import allocator, ledger
from weft.memory.native.build import NativeUnavailable
from weft.memory.private import impl_of

__all__ = ["Arena", "Places", "drop", "forbid", "give"]

Places = tuple[Sequence[tuple[int, int]], tuple[int, int] | None]
"""((nbytes, offset) of the outputs of an operator, (offset, nbytes) of its workspace or None)."""

STRAYS = ("arena", "malloc", "error")  # in the order of `Stray` in arena.h


def _longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _impl(storage: torch.UntypedStorage | int) -> int:
    return storage if isinstance(storage, int) else impl_of(storage)


@final
class Arena:
    """`nbytes` of address space on the CPU; pages cost memory from when they are first written.

    Args:
        nbytes: size, rounded up to the alignment.
        alignment: of offsets and sizes, in bytes; a power of two, at least 64 (what torch's kernels count on).
        stray: what to do with allocations that nobody expected: "arena" (first hole), "malloc" (outside), "error".
        library: of another allocator than the CPU's (`native.cuda`); storages can then not be moved, placed or asked for.

    Raises:
        ValueError: a size below 1, another alignment or stray, or no address space of that size.
        NativeUnavailable: there is no native library here.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        alignment: int = 64,
        stray: Literal["arena", "malloc", "error"] = "arena",
        library: ctypes.PyDLL | None = None,
    ):
        if nbytes < 1:
            raise ValueError(f"Arena: nbytes must be at least 1, got {nbytes}")
        if alignment < 64 or alignment & (alignment - 1):
            raise ValueError(f"Arena: alignment must be a power of two and at least 64, got {alignment}")
        if stray not in STRAYS:
            raise ValueError(f"Arena: stray must be one of {', '.join(STRAYS)}, got {stray!r}")
        if library is None:
            ledger()  # the allocator must be in place
            library = allocator()
        self._library = library
        self.nbytes = -(-nbytes // alignment) * alignment
        self.alignment = alignment
        self._handle = self._library.weft_arena_open(self.nbytes, alignment, STRAYS.index(stray))
        if not self._handle:
            raise ValueError(f"Arena: the system has no address space for {self.nbytes} bytes; ask for less")
        self._out = (ctypes.c_int64 * 5)()
        self._close = weakref.finalize(self, self._library.weft_arena_close, self._handle)

    # -- one operator -------------------------------------------------------------------------------------------------

    def expect(self, places: Iterable[tuple[int, int]], workspace: tuple[int, int] | None = None) -> int:
        """Promise places to the allocations that this thread makes until `done`.

        Args:
            places: (nbytes, offset) of each output; offsets are multiples of the alignment.
            workspace: (offset, nbytes) of the region for everything else; None for no such region.

        Returns:
            How many places overlap bytes that live now. Each is tried again when its allocation comes.

        Raises:
            ValueError: a place or the workspace is not inside the arena, or not aligned.
        """
        flat = self._flat(places, workspace)
        return self._library.weft_arena_expect(self._open(), _longs(flat[3:]), flat[0], flat[1], flat[2])

    def script(self, rows: Iterable[Places]) -> None:
        """Lay down the places of a whole step, a row an operator, for `play`.

        Raises:
            ValueError: as `expect`.
        """
        data: list[int] = []
        starts: list[int] = []
        for places, workspace in rows:
            starts.append(len(data))
            data += self._flat(places, workspace)
        self._library.weft_arena_script(self._open(), _longs(data), len(data), _longs(starts), len(starts))

    def play(self, row: int) -> int:
        """`expect` what row `row` of the script says.

        Raises:
            ValueError: there is no such row.
        """
        missing = self._library.weft_arena_play(self._open(), row)
        if missing < 0:
            raise ValueError(f"Arena.play: the script has no row {row}")
        return missing

    def done(self) -> int:
        """The operator is over: 0 if every place was used and nothing else stayed, else how many places and strays.

        Call it on the thread that called `expect`. What is allocated from now on comes from torch's own allocator.
        """
        return self._library.weft_arena_done(self._open())

    def strays(self) -> list[tuple[int, int]]:
        """(offset, nbytes) of the last operator's allocations that are alive and not at a promised place; offset -1: outside."""
        count = self._library.weft_arena_strays(self._open(), None, 0)
        pairs = (ctypes.c_int64 * (2 * count))()
        self._library.weft_arena_strays(self._handle, pairs, count)
        return list(zip(pairs[::2], pairs[1::2], strict=True))

    # -- bytes --------------------------------------------------------------------------------------------------------

    def offset(self, storage: torch.UntypedStorage | int) -> int:
        """Where the bytes of a storage (or of its address) lie; -1 if they are not in this arena."""
        return self._storages().weft_storage_offset(self._open(), _impl(storage))

    def move(self, storage: torch.UntypedStorage | int, offset: int) -> None:
        """Copy the bytes of a storage to another offset, where it finds them from now on. The two regions may overlap.

        Raises:
            ValueError: its bytes are not in this arena, or there is something at the offset.
        """
        code = self._storages().weft_storage_move(self._open(), _impl(storage), offset)
        if code == -1:
            raise ValueError("Arena.move: the bytes of the storage are not in this arena")
        if code == -2:
            raise ValueError(f"Arena.move: offset {offset} is not free, not aligned or outside of the arena")

    def place(self, storage: torch.UntypedStorage | int, nbytes: int, offset: int) -> None:
        """Give a storage without bytes (`drop`) some at an offset; what is in them is undefined.

        Raises:
            ValueError: the storage has bytes, or there is something at the offset.
            torch.OutOfMemoryError: a window's cap would be exceeded.
        """
        code = self._storages().weft_storage_place(self._open(), _impl(storage), nbytes, offset)
        if code == -1:
            raise ValueError("Arena.place: the storage has bytes; drop them first")
        if code == -2:
            raise ValueError(
                f"Arena.place: {nbytes} bytes at offset {offset} are not free, not aligned or outside of the arena"
            )
        if code == -3:
            raise torch.OutOfMemoryError(f"weft.memory: bringing back {nbytes} bytes would exceed the cap")

    # -- figures ------------------------------------------------------------------------------------------------------

    def _read(self) -> list[int]:
        self._library.weft_arena_read(self._open(), self._out)
        return list(self._out)

    @property
    def free(self) -> int:
        """Bytes that are not taken."""
        return self.nbytes - self._read()[0]

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest contiguous free region."""
        return self._read()[1]

    @property
    def high(self) -> int:
        """End of the highest byte ever given out."""
        return self._read()[2]

    @property
    def address(self) -> int:
        """Of offset 0."""
        return self._read()[4]

    def regions(self) -> list[tuple[int, int]]:
        """(offset, nbytes rounded up) of what is taken, in address order."""
        count = self._read()[3]
        pairs = (ctypes.c_int64 * (2 * count))()
        self._library.weft_arena_regions(self._handle, pairs, count)
        return list(zip(pairs[::2], pairs[1::2], strict=True))

    def close(self) -> None:
        """Give out nothing more. Tensors that live in the arena stay valid; its memory goes back when the last of them dies."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- checks -------------------------------------------------------------------------------------------------------

    def _open(self) -> int:
        if not self._close.alive:
            raise ValueError("Arena: it is closed")
        return self._handle

    def _storages(self) -> ctypes.PyDLL:
        if not hasattr(self._library, "weft_storage_move"):
            raise ValueError("Arena: storages of CUDA cannot be moved or placed in it; copy them with torch")
        return self._library

    def _flat(self, places: Iterable[tuple[int, int]], workspace: tuple[int, int] | None) -> list[int]:
        """As the library reads it: number of places, workspace offset and nbytes, then the places."""
        at, size = workspace or (-1, 0)
        if workspace and (size < 0 or at < 0 or at % self.alignment or at + size > self.nbytes):
            raise ValueError(f"Arena: a workspace of {size} bytes at {at} is not aligned inside {self.nbytes} bytes")
        flat = [0, at, size]
        for nbytes, offset in places:
            if nbytes == 0:  # torch takes no bytes for an empty tensor
                continue
            if nbytes < 0 or offset < 0 or offset % self.alignment or offset + nbytes > self.nbytes:
                raise ValueError(
                    f"Arena: a place of {nbytes} bytes at {offset} is not aligned inside {self.nbytes} bytes"
                )
            flat += (nbytes, offset)
        flat[0] = len(flat) // 2 - 1
        return flat


def drop(storage: torch.UntypedStorage | int) -> None:
    """Give the bytes of a storage back. It keeps its nbytes and has no data: nothing may read it until it has bytes again."""
    allocator().weft_storage_drop(_impl(storage))


def forbid(storage: torch.UntypedStorage | int, why: str) -> bool:
    """From now on whoever reads or writes the bytes of a storage, in any thread, gets a RuntimeError that says `why`, until the
    storage is swapped with another one. False, and nothing has changed, where there is no native library."""
    function = _forbidding()
    if function is not None:
        function(_impl(storage), why.encode())
    return function is not None


@cache
def _forbidding() -> Callable[[int, bytes], None] | None:
    try:
        return allocator().weft_storage_forbid
    except NativeUnavailable:
        return None


def give(donor: torch.UntypedStorage | int, storage: torch.UntypedStorage | int) -> None:
    """The donor's bytes become those of a dropped storage; the donor is left dropped.

    Raises:
        ValueError: the receiver has bytes.
    """
    if allocator().weft_storage_give(_impl(donor), _impl(storage)):
        raise ValueError("native.give: the storage has bytes; drop them first")
