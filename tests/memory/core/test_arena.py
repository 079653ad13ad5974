"""Pieces tile the arena whatever happens; the window is the best of all runs; sliding makes a hole without losing a byte."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.core.live import tile_arena

from weft.memory.core import Arena, Block, PagedArena
from weft.memory.core.arena import MOMENT

sizes = st.one_of(st.integers(0, 40), st.integers(1, 3000), st.sampled_from([64, 128, 256, 1024]))


def block(nbytes, dense=False, **attributes):
    made = Block(nbytes, dense=dense)
    made.evictable = True
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), sizes, st.booleans(), st.integers(0, 50)), max_size=60),
    st.booleans(), st.sampled_from([0, 300]), st.sampled_from([1, 64, 512]),
)  # fmt: skip
def test_pieces_always_tile(moves, partition, small, align):
    """Random puts, removals and hand-overs, checked against a plain dictionary of ranges."""
    arena = Arena(20_000, align, partition, small)
    there: list[Block] = []
    for put, nbytes, dense, which in moves:
        if put or not there:
            new = block(nbytes, dense)
            if arena.put(new):
                assert new.offset % align == 0 and new.room >= nbytes and new.offset + new.room <= arena.size
                there.append(new)
            else:
                need = arena.rounded(nbytes)
                assert all(piece.nbytes < need for piece in arena.pieces() if piece.block is None), (
                    "it would have fitted"
                )
        elif which % 5 == 0:
            old, new = there.pop(which % len(there)), block(0)
            offset = old.offset
            arena.hand_over(old, new)
            assert (new.offset, old.offset) == (offset, -1)
            there.append(new)
        else:
            arena.remove(there.pop(which % len(there)))
        tile_arena(arena)
        ranges = sorted((b.offset, b.offset + b.room) for b in there if b.room)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges)), "two blocks overlap"
    for old in there:
        arena.remove(old)
    tile_arena(arena)
    assert arena.used == 0 and [piece.nbytes for piece in arena.pieces()] == [arena.size]


def layout(parts):
    """An arena of pieces in this order: (units of 64 bytes, state), state a price, "free" or "fixed"."""
    arena = Arena(64 * sum(units for units, _ in parts), 64, small=0)
    made = []
    for units, state in parts:
        new = block(64 * units)
        assert arena.put(new)
        made.append((new, state))
    prices = {}
    for new, state in made:
        if state == "free":
            arena.remove(new)
        elif state == "fixed":
            new.pins = 1
        else:
            prices[new] = state
    return arena, prices


parts = st.lists(
    st.tuples(
        st.integers(1, 6), st.one_of(st.floats(0, 100), st.sampled_from(["free", "free", "fixed", 0.0, 1e12, 1e-12, 3.0]))
    ),
    min_size=1, max_size=14,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(parts, st.integers(1, 20), st.booleans())
def test_window_is_the_best_of_all_runs(parts, units, knows_seconds):
    """Against every run of neighbouring pieces, prices over ages; also where a block's own seconds spare its pricing."""
    arena, prices = layout(parts)
    now = 100.0
    for number, (b, value) in enumerate(prices.items()):
        b.last = now - (1.0, 10.0, 0.0)[number % 3]
        b.seconds = value if knows_seconds else 0.0
    found, seen, priced = arena.window(64 * units, prices.__getitem__, now)
    pieces = list(arena.pieces())
    best = None
    for start, end in itertools.combinations(range(len(pieces) + 1), 2):
        run = pieces[start:end]
        held = [piece.block for piece in run if piece.block is not None]
        if sum(piece.nbytes for piece in run) < 64 * units or any(b.pins for b in held):
            continue
        total = sum(prices[b] / ((now - b.last) or MOMENT) for b in held)
        best = total if best is None else min(best, total)
    if best is None:
        assert found is None
    else:
        assert sum(prices[b] / ((now - b.last) or MOMENT) for b in found) == pytest.approx(best, rel=1e-9, abs=1e-300)
        for b in found:
            arena.remove(b)
        assert arena.put(block(64 * units)), "what was dropped lies together"
    assert priced <= seen == len(prices)


@settings(max_examples=300, deadline=None)
@given(parts, st.integers(1, 20))
def test_sliding_moves_the_fewest_bytes_and_loses_none(parts, units):
    """Contents are copied as memmove would; afterwards every block has its own, and the hole is there."""
    arena, prices = layout(parts)
    pieces = list(arena.pieces())
    memory = {}
    for piece in pieces:
        if piece.block is not None:
            memory.update(
                {at: (piece.block, at - piece.offset) for at in range(piece.offset, piece.offset + piece.nbytes, 64)}
            )
    fewest = None
    for start, end in itertools.combinations(range(len(pieces) + 1), 2):
        run = pieces[start:end]
        if any(piece.block is not None and piece.block.pins for piece in run):
            continue
        if sum(piece.nbytes for piece in run if piece.block is None) >= 64 * units:
            moved = sum(piece.nbytes for piece in run if piece.block is not None)
            fewest = moved if fewest is None else min(fewest, moved)
    moves = arena.slide(64 * units, lambda b: bool(b.pins))
    tile_arena(arena)
    if fewest is None:
        assert moves is None
        return
    assert sum(b.room for b, _ in moves) == fewest
    for b, old in moves:
        content = [memory[at] for at in range(old, old + b.room, 64)]
        memory.update(zip(range(b.offset, b.offset + b.room, 64), content, strict=True))
    for b in arena.blocks():
        assert [memory[at] for at in range(b.offset, b.offset + b.room, 64)] == [(b, at) for at in range(0, b.room, 64)]
    assert arena.put(block(64 * units))


def test_dense_blocks_go_right_and_cheap_ones_left():
    arena = Arena(640, 64, partition=True, small=0)
    made = [block(64, dense) for dense in (False, True, False, True)]
    for b in made:
        arena.put(b)
    assert [b.offset for b in made] == [0, 576, 64, 512]
    plain = Arena(640, 64, small=0)
    for b in (made := [block(64, dense) for dense in (False, True, False, True)]):
        plain.put(b)
    assert [b.offset for b in made] == [0, 64, 128, 192]


def test_best_fit():
    """Of holes of 3, 1 and 2 units, a block of 2 takes the last."""
    arena, _ = layout([(3, "free"), (1, "fixed"), (1, "free"), (1, "fixed"), (2, "free"), (1, "fixed")])
    new = block(128)
    arena.put(new)
    assert new.offset == 64 * 6


def test_small_blocks_lie_together_at_the_right_end():
    arena = Arena(2**20, 64, small=1000)
    big = block(5000)
    arena.put(big)
    tiny = [block(100) for _ in range(20)]
    for b in tiny:
        arena.put(b)
    assert big.offset == 0 and min(b.offset for b in tiny) >= 2**20 - 2 * 16 * 256
    assert arena.window(2**19, lambda b: 1.0, 1.0)[0] == [], "slots are not searched, what is free will do"
    many = [block(1000) for _ in range(100)]  # more than slabs may take: a sixteenth of the arena
    for b in many:
        assert arena.put(b)
    assert sum(piece.nbytes for piece in arena.pieces() if piece.slots is not None) <= 2**16
    assert any(piece.block in many for piece in arena.pieces())
    for b in (*tiny, *many, big):
        arena.remove(b)
    tile_arena(arena)
    assert arena.used == 0, "empty slabs go back"


@pytest.mark.parametrize("size, align", [(-1, 64), (100, 3), (100, 0)])
def test_impossible_arenas(size, align):
    with pytest.raises(ValueError, match="size must be >= 0 and align a power of two"):
        Arena(size, align)


def test_pages_have_no_addresses():
    arena = PagedArena(100)
    a, b, c = block(60), block(40), block(1)
    assert arena.put(a) and arena.put(b) and not arena.put(c) and arena.free == 0
    arena.remove(a)
    assert arena.put(c) and (c.offset, arena.used, arena.most) == (-1, 41, 100)
    new = block(40)
    arena.hand_over(b, new)
    assert list(arena.blocks()) == [c, new] and arena.used == 41
    assert PagedArena(1024, 512).put(block(1)) and PagedArena(1024, 512).put(block(1024))
