"""Arenas against a plain map of taken bytes, by tensors that torch really allocates in them."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from weft.memory import native
from weft.memory.native import Arena

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))

UNIT = 64
SIZE = 32 * UNIT


def tensor(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def where(arena: Arena, x: Tensor) -> int:
    return arena.offset(x.untyped_storage())


def made_at(arena: Arena, nbytes: int, offset: int) -> Tensor:
    assert arena.expect([(nbytes, offset)]) == 0
    x = tensor(nbytes)
    assert arena.done() == 0 and where(arena, x) == offset
    return x


class Plain:
    """An arena as a row of cells of 64 bytes."""

    def __init__(self) -> None:
        self.cells: list[int | None] = [None] * (SIZE // UNIT)

    @staticmethod
    def need(nbytes: int) -> int:
        return -(-nbytes // UNIT)

    def is_free(self, at: int, nbytes: int) -> bool:
        return at + self.need(nbytes) <= len(self.cells) and not any(
            cell is not None for cell in self.cells[at : at + self.need(nbytes)]
        )

    def fill(self, at: int, nbytes: int, owner: int | None) -> None:
        self.cells[at : at + self.need(nbytes)] = [owner] * self.need(nbytes)

    def first_fit(self, nbytes: int, low: int, high: int) -> int | None:
        return next((at for at in range(low, high - self.need(nbytes) + 1) if self.is_free(at, nbytes)), None)

    def regions(self) -> list[tuple[int, int]]:
        """(offset, nbytes) of each owner's cells."""
        found: dict[int, list[int]] = {}
        for at, owner in enumerate(self.cells):
            if owner is not None:
                found.setdefault(owner, []).append(at)
        return sorted((UNIT * cells[0], UNIT * len(cells)) for cells in found.values())

    def largest_hole(self) -> int:
        holes = "".join("." if cell is None else "#" for cell in self.cells).split("#")
        return UNIT * max(map(len, holes))


nbytes = st.integers(1, 6 * UNIT)
place = st.tuples(nbytes, st.integers(0, SIZE // UNIT - 1))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.lists(place, max_size=3), st.lists(nbytes, max_size=4), st.none() | place),
        st.tuples(st.just("free"), st.integers(0, 20)),
        st.tuples(st.just("move"), st.integers(0, 20), st.integers(0, SIZE // UNIT - 1)),
    ),
    min_size=8,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(actions, st.sampled_from(["arena", "malloc", "error"]))
def test_every_allocation_goes_where_the_rules_say(steps, stray):
    plain, alive = Plain(), {}
    with Arena(SIZE, stray=stray) as arena, native.ledger().window() as window:
        for number, (kind, *rest) in enumerate(steps):
            if kind == "run":
                run(arena, plain, alive, number, stray, *rest)
            elif alive:
                chosen = list(alive)[rest[0] % len(alive)]
                if kind == "free":
                    plain.cells = [None if owner == chosen else owner for owner in plain.cells]
                    del alive[chosen]
                else:
                    move(arena, plain, alive[chosen], chosen, rest[1])
            assert arena.regions() == plain.regions()
            assert arena.free == UNIT * plain.cells.count(None) and arena.largest_hole == plain.largest_hole()
            assert window.live == sum(len(x) for x in alive.values())
            assert all(bool((x == owner % 251).all()) for owner, x in alive.items())
        alive.clear()
        assert arena.free == SIZE and arena.regions() == []


def run(arena, plain, alive, number, stray, places, more, workspace):
    """One operator: makes a tensor for each place (in reverse order) and for each of `more`."""
    inside = [(n, at) for n, at in places if UNIT * at + n <= SIZE]
    region = None
    if workspace and UNIT * workspace[1] + workspace[0] <= SIZE:
        region = (workspace[1], Plain.need(workspace[0]))
    expected = arena.expect([(n, UNIT * at) for n, at in inside], region and (UNIT * region[0], UNIT * region[1]))
    waiting, missing = [], 0
    for n, at in inside:
        promised = plain.is_free(at, n)
        if promised:
            plain.fill(at, n, -1)
        missing += not promised
        waiting.append((n, at, promised))
    assert expected == missing
    strays = []
    for index, n in enumerate([n for n, _ in reversed(inside)] + more):
        owner = 1000 * (number + 1) + index
        match = next((w for w in waiting if w[0] == n and (w[2] or plain.is_free(w[1], n))), None)
        at = match[1] if match else None
        if match:
            waiting.remove(match)
        else:
            at = plain.first_fit(n, region[0], sum(region)) if region else None
            if at is None and stray == "arena":
                at = plain.first_fit(n, 0, SIZE // UNIT)
            if at is None and stray != "malloc":
                with pytest.raises(torch.OutOfMemoryError, match="no room in the arena"):
                    tensor(n)
                continue
            strays.append((-1 if at is None else UNIT * at, n))
        x = alive[owner] = tensor(n).fill_(owner % 251)
        assert where(arena, x) == (-1 if at is None else UNIT * at)
        if at is not None:
            plain.fill(at, n, owner)
    assert arena.done() == len(waiting) + len(strays)
    assert sorted(arena.strays()) == sorted(strays)
    plain.cells = [None if owner == -1 else owner for owner in plain.cells]


def move(arena, plain, x, owner, to):
    storage, at = x.untyped_storage(), where(arena, x)
    if at < 0:
        with pytest.raises(ValueError, match="not in this arena"):
            arena.move(storage, UNIT * to)
        return
    before = list(plain.cells)
    plain.cells = [None if cell == owner else cell for cell in plain.cells]
    if plain.is_free(to, len(x)):
        arena.move(storage, UNIT * to)
        plain.fill(to, len(x), owner)
        assert where(arena, x) == UNIT * to
    else:
        plain.cells = before
        with pytest.raises(ValueError, match="not free"):
            arena.move(storage, UNIT * to)


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [0, 64, 192, 448])
def test_bytes_survive_a_move_onto_themselves(to):
    with Arena(2048) as arena:
        x = made_at(arena, 1000, 128)
        values = torch.randint(0, 256, (1000,), dtype=torch.uint8)
        view = x.copy_(values)[100:200]
        address = x.data_ptr()
        arena.move(x.untyped_storage(), to)
        assert x.data_ptr() == address + to - 128 == arena.address + to
        assert torch.equal(x, values) and torch.equal(view, values[100:200])
        del x, view
        assert arena.regions() == []


def test_drop_place_and_give():
    book = native.ledger()
    with Arena(4096) as arena, book.window() as window:
        x = made_at(arena, 1000, 64).fill_(3)
        view, storage = x[:10], x.untyped_storage()
        native.drop(storage)
        assert (arena.regions(), window.live, storage.nbytes(), x.data_ptr()) == ([], 0, 1000, 0)
        arena.place(storage, 1000, 2048)
        assert (arena.regions(), window.live) == ([(2048, 1024)], 1000)
        x.fill_(4)
        assert view.tolist() == [4] * 10
        with pytest.raises(ValueError, match="has bytes; drop them first"):
            arena.place(storage, 1000, 0)
        native.drop(storage)
        again = made_at(arena, 1000, 128).fill_(5)
        native.give(again.untyped_storage(), storage)
        assert view.tolist() == [5] * 10 and where(arena, x) == 128 and again.data_ptr() == 0
        outside = tensor(1000).fill_(6)
        with pytest.raises(ValueError, match="has bytes"):
            native.give(outside.untyped_storage(), storage)
        native.drop(storage)
        native.give(outside.untyped_storage(), storage)
        assert view.tolist() == [6] * 10 and window.live == 1000
        native.drop(storage)
        made_at(arena, 100, 0)
        kept = made_at(arena, 100, 0)
        with pytest.raises(ValueError, match="not free"):
            arena.place(storage, 1000, 64)
        window.cap = 1000
        with pytest.raises(torch.OutOfMemoryError, match="bringing back 1000 bytes"):
            arena.place(storage, 1000, 128)
        assert arena.regions() == [(0, 128)] and kept is not None


def test_operators_run_in_place_and_the_profiler_sees_the_same_bytes():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    expected = torch.softmax(a @ b, 1)
    with (
        Arena(1 << 16) as arena,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen,
    ):
        arena.expect([(4096, 8192)])
        c = a @ b
        assert arena.done() == 0
        arena.expect([(4096, 0)], workspace=(16384, 8192))
        d = torch.softmax(c, 1)
        assert arena.done() == 0
        assert [where(arena, c), where(arena, d)] == [8192, 0] and torch.equal(d, expected)
        arena.move(c.untyped_storage(), 4096)
        del c, d
        assert arena.high == 8192 + 4096 and arena.regions() == []
    events = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(events) == 0 and max(events) == 4096


def test_onednn_allocates_in_it():
    x, w = torch.randn(1, 4, 16, 16), torch.randn(4, 4, 3, 3)
    expected = F.conv2d(x, w)
    with Arena(1 << 20) as arena:
        nbytes = expected.nbytes
        arena.expect([(nbytes, 0)], workspace=(65536, 1 << 19))
        y = F.conv2d(x, w)
        assert arena.done() == 0 and where(arena, y) == 0 and torch.equal(y, expected)


# -- the rules --------------------------------------------------------------------------------------------------------


def test_only_the_thread_that_expects_is_served_and_only_until_done():
    others: list[int] = []
    with Arena(4096) as arena:
        arena.expect([(100, 0)])
        thread = threading.Thread(target=lambda: others.append(where(arena, tensor(100))))
        thread.start()
        thread.join()
        x = tensor(100)
        assert arena.done() == 0
        y = tensor(100)
        assert (others, where(arena, x), where(arena, y)) == ([-1], 0, -1)


def test_a_place_that_becomes_free_in_time_is_used():
    with Arena(4096) as arena:
        old = made_at(arena, 100, 0)
        assert arena.expect([(200, 64)]) == 1
        del old
        x = tensor(200)
        assert arena.done() == 0 and where(arena, x) == 64


def test_unused_places_and_what_outlives_the_workspace_are_told():
    with Arena(4096, stray="error") as arena:
        arena.expect([(100, 0), (200, 128)], workspace=(1024, 1024))
        tensor(300)
        tensor(400)  # leaves its bytes to `kept`
        kept = tensor(400)
        tensor(100)
        assert arena.done() == 2  # (200, 128) was not used, `kept` stays in the workspace
        assert arena.strays() == [(1024, 400)]
        del kept
        assert arena.regions() == []


def test_a_script_is_played_by_row_in_any_order():
    with Arena(4096) as arena:
        arena.script([([(100, 0)], None), ([], None), ([(100, 128), (200, 256)], (1024, 512))])
        for row, sizes, offsets in ((2, [200, 100, 300], [256, 128, 1024]), (0, [100], [0]), (2, [100], [128])):
            assert arena.play(row) == 0
            made = [tensor(n) for n in sizes]
            assert [where(arena, x) for x in made] == offsets
            arena.done()
            del made
        for row in (3, -1):
            with pytest.raises(ValueError, match=f"no row {row}"):
                arena.play(row)


def test_a_cap_counts_the_arena_too():
    with Arena(4096) as arena, native.ledger().window(cap=1000) as window:
        outside = tensor(300)
        x = made_at(arena, 600, 0)
        arena.expect([(200, 1024)])
        with pytest.raises(
            torch.OutOfMemoryError, match="200 bytes would exceed the cap of 1000 bytes; 900 bytes are alive"
        ):
            tensor(200)
        assert arena.done() == 1
        assert (window.live, len(outside), len(x)) == (900, 300, 600)


def test_a_full_arena_says_what_is_left():
    with Arena(1024) as arena:
        a, b, c = (made_at(arena, 128, offset) for offset in (0, 256, 512))
        arena.expect([])
        with pytest.raises(
            torch.OutOfMemoryError,
            match="no room in the arena for 600 bytes: 640 bytes of 1024 bytes are free, the largest hole has 384",
        ):
            tensor(600)
        arena.done()
        assert len(a) + len(b) + len(c) == 384


def test_tensors_outlive_a_closed_arena_and_its_memory_then_goes_back():
    arena = Arena(1 << 22)
    x = made_at(arena, 1 << 20, 0).fill_(9)
    start = f"{arena.address:x}-"
    arena.close()
    arena.close()
    assert bool((x == 9).all())
    with pytest.raises(ValueError, match="it is closed"):
        arena.expect([])
    maps = Path("/proc/self/maps")
    assert start in maps.read_text()
    del x
    assert start not in maps.read_text()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Arena(0), "nbytes must be at least 1, got 0"),
        (lambda: Arena(64, alignment=96), "power of two and at least 64, got 96"),
        (lambda: Arena(64, stray="spill"), "one of arena, malloc, error, got 'spill'"),
        (lambda: Arena(1 << 62), "no address space for"),
        (lambda: Arena(1024).expect([(100, 32)]), "place of 100 bytes at 32 is not aligned inside 1024 bytes"),
        (lambda: Arena(1024).expect([(100, 960)]), "place of 100 bytes at 960"),
        (lambda: Arena(1024).expect([], (512, 1024)), "workspace of 1024 bytes at 512"),
        (lambda: Arena(1024).script([([(-5, 0)], None)]), "place of -5 bytes"),
    ],
)
def test_bad_arguments_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_empty_tensors_need_no_place():
    with Arena(1024) as arena:
        arena.expect([(0, 64), (100, 0)])
        x, y = tensor(0), tensor(100)
        assert arena.done() == 0 and (where(arena, x), where(arena, y)) == (-1, 0)


def test_many_threads_share_one_arena():
    with Arena(1 << 16) as arena:
        wrong: list[int] = []

        def work(seed: int) -> None:
            draw, held = random.Random(seed), {}
            for step in range(300):
                arena_expected = draw.randint(1, 600)
                try:
                    arena.expect([])
                    held[step] = tensor(arena_expected).fill_(seed)
                except torch.OutOfMemoryError:
                    held.clear()
                finally:
                    arena.done()
                if len(held) > 10:
                    del held[draw.choice(list(held))]
                wrong.extend(step for x in held.values() if not bool((x == seed).all()))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and arena.regions() == []
