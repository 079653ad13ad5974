"""The CUDA allocator's host side, over memory of the host that stands in for the device's. No GPU is needed, and none is used."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from weft.memory import native
from weft.memory.native import Arena, Ledger, build, cuda


def _problem() -> str:
    try:
        cuda.library()
    except build.NativeUnavailable as error:
        return error.why
    return ""


pytestmark = pytest.mark.skipif(bool(_problem()), reason=_problem())

STREAM, OTHER = 0x10, 0x20
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
RELEASE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
SYNCHRONIZE = ctypes.CFUNCTYPE(ctypes.c_int)


class Device:
    """A device of `capacity` bytes in host memory: what the driver's functions do, written down."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.capacity = capacity
        self.buffers: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.calls: list[str] = []
        self.functions = (ALLOCATE(self.allocate), RELEASE(self.release), SYNCHRONIZE(self.synchronize))

    @property
    def used(self) -> int:
        return sum(map(len, self.buffers.values()))

    def allocate(self, into: ctypes._Pointer[ctypes.c_void_p], nbytes: int) -> int:
        self.calls.append("allocate")
        if self.used + nbytes > self.capacity:
            return 2
        buffer = ctypes.create_string_buffer(nbytes)
        into[0] = ctypes.addressof(buffer)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return 0

    def release(self, address: int) -> int:
        self.calls.append("release")
        del self.buffers[address]
        return 0

    def synchronize(self) -> int:
        self.calls.append("synchronize")
        return 0


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    cuda.library().weft_driver(*(ctypes.cast(function, ctypes.c_void_p) for function in made.functions))
    yield made
    cuda.library().weft_empty_cache()
    assert made.used == 0


def take(nbytes: int, stream: int = STREAM, device: int = 0) -> int:
    found = cuda.library().weft_malloc_or_null(nbytes, device, stream)
    if not found:
        raise torch.OutOfMemoryError(cuda.library().weft_refusal().decode())
    return found


def free(address: int, nbytes: int, stream: int = STREAM) -> None:
    cuda.library().weft_free(address, nbytes, 0, stream)


def test_bytes_are_counted_as_asked_for(device):
    book = Ledger(cuda.library(), "cuda")
    with book.window() as window:
        a, b = take(1000), take(5)
        assert (window.live, device.used) == (1005, 1024 + 512)
        cuda.library().weft_count(a, 0, native.LABELS.index("parameter"), -1)
        assert window.by_category()["parameter"] == 1000
        free(a, 1000)
        free(b, 5)
        assert (window.live, window.peak, window.peak_by_category()["parameter"]) == (0, 1005, 1000)


def test_freed_blocks_serve_the_same_size_on_the_same_stream(device):
    a = take(1000)
    free(a, 1000)
    assert take(900) == a  # the same once rounded
    b = take(1000, OTHER)
    assert b != a
    free(b, 1000, OTHER)
    c = take(1000)
    assert c not in (a, b) and device.calls == ["allocate"] * 3
    free(a, 900)
    free(c, 1000)


def test_kept_blocks_go_back_before_the_device_is_called_full(device):
    blocks = [take(1 << 18) for _ in range(4)]
    for block in blocks:
        free(block, 1 << 18)
    whole = take(1 << 20)
    assert device.calls[4:] == ["allocate", "synchronize", *["release"] * 4, "allocate"]
    with pytest.raises(torch.OutOfMemoryError, match="device has no 512 bytes left; 1048576 bytes are alive"):
        take(1)
    free(whole, 1 << 20)


def test_an_arena_places_and_caps(device):
    book = Ledger(cuda.library(), "cuda")
    with Arena(1 << 16, alignment=512, stray="error", library=cuda.library()) as arena, book.window(cap=5000) as window:
        assert device.used == 1 << 16
        arena.expect([(1000, 1024)], workspace=(4096, 4096))
        a, b = take(1000), take(2000)
        assert (a - arena.address, b - arena.address) == (1024, 4096)
        free(b, 2000)
        assert arena.done() == 0 and window.live == 1000
        arena.expect([])
        with pytest.raises(torch.OutOfMemoryError, match="no room in the arena for 100 bytes, which nobody expected"):
            take(100)
        arena.done()
        with pytest.raises(
            torch.OutOfMemoryError, match="4001 bytes would exceed the cap of 5000 bytes; 1000 bytes are alive"
        ):
            take(4001)
        with pytest.raises(ValueError, match="storages of CUDA cannot be moved"):
            arena.move(0, 0)
        free(a, 1000)
    assert device.used == 0


def test_bytes_go_to_another_stream_only_after_the_device_was_waited_for(device):
    with Arena(1 << 16, alignment=512, library=cuda.library()) as arena:

        def in_arena(stream: int) -> int:
            arena.expect([])
            found = take(512, stream)
            arena.done()
            return found

        def waits() -> int:
            return device.calls.count("synchronize")

        a, b = in_arena(STREAM), in_arena(STREAM)
        free(a, 512)
        a = in_arena(STREAM)
        assert waits() == 0
        c = in_arena(OTHER)  # the arena now serves another stream
        assert waits() == 1
        free(b, 512, STREAM)  # the first stream may have gone on with it since
        assert waits() == 2
        free(c, 512, OTHER)
        assert waits() == 2
        cuda.library().weft_record_stream(a, OTHER)
        free(a, 512, STREAM)
        assert waits() >= 3
        d = in_arena(OTHER)
        cuda.library().weft_record_stream(d, STREAM)
        before = waits()
        free(d, 512, OTHER)
        assert waits() == before + 1


def test_one_device_per_process(device):
    a = take(100)
    with pytest.raises(torch.OutOfMemoryError, match="has memory on CUDA device 0, and asks for some on device 1"):
        take(100, device=1)
    free(a, 100)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(native.NativeUnavailable, match="torch sees no CUDA device"):
        cuda.install()
    with pytest.raises(native.NativeUnavailable, match="torch sees no CUDA device"):
        cuda.arena(100)
    assert cuda.installed() is None
