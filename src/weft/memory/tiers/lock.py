"""One job per folder: a lock that ends with its process, and that no forked child keeps."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from pathlib import Path

from weft.errors import FolderInUse

__all__ = ["Lock"]


class Lock:
    """A folder's lock for one rank, held until `close` or the end of the process, however it ends.

    Raises:
        FolderInUse: another process holds it.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"lock.{rank}"
        self._file = open(self.path, "a+")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            if error.errno not in (11, 13, 35):  # EWOULDBLOCK by its names
                raise
            raise FolderInUse(str(folder), holder) from None
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} (rank {rank})")
            self._file.flush()
        except BaseException:  # a full disk; whoever looks at the error must not hold the lock with it
            self._drop()
            raise
        _HELD.add(self)

    def close(self) -> None:
        _HELD.discard(self)
        if not self._file.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # closing is not enough while somebody else has the descriptor
        self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forked() -> None:
    """A forked child (a loader's worker) shares the lock, and would hold it when this process is gone: it lets go."""
    for lock in list(_HELD):
        lock._drop()
    _HELD.clear()


os.register_at_fork(after_in_child=_forked)
