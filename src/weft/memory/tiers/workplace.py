"""A folder that one job works in: its lock, its threads, its scratch files."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from weft.errors import DiskFull
from weft.memory.tiers.files import ALIGN, Disk, Place, describe, named
from weft.memory.tiers.lock import Lock
from weft.memory.tiers.manifest import make_folder

__all__ = ["Workplace"]


class Workplace:
    """What a job needs of a disk.

    Args:
        folder: made if it is not there; on several machines, seen by all (to resume on another number of processes).
        rank: of this process.
        threads, block: of the reading and writing.
    Raises:
        FolderInUse: another job works there.
        ValueError: it is no folder, or one may not write there.
        DiskFull: not even a few bytes.
    """

    def __init__(self, folder: Path | str, rank: int = 0, *, threads: int = 4, block: int = 8 << 20):
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ValueError(f"folder must be the path of a folder to keep training state in, got {folder!r}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cannot keep training state in {self.folder}: it is a file; name a folder to write in")
        self.scratch = self.folder / f"scratch.{rank}"
        with ExitStack() as opened:
            self.disk = Disk(threads, block)
            opened.callback(self.disk.close)
            try:
                make_folder(self.folder)
                self.lock = Lock(self.folder, rank)
                opened.callback(self.lock.close)
                shutil.rmtree(self.scratch, ignore_errors=True)  # of a job that was killed
                self.scratch.mkdir()
            except OSError as error:
                found = named(error, self.scratch, ALIGN, "beginning to work in a folder")
                if isinstance(found, DiskFull):
                    raise found from error
                raise ValueError(
                    f"cannot keep training state in {self.folder}: {error}; name a folder to write in"
                ) from error
            opened.pop_all()

    @property
    def place(self) -> Place:
        """What the folder lies on: print it beside numbers."""
        return describe(self.folder)

    def close(self) -> None:
        self.disk.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.lock.close()
