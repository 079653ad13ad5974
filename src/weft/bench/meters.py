"""What benchmarks read besides the clock: bytes over the loopback device, and exact peak bytes of tensors.

Gloo processes of one machine talk over loopback, so its byte counter is what really crossed the wire, frames included, for
weft and for every baseline alike. Peak memory is summed from the allocator's own events, so that it counts tensors and nothing
else (Python and its libraries take a few hundred MB that no plan can change).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Peak", "local", "loopback_bytes", "peak_bytes", "tensor_bytes"]


def loopback_bytes(table: str | None = None) -> int:
    """Bytes that the loopback device has carried since boot (Linux); `table` stands in for /proc/net/dev in tests.

    Raises:
        RuntimeError: there is no such counter here.
    """
    path = Path("/proc/net/dev")
    if table is None and not path.exists():
        raise RuntimeError("no /proc/net/dev here, so bytes on the wire cannot be counted; run this benchmark on Linux")
    for line in (path.read_text() if table is None else table).splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[0])
    raise RuntimeError("the loopback device `lo` is not in /proc/net/dev; bring it up to count bytes on the wire")


WINDOW = "weft.bench.window"


@dataclass
class Peak:
    """Bytes of CPU tensors made in the block: the most at any moment of its `window`s (or of all of it), and at its end."""

    peak: int = 0
    end: int = 0

    @staticmethod
    def window() -> Any:
        """A context manager: only what happens inside counts for `peak`, with all that lives since the block began."""
        from torch.profiler import record_function

        return record_function(WINDOW)


@contextmanager
def peak_bytes() -> Iterator[Peak]:
    """Record every allocation of the block and fill in the yielded `Peak` when it ends. Slows the block; do not time it."""
    from torch.profiler import ProfilerActivity, profile

    found = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield found
    events = profiler.profiler.kineto_results.events()
    windows = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == WINDOW]
    # A window's start is an event of no bytes, so that what already lives then counts.
    changes = [(start, 0) for start, _ in windows]
    changes += [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = 0
    for moment, nbytes in sorted(changes, key=lambda change: change[0]):
        live += nbytes
        if not windows or any(start <= moment <= end for start, end in windows):
            found.peak = max(found.peak, live)
    found.end = live


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes held by the storages of the given tensors, each storage counted once; DTensors count their local piece."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        held = local(tensor).untyped_storage()
        seen[held.data_ptr()] = held.nbytes()
    return sum(seen.values())


def local(tensor: Any) -> Any:
    """The piece that this process holds of a DTensor; another tensor itself."""
    to_local: Callable[[], Any] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
