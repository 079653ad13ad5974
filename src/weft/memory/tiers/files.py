"""Files read and written past the page cache, from a pool of threads, with nothing but the standard library.

Problem    bytes that are read once and written once per step gain nothing from the page cache: copying through it costs a core,
           and "written" data that sits in memory is neither safe nor counted.
Method     `preadv` / `pwritev` on a descriptor opened with O_DIRECT, from and to buffers whose address, length and offset are
           multiples of `ALIGN`; a transfer is cut into blocks that a few threads work on (the calls release the
           interpreter's lock).                                                               `Disk.read`, `Disk.write`
Fallback   where a file system refuses O_DIRECT: ordinary calls, and the pages are given back after use
           (`posix_fadvise(DONTNEED)`), with one warning per folder.

A true length is the caller's business: files here are whole multiples of `ALIGN` long.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from weft.errors import CheckpointDamaged, DiskFull
from weft.memory.tiers.pinned import host_memory

__all__ = [
    "ALIGN", "Disk", "DiskFile", "LimitReached", "Place", "Transfer", "aligned", "describe", "measure", "named", "round_up",
]  # fmt: skip

ALIGN = 4096  # bytes; every disk and file system of today takes multiples of it
LIMITS = {errno.EDQUOT, errno.EFBIG}  # what ends a write while there is room


def round_up(number: int, multiple: int = ALIGN) -> int:
    """The least multiple that is not below `number`.

    >>> round_up(1), round_up(4096), round_up(0)
    (4096, 4096, 0)
    """
    return -(-number // multiple) * multiple


def aligned(nbytes: int, *, pin: bool = False) -> Tensor:
    """A new uint8 CPU tensor of at least `nbytes`, address and length multiples of `ALIGN`; pinned if asked and possible."""
    length = round_up(nbytes)
    whole = host_memory((length + ALIGN,), torch.uint8, pin=pin)
    start = -whole.data_ptr() % ALIGN
    return whole[start : start + length]


class Transfer:
    """Bytes under way; `wait` returns when all are there, or raises what went wrong."""

    def __init__(self, parts: list[Future[Any]], finish: Callable[[], None] | None = None):
        self._parts, self._finish = parts, finish

    def done(self) -> bool:
        return all(part.done() for part in self._parts)

    def wait(self) -> None:
        # All parts, even if one failed: the caller may free or reuse the buffer afterwards.
        failed = [error for error in [part.exception() for part in self._parts] if error is not None]
        if failed:
            raise failed[0]  # also to whoever waits once more: the bytes are still not there
        self._parts = []
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()

    @staticmethod
    def of(transfers: list[Transfer]) -> Transfer:
        """Several as one."""

        def finish() -> None:
            for transfer in transfers:
                transfer.wait()

        return Transfer([part for transfer in transfers for part in transfer._parts], finish)


class DiskFile:
    """One open file of a fixed size. `direct` tells whether it bypasses the page cache.

    Args:
        path: the file; made if it is not there.
        size: bytes to reserve, rounded up to `ALIGN`; None opens the file as it is.
        direct: True, False, or None to try.
    Raises:
        DiskFull: the bytes are not there to reserve.
    """

    def __init__(self, path: Path | str, size: int | None, *, direct: bool | None = None):
        self.path = Path(path)
        flags = os.O_RDWR | (os.O_CREAT if size is not None else 0) | getattr(os, "O_CLOEXEC", 0)
        self.fd, self.direct = _open(self.path, flags, direct)
        try:
            if size is not None:
                self._reserve(round_up(size))
            self.size = os.fstat(self.fd).st_size
        except BaseException:
            os.close(self.fd)
            raise

    def _reserve(self, size: int) -> None:
        have = os.fstat(self.fd).st_size
        if size > have:
            free = shutil.disk_usage(self.path.parent).free
            if size - have > free:
                raise DiskFull(str(self.path), size - have, free, "reserving space")
            try:
                os.posix_fallocate(self.fd, have, size - have)
            except OSError as error:
                os.ftruncate(self.fd, have)
                raise named(error, self.path, size - have, "reserving space") from error
        elif size < have:
            os.ftruncate(self.fd, size)

    def grow(self, size: int) -> None:
        """Make the file longer.

        Raises:
            DiskFull: the bytes are not there.
        """
        self._reserve(round_up(size))
        self.size = os.fstat(self.fd).st_size

    def sync(self) -> None:
        """Return when the device holds everything that was written."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise named(error, self.path, 0, "flushing to disk") from error
        if not self.direct:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read_now(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`, in the calling thread."""
        start, length = offset, len(view)
        while len(view):
            count = os.preadv(self.fd, [view], offset)
            if count == 0:
                raise CheckpointDamaged(
                    str(self.path), f"it ends at byte {offset}, but byte {start + length - 1} was asked for"
                )
            view, offset = view[count:], offset + count
        if not self.direct:
            os.posix_fadvise(self.fd, start, length, os.POSIX_FADV_DONTNEED)

    def write_now(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`, in the calling thread."""
        while len(view):
            try:
                count = os.pwritev(self.fd, [view], offset)
            except OSError as error:
                raise named(error, self.path, len(view), "writing") from error
            view, offset = view[count:], offset + count


class Disk:
    """A pool of threads that reads and writes `DiskFile`s.

    Args:
        threads: transfers worked on at once, >= 1. Four saturate the disks we measured.
        block: most bytes of one system call, a multiple of `ALIGN`; longer transfers are cut into near-equal parts.

    Attributes:
        bytes_read, bytes_written: so far, as asked for.
    """

    def __init__(self, threads: int = 4, block: int = 8 << 20):
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads must be a whole number of at least 1, got {threads!r}; 4 keep most disks busy")
        if block < ALIGN or block % ALIGN:
            raise ValueError(f"Disk: block must be a multiple of {ALIGN} bytes, got {block}")
        self.block = block
        self.bytes_read = self.bytes_written = 0
        self.threads = threads
        self._pool = self._new_pool()
        self._urgent = ThreadPoolExecutor(max(threads // 2, 1), thread_name_prefix="weft-disk-urgent")
        self._count = threading.Lock()

    def read(self, file: DiskFile, buffer: Tensor, offset: int, *, urgent: bool = False) -> Transfer:
        """Start filling an aligned uint8 buffer from `offset` of the file; `urgent`: before what is waiting already."""
        view = _view(file, buffer, offset)
        with self._count:
            self.bytes_read += len(view)
        return Transfer(self._cut(file.read_now, view, offset, self._urgent if urgent else self._pool))

    def write(self, file: DiskFile, buffer: Tensor, offset: int) -> Transfer:
        """Start writing an aligned uint8 buffer at `offset` of the file; it is on the disk after `wait` and `file.sync`."""
        view = _view(file, buffer, offset)
        with self._count:
            self.bytes_written += len(view)
        return Transfer(self._cut(file.write_now, view, offset, self._pool))

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Have a thread of the pool do something else (checksums)."""
        return self._pool.submit(work)

    def _cut(
        self, move: Callable[[memoryview, int], None], view: memoryview, offset: int, pool: ThreadPoolExecutor
    ) -> list[Future[Any]]:
        each = round_up(-(-len(view) // max(-(-len(view) // self.block), 1)))
        return [pool.submit(_move, move, view[at : at + each], offset + at) for at in range(0, len(view), each or 1)]

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="weft-disk")

    def settle(self) -> None:
        """Return when nothing is under way that is not urgent, also what an interrupt kept its caller from knowing."""
        before, self._pool = self._pool, self._new_pool()
        before.shutdown(wait=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._urgent.shutdown(wait=True)


def _move(move: Callable[[memoryview, int], None], view: memoryview, offset: int) -> None:
    # Released before the transfer counts as done: the buffer's last owner shall be whoever asked for it, not this thread.
    with view:
        move(view, offset)


def _open(path: Path, flags: int, direct: bool | None) -> tuple[int, bool]:
    wanted = getattr(os, "O_DIRECT", 0)
    if direct is not False and wanted:
        try:
            fd = os.open(path, flags | wanted, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            try:
                takes = _takes_direct(fd)
            except BaseException:
                os.close(fd)
                raise
            if takes:
                return fd, True
            os.close(fd)
    if direct is True:
        raise ValueError(
            f"{path}: this file system does not take O_DIRECT; leave direct=None to go through the page cache"
        )
    if direct is None:
        _warn_once(path.parent)
    return os.open(path, flags, 0o600), False


def _takes_direct(fd: int) -> bool:
    """Some file systems open with O_DIRECT and refuse to read."""
    try:
        os.preadv(fd, [memoryview(aligned(ALIGN).numpy())], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


_WARNED: set[int] = set()


def _warn_once(folder: Path) -> None:
    device = os.stat(folder).st_dev
    if device not in _WARNED:
        _WARNED.add(device)
        warnings.warn(
            f"{folder} ({describe(folder).filesystem}) does not take O_DIRECT: reads and writes go through the page cache, which "
            "costs CPU time and memory; name a folder on a local disk",
            stacklevel=5,
        )


def _view(file: DiskFile, buffer: Tensor, offset: int) -> memoryview:
    nbytes = buffer.numel()
    if (
        buffer.dtype != torch.uint8
        or not buffer.is_contiguous()
        or buffer.data_ptr() % ALIGN
        or nbytes % ALIGN
        or offset % ALIGN
    ):
        raise ValueError(f"{file.path}: transfers need aligned uint8 buffers and offsets (multiples of {ALIGN} bytes)")
    if offset + nbytes > file.size:
        raise ValueError(f"{file.path}: bytes {offset} to {offset + nbytes} are outside the file of {file.size} bytes")
    return memoryview(buffer.numpy())


def named(error: OSError, path: Path, need: int, doing: str) -> OSError:
    """An error of writing `need` bytes to a file, as one that says so: `DiskFull`, or where the folder went."""
    if error.errno == errno.ENOSPC or error.errno in LIMITS:
        free = shutil.disk_usage(next(above for above in path.absolute().parents if above.exists())).free
        if error.errno == errno.ENOSPC:
            return DiskFull(str(path), need, free, doing)
        return LimitReached(str(path), need, free, doing, _limit(error))
    if error.errno == errno.ENOENT and not path.parent.exists():
        return FileNotFoundError(
            error.errno,
            f"{path.parent} was removed or renamed while it was in use; the last step does not count",
            str(path),
        )
    error.filename = str(path)
    return error


def _limit(error: OSError) -> str:
    """What ends a write while the file system has room, and what to do about it."""
    if error.errno == errno.EDQUOT:
        return "the quota of this user or folder is used up (see `quota`); delete some files, or have it raised"
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most == resource.RLIM_INFINITY:
        return "the file system takes no file of that size; name a folder on another disk"
    return f"this process may write no file of more than {most} bytes; raise its file-size limit (`ulimit -f`)"


@final
class LimitReached(DiskFull):
    """There is room for a file, and the process may not use it; `limit` says what keeps it from that, and what helps."""

    def __init__(self, path: str, need: int, have: int, doing: str, limit: str):
        super().__init__(path, need, have, doing)
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"{self.doing}: {self.path} needs {self.need} bytes more, and the disk has room, but {self.limit}. The last complete "
            "step is intact."
        )

    def __reduce__(self) -> tuple[type[LimitReached], tuple[str, int, int, str, str]]:  # type: ignore[override]
        return type(self), (self.path, self.need, self.have, self.doing, self.limit)


# ---- what a folder is made of


@dataclass(frozen=True)
class Place:
    """Where a folder lies: to be printed beside every number that was measured there.

    Attributes:
        path: the folder.
        filesystem: its type ("ext4", "tmpfs", "nfs4").
        device: what is mounted ("/dev/nvme0n1").
        direct: whether it takes O_DIRECT.
        free: bytes.
    """

    path: str
    filesystem: str
    device: str
    direct: bool
    free: int

    @property
    def is_memory(self) -> bool:
        """Whether "disk" is really memory here."""
        return self.filesystem in ("tmpfs", "ramfs") or Path(self.device).name.startswith(("ram", "zram"))


def describe(folder: Path | str) -> Place:
    """File system, device and O_DIRECT of an existing folder."""
    folder = Path(folder).resolve()
    filesystem, device = "unknown", "unknown"
    best = -1
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        mounts = []
    for line in mounts:
        source, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= best:
            filesystem, device, best = kind, source, len(point)
    direct = False
    probe = folder / f".direct-{os.getpid()}-{threading.get_ident()}"
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600)
        direct = bool(getattr(os, "O_DIRECT", 0)) and _takes_direct(fd)
        os.close(fd)
    except OSError:
        pass
    finally:
        probe.unlink(missing_ok=True)
    return Place(str(folder), filesystem, device, direct, shutil.disk_usage(folder).free)


def measure(folder: Path | str, nbytes: int = 256 << 20, *, threads: int = 4, block: int = 4 << 20) -> dict[str, float]:
    """Bytes per second that plain threads read and write in a folder, without the classes above: what those are held to.

    Every thread calls `preadv` / `pwritev` on its own share of one preallocated file; writes end with `fdatasync`.

    Returns:
        {"read": bytes/s, "write": bytes/s}
    """
    path = Path(folder) / f".measure-{os.getpid()}"
    fd, direct = _open(path, os.O_RDWR | os.O_CREAT, None)
    each = round_up(nbytes // threads, block)
    try:
        os.posix_fallocate(fd, 0, each * threads)
        buffers = [memoryview(aligned(block).numpy()) for _ in range(threads)]

        def work(call: Callable[..., int], index: int) -> None:
            for offset in range(index * each, (index + 1) * each, block):
                if call(fd, [buffers[index]], offset) != block:
                    raise OSError(errno.EIO, "a short transfer", str(path))

        found = {}
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: work(os.pwritev, i), range(threads)))  # first writes also allocate: not timed
            for name, call in (("write", os.pwritev), ("read", os.preadv)):
                os.fdatasync(fd)
                if not direct:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                start = time.perf_counter()
                list(pool.map(lambda i, call=call: work(call, i), range(threads)))
                if name == "write":
                    os.fdatasync(fd)
                found[name] = each * threads / (time.perf_counter() - start)
        return found
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
