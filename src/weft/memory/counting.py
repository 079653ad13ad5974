"""How bytes are counted: three ways to the same figures.

    NativeCounter    CPU, by the allocator itself: every byte, workspace included
    DispatchCounter  CPU, by watching operators from Python: what they return; no workspace. The fallback
    CudaCounter      CUDA, by torch's allocator statistics; categories from the storages it is told about

A category is often known only after the fact (a gradient is recognised when it is accumulated), so relabelling a storage also
corrects the peak at which it was already there: see `Tally`.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from weft.memory import native
from weft.memory.native import LABELS
from weft.memory.native.build import prepare
from weft.memory.private import QuickMode, faking, impl_of, plain_parts, storage_of

__all__ = ["Counter", "CudaCounter", "DispatchCounter", "NativeCounter", "storages_of"]


class Counter(abc.ABC):
    """Counts bytes from its creation until `close`; its figures stay after that.

    Attributes:
        exact: every byte is seen when it is taken, workspace included.
        note: what is counted and what is not, for people.
    """

    exact: bool
    note: str

    @property
    @abc.abstractmethod
    def live(self) -> int:
        """Bytes alive now."""

    @property
    @abc.abstractmethod
    def peak(self) -> int:
        """Most bytes alive since the creation or `reset_peak`."""

    @abc.abstractmethod
    def by_category(self) -> dict[str, int]:
        """Bytes alive now by category; they add up to `live`."""

    @abc.abstractmethod
    def peak_by_category(self) -> dict[str, int]:
        """Bytes by category at the peak; they add up to `peak`."""

    @abc.abstractmethod
    def reset_peak(self) -> None:
        """What is alive now is the peak so far."""

    @abc.abstractmethod
    def count(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's bytes under a category, whether they are known already or not."""

    @abc.abstractmethod
    def stepping(self) -> None:
        """An optimizer is about to change the model."""

    @abc.abstractmethod
    def stepped(self) -> None:
        """A training step has ended."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop counting."""


PLAIN = (Tensor, nn.Parameter)


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Where a tensor's bytes are: one storage, or several for sparse tensors and wrappers (DTensor: the local piece)."""
    return map(storage_of, plain_parts(tensor))


def _checked(category: str) -> str:
    if category not in LABELS:
        raise ValueError(f"meter: {category!r} is no category; there are {', '.join(LABELS)}")
    return category


STILL = 2  # steps without a new peak after which a counter stops looking at operators


@final
class NativeCounter(Counter):
    """Every allocation of torch's allocator, on every thread. Raises `NativeUnavailable` where there is no library.

    Telling workspace from activations means to be called at the start and end of every operator, which costs more than all the
    rest (about 0.4 us an operator). It only matters for the peak. So after `STILL` steps that did not raise the peak it is left
    off, until one does: the categories of that peak are right again when it is next reached, since an equal peak replaces the
    last one.

    Args:
        book: of which allocator; the CPU's by default.
    """

    def __init__(self, book: native.Ledger | None = None) -> None:
        if book is None:
            prepare("allocator", "operators")
            book = native.ledger()
        self._book = book
        self._window = self._book.window()
        self._unwatch: Callable[[], Any] | None = None
        self._still, self._highest = 0, -1
        self.exact = True
        self.note = "every allocation" + ("" if self._watch() else "; workspace counts as activation")

    def _watch(self) -> bool:
        if self._unwatch is None and self._book.operators(True):
            self._unwatch = weakref.finalize(self, self._book.operators, False)
        return self._unwatch is not None

    def _look_away(self) -> None:
        if self._unwatch:
            self._unwatch()
            self._unwatch = None

    @property
    def live(self) -> int:
        return self._window.live

    @property
    def peak(self) -> int:
        return self._window.peak

    def by_category(self) -> dict[str, int]:
        return self._window.by_category()

    def peak_by_category(self) -> dict[str, int]:
        return self._window.peak_by_category()

    def reset_peak(self) -> None:
        self._window.reset_peak()
        self._still, self._highest = 0, -1
        self._watch()

    def count(self, tensor: Tensor, category: str) -> None:
        if type(tensor) in PLAIN and tensor.layout is torch.strided and tensor.is_cpu and self._book.device == "cpu":
            self._window.count(storage_of(tensor), category)  # the usual case, quickly
            return
        for storage in storages_of(tensor):
            if storage.device.type == self._book.device:
                self._window.count(storage, category)

    def stepping(self) -> None:
        pass

    def stepped(self) -> None:
        peak = self._window.peak
        self._still = self._still + 1 if peak == self._highest else 0
        self._highest = peak
        if self._still < STILL:
            self._watch()
        else:
            self._look_away()

    def close(self) -> None:
        self._window.close()
        self._look_away()


class _Held:
    """One storage on the books."""

    __slots__ = ("category", "nbytes", "ref", "since")

    def __init__(self, nbytes: int, category: str, since: int):
        self.nbytes, self.category, self.since = nbytes, category, since
        self.ref: Any = None  # keeps the weak reference, and with it the callback


@final
class Tally:
    """Live bytes of storages by category, and their peak: `ledger.h` in Python, for one window.

    `clock` numbers births; a storage was there at the peak if it was born before. `dying` is called when a storage's bytes are
    gone, before they are taken off.
    """

    def __init__(self, dying: Callable[[], None] = lambda: None):
        self.live, self.peak = 0, 0
        self.by = dict.fromkeys(LABELS, 0)
        self.peak_by = dict(self.by)
        self.clock, self.peak_at = 0, 0
        self._held: dict[int, _Held] = {}
        self._dying = dying

    def see(self, storage: torch.UntypedStorage, category: str | None = None) -> None:
        """A storage is alive; new ones are activations unless a category is given, which also relabels known ones."""
        key, nbytes = impl_of(storage), storage.nbytes()
        held = self._held.get(key)
        if held is None:
            if not nbytes:
                return
            self.clock += 1
            held = self._held[key] = _Held(nbytes, category or "activation", self.clock)
            # The reference's callback outlives neither the storage nor this object.
            owner = weakref.ref(self)
            held.ref = weakref.ref(storage, lambda _, key=key: _died(owner, key))
            self._add(held.category, nbytes)
            return
        if nbytes != held.nbytes:  # resized
            self._add(held.category, nbytes - held.nbytes)
            held.nbytes = nbytes
        if category and category != held.category:
            for by in (self.by, self.peak_by) if held.since <= self.peak_at else (self.by,):
                by[held.category] -= nbytes
                by[category] += nbytes
            held.category = category

    def see_again(self, storage: torch.UntypedStorage) -> None:
        """As `see`, but a storage that is not known stays so."""
        if impl_of(storage) in self._held:
            self.see(storage)

    def forget(self, key: int) -> None:
        """The bytes of a storage are gone."""
        held = self._held.pop(key, None)
        if held:
            self._dying()
            self._add(held.category, -held.nbytes)

    def reset_peak(self) -> None:
        """What is alive now is the peak so far."""
        self.peak, self.peak_by, self.peak_at = self.live, dict(self.by), self.clock

    def close(self) -> None:
        """Let go of the storages; the figures stay."""
        self._held.clear()

    def _add(self, category: str, nbytes: int) -> None:
        self.live += nbytes
        self.by[category] += nbytes
        if self.live > self.peak:
            self.reset_peak()


def _died(owner: weakref.ref[Tally], key: int) -> None:
    tally = owner()
    if tally is not None:
        tally.forget(key)


@cache
def _aliases(func: Any) -> bool:
    """Whether an operator returns (views of) its arguments: no new bytes, but those it knows may have been resized."""
    return any(returned.alias_info is not None for returned in func._schema.returns)


class _Watch(QuickMode):
    """Shows the storages of every operator's results to a tally."""

    def __init__(self, tally: Tally):
        super().__init__()
        self._tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.left or faking() is not None:
            return result
        see = self._tally.see_again if _aliases(func) else self._tally.see
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                for storage in storages_of(leaf):
                    see(storage)
        return result


@final
class DispatchCounter(Counter):
    """What operators return on the CPU, on the creating thread and the backward passes it runs. May be closed in any order and on
    any thread, as those are that nobody refers to any more."""

    def __init__(self) -> None:
        self.exact = False
        self.note = "results of operators; memory they take and give back while they run (workspace) is not seen"
        self._tally = Tally()
        self._mode: _Watch | None = _Watch(self._tally)
        self._mode.__enter__()

    @property
    def live(self) -> int:
        return self._tally.live

    @property
    def peak(self) -> int:
        return self._tally.peak

    def by_category(self) -> dict[str, int]:
        return dict(self._tally.by)

    def peak_by_category(self) -> dict[str, int]:
        return dict(self._tally.peak_by)

    def reset_peak(self) -> None:
        self._tally.reset_peak()

    def count(self, tensor: Tensor, category: str) -> None:
        for storage in storages_of(tensor):
            if storage.device.type == "cpu":
                self._tally.see(storage, _checked(category))

    def stepping(self) -> None:
        pass

    def stepped(self) -> None:
        pass

    def close(self) -> None:
        if self._mode:
            self._mode.leave()
            self._mode = None
            self._tally.close()


Stats = Callable[[torch.device], Mapping[str, Any]]
"""`torch.cuda.memory_stats_as_nested_dict`, or what stands in for it in a test."""

_COUNTING: weakref.WeakSet[CudaCounter] = weakref.WeakSet()


@final
class CudaCounter(Counter):
    """All bytes that this process's tensors take on a CUDA device, by the statistics of torch's allocator.

    Totals are the allocator's and exact: bytes as asked for (`requested_bytes`), rounded ones where the allocator does not say.
    Categories of storages that it is told about are exact now; at the peak they are those of the last event before the statistics
    showed it (a gradient finished, an optimizer step began or ended, a reading). All else is "activation", workspace included.
    Peaks of torch are one per device: every counter reads its own before any other counter resets them.

    Args:
        stats: see `Stats`.
        reset: `torch.cuda.reset_peak_memory_stats`.
    """

    def __init__(
        self, device: torch.device, stats: Stats | None = None, reset: Callable[[torch.device], None] | None = None
    ) -> None:
        self.exact = True
        self.note = "torch's CUDA allocator; workspace counts as activation"
        self.device = device
        self._stats = stats or torch.cuda.memory_stats_as_nested_dict
        self._reset = reset or torch.cuda.reset_peak_memory_stats
        self._tally = Tally(self.sample)
        self._peak, self._peak_by = 0, dict.fromkeys(LABELS, 0)
        self._final: tuple[int, dict[str, int]] | None = None
        _COUNTING.add(self)
        self.reset_peak()

    def _figures(self) -> tuple[int, int]:
        """(bytes now, most bytes since the last reset) of the device."""
        found = self._stats(self.device)
        if not found:  # the device has not been used yet
            return 0, 0
        sizes = found["allocated_bytes"]
        asked = found.get("requested_bytes")
        if asked and asked["all"]["peak"]:  # 0 with allocators that do not say what was asked for
            sizes = asked
        return int(sizes["all"]["current"]), int(sizes["all"]["peak"])

    def sample(self) -> None:
        """If the peak has risen since the last event, it belongs to the categories as they were then."""
        if self._final:
            return
        _, peak = self._figures()
        if peak > self._peak:
            self._peak, self._peak_by = peak, self._split(peak)

    def _split(self, total: int) -> dict[str, int]:
        """Categories of `total` bytes: what is known, the rest as activation."""
        by = dict(self._tally.by)
        by["activation"] += total - sum(by.values())
        return by

    @property
    def live(self) -> int:
        return self._final[0] if self._final else self._figures()[0]

    @property
    def peak(self) -> int:
        self.sample()
        return self._peak

    def by_category(self) -> dict[str, int]:
        return dict(self._final[1]) if self._final else self._split(self.live)

    def peak_by_category(self) -> dict[str, int]:
        self.sample()
        return dict(self._peak_by)

    def reset_peak(self) -> None:
        for other in _COUNTING:
            if other.device == self.device:
                other.sample()
        self._reset(self.device)
        self._peak = 0
        self.sample()

    def count(self, tensor: Tensor, category: str) -> None:
        self.sample()
        for storage in storages_of(tensor):
            if storage.device.type == self.device.type and storage.device.index in (self.device.index, None):
                self._tally.see(storage, _checked(category))

    def stepping(self) -> None:
        self.sample()

    def stepped(self) -> None:
        self.sample()

    def close(self) -> None:
        if not self._final:
            self.sample()
            live = self.live
            self._final = (live, self._split(live))
            self._tally.close()
            _COUNTING.discard(self)
