"""What a folder of training state holds, written so that a crash at any moment leaves a complete step.

    folder/lock.{rank}               held by the process that works here (`lock`)
    folder/{n}/rank{r}/state.bin     chunks, each with two places, of one layout (number n; a higher number is newer)
    folder/{n}/rank{r}/manifest.{0,1}   what the chunks of an even / odd step are: place, checksums, small states; and after that
                                     the module's buffers and random states, as `torch.save` writes them

A step writes every changed chunk into the place that the last complete step does not use, flushes, then writes its manifest
(beside the target, flushed, renamed). Manifests of even and odd steps are two files, and the ranks wait for each other after
writing theirs. So whatever is killed, when and where: the newest step for which *every* rank has a manifest is complete, and
its chunks have not been touched.                                                          `newest`
A step that is undone after a rank has written its manifest, or resumed before, is to be done again, in the same places: its
manifest is withdrawn first.                                                               `withdraw`

A manifest's first line is the CRC-32 of the second, which is JSON and holds that of the rest. A chunk's checksums are sums of
64-bit words per page of 4 KiB, and the CRC-32 of those sums: as fast as memory, and blind to nothing that a disk does to
pages.                                                                                     `checksum`
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import CheckpointDamaged
from weft.memory.tiers.files import ALIGN, named
from weft.memory.tiers.notes import decode_notes, encode_notes

__all__ = [
    "ChunkEntry", "Manifest", "checksum", "decode_small", "encode_small", "layouts", "make_folder", "manifest_path",
    "newest", "read_extra", "remove_layouts", "survey", "withdraw",
]  # fmt: skip

FORMAT = 1


def checksum(area: Tensor) -> int:
    """CRC-32 over the 64-bit sums of the pages of an aligned uint8 buffer."""
    words = area.view(torch.int64).view(-1, ALIGN // 8)
    return zlib.crc32(memoryview(words.sum(1).numpy()).cast("B"))


@dataclass
class ChunkEntry:
    """A chunk in a manifest.

    Attributes:
        segments: (parameter's name, start, stop) in elements of the flattened parameter.
        arrays: (name, dtype) in their order in the record.
        base: offset of the first of the two places in state.bin.
        place: 0 or 1, which of them is valid.
        sums: checksums per array and segment; None where nothing has been written.
        small: per segment, plain-number states by name; None before its first update.
        group: of the optimizer.
    """

    segments: list[tuple[str, int, int]]
    arrays: list[tuple[str, str]]
    base: int
    place: int
    sums: list[list[int | None]]
    small: list[dict[str, Any] | None]
    group: int


@dataclass
class Manifest:
    """The state of one rank after a step."""

    step: int
    rank: int
    world: int
    optimizer: str
    parameters: dict[str, tuple[list[int], str]]  # name -> (shape, dtype) of every parameter of the model
    chunks: list[ChunkEntry]
    groups: list[dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)
    extra: tuple[int, int] = (0, 0)  # size and CRC-32 of what comes after the manifest

    def write(self, folder: Path, extra: Mapping[str, Tensor] | None = None) -> None:
        """Put it, and some more tensors, in place of the manifest of two steps ago, whole or not at all.

        Raises:
            ValueError: a note is nothing that JSON can say.
        """
        buffer = io.BytesIO()
        if extra:
            torch.save({name: tensor.detach().cpu() for name, tensor in extra.items()}, buffer)
        content = buffer.getvalue()
        self.extra = len(content), zlib.crc32(content)
        chunks, notes = [vars(chunk) for chunk in self.chunks], encode_notes(self.notes)
        plain = {"format": FORMAT, **vars(self), "chunks": chunks, "notes": notes}
        text = json.dumps(plain, separators=(",", ":")).encode()
        _replace(manifest_path(folder, self.step), b"%08x\n%s\n%s" % (zlib.crc32(text), text, content))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """
        Raises:
            CheckpointDamaged: the file is not a whole manifest.
            ValueError: it is one of another version of weft.
        """
        try:
            line, text, content = path.read_bytes().split(b"\n", 2)
            if int(line, 16) != zlib.crc32(text):
                raise ValueError("its checksum does not match")
            data = json.loads(text)
            version = data.pop("format")
            if tuple(data["extra"]) != (len(content), zlib.crc32(content)):
                raise ValueError("what comes after it is cut short or altered")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointDamaged(str(path), f"it is no whole manifest ({error})") from None
        if version != FORMAT:
            raise ValueError(f"{path} has format {version}; this version of weft reads {FORMAT}")
        try:
            data["chunks"] = [
                ChunkEntry(
                    **{**c, "segments": [tuple(s) for s in c["segments"]], "arrays": [tuple(a) for a in c["arrays"]]}
                )
                for c in data["chunks"]
            ]
            data["extra"] = tuple(data["extra"])
            data["notes"] = decode_notes(data["notes"])
            data["parameters"] = {name: (shape, dtype) for name, (shape, dtype) in data["parameters"].items()}
            return cls(**data)
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointDamaged(str(path), f"it is no manifest of training state ({error})") from None


def survey(folder: Path) -> tuple[list[tuple[int, int, int, int]], list[str]]:
    """What manifests this process can see: (layout, step, rank, world) of each whole one, and what is wrong with the others."""
    found: list[tuple[int, int, int, int]] = []
    problems: list[str] = []
    for layout in layouts(folder):
        for path in sorted(layout.glob("rank*/manifest.[01]")):
            try:
                manifest = Manifest.read(path)
            except CheckpointDamaged as error:
                problems.append(f"{error.path}: {error.what}")
            else:
                found.append((int(layout.name), manifest.step, manifest.rank, manifest.world))
    return found, problems


def newest(
    folder: Path, seen: Sequence[tuple[list[tuple[int, int, int, int]], list[str]]]
) -> tuple[int, int, int] | None:
    """The newest complete step among the surveys of all processes: (layout, step, number of ranks); None if there is no state,
    or only some ranks' of a run that has not begun.

    Raises:
        CheckpointDamaged: there is state, but no complete step in it.
    """
    problems = list(dict.fromkeys(problem for _, wrong in seen for problem in wrong))
    ranks: dict[tuple[int, int, int], set[int]] = {}
    for found, _ in seen:
        for layout, step, rank, world in found:
            ranks.setdefault((layout, step, world), set()).add(rank)
    complete = [key for key, there in ranks.items() if len(there) == key[2]]
    if complete:
        return max(complete)
    if any(step > 0 for _, step, _ in ranks):
        problems.append("no step has a manifest of every rank")
    if problems:
        raise CheckpointDamaged(str(folder), "; ".join(problems[:3]))
    return None


def layouts(folder: Path) -> list[Path]:
    """The folders of state in a folder, oldest first; other things that may lie there are left alone."""
    if not folder.is_dir():
        return []
    ours = ("rank*/state.bin", "rank*/manifest.[01]")
    named = [path for path in folder.iterdir() if path.name.isdigit() and any(any(path.glob(name)) for name in ours)]
    return sorted(named, key=lambda path: int(path.name))


def remove_layouts(folder: Path, keep: int | None) -> None:
    """Delete all layouts, but one if it is to be kept."""
    for path in layouts(folder):
        if int(path.name) != keep:
            shutil.rmtree(path, ignore_errors=True)


# ---- small states


def encode_small(state: Mapping[str, Any]) -> dict[str, Any]:
    """Plain-number states as JSON values; a tensor becomes [dtype, number]."""
    return {
        key: [str(value.dtype).removeprefix("torch."), value.item()] if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def decode_small(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, with tensors on the CPU."""
    return {
        key: torch.tensor(value[1], dtype=getattr(torch, value[0])) if isinstance(value, list) else value
        for key, value in state.items()
    }


# ---- places


def manifest_path(folder: Path, step: int) -> Path:
    """Where the manifest of a step is."""
    return folder / f"manifest.{step % 2}"


def withdraw(folder: Path, step: int, replaced: bytes | None = None) -> None:
    """The step does not count after all: its manifest goes, if it is there, before its places are written again.

    Args:
        replaced: what is to be there instead.
    """
    path = manifest_path(folder, step)
    if not _tells_of(path, step):
        return
    if replaced is None:
        path.unlink()
        flush_folder(folder)
    elif path.read_bytes() != replaced:
        _replace(path, replaced)


def _tells_of(path: Path, step: int) -> bool:
    try:
        return Manifest.read(path).step == step
    except CheckpointDamaged:  # none, or half of one, which counts for nothing
        return False


def read_extra(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors that were written with a manifest."""
    content = manifest_path(folder, manifest.step).read_bytes().split(b"\n", 2)[2]
    found: dict[str, Tensor] = torch.load(io.BytesIO(content), weights_only=True) if content else {}
    return found


def _replace(path: Path, content: bytes) -> None:
    """
    Raises:
        DiskFull: there is no room. OSError: the folder is gone, or read-only. The file is as before.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        flush_folder(path.parent)
    except OSError as error:
        raise named(error, path, len(content), "writing what a step consists of") from error


def flush_folder(folder: Path) -> None:
    """Have the disk hold a folder's entries (a rename is otherwise in memory only)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder, with those that it is in, if it is not there, and have the disk hold their entries."""
    made = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        with contextlib.suppress(PermissionError):  # one may write in folders that one may not read
            flush_folder(each.parent)
