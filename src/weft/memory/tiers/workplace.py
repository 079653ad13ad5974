"""A folder that one job works in: its lock, its threads, its scratch files."""

from __future__ import annotations

import shutil
from pathlib import Path

from weft.memory.tiers.files import Disk, Place, describe
from weft.memory.tiers.manifest import Lock

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
    """

    def __init__(self, folder: Path | str, rank: int = 0, *, threads: int = 4, block: int = 4 << 20):
        self.folder = Path(folder)
        self.disk = Disk(threads, block)
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = Lock(self.folder, rank)
            except OSError as error:
                raise ValueError(
                    f"cannot keep training state in {self.folder}: {error}; name a folder to write in"
                ) from error
            self.scratch = self.folder / f"scratch.{rank}"
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a job that was killed
            self.scratch.mkdir()
        except BaseException:
            self.disk.close()
            raise

    @property
    def place(self) -> Place:
        """What the folder lies on: print it beside numbers."""
        return describe(self.folder)

    def close(self) -> None:
        self.disk.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.lock.close()
