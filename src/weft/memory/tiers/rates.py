"""What the tier below a device is: its room, and how fast activations are copied there and back.

Measured by the very copies that a limit makes (`execute.shelf`): some storages of one size leave one behind the other, then come
back likewise. Copies of a few sizes give a latency and a bandwidth (`cluster.fit.fit_link`); since copies there and back share
one link, it is their mean that counts.                                                          `copies`, `measured`
Copies from a CPU cost it time: they pass through aligned buffers and come back to fresh pages, and whoever computes meanwhile
shares memory, the interpreter, perhaps the two threads of a core with them.                            `_Bench.overlap`
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

import torch

from weft.cluster import Tier
from weft.cluster.profiler import tier_of
from weft.cluster.topology import machine_memory
from weft.errors import DiskFull
from weft.memory.execute.shelf import Shelf
from weft.memory.private import storage_of
from weft.memory.tiers.files import describe

__all__ = ["Copies", "check_folder", "copies", "measured"]

SIZES = (64 << 10, 512 << 10, 4 << 20, 16 << 20)  # bytes of a copy
AT_ONCE = 64 << 20  # bytes of the copies that follow each other, at most; and
MOST = 16  # copies
BESIDE = 4 << 20  # bytes of a copy beside computing
ROUNDS = {True: 3, False: 7}  # by `quick`, after one that does not count


@dataclass(frozen=True)
class Copies:
    """What was measured, of plain numbers.

    Attributes:
        to: "host" or "disk". folder: of the disk. place: what the folder lies on, for people.
        room: bytes that are free there now, for all processes of the machine.
        seconds: (bytes of a copy, seconds there, seconds back).
        overlap: fraction of a copy's seconds, 0 to 1, that the device need not spend itself; None for accelerators, whose copy
            engines do the work.
    """

    to: str
    folder: str
    place: str
    room: int
    seconds: tuple[tuple[int, float, float], ...]
    overlap: float | None


def copies(to: str, device: torch.device | str = "cpu", quick: bool = True, sharing: int = 1) -> Copies:
    """Measure copies between a device and a folder, or "host" for an accelerator's host memory.

    Args:
        sharing: processes that compute on this machine, each with as many threads as torch has here.
    Raises:
        ValueError: there is no such tier below the device, or files cannot be made in the folder.
        DiskFull: it has no room for `AT_ONCE` bytes.
    """
    device = torch.device(device)
    if to == "host":
        if device.type == "cpu":
            raise ValueError("the host's memory is that of a CPU itself; name a folder on a disk")
        bench = _Bench(device, "", quick)
        return Copies("host", "", "pinned memory", machine_memory() // 2, bench.seconds(), None)
    if device.type != "cpu":
        raise ValueError(f"a {device.type} device offloads to its host's memory, not to {to}; say host")
    folder = check_folder(to)
    place = describe(folder)
    kind = "memory, not a disk" if place.is_memory else "O_DIRECT" if place.direct else "through the page cache"
    where, bench = f"{place.filesystem} on {place.device}, {kind}", _Bench(device, str(folder), quick)
    return Copies("disk", str(folder), where, place.free, bench.seconds(), bench.overlap(sharing))


def check_folder(folder: str | Path) -> Path:
    """The absolute path of a folder in which copies can be measured.

    Raises:
        ValueError: there is none, or it is read-only. DiskFull: it has no room for `AT_ONCE` bytes.
    """
    path = Path(folder).resolve()
    if not path.is_dir():
        raise ValueError(f"{folder} is no folder; make it first, on the disk that activations shall wait on")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"one may not write in {path}; name another folder")
    free = shutil.disk_usage(path).free
    if free < AT_ONCE:
        raise DiskFull(str(path), AT_ONCE, free, "measuring an offload folder")
    return path


def measured(to: str, device: torch.device | str = "cpu", *, quick: bool = True) -> Tier:
    """The tier below a device, measured now: for `weft.memory.plan` and `weft.memory.limit`. Raises as `copies`."""
    return tier_of([vars(copies(to, device, quick))], 1)[0]


@final
class _Bench:
    """Copies to time: several at once of one size."""

    def __init__(self, device: torch.device, folder: str, quick: bool):
        self.device, self.shelf, self.rounds = device, Shelf(device, folder), ROUNDS[quick]
        self.busy = 0.0  # processor seconds per second of the largest copies

    def seconds(self) -> tuple[tuple[int, float, float], ...]:
        """(bytes, seconds of a copy there, back) for each size."""
        found = []
        for nbytes in SIZES:
            storages = self._storages(nbytes)
            self._there_and_back(storages)
            wall, own = time.perf_counter(), time.process_time()
            rounds = [self._there_and_back(storages) for _ in range(self.rounds)]
            self.busy = (time.process_time() - own) / (time.perf_counter() - wall)
            there, back = (median(one[way] for one in rounds) / len(storages) for way in (0, 1))
            found.append((nbytes, there, back))
        return tuple(found)

    def overlap(self, sharing: int) -> float:
        """Of a CPU's copies, after `seconds`: how much longer this thread computes beside copies, per second of copying; and
        where no core is idle, the processor seconds of the other threads. Strangers' programs do not count in either."""
        storages = self._storages(BESIDE)
        x, y = torch.randn(256, 256), torch.randn(1 << 20)
        copying = median(sum(self._there_and_back(storages)) for _ in range(self.rounds))

        def compute() -> float:
            begin = time.thread_time()
            for _ in range(turns):
                torch.mm(x, x)
                torch.nn.functional.gelu(y)
            return time.thread_time() - begin

        turns = 8
        turns = max(8, int(turns * copying / compute()))  # each way about twice what the copies take
        lost = []
        for _ in range(self.rounds):
            alone = 2 * compute()
            begin = time.thread_time()
            self._there_and_back(storages, compute)
            lost.append((time.thread_time() - begin - alone) / copying)
        idle = len(os.sched_getaffinity(0)) - sharing * torch.get_num_threads()
        return round(min(max(1.0 - median(lost) - (self.busy if idle < 1 else 0.0), 0.0), 1.0), 3)

    def _storages(self, nbytes: int) -> list[torch.UntypedStorage]:
        number = min(MOST, max(2, AT_ONCE // nbytes))
        return [storage_of(torch.full((nbytes,), n, dtype=torch.uint8, device=self.device)) for n in range(number)]

    def _there_and_back(
        self, storages: list[torch.UntypedStorage], meanwhile: Callable[[], Any] = lambda: None
    ) -> tuple[float, float]:
        """Seconds until all are there, and from then until all are back; `meanwhile` is done on each way."""
        shelf, keys = self.shelf, range(len(storages))
        begin = self._now()
        for key in keys:
            shelf.save(key, storages[key])
        meanwhile()
        for key in keys:
            shelf.saved(key)
        middle = self._now()
        for key in keys:
            shelf.fetch(key)
        meanwhile()
        back = [shelf.load(key) for key in keys]
        end = self._now()
        del back
        shelf.clear()
        return middle - begin, end - middle

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
