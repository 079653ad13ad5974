"""What autograd saves between forward and backward, on the host or on disk.

A saved tensor is copied to its tier when it is saved and brought back when its node runs (`torch.autograd.graph.
saved_tensors_hooks`, applied by `Tiered`). One copy serves all that save the same bytes. Backward goes through the saved tensors
from the last to the first, so the ones saved before are read ahead.

On a device that is the CPU, the host tier is where activations are anyway, and nothing moves.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import DiskFull
from weft.memory.tiers.files import Disk, DiskFile, Transfer, aligned, round_up
from weft.memory.tiers.pinned import host_memory

__all__ = ["Activations", "Saved"]

GROWTH = 64 << 20  # bytes that the scratch file grows by


@dataclass
class Kept:
    """The bytes of one saved tensor, on their tier."""

    nbytes: int
    offset: int = -1  # in the file
    host: Tensor | None = None
    writing: Transfer | None = None
    failed: Exception | None = None  # why its bytes did not come there
    buffer: Tensor | None = None  # being written from, or read into
    reading: Transfer | None = None
    earlier: weakref.ref[Kept] | None = None  # saved before this one


@dataclass
class Saved:
    """What autograd holds in place of a tensor."""

    kept: Kept
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Activations:
    """Keeps saved tensors on a tier.

    Args:
        tier: "host" or "disk".
        device: where they are used.
        floor: tensors of fewer bytes stay on the device.
        disk, folder: for the disk.
        ahead: bytes read ahead in backward. in_flight: bytes being written.
    """

    def __init__(
        self,
        tier: str,
        device: torch.device,
        *,
        floor: int,
        disk: Disk | None = None,
        folder: Path | None = None,
        ahead: int = 64 << 20,
        in_flight: int = 64 << 20,
    ):
        self.tier, self.device, self.floor, self.disk = tier, device, floor, disk
        self.ahead, self.in_flight = ahead, in_flight
        self._path = None if folder is None else folder / "activations.bin"
        self._file: DiskFile | None = None
        self._free: dict[int, list[int]] = {}  # padded size -> offsets
        self._end = 0
        self._known: dict[tuple[int, int, int], tuple[weakref.ref[torch.UntypedStorage], int, weakref.ref[Kept]]] = {}
        self._last: weakref.ref[Kept] | None = None
        self._recent: tuple[Kept, Tensor] | None = None  # neighbours in the graph often save the same bytes
        self._writing: deque[tuple[Transfer, Kept]] = deque()
        self.saved_bytes = 0

    def save(self, tensor: Tensor) -> Saved | None:
        """Move a tensor to the tier; None if it is to stay."""
        nbytes = tensor.nbytes
        if (
            nbytes < max(self.floor, 1)
            or tensor.layout != torch.strided
            or tensor.device != self.device
            or type(tensor) not in (Tensor, torch.nn.Parameter)
            or (self.tier == "host" and self.device.type == "cpu")
            or torch.empty_like(tensor, device="meta").stride() != tensor.stride()  # not dense
        ):
            return None
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        storage = tensor.untyped_storage()
        key = (id(storage), int(tensor.storage_offset()) * tensor.element_size(), nbytes)
        known = self._known.get(key)
        if (
            known is not None
            and known[0]() is storage
            and known[1] == tensor._version
            and (kept := known[2]()) is not None
        ):
            return Saved(kept, tensor.dtype, shape, stride)
        kept = self._keep(tensor.detach().as_strided((tensor.numel(),), (1,)), nbytes)
        self._known[key] = (weakref.ref(storage), tensor._version, weakref.ref(kept))
        return Saved(kept, tensor.dtype, shape, stride)

    def _keep(self, flat: Tensor, nbytes: int) -> Kept:
        kept = Kept(nbytes, earlier=self._last)
        self._last = weakref.ref(kept)
        self.saved_bytes += nbytes
        if self.tier == "host":
            kept.host = host_memory(flat.shape, flat.dtype, pin=self.device.type == "cuda")
            kept.host.copy_(flat, non_blocking=True)
            return kept
        while self._writing and sum(k.nbytes for _, k in self._writing) > self.in_flight:
            self._written()
        kept.buffer = aligned(nbytes, pin=self.device.type == "cuda")
        kept.buffer[:nbytes].view(flat.dtype).copy_(flat)
        kept.offset = self._room(kept.buffer.numel())
        kept.writing = self.disk.write(self._file, kept.buffer, kept.offset)
        self._writing.append((kept.writing, kept))
        # Last, so that an interrupt before loses the place, and does not give it away while it is being written.
        weakref.finalize(kept, self._give_back, kept.buffer.numel(), kept.offset)
        return kept

    def _written(self) -> None:
        """Wait for the oldest writing. If it failed, that is for whoever loads it: later passes have nothing to do with it."""
        _, kept = self._writing[0]
        if kept.writing is not None:
            _settle(kept)
            kept.buffer = None
        self._writing.popleft()

    def _room(self, nbytes: int) -> int:
        """An offset with room for an aligned number of bytes; grows the file.

        Raises:
            DiskFull: there is none.
        """
        offsets = self._free.get(nbytes)
        if offsets:
            return offsets.pop()
        if self._file is None:
            self._file = DiskFile(self._path, 0)
        offset, end = self._end, self._end + nbytes
        if end > self._file.size:
            try:
                self._file.grow(round_up(end, GROWTH))
            except DiskFull:
                self._file.grow(end)
        self._end = end
        return offset

    def _give_back(self, nbytes: int, offset: int) -> None:
        self._free.setdefault(nbytes, []).append(offset)

    def load(self, saved: Saved) -> Tensor:
        """The tensor, on the device."""
        kept = saved.kept
        if self._recent is None or self._recent[0] is not kept:
            self._recent = None
            self._recent = (kept, self._arrive(kept))
        flat = self._recent[1]
        return flat.view(saved.dtype).as_strided(saved.shape, saved.stride)

    def _arrive(self, kept: Kept) -> Tensor:
        if kept.host is not None:
            return kept.host.to(self.device, non_blocking=True)
        _settle(kept)
        if kept.failed is not None:
            raise kept.failed  # also if its bytes are still here: an error must not go unseen
        if kept.buffer is None:
            self._read(kept)
        if kept.reading is not None:
            kept.reading.wait()
            kept.reading = None
        buffer, kept.buffer = kept.buffer, None
        assert buffer is not None
        self._read_ahead(kept)
        return buffer[: kept.nbytes].to(self.device, non_blocking=True)

    def _read(self, kept: Kept) -> None:
        kept.buffer = aligned(kept.nbytes, pin=self.device.type == "cuda")
        kept.reading = self.disk.read(self._file, kept.buffer, kept.offset)

    def _read_ahead(self, kept: Kept) -> None:
        room, earlier = self.ahead, kept.earlier
        while earlier is not None and (kept := earlier()) is not None and (room := room - kept.nbytes) >= 0:
            if kept.buffer is None and kept.writing is None and kept.host is None and kept.failed is None:
                self._read(kept)
            earlier = kept.earlier

    def clear(self) -> None:
        """Between steps: nothing is saved any more, so places are given out anew."""
        while self._writing:
            self._written()
        self._known.clear()
        self._last = self._recent = None

    def close(self) -> None:
        self.clear()
        if self._file is not None:
            self._file.close()
            self._file.path.unlink(missing_ok=True)  # closing a second time finds no folder


def _settle(kept: Kept) -> None:
    """Return when its bytes are written, or are known not to be."""
    if kept.writing is not None:
        try:
            kept.writing.wait()
        except Exception as error:
            kept.failed = error
        kept.writing = None
