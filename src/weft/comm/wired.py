"""An exchange's own process group, the thread that uses it, and the buffers that messages are sent from and received into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from weft.comm.agree import agree
from weft.comm.codec import Codec, Setting, Spec
from weft.comm.fifo import Fifo, Job
from weft.comm.packing import Packing
from weft.errors import together

__all__ = ["Wired"]

Views = list[tuple[Tensor, ...]]


@final
class Wired:
    """Made on every rank of `parent` at the same time (None: of the default group); `timeout` in seconds for each round.

    Args:
        rows: groups side by side that are all of `parent`'s ranks together, equally long; this rank's own is the `group`. Then
            those at one place of their rows are a group as well, `across`, by which rows agree.
    """

    def __init__(self, parent: dist.ProcessGroup | None, timeout: float, rows: Sequence[Sequence[int]] = ()):
        members = dist.get_process_group_ranks(parent if parent is not None else dist.group.WORLD)
        backend, limit = dist.get_backend(parent), timedelta(seconds=timeout)
        self.across: dist.ProcessGroup | None = None
        # A group of some ranks must be made without the others, and is then named by its ranks: destroying it would let the next
        # one find its stale addresses under the same name in the store.
        self._part = len(members) < dist.get_world_size()
        with together("beginning an exchange, which every rank must"):
            if len(rows) > 1:
                self.group = _own(rows, limit, backend)
                self.across = _own(list(zip(*rows, strict=True)), limit, backend)
            else:
                self.group = dist.new_group(
                    members, timeout=limit, backend=backend, use_local_synchronization=self._part
                )
        self.ranks, self.own, self.timeout = dist.get_world_size(self.group), dist.get_rank(self.group), timeout
        self.device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
        self._known: set[tuple[object, ...]] = set()
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._rows: dict[tuple[object, ...], tuple[Packing, Tensor, Views]] = {}
        self._all: dict[tuple[object, ...], tuple[Tensor, list[Views]]] = {}
        self._fifo: Fifo | None = None
        self._open = True

    def submit(self, job: Job) -> None:
        if self._fifo is None:
            self._fifo = Fifo(f"weft exchange, rank {self.own}", self.timeout, self._broken, self._listen)
        self._fifo.submit(job)

    def agreed(self, same: tuple[object, ...]) -> bool:
        """Whether these tensors were compared over the ranks already."""
        return same in self._known

    def compare(self, same: tuple[object, ...], text: str) -> None:
        """Compare a bucket over the ranks; see `agree`."""
        agree(
            "the tensors of a bucket", text, self.group, self.device,
            "Every rank must have the same model and the same exchange options.",
        )  # fmt: skip
        self._known.add(same)

    # ---- buffers, kept from step to step

    def buffer(self, key: tuple[object, ...], nbytes: int, device: torch.device) -> Tensor:
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return found

    def row(
        self, key: tuple[object, ...], parts: Callable[[], Sequence[tuple[Codec, Spec, Setting]]], device: torch.device
    ) -> tuple[Packing, Tensor, Views]:
        """One row and the typed views into it; `parts` is asked only the first time."""
        found = self._rows.get(key)
        if found is None:
            packing = Packing(parts())
            row = self.buffer(key, packing.nbytes, device)
            found = self._rows[key] = packing, row, packing.views(row)
        return found

    def received(
        self, key: tuple[object, ...], packing: Packing, ranks: int, device: torch.device
    ) -> tuple[Tensor, list[Views]]:
        """A buffer of one row per rank, and the views into each."""
        found = self._all.get(key)
        if found is None:
            buffer = self.buffer(key, ranks * packing.nbytes, device)
            found = self._all[key] = buffer, [packing.views(row) for row in buffer.view(ranks, -1)]
        return found

    def forget(self) -> None:
        """Drop the buffers: the buckets or the settings have changed."""
        self._buffers.clear()
        self._rows.clear()
        self._all.clear()

    def crowded(self, most: int = 512) -> bool:
        return len(self._buffers) > most

    # ---- failures, and the end

    @property
    def _groups(self) -> list[dist.ProcessGroup]:
        return [self.group] if self.across is None else [self.group, self.across]

    @property
    def _boards(self) -> list[str]:
        return [f"weft/exchange/{group.group_name}/failed" for group in self._groups]

    @property
    def _signature(self) -> int:
        """This rank on the boards: among all where there are several groups."""
        return self.own if self.across is None else dist.get_rank()

    def _broken(self, error: BaseException) -> None:
        """Tell the other ranks, which would wait for this one until their timeout: gloo closes no connection by request."""
        try:
            store = dist.distributed_c10d._get_default_store()
            for board in self._boards:
                if not store.check([board]):
                    store.set(board, f"{self._signature} {type(error).__name__}: {error}")
        except RuntimeError:  # the store is gone with the rank that kept it
            return

    def _listen(self) -> tuple[int, str] | None:
        try:
            store = dist.distributed_c10d._get_default_store()
            for board in self._boards:
                if store.check([board]):
                    rank, _, what = store.get(board).decode().partition(" ")
                    return (int(rank), what) if int(rank) != self._signature else None
        except RuntimeError as error:
            return -1, f"the loss of its store: {error}"
        return None

    def _destroy(self) -> None:
        if self._open:
            self._open = False
            try:
                for group in self._groups:
                    dist.destroy_process_group(group)
            except (RuntimeError, ValueError, AssertionError):  # the whole of torch.distributed is already gone
                return

    def close(self) -> None:
        if self._fifo is not None:
            self._fifo.close()
        if not self._part:
            self._destroy()


def _own(groups: Sequence[Sequence[int]], limit: timedelta, backend: str) -> dist.ProcessGroup:
    """Make groups of ranks that are all ranks together, and say which is this rank's; members are numbered as they are given."""
    made = [dist.new_group(list(ranks), timeout=limit, backend=backend, sort_ranks=False) for ranks in groups]
    return next(group for ranks, group in zip(groups, made, strict=True) if dist.get_rank() in ranks)
