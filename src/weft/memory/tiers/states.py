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
along with them whatever their home, so that the folder alone is enough to resume. Bytes and places are the business of
`statefile`, whole states (state dicts) of `whole`.
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

from weft.memory.tiers.elementwise import Elementwise, Piece, is_small
from weft.memory.tiers.files import Disk, Transfer, aligned, round_up
from weft.memory.tiers.gradients import Gradients
from weft.memory.tiers.layout import Chunk, Record, Segment, Shard, cut, parts_of
from weft.memory.tiers.manifest import (
    ChunkEntry,
    Manifest,
    decode_small,
    encode_small,
    make_folder,
    manifest_path,
    withdraw,
)
from weft.memory.tiers.peers import Peers
from weft.memory.tiers.ring import Ring
from weft.memory.tiers.statefile import StateFile, Sums

__all__ = ["Held", "States", "scaled"]

PATIENCE = 5  # interrupts while a step is undone, until it stays half undone
RESUME = "make a new one with resume=True to go on"

Held = list[dict[str, Any] | None]
"""What memory has of the states of a chunk's segments: plain numbers if arrays are on disk, else all; None: never updated."""


@dataclass
class Work:
    """A chunk on its way: its buffer, and the reading that fills it."""

    buffer: Tensor | None
    reading: Transfer | None


@dataclass
class Before:
    """What is to hold again if a step is undone whose manifest may be in the folder already."""

    step: int
    held: list[Held]
    places: list[int]
    sums: list[Sums]
    written: int  # the step that the manifest tells of
    replaced: bytes | None  # the manifest that it replaces, if that is the one of the last complete step


@dataclass
class Changes:
    """What a step has changed so far: becomes true with `commit`."""

    held: dict[int, Held] = field(default_factory=dict)
    sums: dict[int, Future[Sums]] = field(default_factory=dict)
    touched: list[int] = field(default_factory=list)
    before: Before | None = None


def scaled(gradient: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """A gradient times numbers, rounded after each; itself if there are none."""
    for factor in factors:
        gradient = gradient * factor.to(gradient.device)
    return gradient


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

    Attributes:
        of_shard: for each shard, its parts: (chunk, segment of it).
        arrays: for each chunk, name and dtype of what the optimizer keeps per element.
        present: gives the elements of a segment whose home is disk, if they happen to be in memory when its update comes.
        broken: why nothing can be updated any more; "" if it can.
    Raises:
        ValueError: an optimizer cannot be run on pieces.
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
        self.shards, self.rules, self.options, self.value = tuple(shards), rules, options, value
        self.streamed, self.peers, self.disk, self.folder = streamed, peers, disk, folder
        self.device = torch.device("cpu") if streamed else device
        self.chunks = cut(shards, chunk)
        self.of_shard = parts_of(self.chunks, len(shards))
        self.arrays = self._arrays()
        self.records = tuple(self._record(*pair) for pair in zip(self.chunks, self.arrays, strict=True))
        self.file = StateFile(self.records, disk)
        self.ring = Ring(buffers, max((record.nbytes for record in self.records), default=0))
        self.held: list[Held] = [[None] * len(chunk.segments) for chunk in self.chunks]
        self.step = 0
        self.present: Callable[[Segment], Tensor | None] | None = None
        self.broken = ""
        self._works: dict[int, Work] = {}
        self._changes = Changes()

    def _arrays(self) -> list[tuple[tuple[str, torch.dtype], ...]]:
        known: dict[tuple[int, torch.dtype], tuple[tuple[str, torch.dtype], ...]] = {}
        for chunk in self.chunks:
            key = chunk.group, chunk.dtype
            if key not in known:
                known[key] = ()
                if chunk.group >= 0:
                    options = self.options(chunk.group)
                    known[key] = self.rules[chunk.group].arrays(options, chunk.dtype, self.device)
        return [known[chunk.group, chunk.dtype] for chunk in self.chunks]

    def _record(self, chunk: Chunk, arrays: tuple[tuple[str, torch.dtype], ...]) -> Record:
        parameter = (("parameter", chunk.dtype),) if chunk.on_disk or self.streamed else ()
        lengths = tuple(segment.length for segment in chunk.segments)
        return Record(lengths, parameter + (arrays if self.streamed else ()))

    # ---- the file

    @property
    def nbytes(self) -> int:
        """Of state.bin."""
        return self.file.nbytes

    def open(self, *, fresh: bool) -> None:
        """Open state.bin, a new one or the one that is there; raises as `StateFile.open`."""
        assert self.folder is not None
        if fresh:
            make_folder(self.folder)
        self.file.open(self.folder / "state.bin", fresh=fresh)

    def seed(self, index: int, values: Tensor) -> None:
        """Write the initial elements (1-D) of a shard into the file, if it has a place there."""
        first = self.shards[index].start
        for c, k in self.of_shard[index]:
            if self.records[c].arrays:
                segment = self.chunks[c].segments[k]
                self.file.write_area(c, 0, k, values[segment.start - first : segment.stop - first])

    def read(self, index: int, buffer: Tensor) -> Transfer:
        """Start reading a shard's elements, as of the last complete step, into an aligned buffer of its padded size."""
        shard, transfers = self.shards[index], []
        for c, k in self.of_shard[index]:
            segment = self.chunks[c].segments[k]
            at = (segment.start - shard.start) * shard.dtype.itemsize
            part = buffer[at : at + round_up(segment.length * shard.dtype.itemsize)]
            transfers.append(self.file.read(c, part, self.records[c].areas[0][k][0], urgent=True))
        return Transfer.of(transfers)

    def in_memory(self) -> list[int]:
        """Chunks that have a place in the file, while the home of their parameters is memory."""
        return [c for c, chunk in enumerate(self.chunks) if self.records[c].arrays and not chunk.on_disk]

    def load_values(self, chunks: Sequence[int]) -> None:
        """Read the parameters of chunks, whose home is memory, from the file."""
        for c in chunks:
            record = self.records[c]
            buffer = aligned(record.start(1))
            self.file.read(c, buffer).wait()
            for k, segment in enumerate(self.chunks[c].segments):
                self.value(segment).copy_(record.view(buffer, 0, k))

    def verify(self) -> None:
        """Read everything and compare it with its checksums; raises as `StateFile.verify`."""
        self.file.verify([[self.shards[s.shard].name for s in chunk.segments] for chunk in self.chunks])

    def close(self) -> None:
        self.broken = f"the files of the optimizer's state are closed; {RESUME}"
        self._settle()
        self.ring.close()
        self.file.close()

    # ---- updating

    def update(self, order: Sequence[int], gradients: Gradients, factors: Sequence[Tensor] = ()) -> None:
        """Update chunks, in this order, reading ahead and writing behind.

        Args:
            order: indices of chunks.
            gradients: of this process's shards; a segment without one is left as it is.
            factors: for the gradients, one after the other (clipping).
        """
        todo, under_way = deque(c for c in order if c not in self._works), deque(c for c in order if c in self._works)
        while len(under_way) < max(self.ring.number - 1, 1) and todo:
            under_way.append(self.prepare(todo.popleft(), gradients))
        while under_way:
            self.finish(under_way.popleft(), gradients, factors)
            if todo:
                under_way.append(self.prepare(todo.popleft(), gradients))

    def prepare(self, c: int, gradients: Gradients | None = None) -> int:
        """Start reading what the update of a chunk needs; waits for a free buffer."""
        if self.broken:
            raise RuntimeError(self.broken)
        if gradients is not None:
            for segment in self.chunks[c].segments:
                gradients.fetch(segment)
        if c in self._works:
            return c
        record = self.records[c]
        if not record.arrays:
            self._works[c] = Work(None, None)
            return c
        buffer = self.ring.take()
        first = 0 if self.chunks[c].on_disk and self.present is None else 1
        last = len(record.arrays) if any(state is not None for state in self.held[c]) else 1
        start, stop = record.start(first), record.start(last)
        reading = self.file.read(c, buffer[start:stop], start) if stop > start else None
        self._works[c] = Work(buffer, reading)
        return c

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
            self.ring.give_back(work.buffer)

    def finish(self, c: int, gradients: Gradients, factors: Sequence[Tensor] = ()) -> None:
        """Update a prepared chunk and start writing it."""
        chunk, record, buffer = self.chunks[c], self.records[c], self.claim(c)
        held = list(self.held[c])
        pieces: list[tuple[int, Tensor, Piece]] = []
        for k, segment in enumerate(chunk.segments):
            gradient = gradients.get(segment)
            if gradient is None:
                continue
            home = record.view(buffer, 0, k) if chunk.on_disk else self.value(segment)
            gradient = scaled(gradient.to(self.device), factors)
            pieces.append((k, home, Piece(home.to(self.device), gradient, self._state(c, k, buffer))))
        if pieces:
            self.rules[chunk.group].update([piece for _, _, piece in pieces], self.options(chunk.group))
        for k, home, piece in pieces:
            if piece.value is not home:
                home.copy_(piece.value)
            held[k] = self.keep(c, k, buffer, piece.state or {})
        self.end(c, buffer, held)

    def claim(self, c: int) -> Tensor | None:
        """The buffer of a prepared chunk, when all that was asked for is in it; None for a chunk without bytes in the file."""
        work = self._works[c]
        if work.reading is not None:
            work.reading.wait()
            work.reading = None
        self._changes.touched.append(c)
        if self.chunks[c].on_disk and self.present is not None:
            self._fill(c, work.buffer)
        return work.buffer

    def end(self, c: int, buffer: Tensor | None, held: Held) -> None:
        """Start writing a chunk that was claimed: its states are in the buffer, and so are parameters whose home is disk."""
        record, chunk = self.records[c], self.chunks[c]
        self._changes.held[c] = held
        if buffer is not None:
            if not chunk.on_disk:
                for k, segment in enumerate(chunk.segments):
                    record.view(buffer, 0, k).copy_(self.value(segment))
            writing, self._changes.sums[c] = self.file.write(c, buffer, [state is not None for state in held])
            self.ring.write(writing, buffer)
        del self._works[c]

    def _fill(self, c: int, buffer: Tensor | None) -> None:
        """Put the parameters of a chunk into its buffer: from memory where they are there, else from disk."""
        assert buffer is not None and self.present is not None
        record, reading = self.records[c], []
        for k, segment in enumerate(self.chunks[c].segments):
            here = self.present(segment)
            if here is not None:
                record.view(buffer, 0, k).copy_(here)
            else:
                reading.append(self.file.read(c, record.area(buffer, 0, k), record.areas[0][k][0]))
        for transfer in reading:
            transfer.wait()

    def _state(self, c: int, k: int, buffer: Tensor | None) -> dict[str, Any] | None:
        """The state of a segment, for the optimizer."""
        held = self.held[c][k]
        if held is None or not self.streamed:
            return held
        arrays = self.records[c].arrays
        views = {name: self.records[c].view(buffer, a, k) for a, (name, _) in enumerate(arrays) if a > 0}
        # Copies of the numbers: the optimizer counts in place, and the step may yet be rolled back.
        return {**{key: v.clone() if isinstance(v, Tensor) else v for key, v in held.items()}, **views}

    def keep(self, c: int, k: int, buffer: Tensor | None, state: dict[str, Any]) -> dict[str, Any]:
        """Put the arrays of a new state into the buffer, if that is where they belong; what is to be held of it.

        Raises:
            ValueError: it has arrays that the file has no place for.
        """
        if not self.streamed:
            return state
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
        written = self.peers.agree(lambda: self._write_down(about, extra or {}, step))
        for c, counting in self._changes.sums.items():
            self.file.turn(c, counting.result())
        for c, held in self._changes.held.items():
            self.held[c] = held
        self.step = self.step + step if written is None else written
        self._changes = Changes()  # until here an interrupt has it undone, all of it

    def _write_down(self, about: Callable[[], Manifest], extra: Mapping[str, Tensor], step: bool) -> int | None:
        """Finish all writing; returns the step that the manifest tells of, None without one."""
        self.ring.drain()
        if not self.streamed:
            return None  # nothing to resume from, so nothing to flush
        manifest = about()
        manifest.chunks = self.entries(after=True)
        self.file.sync()
        assert self.folder is not None
        path = manifest_path(self.folder, manifest.step)
        replaced = None if step else path.read_bytes()
        held, places, sums = list(self.held), list(self.file.places), list(self.file.sums)
        self._changes.before = Before(self.step, held, places, sums, manifest.step, replaced)
        manifest.write(self.folder, extra)
        return manifest.step

    def entries(self, *, after: bool = False) -> list[ChunkEntry]:
        """The chunks as a manifest tells of them; `after` the changes of this step."""
        found, file = [], self.file
        for c, (chunk, record) in enumerate(zip(self.chunks, self.records, strict=True)):
            changed = after and c in self._changes.sums
            held = self._changes.held[c] if after and c in self._changes.held else self.held[c]
            found.append(ChunkEntry(
                [(self.shards[s.shard].name, s.start, s.stop) for s in chunk.segments],
                [(name, str(dtype).removeprefix("torch.")) for name, dtype in record.arrays],
                file.bases[c],
                1 - file.places[c] if changed else file.places[c],
                self._changes.sums[c].result() if changed else file.sums[c],
                [None if state is None else encode_small(state) for state in held],
                chunk.group,
            ))  # fmt: skip
        return found

    def adopt(self, entries: Sequence[ChunkEntry]) -> None:
        """Take over the chunks of a manifest of the same layout."""
        for c, entry in enumerate(entries):
            self.file.places[c], self.file.sums[c] = entry.place, entry.sums
            self.held[c] = [None if state is None else decode_small(state) for state in entry.small]

    def rollback(self) -> None:
        """Throw away what the step has changed; parameters in memory are read back from the file.

        Whoever presses Ctrl-C twice is heard when it is done: half of it would leave some parameters ahead of others.
        """
        interrupt: KeyboardInterrupt | None = None
        for _ in range(PATIENCE):
            try:
                self._roll_back()
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception as error:
                self.broken = f"a step could not be undone ({error}), so some parameters are ahead of others; {RESUME}"
                raise
            else:
                break
        else:
            self.broken = f"undoing a step was interrupted, so some parameters may be ahead of others; {RESUME}"
        if interrupt is not None:
            raise interrupt

    def _roll_back(self) -> None:
        """Can be interrupted anywhere, and done again."""
        self._settle()
        if self._changes.before is not None:
            self._take_back(self._changes.before)
        touched = set(self._changes.touched)
        if touched and not self.streamed:
            # Undoing an update in memory would take a second copy of the states, which are in memory for their speed.
            self.broken = (
                "a step failed while it was updating optimizer states in memory, so some parameters are ahead of others; load a "
                "checkpoint. With optimizer='disk' a failed step is undone."
            )
        else:
            self.load_values([c for c in self.in_memory() if c in touched])
        self._changes = Changes()

    def _settle(self) -> None:
        """Nothing is under way any more, and all buffers are free, well or not, whatever was interrupted."""
        if self.disk is not None:
            self.disk.settle()
        self._works.clear()
        self.ring.reset()

    def _take_back(self, before: Before) -> None:
        """Undo a commit that did not come to its end."""
        assert self.folder is not None
        try:
            withdraw(self.folder, before.written, before.replaced)
        except OSError as error:
            # Doing the step again would write to the places that this manifest tells of.
            self.broken = (
                f"a step was undone, but its manifest could not be taken out of {self.folder} ({error}); {RESUME}"
            )
        self.step, self.held = before.step, before.held
        self.file.places, self.file.sums = before.places, before.sums
