"""The counting allocator against torch's profiler, and its books against a plain model of them."""

from __future__ import annotations

import copy
import gc
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.models import make, run
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import weft
from weft.memory import native
from weft.memory.native import LABELS

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))

KIB = 1024


def tensor(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def nonzero(by: dict[str, int]) -> dict[str, int]:
    return {label: nbytes for label, nbytes in by.items() if nbytes}


def profiled(function):
    """(result, signed bytes of every CPU allocation and release in order) of a call, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


# -- against the profiler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "unet", "resnet", "bilstm"])
def test_every_allocation_of_a_training_step_is_seen(name):
    """Same events in the same order as the profiler's: nothing missed, nothing twice, workspace included."""
    made = make(name)
    run(made)
    gc.collect()
    made.model.zero_grad()
    book = native.ledger()

    def step():
        with book.log() as events, book.window() as window:
            run(made)
            made.model.zero_grad()
        return events, window

    (events, window), expected = profiled(step)
    assert [nbytes for _, nbytes in events] == expected and len(events) > 100
    totals = np.cumsum(expected)
    # What was alive before the step is not the window's.
    born: set[int] = set()
    live = peak = 0
    for address, nbytes in events:
        if nbytes > 0:
            born.add(address)
            live += nbytes
        elif address in born:
            born.remove(address)
            live += nbytes
        peak = max(peak, live)
    assert (window.peak, window.live) == (peak, live)
    assert totals[-1] <= 0 or live == totals[-1]


def test_mark_and_since_say_what_an_operator_needed():
    book = native.ledger()
    a = torch.randn(64, 64)
    result, peak, left = book.peak_during(lambda: (a @ a).softmax(1).sum(0))
    _, events = profiled(lambda: (a @ a).softmax(1).sum(0))
    totals = np.cumsum(events)
    assert (peak, left) == (totals.max(), result.nbytes)
    book.mark()
    assert book.since() == (0, 0)
    del result
    assert book.since() == (0, -256)


def test_what_an_operator_asks_for_beyond_its_bytes_is_refused_and_noted():
    book = native.ledger()
    a, kept = torch.randn(64, 64), torch.ones(5)
    needed = book.peak_during(lambda: (a @ a).softmax(1).sum(0))[1]
    book.mark(needed - 1)
    with pytest.raises(torch.OutOfMemoryError, match=f"would exceed the {needed - 1} bytes"):
        (a @ a).softmax(1).sum(0)
    assert book.since() == (needed, 0)  # as if it had been given; nothing is left of what was
    assert (a @ a).softmax(1).sum(0).shape == (64,)  # nothing is refused any more
    book.mark(needed)
    del kept  # what is given back may be taken
    (a @ a).softmax(1).sum(0)
    assert book.since()[0] <= needed


# -- against a plain model --------------------------------------------------------------------------------------------------


class Plain:
    """What windows must say, kept the slow way: a list of moments, each with the blocks that were there."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.labels: dict[int, str] = {}
        self.members: dict[int, set[int]] = {}
        self.peaks: dict[int, set[int]] = {}

    def total(self, blocks: set[int]) -> int:
        return sum(self.sizes[b] for b in blocks)

    def changed(self, window: int) -> None:
        if self.total(self.members[window]) > self.total(self.peaks[window]):
            self.peaks[window] = set(self.members[window])

    def by(self, blocks: set[int]) -> dict[str, int]:
        return {label: sum(self.sizes[b] for b in blocks if self.labels[b] == label) for label in LABELS}


action = st.one_of(
    st.tuples(st.just("make"), st.integers(1, 40)),
    st.tuples(st.sampled_from(["free", "close", "reset"]), st.integers(0, 9)),
    st.tuples(st.just("open"), st.just(0)),
    st.tuples(st.just("label"), st.integers(0, 9), st.sampled_from(LABELS)),
    st.tuples(st.just("count"), st.integers(0, 9), st.integers(0, 9), st.sampled_from(LABELS)),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(action, min_size=20, max_size=60))
def test_windows_nest_and_keep_their_peaks_by_what_the_blocks_turn_out_to_be(actions):
    book, plain = native.ledger(), Plain()
    alive: dict[int, Tensor] = {}
    windows: dict[int, native.Window] = {}
    joined: set[int] = (
        set()
    )  # of several windows that a block joined after its birth, only the last is exact: once each here
    for number, (kind, *rest) in enumerate(actions):
        blocks, open_ = list(alive), list(windows)
        if kind == "make":
            plain.sizes[number], plain.labels[number] = 64 * rest[0], "activation"
            for window in open_:
                plain.members[window].add(number)
                plain.changed(window)
            alive[number] = tensor(64 * rest[0])
        elif kind == "open":
            windows[number] = book.window()
            plain.members[number], plain.peaks[number] = set(), set()
        elif kind in ("close", "reset") and open_:
            window = open_[rest[0] % len(open_)]
            if kind == "reset":
                windows[window].reset_peak()
                plain.peaks[window] = set(plain.members[window])
            else:
                windows.pop(window).close()
        elif kind == "free" and blocks:
            block = blocks[rest[0] % len(blocks)]
            del alive[block]
            for window in open_:
                plain.members[window].discard(block)
        elif kind == "label" and blocks:
            block = blocks[rest[0] % len(blocks)]
            book.label(alive[block], rest[1])
            plain.labels[block] = rest[1]
        elif kind == "count" and blocks and open_:
            block, window = blocks[rest[0] % len(blocks)], open_[rest[1] % len(open_)]
            if block in plain.members[window] or block in joined:
                continue
            windows[window].count(alive[block], plain.labels[block])
            joined.add(block)
            plain.members[window].add(block)
            plain.changed(window)
        for window, meter in windows.items():
            assert meter.live == plain.total(plain.members[window])
            assert meter.by_category() == plain.by(plain.members[window])
            assert meter.peak == plain.total(plain.peaks[window])
            assert meter.peak_by_category() == plain.by(plain.peaks[window])
    for meter in windows.values():
        meter.close()


def test_a_block_that_joined_after_the_peak_was_not_at_the_peak():
    book = native.ledger()
    with book.window() as outer:
        old = tensor(100)
        with book.window() as window:
            big = tensor(1000)
            del big
            window.count(old, "parameter")
            book.label(old, "buffer")
            assert nonzero(window.peak_by_category()) == {"activation": 1000}
            assert nonzero(window.by_category()) == {"buffer": 100}
        assert nonzero(outer.peak_by_category()) == {"activation": 1000, "buffer": 100}


# -- what comes to the books from outside -----------------------------------------------------------------------------------


def test_tensors_older_than_the_library_are_adopted_and_their_end_is_seen():
    script = """
import torch
old = torch.empty(1000, dtype=torch.uint8)
from weft.memory import native
book = native.ledger()
window = book.window()
assert window.live == 0
window.count(old, "parameter")
window.count(old[10:], "parameter")
assert window.live == 1000 and window.by_category()["parameter"] == 1000
old.numpy()
del old
assert (window.live, window.peak) == (0, 1000), window.live
kept = torch.randn(300)  # alive when the process ends
raise SystemExit(7)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(weft.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 7, done.stderr


def test_memory_of_others_is_counted_while_its_storage_lives():
    book = native.ledger()
    array = np.zeros(100)
    with book.window() as window:
        shared = torch.from_numpy(array)
        window.count(shared, "input")
        assert window.by_category()["input"] == 800
        view = shared[3:]
        del shared
        assert window.live == 800
        del view
        assert (window.live, window.peak) == (0, 800)


def test_operations_on_storages_keep_the_books_right():
    book = native.ledger()
    with book.window() as window:
        a = torch.arange(100.0)
        a.untyped_storage().resize_(4000)
        assert window.live == 4000 and a.sum() == 4950
        b = a.clone()
        assert window.live == 4000 + b.untyped_storage().nbytes()
        c = torch._lazy_clone(b)
        c.add_(1)
        assert torch.equal(c, b + 1)
        d = a.numpy()
        a.share_memory_()  # moves to memory of its own kind
        assert a.sum() == 4950 and d.shape == (100,)
        del a, b, c, d
        assert window.live == 0


def test_storages_made_directly_pass_it_by_until_they_are_counted():
    """`torch.UntypedStorage(n)`, and so deepcopy and load, asks torch's default allocator, whoever is in front of it."""
    book = native.ledger()
    a = torch.arange(100.0)
    with book.window() as window:
        b = copy.deepcopy(a)
        assert window.live == 0
        window.count(b, "parameter")
        assert window.live == 400
        del b
        assert (window.live, window.peak) == (0, 400)


def test_onednn_which_allocates_raw_works_through_it():
    x, w = torch.randn(2, 8, 16, 16), torch.randn(8, 8, 3, 3)
    book = native.ledger()
    with book.window() as window:
        y = F.conv2d(x, w, padding=1)
        if torch.backends.mkldnn.is_available():
            dense = F.relu(x.to_mkldnn()).to_dense()
            assert torch.equal(dense, x.relu())
            del dense
        assert window.peak > y.nbytes and window.live == y.nbytes
    reference = F.conv2d(x.double(), w.double(), padding=1)
    assert (y - reference).abs().max() < 1e-4


# -- categories ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("weft_test_books::needs_workspace", mutates_args=())
def needs_workspace(x: Tensor, nbytes: int) -> Tensor:
    """A result as large as x, made with `nbytes` of workspace."""
    result = torch.empty_like(x)
    scratch = tensor(nbytes)
    del scratch
    return result


def test_workspace_is_what_an_operator_takes_and_gives_back():
    book = native.ledger()
    x = tensor(100)
    needs_workspace(x, 0)
    assert book.operators(True)
    try:
        with book.window() as window:
            y = needs_workspace(x, 5000)
            assert nonzero(window.by_category()) == {"activation": 100}
            assert nonzero(window.peak_by_category()) == {"activation": 100, "workspace": 5000}
            del y
    finally:
        book.operators(False)
    with book.window() as window:  # nobody watches operators
        needs_workspace(x, 5000)
        assert window.peak_by_category()["activation"] == 5100


def test_an_equal_peak_that_was_watched_replaces_one_that_was_not():
    book = native.ledger()
    x = tensor(100)
    with book.window() as window:
        needs_workspace(x, 5000)
        assert window.peak_by_category()["workspace"] == 0
        book.operators(True)
        try:
            needs_workspace(x, 5000)
        finally:
            book.operators(False)
        assert window.peak_by_category()["workspace"] == 5000
        needs_workspace(x, 5000)
        assert (window.peak, window.peak_by_category()["workspace"]) == (5100, 5000)


def test_an_operator_that_fails_ends_too():
    book = native.ledger()
    book.operators(True)
    try:
        with book.window() as window:
            with pytest.raises(RuntimeError):
                torch.zeros(2, 3) @ torch.zeros(2, 3)
            x = torch.randn(10)
            assert window.by_category()["activation"] == x.nbytes
    finally:
        book.operators(False)


# -- caps -----------------------------------------------------------------------------------------------------------------------


def test_a_cap_refuses_before_the_bytes_are_taken():
    book = native.ledger()
    with book.window() as outer, book.window(cap=1000) as window:
        a = tensor(600)
        with pytest.raises(
            torch.OutOfMemoryError, match="500 bytes would exceed the cap of 1000 bytes; 600 bytes are alive"
        ):
            tensor(500)
        assert (window.live, window.peak, outer.peak) == (600, 600, 600)
        b = tensor(400)
        assert window.live == window.peak == 1000
        del a, b
        window.cap = 100
        with pytest.raises(torch.OutOfMemoryError):
            tensor(101)
        window.cap = None
        tensor(5000)
        assert window.peak == 5000
    tensor(5000)  # a closed window refuses nothing
    with pytest.raises(ValueError, match="at least 0 bytes, got -1"):
        book.window(cap=-1)


def test_a_cap_holds_for_all_threads_together():
    book = native.ledger()
    refused, most = [], []
    with book.window(cap=24 * KIB) as window:

        def work(seed: int) -> None:
            draw, held = random.Random(seed), []
            for _ in range(500):
                try:
                    held.append(tensor(draw.randint(1, 4 * KIB)))
                except torch.OutOfMemoryError:
                    refused.append(seed)
                    held.clear()
                if len(held) > 8:
                    held.pop(draw.randrange(len(held)))
                most.append(window.live)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused and max(most) <= window.peak <= 24 * KIB
        assert window.live == 0


# -- limits and surroundings --------------------------------------------------------------------------------------------------


def test_sixty_four_windows_and_no_more():
    book = native.ledger()
    windows = []
    with pytest.raises(ValueError, match="64 meters are open"):
        while True:
            windows.append(book.window())
    x = tensor(100)
    assert {window.live for window in windows} == {100}
    windows.pop().close()
    fresh = book.window()
    assert fresh.live == 0  # its number's former member is not its own
    del x
    for window in (*windows, fresh):
        assert window.live == 0
        window.close()


def test_a_forgotten_window_closes_itself():
    book = native.ledger()
    for _ in range(200):
        book.window()
    gc.collect()
    with book.window() as window:
        tensor(10)
    assert window.peak == 10


def test_a_closed_window_keeps_its_figures():
    book = native.ledger()
    with book.window() as window:
        x = tensor(100)
        window.count(x, "input")
    del x
    window.count(tensor(50), "input")
    assert (window.live, window.peak, window.by_category()["input"]) == (100, 100, 100)


def test_unknown_categories_are_named():
    with pytest.raises(ValueError, match="'weights' is no category; there are activation, workspace, parameter"):
        native.ledger().label(tensor(1), "weights")


def test_a_forked_child_can_allocate():
    """Fork holds the library's lock, so that a child never inherits it locked by a thread it does not have."""
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            tensor(100)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                tensor(1000)
                os._exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    finally:
        stop.set()
        thread.join()
