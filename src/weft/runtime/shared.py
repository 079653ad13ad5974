"""Tensors handed between the processes of one machine through files in memory.

    box = SharedTensors(folder)
    note = box.put({"x": x})           in one process: a small picklable note
    tensors = take(note)               in another: views of the same memory, nothing is copied

A `SharedTensors` reuses its file as long as the tensors fit, so the reader must be done before the next `put`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Note", "SharedTensors", "run_folder", "take"]

ALIGN = 64  # bytes; every tensor starts on a cache line
_NUMBER = itertools.count()


@dataclass(frozen=True)
class Note:
    """Where tensors lie: a file of `nbytes` bytes, and per name (offset in bytes, shape, dtype)."""

    path: str
    nbytes: int
    tensors: Mapping[str, tuple[int, tuple[int, ...], torch.dtype]]


def run_folder() -> Path:
    """A fresh private folder, in memory where the system has such (`/dev/shm`)."""
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="weft-", dir=base))


def remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)


class SharedTensors:
    """One shared file that grows as needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._path: Path | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def put(self, tensors: Mapping[str, Tensor]) -> Note:
        """Copy tensors into the file, over what was there."""
        places, offset = {}, 0
        for name, tensor in tensors.items():
            places[name] = (offset, tuple(tensor.shape), tensor.dtype)
            offset += -(-tensor.nbytes // ALIGN) * ALIGN
        if offset > len(self._bytes) or self._path is None:
            self.close()
            self._path = self.folder / f"{os.getpid()}-{next(_NUMBER)}.tensors"
            self._bytes = torch.from_file(str(self._path), shared=True, size=max(offset, ALIGN), dtype=torch.uint8)
        note = Note(str(self._path), len(self._bytes), places)
        for name, target in _views(self._bytes, note).items():
            target.copy_(tensors[name].detach())
        return note

    def close(self) -> None:
        """Remove the file; readers that have it open keep their memory."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._path, self._bytes = None, torch.empty(0, dtype=torch.uint8)


def take(note: Note, known: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a note, as views of shared memory.

    Args:
        known: files opened earlier, by path; updated.
    """
    known = {} if known is None else known
    if note.path not in known:
        known.clear()
        known[note.path] = torch.from_file(note.path, shared=True, size=note.nbytes, dtype=torch.uint8)
    return _views(known[note.path], note)


def _views(flat: Tensor, note: Note) -> dict[str, Tensor]:
    found = {}
    for name, (offset, shape, dtype) in note.tensors.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        found[name] = flat[offset : offset + nbytes].view(dtype).view(shape)
    return found
