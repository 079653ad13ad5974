"""Bring the state in a folder back, on any number of processes.

Of the same layout (processes, chunk size, optimizer), a manifest is taken over as it is. Otherwise every new chunk is put
together from the areas of the old ones that overlap it and written to a new layout; the old one is removed when the new one
is complete on every rank, so that a crash while resuming costs nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import CheckpointDamaged
from weft.memory.tiers.files import Disk, DiskFile, aligned
from weft.memory.tiers.layout import Record
from weft.memory.tiers.manifest import (
    ChunkEntry,
    Manifest,
    checksum,
    decode_small,
    layouts,
    manifest_path,
    newest,
    read_extra,
    remove_layouts,
    survey,
    withdraw,
)
from weft.memory.tiers.states import States

__all__ = ["Found", "check_resume", "open_states"]


@dataclass(frozen=True)
class Found:
    """What a folder held besides chunks: tensors and notes that were written with the step, and options of the groups."""

    extra: dict[str, Tensor]
    notes: dict[str, Any]
    groups: list[dict[str, Any]]


def check_resume(resume: object) -> None:
    """
    Raises:
        ValueError: it is neither True nor False: of a string from a command line, "no" would resume.
    """
    if not isinstance(resume, bool):
        raise ValueError(f"resume must be True or False, got {resume!r}")


def open_states(
    states: States,
    folder: Path,
    about: Callable[[int], Manifest],
    extra: Callable[[], Mapping[str, Tensor]],
    *,
    resume: bool,
) -> Found | None:
    """Give the states their files: those in the folder if it holds any, else new ones; a collective.

    Args:
        states: not opened yet; on return its file is open, and if it was resumed, everything is in it. Parameters whose home
            is memory get their values from it by `States.load_values`, when nothing else can go wrong any more.
        folder: of all ranks.
        about: makes a manifest (without chunks) for a step.
        extra: what is to be kept beside the chunks, if a new layout is written.
        resume: whether to go on from what the folder holds. If not, it must hold nothing.
    Returns:
        What was written with the step that was resumed; None if the folder was empty: then `States.seed` and a commit come
        next.
    Raises:
        ValueError: the state is of another model or optimizer, or `resume` is False and there is some.
        CheckpointDamaged: files are missing, cut short or altered. In both cases nothing has been changed.
    """
    peers = states.peers
    seen = peers.gather(peers.agree(lambda: survey(folder)))
    found = newest(folder, seen)
    number = max([int(path.name) for path in layouts(folder)], default=-1) + 1
    number = max(peers.gather(number))

    def clean(keep: int | None) -> None:
        """What jobs have left that were killed while they opened or resumed would take the room of the new files."""
        peers.agree(lambda: remove_layouts(folder, keep) if peers.rank == 0 else None)

    if found is None:
        clean(None)
        states.folder = folder / str(number) / f"rank{peers.rank}"
        peers.agree(lambda: states.open(fresh=True))
        return None
    if not resume:
        raise ValueError(
            f"{folder} holds the state of a training run after step {found[1]}; resume=True goes on from it, another folder "
            "starts anew"
        )
    layout, step, world = found
    old = folder / str(layout)
    theirs, same = peers.agree(lambda: _inspect(states, old, step, world, about(step)))
    # What one rank can take over as it is, another may not; then all move.
    if all(peers.gather(same)):
        extras = peers.agree(lambda: _adopt(states, old, theirs))
    else:
        clean(layout)
        states.folder = folder / str(number) / f"rank{peers.rank}"
        extras = peers.agree(lambda: _move(states, old, theirs, world))
        states.commit(lambda: replace(about(step), notes=theirs.notes, groups=theirs.groups), extras or extra())
    if peers.rank == 0:
        remove_layouts(folder, int(states.folder.parent.name))
    return Found(extras, theirs.notes, theirs.groups)


def _inspect(states: States, old: Path, step: int, world: int, mine: Manifest) -> tuple[Manifest, bool]:
    """The manifest that this rank goes on from, and whether its layout is the one wanted now."""
    theirs = Manifest.read(manifest_path(old / f"rank{states.peers.rank % world}", step))
    _compare(mine, theirs, old.parent)
    same = world == states.peers.world and [_shape(c) for c in theirs.chunks] == [_shape(c) for c in states.entries()]
    return theirs, same


def _adopt(states: States, old: Path, theirs: Manifest) -> dict[str, Tensor]:
    states.folder = old / f"rank{states.peers.rank}"
    states.open(fresh=False)
    states.adopt(theirs.chunks)
    states.verify()
    states.step = theirs.step
    withdraw(states.folder, theirs.step + 1)  # to which other ranks had not come
    return read_extra(states.folder, theirs)


def _move(states: States, old: Path, theirs: Manifest, world: int) -> dict[str, Tensor]:
    source = _Source(old, theirs.step, world, states.disk)
    try:
        states.open(fresh=True)
        _convert(states, source)
    finally:
        source.close()
    return read_extra(old / f"rank{states.peers.rank % world}", theirs)


def _shape(entry: ChunkEntry) -> tuple[Any, ...]:
    return entry.segments, entry.arrays, entry.base, entry.group


def _compare(mine: Manifest, theirs: Manifest, folder: Path) -> None:
    if {k: (list(s), d) for k, (s, d) in mine.parameters.items()} != {
        k: (list(s), d) for k, (s, d) in theirs.parameters.items()
    }:
        lacking = sorted(set(mine.parameters) - set(theirs.parameters))
        extra = sorted(set(theirs.parameters) - set(mine.parameters))
        other = [
            n for n, (s, d) in mine.parameters.items()
            if n in theirs.parameters and (list(s), d) != (list(theirs.parameters[n][0]), theirs.parameters[n][1])
        ]  # fmt: skip
        raise ValueError(
            f"{folder} holds the state of another model: it lacks {lacking[:3] or 'nothing'}, has {extra[:3] or 'nothing'} "
            f"besides, and differs in shape or dtype of {other[:3] or 'nothing'}; name another folder"
        )
    if mine.optimizer != theirs.optimizer:
        raise ValueError(
            f"{folder} holds the state of {theirs.optimizer}, but this run uses {mine.optimizer}; use that optimizer, or "
            "another folder"
        )


class _Source:
    """Areas of the chunks of an old layout, by parameter."""

    def __init__(self, layout: Path, step: int, world: int, disk: Disk):
        self.layout, self.disk = layout, disk
        self.files: dict[int, DiskFile] = {}
        self.parts: dict[str, list[tuple[int, int, int, ChunkEntry, Record, int]]] = {}
        try:
            self._survey(step, world)
        except BaseException:
            self.close()
            raise

    def _survey(self, step: int, world: int) -> None:
        for rank in range(world):
            manifest = Manifest.read(manifest_path(self.layout / f"rank{rank}", step))
            expected = 0
            for entry in manifest.chunks:
                lengths = tuple(stop - start for _, start, stop in entry.segments)
                record = Record(lengths, tuple((name, getattr(torch, dtype)) for name, dtype in entry.arrays))
                expected = max(expected, entry.base + 2 * record.nbytes)
                for k, (name, start, stop) in enumerate(entry.segments):
                    self.parts.setdefault(name, []).append((start, stop, rank, entry, record, k))
            if expected:  # of few elements a rank may have none, and no file
                self._open(rank, self.layout / f"rank{rank}" / "state.bin", expected)

    def _open(self, rank: int, path: Path, expected: int) -> None:
        if not path.exists():
            raise CheckpointDamaged(str(path), "it is missing")
        file = self.files[rank] = DiskFile(path, None)
        if file.size != expected:
            raise CheckpointDamaged(str(path), f"it has {file.size} bytes instead of {expected}")

    def overlapping(self, name: str, start: int, stop: int) -> list[tuple[int, int, int, ChunkEntry, Record, int]]:
        return [part for part in self.parts.get(name, ()) if part[0] < stop and start < part[1]]

    def read(self, rank: int, entry: ChunkEntry, record: Record, array: int, k: int) -> Tensor:
        """The elements of a segment of an array, checked."""
        offset, nbytes = record.areas[array][k]
        buffer, file = aligned(nbytes), self.files[rank]
        at = entry.base + entry.place * record.nbytes + offset
        self.disk.read(file, buffer, at).wait()
        if checksum(buffer) != entry.sums[array][k]:
            raise CheckpointDamaged(
                str(file.path), f"the {entry.arrays[array][0]} of {entry.segments[k][0]} has changed"
            )
        return buffer[:nbytes].view(record.arrays[array][1])

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _convert(states: States, source: _Source) -> None:
    """Fill the new layout's first places."""
    for c, (chunk, record) in enumerate(zip(states.chunks, states.records, strict=True)):
        if not record.arrays:
            continue
        buffer = aligned(record.nbytes).zero_()
        states.held[c] = [None] * len(chunk.segments)
        names = [name for name, _ in record.arrays]
        for k, segment in enumerate(chunk.segments):
            shard = states.shards[segment.shard]
            covered, small, started = 0, None, True
            for start, stop, rank, entry, old, j in source.overlapping(shard.name, segment.start, segment.stop):
                low, high = max(start, segment.start), min(stop, segment.stop)
                covered += high - low
                known = [name for name, _ in old.arrays]
                other = set(names) - set(known) if chunk.group < 0 else set(names) ^ set(known)
                if other:
                    raise ValueError(
                        f"of {shard.name}, the files and the optimizer differ in whether they keep {min(other)!r}: trained "
                        "with other options. Resume with those, or load a state dict into a new folder"
                    )
                started &= entry.small[j] is not None
                small = entry.small[j]
                for a, name in enumerate(names):
                    if entry.sums[known.index(name)][j] is None:
                        continue
                    values = source.read(rank, entry, old, known.index(name), j)
                    record.view(buffer, a, k)[low - segment.start : high - segment.start] = values[
                        low - start : high - start
                    ]
            if covered != segment.length:
                raise CheckpointDamaged(
                    str(source.layout),
                    f"it holds {covered} of {segment.length} elements of {shard.name}",
                )
            states.held[c][k] = decode_small(small) if started and small is not None else None
        states.file.fill(c, buffer, [state is not None for state in states.held[c]])
