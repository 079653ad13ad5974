"""Optimizer state (and the parameters it belongs to) of one process, in memory or on disk, updated chunk by chunk.

Problem    an update reads and writes every state once. Kept on disk it should cost what the disk costs and no more, in a few
           buffers of memory; and a process that is killed meanwhile must find a complete step.
Method     chunks flow through a ring of aligned buffers: while one is updated the next are read and the last is
           written                                                                              `States.update`
           a chunk is written to the place that the last complete step does not use; `commit` flushes, writes the manifest,
           waits for the other ranks, and only then counts the step (see `manifest`)            `States.commit`
           an error on the way leaves the last complete step as it was                          `States.rollback`
Guarantee  peak memory of the ring: `buffers` times the largest record (parameter and states of one chunk).

Where things are: `Shard.on_disk` says it of parameters, `streamed` of states. If states are on disk the parameters are written
along with them whatever their home, so that the folder alone is enough to resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import CheckpointDamaged
from weft.memory.tiers.elementwise import Elementwise, Piece, is_small
from weft.memory.tiers.files import Disk, DiskFile, Transfer, aligned, round_up
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.layout import Chunk, Record, Segment, Shard, cut
from weft.memory.tiers.manifest import ChunkEntry, Manifest, checksum, decode_small, encode_small
from weft.memory.tiers.peers import Peers

__all__ = ["States"]


@dataclass
class Work:
    """A chunk on its way: its buffer, and the reading that fills it."""

    buffer: Tensor | None
    reading: Transfer | None


@dataclass
class Changes:
    """What a step has changed so far: becomes true with `commit`."""

    small: dict[int, list[dict[str, Any] | None]] = field(default_factory=dict)
    sums: dict[int, Future[list[list[int | None]]]] = field(default_factory=dict)
    writing: deque[tuple[Transfer, Tensor]] = field(default_factory=deque)
    touched: list[int] = field(default_factory=list)


class States:
    """See the file's header.

    Args:
        shards: of this process, of every parameter.
        rules: the optimizer of each group. options: gives a group's options of the moment; read at each update.
        value: gives the 1-D view of a segment whose home is memory; updated in place.
        streamed: optimizer states live on disk.
        device: where updates are computed if states are in memory; streamed ones are updated on the CPU.
        folder: this rank's folder for `state.bin`; needed if anything is on disk.
        chunk: bytes of parameters in a chunk. buffers: of the ring, >= 1.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        rules: Sequence[Elementwise],
        options: Callable[[int], Mapping[str, Any]],
        value: Callable[[Segment], Tensor],
        *,
        streamed: bool,
        device: torch.device,
        peers: Peers,
        disk: Disk | None = None,
        folder: Path | None = None,
        chunk: int = 16 << 20,
        buffers: int = 3,
    ):
        if buffers < 1:
            raise ValueError(f"buffers must be at least 1, got {buffers}; 3 let reading, updating and writing overlap")
        self.shards, self.rules, self.options, self.value = tuple(shards), rules, options, value
        self.streamed, self.peers, self.disk, self.folder = streamed, peers, disk, folder
        self.device = torch.device("cpu") if streamed else device
        self.chunks = cut(shards, chunk)
        self.records = tuple(self._record(c) for c in self.chunks)
        self.of_shard: list[list[tuple[int, int]]] = [[] for _ in shards]  # shard -> (chunk, segment in it)
        for c, item in enumerate(self.chunks):
            for k, segment in enumerate(item.segments):
                self.of_shard[segment.shard].append((c, k))
        self.bases, at = [], 0
        for record in self.records:
            self.bases.append(at)
            at += 2 * record.nbytes
        self.nbytes = at  # of state.bin
        self.file: DiskFile | None = None
        self.places = [0] * len(self.chunks)
        self.sums: list[list[list[int | None]]] = [[[None] * len(r.lengths) for _ in r.arrays] for r in self.records]
        # Plain-number states of streamed chunks, whole states of the others; None: never updated.
        self.small: list[list[dict[str, Any] | None]] = [[None] * len(r.lengths) for r in self.records]
        self.kept: list[list[dict[str, Any] | None]] = [[None] * len(r.lengths) for r in self.records]
        self.step = 0
        self.buffers = buffers
        # Gives the elements of a segment whose home is disk, if they happen to be in memory when its update comes.
        self.present: Callable[[Segment], Tensor | None] | None = None
        self._free: list[Tensor] | None = None
        self._works: dict[int, Work] = {}
        self._changes = Changes()
        self.broken = ""

    def _record(self, chunk: Chunk) -> Record:
        parameter = (("parameter", chunk.dtype),) if chunk.on_disk or self.streamed else ()
        arrays: tuple[tuple[str, torch.dtype], ...] = ()
        if self.streamed and chunk.group >= 0:
            arrays = self.rules[chunk.group].arrays(self.options(chunk.group), chunk.dtype)
        return Record(tuple(segment.length for segment in chunk.segments), parameter + arrays)

    # ---- the file

    def open(self, *, fresh: bool) -> None:
        """Open state.bin: a new one with all its bytes reserved, or the one that is there.

        Raises:
            DiskFull: there is no room for it.
            CheckpointDamaged: the one that is there is missing or of another length.
        """
        assert self.folder is not None
        if fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self.nbytes:
            return  # of so few elements that this process has none
        path = self.folder / "state.bin"
        if fresh:
            self.file = DiskFile(path, self.nbytes)
            return
        size = path.stat().st_size if path.exists() else 0
        if size != self.nbytes:
            raise CheckpointDamaged(str(path), f"it has {size} bytes instead of {self.nbytes}")
        self.file = DiskFile(path, None)

    def seed(self, index: int, values: Tensor) -> None:
        """Write the initial elements (1-D) of a shard into the file, if it has a place there."""
        shard = self.shards[index]
        for c, k in self.of_shard[index]:
            if not self.records[c].arrays:
                continue
            segment = self.chunks[c].segments[k]
            offset, nbytes = self.records[c].areas[0][k]
            buffer = aligned(nbytes)
            buffer[:nbytes].view(shard.dtype).copy_(values[segment.start - shard.start : segment.stop - shard.start])
            buffer[nbytes:].zero_()
            self.sums[c][0][k] = checksum(buffer)
            self.disk.write(self.file, buffer, self.bases[c] + self.places[c] * self.records[c].nbytes + offset).wait()

    def read(self, index: int, buffer: Tensor) -> Transfer:
        """Start reading a shard's elements, as of the last complete step, into an aligned buffer of its padded size."""
        shard, transfers = self.shards[index], []
        for c, k in self.of_shard[index]:
            segment, record = self.chunks[c].segments[k], self.records[c]
            offset, _ = record.areas[0][k]
            at = (segment.start - shard.start) * shard.dtype.itemsize
            part = buffer[at : at + round_up(segment.length * shard.dtype.itemsize)]
            transfers.append(
                self.disk.read(self.file, part, self.bases[c] + self.places[c] * record.nbytes + offset, urgent=True)
            )
        return Transfer.of(transfers)

    # ---- updating

    def update(self, order: Sequence[int], gradients: Gradients, scale: Tensor | None = None) -> None:
        """Update chunks, in this order, reading ahead and writing behind.

        Args:
            order: indices of chunks.
            gradients: of this process's shards; a segment without one is left as it is.
            scale: a factor for the gradients (clipping).
        """
        todo, under_way = deque(c for c in order if c not in self._works), deque(c for c in order if c in self._works)
        while len(under_way) < max(self.buffers - 1, 1) and todo:
            under_way.append(self.prepare(todo.popleft(), gradients))
        while under_way:
            self.finish(under_way.popleft(), gradients, scale)
            if todo:
                under_way.append(self.prepare(todo.popleft(), gradients))

    def prepare(self, c: int, gradients: Gradients | None = None) -> int:
        """Start reading what the update of a chunk needs; waits for a free buffer."""
        if self.broken:
            raise RuntimeError(self.broken)
        if gradients is not None:
            for segment in self.chunks[c].segments:
                gradients.fetch(segment)
        if c not in self._works:
            record = self.records[c]
            if not record.arrays:
                self._works[c] = Work(None, None)
                return c
            buffer = self._take()
            first = 0 if self.chunks[c].on_disk and self.present is None else 1
            last = len(record.arrays) if any(small is not None for small in self.small[c]) else 1
            start, stop = record.start(first), record.start(last)
            reading = None
            if stop > start:
                offset = self.bases[c] + self.places[c] * record.nbytes
                reading = self.disk.read(self.file, buffer[start:stop], offset + start)
            self._works[c] = Work(buffer, reading)
        return c

    @property
    def idle_buffers(self) -> int:
        """Buffers that could be had without waiting for a chunk to be finished, though perhaps for its writing."""
        return self.buffers - sum(work.buffer is not None for work in self._works.values())

    def has_free_buffer(self) -> bool:
        """Whether a buffer can be had without waiting for anything."""
        free, writing = self._ring(), self._changes.writing
        while not free and writing and writing[0][0].done():
            transfer, buffer = writing.popleft()
            free.append(buffer)
            transfer.wait()
        return bool(free)

    def is_prepared(self, c: int) -> bool:
        return c in self._works

    def prepared(self) -> list[int]:
        """Chunks that have been prepared and not finished, oldest first."""
        return list(self._works)

    def forget(self, c: int) -> None:
        """Give the buffer of a prepared chunk back without updating it."""
        work = self._works.pop(c)
        if work.reading is not None:
            work.reading.wait()
        if work.buffer is not None:
            self._ring().append(work.buffer)

    def finish(self, c: int, gradients: Gradients, scale: Tensor | None = None) -> None:
        """Update a prepared chunk and start writing it."""
        chunk, record, work = self.chunks[c], self.records[c], self._works[c]
        if work.reading is not None:
            work.reading.wait()
            work.reading = None
        self._changes.touched.append(c)
        if chunk.on_disk and self.present is not None:
            self._fill(c, work.buffer)
        small = list(self.small[c])
        pieces: list[tuple[int, Tensor, Piece]] = []
        for k, segment in enumerate(chunk.segments):
            gradient = gradients.get(segment)
            if gradient is None:
                continue
            home = record.view(work.buffer, 0, k) if chunk.on_disk else self.value(segment)
            gradient = gradient.to(self.device)
            if scale is not None:
                gradient = gradient * scale.to(self.device)
            pieces.append((k, home, Piece(home.to(self.device), gradient, self._state(c, k, work.buffer))))
        if pieces:
            self.rules[chunk.group].update([piece for _, _, piece in pieces], self.options(chunk.group))
        for k, home, piece in pieces:
            if piece.value is not home:
                home.copy_(piece.value)
            small[k] = self._keep(c, k, work.buffer, piece.state or {})
        if record.arrays and not chunk.on_disk:
            for k, segment in enumerate(chunk.segments):
                record.view(work.buffer, 0, k).copy_(self.value(segment))
        self._changes.small[c] = small
        del self._works[c]
        if work.buffer is not None:
            self._write(c, work.buffer)

    def _fill(self, c: int, buffer: Tensor) -> None:
        """Put the parameters of a chunk into its buffer: from memory where they are there, else from disk."""
        record, reading = self.records[c], []
        for k, segment in enumerate(self.chunks[c].segments):
            here = self.present(segment)
            if here is not None:
                record.view(buffer, 0, k).copy_(here)
            else:
                at = self.bases[c] + self.places[c] * record.nbytes + record.areas[0][k][0]
                reading.append(self.disk.read(self.file, record.area(buffer, 0, k), at))
        for transfer in reading:
            transfer.wait()

    def _state(self, c: int, k: int, buffer: Tensor | None) -> dict[str, Any] | None:
        if not self.streamed:
            return self.kept[c][k]
        small = self.small[c][k]
        if small is None:
            return None
        arrays = self.records[c].arrays
        views = {name: self.records[c].view(buffer, a, k) for a, (name, _) in enumerate(arrays) if a > 0}
        # Copies of the numbers: the optimizer counts in place, and the step may yet be rolled back.
        return {**{key: v.clone() if isinstance(v, Tensor) else v for key, v in small.items()}, **views}

    def _keep(self, c: int, k: int, buffer: Tensor | None, state: dict[str, Any]) -> dict[str, Any]:
        """Put a new state where it belongs; returns its plain numbers."""
        if not self.streamed:
            self.kept[c][k] = state
            return {}
        arrays = {name: a for a, (name, _) in enumerate(self.records[c].arrays) if a > 0}
        for name, value in state.items():
            if name in arrays:
                view = self.records[c].view(buffer, arrays[name], k)
                if value.data_ptr() != view.data_ptr():
                    view.copy_(value)
            elif not is_small(value):
                raise ValueError(
                    f"the optimizer began to keep {name!r}, which it did not when the files were laid out; options that "
                    "change what it keeps (momentum, amsgrad) cannot change during training"
                )
        return {name: value for name, value in state.items() if name not in arrays}

    def _write(self, c: int, buffer: Tensor) -> None:
        record = self.records[c]
        part = buffer[: record.nbytes]
        offset = self.bases[c] + (1 - self.places[c]) * record.nbytes
        started = [state is not None for state in self._changes.small[c]]

        def sums() -> list[list[int | None]]:
            return [
                [
                    checksum(record.area(part, a, k)) if a == 0 or started[k] else None
                    for k in range(len(record.lengths))
                ]
                for a in range(len(record.arrays))
            ]

        counting = self.disk.submit(sums)
        self._changes.sums[c] = counting
        writing = self.disk.write(self.file, part, offset)
        self._changes.writing.append((Transfer.of([writing, Transfer([counting])]), buffer))

    # ---- the ring

    def _ring(self) -> list[Tensor]:
        if self._free is None:
            largest = max((record.nbytes for record in self.records), default=0)
            # Zeros: padding goes to disk, and what another job left in memory should not.
            self._free = [aligned(largest).zero_() for _ in range(self.buffers)]
        return self._free

    def _take(self) -> Tensor:
        free = self._ring()
        if not free:
            if not self._changes.writing:
                raise AssertionError("every buffer of the ring is being read into")
            transfer, buffer = self._changes.writing.popleft()
            free.append(buffer)
            transfer.wait()
        return free.pop()

    def _drain(self) -> None:
        while self._changes.writing:
            transfer, buffer = self._changes.writing.popleft()
            self._ring().append(buffer)
            transfer.wait()

    # ---- ending a step

    def commit(
        self, about: Callable[[], Manifest], extra: Mapping[str, Tensor] | None = None, *, step: bool = True
    ) -> None:
        """Make everything since the last commit count; a collective.

        Args:
            about: makes the manifest, with step, names and groups; chunks and extra are filled in here.
            extra: more tensors to keep with the step.
            step: count it as one.
        """
        written = self.peers.agree(lambda: self._write_down(about, extra or {}))
        self.step = self.step + step if written is None else written
        for c, counting in self._changes.sums.items():
            self.places[c] = 1 - self.places[c]
            self.sums[c] = counting.result()
        for c, small in self._changes.small.items():
            self.small[c] = small
        self._changes = Changes()

    def _write_down(self, about: Callable[[], Manifest], extra: Mapping[str, Tensor]) -> int | None:
        """Finish all writing; returns the step that the manifest tells of, None without one."""
        if self.file is not None:
            self._drain()
        if not self.streamed:
            return None  # nothing to resume from, so nothing to flush
        manifest = about()
        manifest.chunks = self.entries(after=True)
        if self.file is not None:
            self.file.sync()
        manifest.write(self.folder, extra)
        return manifest.step

    def entries(self, *, after: bool = False) -> list[ChunkEntry]:
        """The chunks as a manifest tells of them; `after` the changes of this step."""
        found = []
        for c, (chunk, record) in enumerate(zip(self.chunks, self.records, strict=True)):
            changed = after and c in self._changes.sums
            small = self._changes.small[c] if after and c in self._changes.small else self.small[c]
            found.append(ChunkEntry(
                [(self.shards[s.shard].name, s.start, s.stop) for s in chunk.segments],
                [(name, str(dtype).removeprefix("torch.")) for name, dtype in record.arrays],
                self.bases[c],
                1 - self.places[c] if changed else self.places[c],
                self._changes.sums[c].result() if changed else self.sums[c],
                [None if state is None else encode_small(state) for state in small],
                chunk.group,
            ))  # fmt: skip
        return found

    def adopt(self, entries: Sequence[ChunkEntry]) -> None:
        """Take over the chunks of a manifest of the same layout."""
        for c, entry in enumerate(entries):
            self.places[c], self.sums[c] = entry.place, entry.sums
            self.small[c] = [None if state is None else decode_small(state) for state in entry.small]

    def rollback(self) -> None:
        """Throw away what the step has changed; parameters in memory are read back from the file."""
        for transfer, buffer in self._changes.writing:
            self._ring().append(buffer)
            _wait_anyway(transfer)
        for work in self._works.values():
            if work.reading is not None:
                _wait_anyway(work.reading)
            if work.buffer is not None:
                self._ring().append(work.buffer)
        self._works.clear()
        touched, self._changes = set(self._changes.touched), Changes()
        if touched and not self.streamed:
            # Undoing an update in memory would take a second copy of the states, which are in memory for their speed.
            self.broken = (
                "a step failed while it was updating optimizer states in memory, so some parameters are ahead of others; load a "
                "checkpoint. With optimizer='disk' a failed step is undone."
            )
            return
        for c in self.in_memory():
            if c in touched:
                self.load_values(c)

    def in_memory(self) -> list[int]:
        """Chunks that have a place in the file, while the home of their parameters is memory."""
        return [c for c, chunk in enumerate(self.chunks) if self.records[c].arrays and not chunk.on_disk]

    def load_all_values(self) -> None:
        """Read all parameters whose home is memory from the file."""
        for c in self.in_memory():
            self.load_values(c)

    def load_values(self, c: int) -> None:
        """Read a chunk's parameters, whose home is memory, from the file."""
        record, chunk = self.records[c], self.chunks[c]
        buffer = aligned(record.start(1))
        self.disk.read(self.file, buffer, self.bases[c] + self.places[c] * record.nbytes).wait()
        for k, segment in enumerate(chunk.segments):
            self.value(segment).copy_(record.view(buffer, 0, k))

    def whole_state(self, index: int) -> dict[str, Any] | None:
        """The optimizer's state of a shard, its arrays 1-D and in memory; None if it was never updated, or has no elements."""
        shard, found = self.shards[index], {}
        if not self.of_shard[index]:
            return None
        for c, k in self.of_shard[index]:
            segment, record = self.chunks[c].segments[k], self.records[c]
            if not self.streamed:
                state = self.kept[c][k]
                parts = {} if state is None else {n: v for n, v in state.items() if not is_small(v)}
                small = state
            else:
                small, parts = self.small[c][k], {}
                for a, (name, dtype) in enumerate(record.arrays):
                    if a > 0 and small is not None:
                        offset, nbytes = record.areas[a][k]
                        buffer = aligned(nbytes)
                        at = self.bases[c] + self.places[c] * record.nbytes + offset
                        self.disk.read(self.file, buffer, at).wait()
                        parts[name] = buffer[:nbytes].view(dtype)
            if small is None:
                return None
            for name, part in parts.items():
                whole = found.setdefault(name, torch.empty(shard.length, dtype=part.dtype, device=part.device))
                whole[segment.start - shard.start : segment.stop - shard.start] = part
            found.update({n: v.clone() if isinstance(v, Tensor) else v for n, v in small.items() if is_small(v)})
        return found

    def assign(self, index: int, values: Tensor) -> None:
        """Give a shard other elements (1-D), in the file; the caller does it in memory. `commit` comes next."""
        shard = self.shards[index]
        for c in dict.fromkeys(c for c, _ in self.of_shard[index]):
            if not self.records[c].arrays:
                continue
            self.prepare(c)
            work, record = self._works.pop(c), self.records[c]
            if work.reading is not None:
                work.reading.wait()
            if self.chunks[c].on_disk and self.present is not None:
                self._fill(c, work.buffer)
            for k, segment in enumerate(self.chunks[c].segments):
                area = record.view(work.buffer, 0, k)
                if segment.shard == index:
                    area.copy_(values[segment.start - shard.start : segment.stop - shard.start])
                elif not self.chunks[c].on_disk:
                    area.copy_(self.value(segment))
            self._changes.small[c] = list(self.small[c])
            self._changes.touched.append(c)
            self._write(c, work.buffer)

    def replace(self, get: Callable[[int], Mapping[str, Any] | None]) -> None:
        """Put other optimizer states in place of what there is; `commit` comes next.

        Args:
            get: gives the state of a shard, arrays in any shape of its length; None for one that was never updated.
        """
        for c, (chunk, record) in enumerate(zip(self.chunks, self.records, strict=True)):
            self.prepare(c)
            work, small = self._works.pop(c), [None] * len(chunk.segments)
            if work.reading is not None:
                work.reading.wait()
            for k, segment in enumerate(chunk.segments):
                state, shard = get(segment.shard), self.shards[segment.shard]
                if not chunk.on_disk and record.arrays:
                    record.view(work.buffer, 0, k).copy_(self.value(segment))
                if state is None:
                    continue
                low, high = segment.start - shard.start, segment.stop - shard.start
                own = {
                    name: value if is_small(value) else value.detach().reshape(-1)[low:high].to(self.device)
                    for name, value in state.items()
                }
                own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}
                small[k] = self._keep(c, k, work.buffer, own)
            self._changes.small[c] = small
            self._changes.touched.append(c)
            if work.buffer is not None:
                self._write(c, work.buffer)

    def verify(self) -> None:
        """Read everything and compare it with its checksums.

        Raises:
            CheckpointDamaged: something is not what was written.
        """
        for c, record in enumerate(self.records):
            if not record.arrays:
                continue
            buffer = aligned(record.nbytes)
            self.disk.read(self.file, buffer, self.bases[c] + self.places[c] * record.nbytes).wait()
            for a, (name, _) in enumerate(record.arrays):
                for k, segment in enumerate(self.chunks[c].segments):
                    said = self.sums[c][a][k]
                    if said is not None and said != checksum(record.area(buffer, a, k)):
                        raise CheckpointDamaged(
                            str(self.file.path), f"the {name} of {self.shards[segment.shard].name} has changed"
                        )

    def close(self) -> None:
        self.broken = "the files of the optimizer's state are closed; make a new one with resume=True to go on"
        self._works.clear()
        self._free = None
        if self.file is not None:
            self.file.close()


def _wait_anyway(transfer: Transfer) -> None:
    try:
        transfer.wait()
    except Exception:  # the step is being undone because of an error; this may be the same one
        return
