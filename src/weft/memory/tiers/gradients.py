"""Gradients of this process's shards between backward and the optimizer: in memory, or in a scratch file.

    add(shard, gradient)    keep a finished gradient; adds to one that is there (micro-batches)
    get(segment)            its elements, for the update; from disk, asked for by `fetch` before so that nobody waits
    whole(shard), replace   all its elements, for whoever changes a gradient between backward and update

The file holds one area per shard, which nobody reads after the step: no checksums, no second place.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from weft.memory.tiers.files import Disk, DiskFile, Transfer, aligned, round_up
from weft.memory.tiers.layout import Segment, Shard

__all__ = ["Gradients"]

IN_FLIGHT = 2  # gradients being written at once: their buffers are memory


class Gradients:
    """Gradients by shard.

    Args:
        shards: of this process.
        device: where gradients that stay in memory are kept; None keeps them where they come.
        disk, folder: given together, for gradients that go to a file.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        device: torch.device | None = None,
        disk: Disk | None = None,
        folder: Path | None = None,
    ):
        self.shards, self.device, self.disk = shards, device, disk
        self.kept: dict[int, Tensor] = {}
        self.stored: set[int] = set()  # shards whose gradient is in the file
        self.file: DiskFile | None = None
        if disk is not None:
            assert folder is not None
            self._offsets, at = [], 0
            for shard in shards:
                self._offsets.append(at)
                at += round_up(shard.length * shard.dtype.itemsize)
            self.file = DiskFile(folder / "gradients.bin", max(at, 1))
            self._writing: deque[tuple[int, Transfer, Tensor]] = deque()
        self._read: dict[tuple[int, int, int], tuple[Transfer, Tensor]] = {}

    def __contains__(self, shard: int) -> bool:
        return shard in self.kept or shard in self.stored

    def add(self, index: int, gradient: Tensor) -> None:
        """Keep a 1-D gradient of a shard, or add it to the one that is kept."""
        if self.file is None:
            if index in self.kept:
                self.kept[index] += gradient.to(self.kept[index].device)
            else:
                self.kept[index] = gradient if self.device is None else gradient.to(self.device)
            return
        if index in self.stored:
            buffer = self._arrived(self._all(index))
            self._elements(buffer, index, self.shards[index].length).add_(gradient.to("cpu"))
        else:
            buffer = self._filled(index, gradient)
        self._write(index, buffer)

    def whole(self, index: int) -> Tensor:
        """All elements of a shard's gradient, which there is, 1-D; of one in memory an alias."""
        found = self.get(self._all(index))
        assert found is not None
        return found

    def replace(self, index: int, gradient: Tensor) -> None:
        """Put other elements in place of a shard's gradient."""
        if index not in self.kept:
            self._write(index, self._filled(index, gradient))
        elif self.kept[index].data_ptr() != gradient.data_ptr():
            self.kept[index].copy_(gradient)

    def _all(self, index: int) -> Segment:
        return Segment(index, self.shards[index].start, self.shards[index].stop)

    def _elements(self, buffer: Tensor, index: int, length: int) -> Tensor:
        dtype = self.shards[index].dtype
        return buffer[: length * dtype.itemsize].view(dtype)

    def _filled(self, index: int, gradient: Tensor) -> Tensor:
        shard = self.shards[index]
        buffer = aligned(shard.length * shard.dtype.itemsize)
        self._elements(buffer, index, shard.length).copy_(gradient)
        return buffer

    def _write(self, index: int, buffer: Tensor) -> None:
        """Start writing a shard's gradient."""
        self._settle(index)
        while len(self._writing) >= IN_FLIGHT:
            self._writing[0][1].wait()  # one that failed stays, so that its gradient is not read as if it were there
            self._writing.popleft()
        self._writing.append((index, self.disk.write(self.file, buffer, self._offsets[index]), buffer))
        self.stored.add(index)

    def _settle(self, index: int) -> None:
        """Wait for what is being written of a shard."""
        for other, transfer, _ in self._writing:
            if other == index:
                transfer.wait()
        self._writing = deque(item for item in self._writing if item[0] != index)

    def fetch(self, segment: Segment) -> None:
        """Start reading a segment, if it is in the file."""
        if segment.shard not in self.stored or self._key(segment) in self._read:
            return
        self._settle(segment.shard)
        shard = self.shards[segment.shard]
        buffer = aligned(segment.length * shard.dtype.itemsize)
        offset = self._offsets[segment.shard] + (segment.start - shard.start) * shard.dtype.itemsize
        self._read[self._key(segment)] = (self.disk.read(self.file, buffer, offset), buffer)

    def get(self, segment: Segment) -> Tensor | None:
        """The segment's gradient, 1-D; None if its shard has none. What was read from disk is handed over, not kept."""
        shard = self.shards[segment.shard]
        if segment.shard in self.kept:
            return self.kept[segment.shard][segment.start - shard.start : segment.stop - shard.start]
        if segment.shard not in self.stored:
            return None
        return self._elements(self._arrived(segment), segment.shard, segment.length)

    def _arrived(self, segment: Segment) -> Tensor:
        """The buffer that a segment in the file has been read into."""
        self.fetch(segment)
        transfer, buffer = self._read.pop(self._key(segment))
        transfer.wait()
        return buffer

    @staticmethod
    def _key(segment: Segment) -> tuple[int, int, int]:
        return segment.shard, segment.start, segment.stop

    def drop(self, index: int) -> None:
        """The gradient of a shard has been used."""
        self.kept.pop(index, None)
        self.stored.discard(index)

    def clear(self) -> None:
        """Drop all gradients; returns when nothing is under way any more, well or not."""
        under_way = [transfer for transfer, _ in self._read.values()]
        if self.file is not None:
            under_way += [transfer for _, transfer, _ in self._writing]
            self._writing.clear()
        for transfer in under_way:
            with contextlib.suppress(Exception):  # nobody wants these gradients any more
                transfer.wait()
        self._read.clear()
        self.kept.clear()
        self.stored.clear()

    def close(self) -> None:
        self.clear()
        if self.file is not None:
            self.file.close()
            self.file.path.unlink(missing_ok=True)
