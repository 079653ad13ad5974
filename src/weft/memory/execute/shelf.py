"""The lower tier of a limit: activations that are copied away and back instead of being made again.

From an accelerator they go to pinned host memory, by a stream of their own; from the CPU to a temporary file, past the page
cache (`tiers.files`: what waits in the cache would still be memory), by a few threads. The file has no name, lies in the tier's
folder or where `tempfile` says (`TMPDIR`), and disappears with the process. Copies go one after the other, as on a link; the
device goes on meanwhile (`save`, `fetch`) until somebody needs one to be done (`saved`, `load`). Bytes on the shelf count in no
budget of the device; nor do the threads' buffers, `THREADS` x `BLOCK`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, final

import torch

from weft.errors import DiskFull
from weft.memory.private import bytes_of, storage_of

__all__ = ["Shelf"]

THREADS = 4  # that copy to and from the disk
BLOCK = 1 << 20  # bytes of one system call
DOING = "limit: offloading activations"  # for errors


@final
class Shelf:
    """Copies of storages, by any key.

    Args:
        device: whose storages.
        folder: of the file, for the CPU; "" is where `tempfile` says.

    Attributes:
        nbytes: on the shelf.
    """

    def __init__(self, device: torch.device, folder: str = ""):
        self.device, self.folder = device, folder
        self.nbytes = 0
        self._copies: dict[Any, tuple[Any, int]] = {}  # key -> (tensor, or offset in the file), bytes
        self._disk: _Disk | None = None
        self._link: Any = None  # a stream
        # Under way, with the storage that must stay until it is done: the last reference to one of the program's must not go
        # in a thread, which would tell the executor there.
        self._leaving: dict[Any, tuple[Any, torch.UntypedStorage]] = {}
        self._coming: dict[Any, tuple[Callable[[], Any], torch.UntypedStorage]] = {}
        weakref.finalize(self, _settle, self._leaving, self._coming)

    def __contains__(self, key: Any) -> bool:
        return key in self._copies

    def save(self, key: Any, storage: torch.UntypedStorage) -> None:
        """Begin to copy the bytes of a storage away. They must stay as they are until `saved`.

        Raises:
            DiskFull: the file cannot grow. ValueError: there can be no file in the folder.
        """
        nbytes = storage.nbytes()
        if self.device.type != "cpu":
            copy = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._copies[key] = copy, nbytes
            self._leaving[key] = self._stream_copy(copy, bytes_of(storage)), storage
        else:
            if self._disk is None:
                self._disk = _Disk(self.folder or tempfile.gettempdir())
            offset = self._disk.take(nbytes)
            self._copies[key] = offset, nbytes
            self._leaving[key] = _Copy(self._disk, True, storage, offset, None), storage
        self.nbytes += nbytes

    def saved(self, key: Any) -> None:
        """Return when the bytes have been copied away, if they are to be.

        Raises:
            DiskFull: there is no room for them.
        """
        done = self._leaving.pop(key, None)
        if done is not None:
            done[0]()

    def fetch(self, key: Any, empty: Callable[..., torch.Tensor] = torch.empty) -> None:
        """Begin to copy the bytes of a key back, for `load`. `empty`: as `torch.empty`, makes the place for them."""
        where, nbytes = self._copies[key]
        target = empty(nbytes, dtype=torch.uint8, device=self.device)
        if isinstance(where, torch.Tensor):
            self.saved(key)
            self._coming[key] = self._stream_copy(target, where), storage_of(target)
        else:
            storage, leaving = storage_of(target), self._leaving.get(key)
            after = leaving[0] if leaving is not None else None
            self._coming[key] = _Copy(self._disk, False, storage, where, after), storage

    def load(self, key: Any, empty: Callable[..., torch.Tensor] = torch.empty) -> torch.UntypedStorage:
        """A storage with the bytes that were saved; the copy stays until `forget`. `empty`: see `fetch`, unless that began."""
        self.saved(key)
        if key not in self._coming:
            self.fetch(key, empty)
        done, storage = self._coming.pop(key)
        done()
        return storage

    def forget(self, key: Any) -> None:
        """Drop a copy if there is one."""
        with contextlib.suppress(DiskFull):
            self.saved(key)
        if key in self._coming:
            self._coming.pop(key)[0]()
        found = self._copies.pop(key, None)
        if found is not None:
            self.nbytes -= found[1]
            if not isinstance(found[0], torch.Tensor):
                self._disk.give(found[1], found[0])

    def clear(self) -> None:
        """Drop all copies."""
        for key in list(self._copies):
            self.forget(key)

    def _stream_copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        """Copy between device and pinned memory besides computing; what is returned makes computing wait for it."""
        if self._link is None:
            self._link = torch.cuda.Stream(self.device)
        computing = torch.cuda.current_stream(self.device)
        self._link.wait_stream(computing)  # which makes the source, or has just used the memory of the target
        with torch.cuda.stream(self._link):
            target.copy_(source, non_blocking=True)
            done = self._link.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)


def _settle(*under_way: dict[Any, tuple[Callable[[], Any], torch.UntypedStorage]]) -> None:
    """Copies read and write their storages until they are done."""
    for copies in under_way:
        for done, _ in copies.values():
            with contextlib.suppress(Exception):
                done()
        copies.clear()


@final
class _Copy:
    """One copy to or from the disk; called, it returns when all blocks of it are done, or raises what went wrong first.

    The threads take its blocks themselves: whoever computes asks once, and does not wait for the interpreter block by block.
    """

    def __init__(self, disk: _Disk, out: bool, storage: torch.UntypedStorage, offset: int, after: _Copy | None):
        self.disk, self.out, self.offset, self.after = disk, out, offset, after
        # by address: the threads must not own the bytes (see `Shelf._leaving`)
        self.address, self.nbytes = storage.data_ptr(), storage.nbytes()
        number = -(-self.nbytes // BLOCK)
        self.blocks, self.left = iter(range(0, self.nbytes, BLOCK)), number
        self.error: Exception | None = None
        self.lock, self.done = threading.Lock(), threading.Event()
        if not number:
            self.done.set()
        for _ in range(min(number, THREADS)):
            disk.queue.put(self)

    def work(self, buffer: int, view: memoryview) -> None:
        """In a thread, with its buffer: do blocks as long as there are any."""
        for at in self.blocks:
            try:
                self._move(at, min(BLOCK, self.nbytes - at), buffer, view)
            except Exception as error:
                self.error = self.error or error
            with self.lock:
                self.left -= 1
                last = not self.left
            if last:
                self.done.set()

    def _move(self, at: int, nbytes: int, buffer: int, view: memoryview) -> None:
        file, block = self.disk.file, view[: self.disk.rounded(nbytes)]
        if self.out:
            ctypes.memmove(buffer, self.address + at, nbytes)
            file.write_now(block, self.offset + at)
            return
        if self.after is not None:
            self.after.done.wait()  # it was asked for before this, so that threads are at it
        file.read_now(block, self.offset + at)
        ctypes.memmove(self.address + at, buffer, nbytes)

    def __call__(self) -> None:
        self.done.wait()
        if isinstance(self.error, DiskFull):
            raise DiskFull(self.disk.folder, self.error.need, self.error.have, DOING) from self.error
        if self.error is not None:
            raise self.error


@final
class _Disk:
    """A file without name, the places in it, and the threads that read and write it.

    Raises:
        ValueError: there can be no file in the folder.
    """

    def __init__(self, folder: str):
        from weft.memory.tiers.files import DiskFile, round_up  # only now: it brings all of the tiers along

        self.folder, self.rounded = folder, round_up
        path = Path(folder, f".weft-shelf-{os.getpid()}-{threading.get_ident()}-{id(self)}")
        try:
            self.file = DiskFile(path, 0)
        except OSError as error:
            raise ValueError(
                f"limit: activations cannot be offloaded to {folder}: {os.strerror(error.errno or 0)}; name a folder to write "
                "in (`folder` of the tier, or TMPDIR)"
            ) from error
        path.unlink()
        weakref.finalize(self.file, os.close, self.file.fd)  # the threads have the file while they use it
        self.queue: SimpleQueue[_Copy | None] = SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=_copy, args=(self.queue,), name="weft-shelf", daemon=True).start()
        weakref.finalize(self, _dismiss, self.queue)
        self._free: dict[int, list[int]] = {}  # bytes -> offsets that may be written again
        self._end = 0

    def take(self, nbytes: int) -> int:
        """The offset of a place.

        Raises:
            DiskFull: there is none.
        """
        room = self.rounded(nbytes)
        places = self._free.get(room)
        if places:
            return places.pop()
        try:
            self.file.grow(self._end + room)
        except DiskFull as full:
            raise DiskFull(self.folder, room, full.have, DOING) from full
        offset, self._end = self._end, self._end + room
        return offset

    def give(self, nbytes: int, offset: int) -> None:
        """A place is free."""
        self._free.setdefault(self.rounded(nbytes), []).append(offset)


def _dismiss(queue: SimpleQueue[_Copy | None]) -> None:
    """End the threads."""
    for _ in range(THREADS):
        queue.put(None)


def _copy(queue: SimpleQueue[_Copy | None]) -> None:
    """A thread of a disk. Its aligned bytes are not torch's, so that no meter counts them."""
    pages = mmap.mmap(-1, BLOCK)
    view, buffer = memoryview(pages), ctypes.addressof(ctypes.c_char.from_buffer(pages))
    while (copy := queue.get()) is not None:
        copy.work(buffer, view)
        del copy  # it has the disk, which ends the threads when nobody has it
