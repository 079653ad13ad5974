"""The ways to count against each other and against plain sums; CUDA's with statistics made up here."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from weft.memory.counting import LABELS, CudaCounter, DispatchCounter, NativeCounter, Tally, storages_of
from weft.memory.native import problem

native = pytest.mark.skipif(problem() is not None, reason=str(problem()))


def nonzero(by: dict[str, int]) -> dict[str, int]:
    return {label: nbytes for label, nbytes in by.items() if nbytes}


# -- tally ----------------------------------------------------------------------------------------------------------------

actions = st.lists(
    st.one_of(
        st.tuples(st.just("make"), st.integers(1, 30), st.none() | st.sampled_from(LABELS)),
        st.tuples(st.just("label"), st.integers(0, 9), st.sampled_from(LABELS)),
        st.tuples(st.sampled_from(["free", "reset"]), st.integers(0, 9)),
        st.tuples(st.just("resize"), st.integers(0, 9), st.integers(1, 30)),
    ),
    min_size=15,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions)
def test_tally_keeps_the_peak_by_what_the_storages_turn_out_to_be(steps):
    tally = Tally()
    alive: dict[int, Tensor] = {}
    sizes: dict[int, int] = {}
    labels: dict[int, str] = {}
    peak: dict[int, int] = {}  # storage -> bytes it had then
    for number, (kind, *rest) in enumerate(steps):
        chosen = list(alive)[rest[0] % len(alive)] if alive else None
        if kind == "make":
            alive[number], sizes[number], labels[number] = torch.empty(rest[0]), 4 * rest[0], rest[1] or "activation"
            tally.see(alive[number].untyped_storage(), rest[1])
        elif kind == "reset":
            tally.reset_peak()
            peak = {storage: sizes[storage] for storage in alive}
        elif chosen is None:
            continue
        elif kind == "free":
            del alive[chosen]
        elif kind == "label":
            tally.see(alive[chosen].untyped_storage(), rest[1])
            labels[chosen] = rest[1]
        elif sizes[chosen] not in peak.values() or chosen not in peak:  # one in the peak keeps its bytes of then
            alive[chosen].untyped_storage().resize_(4 * rest[1])
            sizes[chosen] = 4 * rest[1]
            tally.see(alive[chosen].untyped_storage())
        if sum(sizes[storage] for storage in alive) > sum(peak.values()):
            peak = {storage: sizes[storage] for storage in alive}
        assert tally.live == sum(sizes[storage] for storage in alive) == sum(tally.by.values())
        assert nonzero(tally.by) == nonzero(
            {label: sum(sizes[s] for s in alive if labels[s] == label) for label in LABELS}
        )
        assert tally.peak == sum(peak.values())
        assert nonzero(tally.peak_by) == nonzero(
            {label: sum(n for s, n in peak.items() if labels[s] == label) for label in LABELS}
        )


def test_a_storage_lives_as_long_as_anything_looks_at_it():
    tally = Tally()
    x = torch.randn(10, requires_grad=True)
    y = x.exp()  # autograd keeps its result
    tally.see(y.untyped_storage())
    z = y.sum()
    view = y.detach()[2:]
    del y
    gc.collect()
    assert tally.live == 40
    del view
    gc.collect()
    assert tally.live == 40
    z.backward()
    assert tally.live == 0


def test_bytes_of_sparse_and_wrapped_tensors():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    assert sorted(s.nbytes() for s in storages_of(sparse)) == [8, 16]
    assert [s.nbytes() for s in storages_of(torch.zeros(3))] == [12]
    assert list(storages_of(torch.zeros(3).to_mkldnn())) == []


# -- from Python and by the allocator ----------------------------------------------------------------------------------


@native
def test_both_ways_agree_where_no_workspace_is_at_the_peak():
    def work() -> Tensor:
        x = torch.randn(100, 100)
        y = (x @ x).relu_()
        z = torch.cat([y, x])[:50].sum(0)
        a, b = torch.split(z, 50)
        return a + b

    figures = []
    for counter in (NativeCounter(), DispatchCounter()):
        kept = work()
        x = torch.ones(7)
        counter.count(x, "input")
        figures.append(
            (counter.live, counter.peak, nonzero(counter.by_category()), nonzero(counter.peak_by_category()))
        )
        counter.close()
        del kept, x
        assert counter.live == figures[-1][0]
    assert figures[0] == figures[1]
    assert figures[0][2] == {"activation": 200, "input": 28}


def test_watching_counts_results_once_and_views_never():
    old = torch.ones(100)
    counter = DispatchCounter()
    view, same = old[3:], old.view(10, 10)
    old.add_(1)
    assert counter.live == 0
    new = old * 2
    also = new.view(-1)
    torch.add(old, 1, out=new)
    assert counter.live == 400
    del new
    assert counter.live == 400
    del also
    assert (counter.live, counter.peak) == (0, 400)
    counter.count(view, "buffer")
    assert nonzero(counter.by_category()) == {"buffer": 400} and same is not None
    with pytest.raises(ValueError, match="'thing' is no category"):
        counter.count(view, "thing")
    counter.close()
    assert not counter.exact and "workspace) is not seen" in counter.note


def test_a_forgotten_counter_takes_nobody_elses_mode_off():
    before = _get_current_dispatch_mode()
    counter = DispatchCounter()
    with FlopCounterMode(display=False) as flops:
        torch.ones(8, 8) @ torch.ones(8, 8)
        counter.close()
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert flops.get_total_flops() == 2 * (2 * 8**3)
    assert _get_current_dispatch_mode() is before


def test_a_counter_that_is_closed_on_another_thread_is_silent():
    counter = DispatchCounter()
    mode = counter._mode
    thread = threading.Thread(target=counter.close)
    thread.start()
    thread.join()
    kept = torch.ones(8) * 2
    assert counter.live == 0 and kept.sum() == 16
    assert _get_current_dispatch_mode() is mode  # nobody else can take it off
    mode.leave()
    assert _get_current_dispatch_mode() is not mode


@native
def test_operators_are_watched_until_the_peak_stands_still():
    from weft.memory.native import ledger

    book = ledger()
    counter = NativeCounter()
    sizes = [10, 20, 20, 20, 20, 30, 30, 30]
    watched = []
    for size in sizes:
        watched.append(book._watchers)
        torch.empty(size)
        counter.stepped()
    assert watched == [1, 1, 1, 1, 0, 0, 1, 1] and book._watchers == 0
    counter.reset_peak()
    assert book._watchers == 1
    counter.close()
    assert book._watchers == 0


# -- CUDA -------------------------------------------------------------------------------------------------------------------


class Allocator:
    """torch.cuda's statistics of a device on which we say what is allocated. Tensors that are counted are the host's."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)

    def stats(self, device: torch.device) -> dict[str, Any]:
        def sizes(rounding: int) -> dict[str, Any]:
            now, most = (-(-nbytes // rounding) * rounding for nbytes in (self.now, self.most))
            return {"all": {"current": now, "peak": most}}

        return {"requested_bytes": sizes(1), "allocated_bytes": sizes(512)}

    def reset(self, device: torch.device) -> None:
        self.most = self.now

    def counter(self) -> CudaCounter:
        # The host's device stands in for cuda:0, so that its tensors are taken for the device's.
        return CudaCounter(torch.device("cpu"), self.stats, self.reset)


def test_totals_are_the_allocators():
    allocator = Allocator()
    allocator.add(5000)
    counter = allocator.counter()
    allocator.add(300)
    allocator.add(-200)
    assert (counter.live, counter.peak) == (5100, 5300)
    counter.reset_peak()
    assert counter.peak == 5100
    allocator.add(-5000)
    assert (counter.live, counter.peak) == (100, 5100)
    counter.close()
    allocator.add(77)
    assert (counter.live, counter.peak) == (100, 5100)


def test_an_allocator_that_does_not_say_what_was_asked_for():
    stats = {"allocated_bytes": {"all": {"current": 512, "peak": 1024}}}
    zeros = {"requested_bytes": {"all": {"current": 0, "peak": 0}}, **stats}
    for found in (stats, zeros):
        counter = CudaCounter(torch.device("cpu"), lambda _, found=found: found, lambda _: None)
        assert (counter.live, counter.peak) == (512, 1024)
        counter.close()
    counter = CudaCounter(torch.device("cpu"), lambda _: {}, lambda _: None)  # a device that has not been used
    assert (counter.live, counter.peak) == (0, 0)
    counter.close()


def test_categories_on_cuda_follow_a_training_step():
    allocator, counter = (made := Allocator()), made.counter()
    weight = torch.zeros(100)
    allocator.add(400)
    counter.count(weight, "parameter")
    assert counter.by_category()["parameter"] == 400 and counter.by_category()["activation"] == 0
    allocator.add(3000)  # forward
    allocator.add(400)  # the gradient, while all activations are there: the peak
    grad = torch.zeros(100)
    counter.count(grad, "gradient")
    assert nonzero(counter.peak_by_category()) == {"parameter": 400, "activation": 3400}
    allocator.add(-3000)
    counter.stepping()
    assert nonzero(counter.by_category()) == {"parameter": 400, "gradient": 400}
    allocator.add(8000)  # optimizer state
    counter.stepped()
    state = torch.zeros(2000)
    counter.count(state, "optimizer")
    assert nonzero(counter.by_category()) == {"parameter": 400, "gradient": 400, "optimizer": 8000}
    assert nonzero(counter.peak_by_category()) == {"parameter": 400, "gradient": 400, "activation": 8000}
    # Nobody looks before the gradient is gone: its last moment still belongs to it.
    allocator.add(100)
    del grad
    allocator.add(-500)
    assert counter.peak_by_category()["gradient"] == 400
    assert nonzero(counter.by_category()) == {"parameter": 400, "optimizer": 8000}
    counter.close()


def test_one_counter_does_not_lose_its_peak_to_another():
    allocator = Allocator()
    outer = allocator.counter()
    allocator.add(1000)
    allocator.add(-1000)
    inner = allocator.counter()  # resets the device's peak
    allocator.add(10)
    assert (inner.peak, outer.peak) == (10, 1000)
    outer.reset_peak()
    assert (inner.peak, outer.peak) == (10, 10)
    for counter in (inner, outer):
        counter.close()
