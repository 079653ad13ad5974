"""Who holds which elements of a parameter, and where they lie in a file.

    Shard     this process's part of one parameter: elements [start, stop) of it, flattened              `share`
    Segment   a part of a shard that is moved as one
    Chunk     segments that are read, updated and written together, of one optimizer group and dtype     `cut`
    Record    a chunk's bytes in a file: the parameter's segments, then each state's, every segment at a multiple of `ALIGN`,
              so that any of them can be read alone past the page cache

Cuts inside a tensor are multiples of `QUANTUM` (shards: of `LANE`) elements from its start. Then vectorised kernels meet the
same elements in their main loop and in their tail as they do on the whole tensor, and results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from weft.memory.tiers.files import ALIGN, round_up

__all__ = ["LANE", "QUANTUM", "Chunk", "Record", "Segment", "Shard", "cut", "parts_of", "share"]

LANE = 64  # elements: a multiple of every vector width, unrolling included
QUANTUM = ALIGN  # elements: a multiple of LANE, and of ALIGN bytes at any item size


def share(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Elements [start, stop) of a flattened tensor that a rank owns: equal parts, the last ones shorter or empty.

    >>> share(100, 0, 2), share(100, 1, 2)
    ((0, 64), (64, 100))
    """
    each = shard_length(numel, world)
    return min(rank * each, numel), min((rank + 1) * each, numel)


def shard_length(numel: int, world: int) -> int:
    """Elements of every rank's part, padding included."""
    return numel if world == 1 else round_up(-(-numel // world), LANE)


@dataclass(frozen=True)
class Shard:
    """This process's elements [start, stop) of a parameter.

    Attributes:
        name: of the parameter, unique.
        shape: of the whole parameter.
        dtype: of its elements.
        group: index of its optimizer group; -1 if it is not trained.
        on_disk: its home is the file; otherwise the caller keeps it in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int
    group: int
    on_disk: bool

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of the parameter that `shard` (an index) is a part of."""

    shard: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Chunk:
    """Segments that are moved together."""

    group: int
    dtype: torch.dtype
    on_disk: bool
    segments: tuple[Segment, ...]


def cut(shards: Sequence[Shard], nbytes: int) -> tuple[Chunk, ...]:
    """Pack shards, in their order, into chunks of at most `nbytes` of parameters (at least `QUANTUM` elements each).

    A shard that is too long for a chunk is cut into near-equal pieces, and one that does not fit behind others begins a chunk:
    an update waits for the gradients of all shards of its chunk, and keeps the others in memory meanwhile.
    """
    chunks: list[Chunk] = []
    filling: dict[tuple[int, torch.dtype, bool], tuple[list[Segment], int]] = {}
    for index, shard in enumerate(shards):
        key = (shard.group, shard.dtype, shard.on_disk)
        room = max(nbytes // shard.dtype.itemsize // QUANTUM, 1) * QUANTUM
        pieces = -(-shard.length // room)
        each = round_up(-(-shard.length // max(pieces, 1)), QUANTUM)
        at = shard.start
        while at < shard.stop:
            # A segment ends with its shard or at a multiple of QUANTUM from the shard's start.
            length = min(shard.stop - at, each)
            segments, used = filling.pop(key, ([], 0))
            if used + length > room:
                chunks.append(Chunk(*key, tuple(segments)))
                segments, used = [], 0
            filling[key] = ([*segments, Segment(index, at, at + length)], used + length)
            at += length
    return (*chunks, *(Chunk(*key, tuple(segments)) for key, (segments, _) in filling.items()))


def parts_of(chunks: Sequence[Chunk], shards: int) -> list[list[tuple[int, int]]]:
    """Where each of some shards is: (chunk, segment of it) of its parts, in their order."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(shards)]
    for c, chunk in enumerate(chunks):
        for k, segment in enumerate(chunk.segments):
            found[segment.shard].append((c, k))
    return found


@dataclass(frozen=True)
class Record:
    """Where the arrays of a chunk lie, relative to the record's start.

    Attributes:
        lengths: elements of each segment.
        arrays: (name, dtype) in their order; the parameter, if it is in the record, comes first.
    """

    lengths: tuple[int, ...]
    arrays: tuple[tuple[str, torch.dtype], ...]

    @cached_property
    def areas(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(offset, bytes) for each array and segment; bytes are the true ones, the area is rounded up."""
        found, at = [], 0
        for _, dtype in self.arrays:
            row = []
            for length in self.lengths:
                row.append((at, length * dtype.itemsize))
                at += round_up(length * dtype.itemsize)
            found.append(tuple(row))
        return tuple(found)

    @cached_property
    def nbytes(self) -> int:
        return sum(round_up(length * dtype.itemsize) for _, dtype in self.arrays for length in self.lengths)

    def start(self, array: int) -> int:
        """Offset at which an array begins; `nbytes` for one past the last."""
        if array >= len(self.arrays):
            return self.nbytes
        return self.areas[array][0][0] if self.lengths else 0

    def view(self, buffer: Tensor, array: int, segment: int) -> Tensor:
        """The segment of an array inside a record's buffer, 1-D of the array's dtype."""
        offset, nbytes = self.areas[array][segment]
        return buffer[offset : offset + nbytes].view(self.arrays[array][1])

    def area(self, buffer: Tensor, array: int, segment: int) -> Tensor:
        """The same with its padding, in bytes."""
        offset, nbytes = self.areas[array][segment]
        return buffer[offset : offset + round_up(nbytes)]
