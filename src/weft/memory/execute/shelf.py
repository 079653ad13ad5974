"""The lower tier of a limit: activations that are copied away and back instead of being made again.

From an accelerator they go to pinned host memory, by a stream of their own; from the CPU to a temporary file, by a thread of its
own. The file has no name, lies where `tempfile` says (`TMPDIR`) and disappears with the process. One copy follows the other, as
on a link; the device goes on meanwhile (`save`, `fetch`) until somebody needs one to be done (`saved`, `load`). Bytes on the
shelf count in no budget of the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import torch

from weft.errors import DiskFull
from weft.memory.private import bytes_of, storage_of

__all__ = ["Shelf"]


@final
class Shelf:
    """Copies of storages, by any key.

    Attributes:
        nbytes: on the shelf.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.nbytes = 0
        self._copies: dict[Any, tuple[Any, int]] = {}  # key -> (tensor, or offset in the file), bytes
        self._file: Any = None
        self._free: dict[int, list[int]] = {}  # bytes -> offsets in the file that may be written again
        self._end = 0
        self._link: Any = None  # a thread or a stream
        # Under way, with the storage that must stay until it is done: the last reference to one of the program's must not go
        # in the thread, which would tell the executor there.
        self._leaving: dict[Any, tuple[Callable[[], Any], torch.UntypedStorage]] = {}
        self._coming: dict[Any, tuple[Callable[[], Any], torch.UntypedStorage]] = {}

    def __contains__(self, key: Any) -> bool:
        return key in self._copies

    def save(self, key: Any, storage: torch.UntypedStorage) -> None:
        """Begin to copy the bytes of a storage away. They must stay as they are until `saved`."""
        nbytes = storage.nbytes()
        self.nbytes += nbytes
        if self.device.type != "cpu":
            copy = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._copies[key] = copy, nbytes
            self._leaving[key] = self._stream_copy(copy, bytes_of(storage)), storage
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the shelf
        places = self._free.get(nbytes)
        offset = places.pop() if places else self._end
        self._end = max(self._end, offset + nbytes)
        self._copies[key] = offset, nbytes
        self._leaving[key] = self._thread_copy(os.pwritev, storage, offset), storage

    def saved(self, key: Any) -> None:
        """Return when the bytes have been copied away, if they are to be.

        Raises:
            DiskFull: there is no room for them.
        """
        done = self._leaving.pop(key, None)
        if done is not None:
            done[0]()

    def fetch(self, key: Any) -> None:
        """Begin to copy the bytes of a key back, for `load`."""
        where, nbytes = self._copies[key]
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if isinstance(where, torch.Tensor):
            self.saved(key)
            self._coming[key] = self._stream_copy(target, where), storage_of(target)
        else:
            self._coming[key] = self._thread_copy(os.preadv, storage_of(target), where), storage_of(target)

    def load(self, key: Any) -> torch.UntypedStorage:
        """A storage of torch's own with the bytes that were saved; the copy stays until `forget`."""
        self.saved(key)
        if key not in self._coming:
            self.fetch(key)
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
                self._free.setdefault(found[1], []).append(found[0])

    def clear(self) -> None:
        """Drop all copies."""
        for key in list(self._copies):
            self.forget(key)

    # -- links --------------------------------------------------------------------------------------------------------

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

    def _thread_copy(self, move: Any, storage: torch.UntypedStorage, offset: int) -> Callable[[], None]:
        """Write a storage's bytes to the file, or read them from there, in the thread; what is returned waits for it."""
        if self._link is None:
            self._link = ThreadPoolExecutor(1, "weft-shelf")
        nbytes = storage.nbytes()
        if not nbytes:
            return lambda: None
        # by address: the thread must not own the bytes (see `_leaving`)
        view = memoryview((ctypes.c_ubyte * nbytes).from_address(storage.data_ptr())).cast("B")
        under_way: Future[None] = self._link.submit(_move_all, move, self._file.fileno(), view, offset)
        return under_way.result


def _move_all(
    move: Callable[[int, list[memoryview], int], int], descriptor: int, view: memoryview, offset: int
) -> None:
    while len(view):
        try:
            count = move(descriptor, [view], offset)
        except OSError as error:
            from weft.memory.tiers.files import FULL  # only now: it brings all of the tiers along

            if error.errno not in FULL:
                raise
            folder = tempfile.gettempdir()
            raise DiskFull(
                folder, len(view), shutil.disk_usage(folder).free, "limit: offloading activations"
            ) from error
        if not count:
            raise RuntimeError(f"limit: the file of offloaded activations ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count
