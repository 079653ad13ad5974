"""The same counting and placing on CUDA, through torch's pluggable allocator. Not yet run on a GPU: see the tests for what is.

    from weft.memory.native import cuda
    book = cuda.install()                       before anything is allocated on the device: torch does not change allocators later
    arena = cuda.arena(nbytes)                  an `Arena` of device memory, 512-byte aligned

Outside arenas it keeps freed blocks by size, which suits steps that repeat; programs whose sizes vary are better served by
torch's own allocator, whose statistics `weft.memory.meter` reads without any of this. CUDA graphs, memory pools and
`torch.cuda.memory_stats` are not there with a pluggable allocator; one device per process.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch

from weft.memory.native.arena import Arena
from weft.memory.native.books import CONTROL, Ledger, declared
from weft.memory.native.build import NativeUnavailable, build

__all__ = ["arena", "install", "installed", "library"]

DRIVER = "libcuda.so.1"
CALLS = ("cuMemAlloc_v2", "cuMemFree_v2", "cuCtxSynchronize")  # in the order of `weft_driver`

_pointer = ctypes.c_void_p
FUNCTIONS: dict[str, tuple[object, list[object]]] = {  # in cuda.cpp
    **CONTROL,
    "weft_driver": (None, [_pointer, _pointer, _pointer]),
    "weft_empty_cache": (None, []),
    "weft_malloc": (_pointer, [ctypes.c_ssize_t, ctypes.c_int, _pointer]),
    "weft_malloc_or_null": (_pointer, [ctypes.c_ssize_t, ctypes.c_int, _pointer]),
    "weft_refusal": (ctypes.c_char_p, []),
    "weft_free": (None, [_pointer, ctypes.c_ssize_t, ctypes.c_int, _pointer]),
    "weft_record_stream": (None, [_pointer, _pointer]),
}


@cache
def library() -> ctypes.PyDLL:
    """The allocator's library; it has no driver yet.

    Raises:
        NativeUnavailable: see `declared`.
    """
    return declared("cuda", FUNCTIONS)


_installed: list[Ledger] = []


def installed() -> Ledger | None:
    """The ledger, if `install` has been called."""
    return _installed[0] if _installed else None


def install() -> Ledger:
    """Make it torch's CUDA allocator, for the life of the process; its ledger.

    Raises:
        NativeUnavailable: no CUDA here, or the device has been used already.
    """
    if _installed:
        return _installed[0]
    if not torch.cuda.is_available():
        raise NativeUnavailable("torch sees no CUDA device")
    found = library()
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        raise NativeUnavailable(f"the CUDA driver does not load: {error}") from error
    found.weft_driver(*(ctypes.cast(getattr(driver, name), _pointer) for name in CALLS))
    torch.cuda.init()  # makes the context that the driver's functions work in
    plugged = torch.cuda.memory.CUDAPluggableAllocator(str(build("cuda")), "weft_malloc", "weft_free")
    remember = ctypes.cast(found.weft_record_stream, _pointer).value
    plugged.allocator().set_record_stream_fn(remember)
    try:
        torch.cuda.memory.change_current_allocator(plugged)
    except RuntimeError as error:
        raise NativeUnavailable(
            f"torch's own CUDA allocator is in use already ({error}); call weft.memory.native.cuda.install() first"
        ) from error
    _installed.append(Ledger(found, "cuda"))
    return _installed[0]


def arena(nbytes: int, *, stray: Literal["arena", "malloc", "error"] = "arena") -> Arena:
    """An arena of device memory; `nbytes` are taken from the device at once.

    Raises:
        NativeUnavailable: see `install`.
        ValueError: the device does not have them.
    """
    install()
    return Arena(nbytes, alignment=512, stray=stray, library=library())
