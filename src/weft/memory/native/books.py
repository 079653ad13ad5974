"""What is alive: the ledger of all allocations, and windows on it. Python side of `ledger.h`."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, final

import torch
from torch import Tensor

from weft.memory.native.build import NativeUnavailable, load
from weft.memory.private import impl_of, storage_of

__all__ = ["LABELS", "Ledger", "Window", "ledger", "problem"]

T = TypeVar("T")

# In the order of `Category` in ledger.h.
LABELS = ("activation", "workspace", "parameter", "gradient", "optimizer", "buffer", "input")
NUMBER = {label: number for number, label in enumerate(LABELS)}
VERSION = 2  # of the C functions
UNSEEN = 2  # `weft_adopt`: counted, but the library will not see the block die

_int, _long, _pointer, _text, _void = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p, None
_longs = ctypes.POINTER(ctypes.c_int64)
CONTROL: dict[str, tuple[object, list[object]]] = {  # in control.h, of every allocator
    "weft_version": (_int, []),
    "weft_live": (_long, []),
    "weft_mark": (_void, [_long]),
    "weft_since": (_long, [_longs]),
    "weft_log_start": (_void, []),
    "weft_log_stop": (_long, []),
    "weft_log_read": (_void, [_longs, _long]),
    "weft_window_open": (_int, [_long]),
    "weft_window_close": (_void, [_int]),
    "weft_window_cap": (_void, [_int, _long]),
    "weft_window_reset": (_void, [_int]),
    "weft_window_read": (_int, [_int, _longs]),
    "weft_count": (_int, [_pointer, _long, _int, _int]),
    "weft_watching": (_void, [_int]),
    "weft_forget": (_void, [_pointer]),
    "weft_arena_open": (_pointer, [_long, _long, _int]),
    "weft_arena_expect": (_int, [_pointer, _longs, _long, _long, _long]),
    "weft_arena_done": (_int, [_pointer]),
    "weft_arena_script": (_void, [_pointer, _longs, _long, _longs, _long]),
    "weft_arena_play": (_int, [_pointer, _long]),
    "weft_arena_strays": (_long, [_pointer, _longs, _long]),
    "weft_arena_read": (_void, [_pointer, _longs]),
    "weft_arena_regions": (_void, [_pointer, _longs, _long]),
    "weft_arena_close": (_void, [_pointer]),
}
ALLOCATOR: dict[str, tuple[object, list[object]]] = {  # in allocator.cpp
    **CONTROL,
    "weft_install": (_int, []),
    "weft_uninstall": (_int, []),
    "weft_adopt": (_int, [_pointer, _int, _int]),
    "weft_storage_offset": (_long, [_pointer, _pointer]),
    "weft_storage_move": (_int, [_pointer, _pointer, _long]),
    "weft_storage_drop": (_void, [_pointer]),
    "weft_storage_forbid": (_void, [_pointer, _text]),
    "weft_storage_place": (_int, [_pointer, _pointer, _long, _long]),
    "weft_storage_give": (_int, [_pointer, _pointer]),
}


def declare(library: ctypes.PyDLL, functions: dict[str, tuple[object, list[object]]]) -> ctypes.PyDLL:
    """Give the library's functions their types."""
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def declared(name: str, functions: dict[str, tuple[object, list[object]]]) -> ctypes.PyDLL:
    """An allocator's library, its functions declared.

    Raises:
        NativeUnavailable: it cannot be built or loaded, or is of another version.
    """
    library = declare(load(name), functions)
    if library.weft_version() != VERSION:
        raise NativeUnavailable(f"the built library has version {library.weft_version()}, this weft needs {VERSION}")
    return library


@cache
def allocator() -> ctypes.PyDLL:
    """The CPU allocator's library. Not put in place yet: `ledger` does that.

    Raises:
        NativeUnavailable: see `declared`.
    """
    return declared("allocator", ALLOCATOR)


@final
class Window:
    """A count of bytes from now on; see `weft.memory.native`. Made by `Ledger.window`; a context manager that closes itself."""

    def __init__(self, book: Ledger, cap: int | None):
        self._book, self._cap = book, cap
        self._number = book._library.weft_window_open(-1 if cap is None else cap)
        if self._number < 0:
            raise ValueError(
                "memory: 64 meters are open at once, which is all there can be; close some (`with meter() as m`)"
            )
        self._figures = (ctypes.c_int64 * (2 * (1 + len(LABELS))))()
        self._close = weakref.finalize(self, book._library.weft_window_close, self._number)

    def _read(self) -> list[int]:
        self._book.settle()
        # A closed window keeps its last figures.
        if self._close.alive:
            self._book._library.weft_window_read(self._number, self._figures)
        return list(self._figures)

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return self._read()[0]

    @property
    def peak(self) -> int:
        """Most bytes alive at any moment since the window was opened, or since `reset_peak`."""
        return self._read()[1 + len(LABELS)]

    def by_category(self) -> dict[str, int]:
        """Bytes alive now, by category; they add up to `live`."""
        return dict(zip(LABELS, self._read()[1 : 1 + len(LABELS)], strict=True))

    def peak_by_category(self) -> dict[str, int]:
        """Bytes by category at the moment of the peak; they add up to `peak`."""
        return dict(zip(LABELS, self._read()[2 + len(LABELS) :], strict=True))

    def reset_peak(self) -> None:
        """Forget the peak: what is alive now is the peak so far."""
        self._book.settle()
        self._book._library.weft_window_reset(self._number)

    @property
    def cap(self) -> int | None:
        """Most bytes the window may hold; None for any."""
        return self._cap

    @cap.setter
    def cap(self, nbytes: int | None) -> None:
        self._cap = nbytes
        self._book._library.weft_window_cap(self._number, -1 if nbytes is None else nbytes)

    def count(self, tensor: Tensor | torch.UntypedStorage, category: str) -> None:
        """Count a tensor's storage, each once, under a category of `LABELS`; again to change the category."""
        if self._close.alive:
            self._book.label(tensor, category, self._number)

    def close(self) -> None:
        """Stop counting; the figures stay as they are."""
        self._read()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class Ledger:
    """All live blocks of an allocator. There is one for the CPU, `ledger()`, and on request one for CUDA (`native.cuda`).

    Attributes:
        device: type of the device whose allocator it is.
    """

    def __init__(self, library: ctypes.PyDLL, device: Literal["cpu", "cuda"] = "cpu"):
        self._library = library
        self.device = device
        self._left = ctypes.c_int64()
        # Storages over memory of others (numpy, shared memory, files): their end is not seen, so it is looked for.
        self._unseen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._watchers = 0

    @property
    def live(self) -> int:
        """Bytes of all blocks allocated since the library was put in place, and of those it was told to count."""
        self.settle()
        return self._library.weft_live()

    def window(self, cap: int | None = None) -> Window:
        """A new meter, with a cap in bytes or none.

        Raises:
            ValueError: a negative cap, or 64 windows are open.
        """
        if cap is not None and cap < 0:
            raise ValueError(f"memory: a cap must be at least 0 bytes, got {cap}")
        return Window(self, cap)

    def label(self, tensor: Tensor | torch.UntypedStorage, category: str, window: int = -1) -> None:
        """Put a storage on the books (if it is not yet) under a category of `LABELS`.

        Raises:
            ValueError: no such category.
        """
        number = NUMBER.get(category)
        if number is None:
            raise ValueError(f"memory: {category!r} is no category; there are {', '.join(LABELS)}")
        storage = storage_of(tensor) if isinstance(tensor, Tensor) else tensor
        if self.device == "cpu":
            found = self._library.weft_adopt(impl_of(storage), number, window)
        else:  # blocks older than the allocator do not pass it when they die
            found = self._library.weft_count(storage.data_ptr(), storage.nbytes(), number, window)
        if found == UNSEEN:
            with suppress(RuntimeError):  # a limit has taken its bytes away
                self._unseen[storage.data_ptr()] = weakref.ref(storage)

    def settle(self) -> None:
        """Take storages over others' memory that have died off the books."""
        for address in [address for address, storage in self._unseen.items() if storage() is None]:
            del self._unseen[address]
            self._library.weft_forget(address)

    def mark(self, most: int = -1) -> None:
        """Begin to look at an operator: see `since`. There is one mark, the last.

        Args:
            most: bytes alive beyond those of now that allocations of this thread may bring about until `since`; one that
                would exceed them is refused with `torch.OutOfMemoryError`. -1 for any.
        """
        self._library.weft_mark(most)

    def since(self) -> tuple[int, int]:
        """(most bytes, bytes left) relative to the live bytes at the last `mark`; a refused allocation counts as asked for."""
        peak = self._library.weft_since(self._left)
        return peak, self._left.value

    def peak_during(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, int, int]:
        """Call a function: (result, most bytes, bytes left), both relative to what was alive before the call."""
        self.mark()
        result = function(*args, **kwargs)
        return result, *self.since()

    @contextmanager
    def log(self) -> Iterator[list[tuple[int, int]]]:
        """Fill the yielded list, when the block ends, with (address, +nbytes or -nbytes) of every allocation and release."""
        events: list[tuple[int, int]] = []
        self._library.weft_log_start()
        try:
            yield events
        finally:
            count = self._library.weft_log_stop()
            pairs = (ctypes.c_int64 * (2 * count))()
            self._library.weft_log_read(pairs, count)
            events.extend(zip(pairs[::2], pairs[1::2], strict=True))

    def operators(self, watch: bool) -> bool:
        """Watch where operators begin and end, so that workspace is told from activations; calls count (on, on, off: on).

        False if torch's observers cannot be used here: then workspace counts as activation.
        """
        library = _observers()
        if library is None:
            return False
        which = 0 if self.device == "cpu" else 1
        self._watchers = max(0, self._watchers + (1 if watch else -1))
        if self._watchers:
            begin, end = self._library.weft_operator_begin, self._library.weft_operator_end
            library.weft_operators_on(which, ctypes.cast(begin, ctypes.c_void_p), ctypes.cast(end, ctypes.c_void_p))
        else:
            library.weft_operators_off(which)
        self._library.weft_watching(int(self._watchers > 0))
        return True


@cache
def _observers() -> ctypes.PyDLL | None:
    try:
        return declare(
            load("operators"),
            {"weft_operators_on": (None, [_int, _pointer, _pointer]), "weft_operators_off": (None, [_int])},
        )
    except NativeUnavailable:
        return None


_ONCE = threading.RLock()  # two threads that ask first must get the same ledger


@cache
def _ledger() -> Ledger | NativeUnavailable:
    try:
        library = allocator()
    except NativeUnavailable as error:
        return error
    if code := library.weft_install():
        why = "keeps its own deleters" if code == 1 else "has priority"
        return NativeUnavailable(f"another CPU allocator has been put into torch, and it {why}")
    book = Ledger(library)
    # Try it out: an incompatible torch must be found here and not in the middle of training.
    with book.window() as window:
        tensor = torch.empty(1000, dtype=torch.uint8)
        seen, moment = window.live, window.peak
        del tensor
        left = window.live
    if (seen, moment, left) != (1000, 1000, 0):
        library.weft_uninstall()
        return NativeUnavailable(
            f"torch {torch.__version__} does not allocate through it (counted {seen}, {moment}, {left})"
        )
    return book


def ledger() -> Ledger:
    """The ledger of this process. The first call builds the library if need be and puts the allocator in place, for good.

    Raises:
        NativeUnavailable: it cannot be had here.
    """
    with _ONCE:
        found = _ledger()
    if isinstance(found, NativeUnavailable):
        raise NativeUnavailable(found.why)
    return found


def problem() -> str | None:
    """Why there is no native library here, a sentence; None if there is one. The first call builds it (seconds, then cached)."""
    with _ONCE:
        found = _ledger()
    return found.why if isinstance(found, NativeUnavailable) else None
