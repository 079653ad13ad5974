"""The bytes of one rank's chunks: `state.bin`, in which each has two places, of which one holds the last complete step.

    place(c, 0), place(c, 1)     adjacent, of the record's length; a step writes to the one that does not count     `write`
    sums                         of what lies in the place that counts, per array and segment             `Sums`, `verify`
A record without arrays has no bytes here; its chunk is in memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import final

from torch import Tensor

from weft.errors import CheckpointDamaged
from weft.memory.tiers.files import Disk, DiskFile, Transfer, aligned
from weft.memory.tiers.layout import Record
from weft.memory.tiers.manifest import checksum

__all__ = ["StateFile", "Sums"]

Sums = list[list[int | None]]
"""Checksums per array and segment of a record; None where nothing has been written."""


@final
class StateFile:
    """See the file's header.

    Args:
        records: of the chunks, in their order.
        disk: whose threads read and write; needed if any record has arrays.

    Attributes:
        nbytes: of the file.
        bases: offset of each chunk's first place.
        places: 0 or 1 for each chunk: the place that counts.
        sums: what lies there.
        path: once it is open.
    """

    def __init__(self, records: Sequence[Record], disk: Disk | None):
        self.records, self.disk = records, disk
        *self.bases, self.nbytes = accumulate((2 * record.nbytes for record in records), initial=0)
        self.places = [0] * len(records)
        self.sums: list[Sums] = [[[None] * len(record.lengths) for _ in record.arrays] for record in records]
        self.path = Path()
        self._file: DiskFile | None = None

    def open(self, path: Path, *, fresh: bool) -> None:
        """Open the file: a new one with all its bytes reserved, or the one that is there. None is made for no bytes.

        Raises:
            DiskFull: there is no room for it.
            CheckpointDamaged: the one that is there is missing or of another length.
        """
        self.path = path
        if not self.nbytes:
            return
        if fresh:
            self._file = DiskFile(path, self.nbytes)
            return
        size = path.stat().st_size if path.is_file() else 0
        if size != self.nbytes:
            raise CheckpointDamaged(str(path), f"it has {size} bytes instead of {self.nbytes}")
        self._file = DiskFile(path, None)

    def sync(self) -> None:
        """Return when the device holds everything that was written."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    # ---- where things are

    def place(self, c: int, *, other: bool = False) -> int:
        """Offset of the place of a chunk that counts, or of the other."""
        return self.bases[c] + (self.places[c] ^ other) * self.records[c].nbytes

    def read(self, c: int, buffer: Tensor, start: int = 0, *, urgent: bool = False) -> Transfer:
        """Start filling a buffer from byte `start` of a chunk's record."""
        return self.disk.read(self._file, buffer, self.place(c) + start, urgent=urgent)  # type: ignore[union-attr, arg-type]

    def read_area(self, c: int, array: int, k: int) -> Tensor:
        """A segment of an array, 1-D, in new memory."""
        record = self.records[c]
        offset, nbytes = record.areas[array][k]
        buffer = aligned(nbytes)
        self.read(c, buffer, offset).wait()
        return buffer[:nbytes].view(record.arrays[array][1])

    def write_area(self, c: int, array: int, k: int, values: Tensor) -> None:
        """Write a segment of an array (1-D) to the place that counts: a step that nobody can go back to yet."""
        record = self.records[c]
        offset, nbytes = record.areas[array][k]
        buffer = aligned(nbytes)
        buffer[:nbytes].view(values.dtype).copy_(values)
        buffer[nbytes:].zero_()
        self.sums[c][array][k] = checksum(buffer)
        self._put(c, buffer, offset).wait()

    def fill(self, c: int, buffer: Tensor, started: Sequence[bool]) -> None:
        """Write a whole record to the place that counts, as `write_area`. `started`: segments that have optimizer states."""
        self.sums[c] = self._sums(c, buffer, started)
        self._put(c, buffer, 0).wait()

    def _put(self, c: int, buffer: Tensor, start: int) -> Transfer:
        return self.disk.write(self._file, buffer, self.place(c) + start)  # type: ignore[union-attr, arg-type]

    def write(self, c: int, buffer: Tensor, started: Sequence[bool]) -> tuple[Transfer, Future[Sums]]:
        """Start writing a whole record to the other place, and adding it up; `turn` makes it the one that counts."""
        assert self.disk is not None and self._file is not None
        part = buffer[: self.records[c].nbytes]
        counting = self.disk.submit(lambda: self._sums(c, part, started))
        writing = self.disk.write(self._file, part, self.place(c, other=True))
        return Transfer.of([writing, Transfer([counting])]), counting

    def _sums(self, c: int, part: Tensor, started: Sequence[bool]) -> Sums:
        record = self.records[c]
        return [
            [checksum(record.area(part, a, k)) if a == 0 or started[k] else None for k in range(len(record.lengths))]
            for a in range(len(record.arrays))
        ]

    def turn(self, c: int, sums: Sums) -> None:
        """The other place counts from now on."""
        self.places[c], self.sums[c] = 1 - self.places[c], sums

    def verify(self, names: Sequence[Sequence[str]]) -> None:
        """Read everything and compare it with its checksums.

        Args:
            names: of the parameters, per chunk and segment; for the error.
        Raises:
            CheckpointDamaged: something is not what was written.
        """
        for c, record in enumerate(self.records):
            if not record.arrays:
                continue
            buffer = aligned(record.nbytes)
            self.read(c, buffer).wait()
            for a, (array, _) in enumerate(record.arrays):
                for k, name in enumerate(names[c]):
                    said = self.sums[c][a][k]
                    if said is not None and said != checksum(record.area(buffer, a, k)):
                        raise CheckpointDamaged(str(self.path), f"the {array} of {name} has changed")
