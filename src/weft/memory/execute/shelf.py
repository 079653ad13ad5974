"""The lower tier of a replayed plan: activations that are copied away and back instead of being made again.

From an accelerator they go to pinned host memory, from the CPU to a temporary file, which has no name and disappears with the
process. Copies are synchronous; bytes on the shelf count in no budget of the device.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any, final

import torch

from weft.memory.private import bytes_of, numpy_of, storage_of

__all__ = ["Shelf"]


@final
class Shelf:
    """Copies of storages, by any key."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copies: dict[Any, tuple[Any, int]] = {}  # key -> (tensor, or offset in the file), bytes
        self._file: Any = None
        self._free: dict[int, list[int]] = {}  # bytes -> offsets in the file that may be written again
        self._end = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._copies

    def save(self, key: Any, storage: torch.UntypedStorage) -> None:
        """Copy the bytes of a storage away."""
        nbytes = storage.nbytes()
        if self.device.type != "cpu":
            copy = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            copy.copy_(bytes_of(storage))
            self._copies[key] = copy, nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the shelf
        places = self._free.get(nbytes)
        offset = places.pop() if places else self._end
        self._end = max(self._end, offset + nbytes)
        view, done = memoryview(numpy_of(bytes_of(storage))), 0
        while done < nbytes:
            done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        self._copies[key] = offset, nbytes

    def load(self, key: Any) -> torch.UntypedStorage:
        """A storage of torch's own with the bytes that were saved; the copy stays until `forget`."""
        where, nbytes = self._copies[key]
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if isinstance(where, torch.Tensor):
            target.copy_(where)
            return storage_of(target)
        view, done = memoryview(numpy_of(target)), 0
        while done < nbytes:
            count = os.preadv(self._file.fileno(), [view[done:]], where + done)
            if not count:
                raise RuntimeError(f"limit: the file of offloaded activations ends {nbytes - done} bytes too early")
            done += count
        return storage_of(target)

    def forget(self, key: Any) -> None:
        """Drop a copy if there is one."""
        found = self._copies.pop(key, None)
        if found is not None and not isinstance(found[0], torch.Tensor):
            self._free.setdefault(found[1], []).append(found[0])

    def clear(self) -> None:
        """Drop all copies."""
        for key in list(self._copies):
            self.forget(key)
