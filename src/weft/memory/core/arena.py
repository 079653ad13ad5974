"""Room for blocks: an arena of addresses, or pages that can be remapped.

`Arena` is one range of addresses. *Pieces* tile it in address order; each is free or holds a block. A freed piece merges with
free neighbours, so that no two free pieces touch. A block goes into the smallest free piece that holds it, at its left
end or, if the arena is partitioned and the block dense, at its right end: cheap blocks gather left, dense ones right.
Small blocks live in *slabs*: pieces at the right end of the arena, cut into equal slots, which are never searched, up to a
sixteenth of the arena; beyond that they are treated like the others.

`window` finds the stretch of neighbouring pieces that is cheapest to clear:
Problem    pieces p1..pk in address order with bytes b_i, and prices h_i >= 0 (0 for a free one, none for a fixed one). Find
           the run of neighbours without fixed pieces with sum of b >= n whose sum of h is least.
Method     two pointers: for each end the shortest run that suffices, since prices are not negative; O(pieces).
           A piece that alone counts more than the best run found so far is in no better one, and is not even priced
           if its own seconds say so already.
Guarantee  optimal among all runs (tests/memory/core/test_arena.py compares with trying all).
Source     Zhang et al., "Coop: Memory is not a Commodity", NeurIPS 2023, arXiv:2311.00591, section 4.1.

`PagedArena` counts bytes: memory whose pages can be remapped never has to be in one stretch.
"""

from __future__ import annotations

import abc
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import final

from weft.memory.core.blocks import Block

__all__ = ["MOMENT", "Arena", "PagedArena", "Piece", "Space"]

MOMENT = 1e-9  # seconds: nothing was used less long ago than this
SMALL = 10 * 2**10  # bytes up to which a block goes into a slot, in an arena of 40 MiB and more
SLOTS = (256, 2048, SMALL)  # bytes of a slot
SLOTS_OF_SLAB = 16


@final
class Piece:
    """`nbytes` from `offset` on; `block` is who lives there, None if nobody does. `left`, `right` are its neighbours."""

    __slots__ = ("block", "left", "nbytes", "offset", "right", "slots")

    def __init__(self, offset: int, nbytes: int, left: Piece | None, right: Piece | None):
        self.offset = offset
        self.nbytes = nbytes
        self.block: Block | None = None
        self.left = left
        self.right = right
        self.slots: list[int] | None = None  # of a slab: the addresses of its free slots


class Space(abc.ABC):
    """Where blocks lie. `size`, `used`, `most` (the most that was ever used) and `free` are bytes, rounded as they are taken."""

    size: int
    used: int
    most: int

    @property
    def free(self) -> int:
        """Bytes that nobody has, wherever they are."""
        return self.size - self.used

    @abc.abstractmethod
    def put(self, block: Block) -> bool:
        """Give a block room (sets `offset`, `room`, `piece`), or answer False if there is none."""

    @abc.abstractmethod
    def remove(self, block: Block) -> None:
        """Take a block's room back."""

    @abc.abstractmethod
    def hand_over(self, old: Block, new: Block) -> None:
        """`new` gets the room of `old`: it is written in place."""

    @abc.abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Blocks that might be dropped or moved, in address order where there are addresses."""

    @abc.abstractmethod
    def beside(self, block: Block) -> int:
        """Free bytes next to a block."""


@final
class PagedArena(Space):
    """Counts bytes; any free bytes serve any block. Offsets are -1.

    Args:
        size: bytes, >= 0.
        align: bytes are rounded up to multiples of this.
    """

    def __init__(self, size: int, align: int = 1):
        self.size, self.used, self.most = size, 0, 0
        self._mask = align - 1
        self._there: dict[Block, None] = {}

    def put(self, block: Block) -> bool:
        room = (block.nbytes + self._mask) & ~self._mask
        used = self.used + room
        if used > self.size:
            return False
        self.used = used
        if used > self.most:
            self.most = used
        block.room = room
        if room and block.evictable:
            self._there[block] = None
        return True

    def remove(self, block: Block) -> None:
        self.used -= block.room
        block.room = 0
        self._there.pop(block, None)

    def hand_over(self, old: Block, new: Block) -> None:
        new.room, old.room = old.room, 0
        self._there.pop(old, None)
        if new.room and new.evictable:
            self._there[new] = None

    def blocks(self) -> Iterator[Block]:
        return iter(self._there)

    def beside(self, block: Block) -> int:
        return self.size - self.used


@final
class Arena(Space):
    """One range of addresses from 0 to `size`.

    Args:
        size: bytes, >= 0; rounded down to a multiple of `align`.
        align: every address and every room is a multiple of this, a power of two.
        partition: dense blocks go to the right end of their piece, others to the left.
        small: bytes up to which a block gets a slot; None for 10 KiB, less in arenas under 40 MiB.
    """

    def __init__(self, size: int, align: int = 64, partition: bool = False, small: int | None = None):
        if size < 0 or align < 1 or align & (align - 1):
            raise ValueError(f"Arena: size must be >= 0 and align a power of two, got {size} and {align}")
        self.size = size & ~(align - 1)
        self.align, self.partition = align, partition
        self.small = min(SMALL, self.size >> 12) if small is None else small
        self.used = self.most = 0
        self._mask = align - 1
        self.first = Piece(0, self.size, None, None)
        self._free: list[tuple[int, int, Piece]] = [(self.size, 0, self.first)] if self.size else []  # by size, address
        self._slab = Block(0)  # stands in every slab: pinned, so that nothing drops or moves it
        self._slab.pins = 1
        self._slabs: dict[int, list[Piece]] = {}  # bytes of a slot -> slabs with a free slot
        self._in_slabs = 0  # bytes of all slabs

    def rounded(self, nbytes: int) -> int:
        """The room that `nbytes` bytes take."""
        return (nbytes + self._mask) & ~self._mask

    # -- taking and giving back ---------------------------------------------------------------------------------------

    def put(self, block: Block) -> bool:
        need = (block.nbytes + self._mask) & ~self._mask
        if need <= self.small:
            if not need:
                block.offset = block.room = 0
                return True
            if self._put_in_slot(block, need):
                return True
        piece = self._take(need, block.dense and self.partition)
        if piece is None:
            return False
        piece.block = block
        block.piece, block.offset, block.room = piece, piece.offset, need
        return True

    def _take(self, need: int, from_right: bool, rightmost: bool = False) -> Piece | None:
        """Cut `need` bytes from the smallest free piece that has them (or from the rightmost one)."""
        free = self._free
        at = bisect_left(free, (need,))
        if at == len(free):
            return None
        if rightmost:
            at = max(range(at, len(free)), key=lambda i: free[i][1])
        nbytes, offset, piece = free.pop(at)
        rest = nbytes - need
        if rest:
            right = piece.right
            if from_right:
                taken = Piece(offset + rest, need, piece, right)
                piece.nbytes = rest
                insort(free, (rest, offset, piece))
                piece.right = taken
                if right is not None:
                    right.left = taken
                piece = taken
            else:
                other = Piece(offset + need, rest, piece, right)
                piece.nbytes = need
                insort(free, (rest, other.offset, other))
                piece.right = other
                if right is not None:
                    right.left = other
        self.used += need
        if self.used > self.most:
            self.most = self.used
        return piece

    def remove(self, block: Block) -> None:
        piece, offset, room = block.piece, block.offset, block.room
        block.piece, block.offset, block.room = None, -1, 0
        if piece is None:
            return
        if piece.slots is None:
            self._give(piece)
        else:
            self._give_slot(piece, room, offset)

    def _give(self, piece: Piece) -> None:
        """Make a piece free and merge it with free neighbours."""
        free = self._free
        piece.block = None
        self.used -= piece.nbytes
        left, right = piece.left, piece.right
        if left is not None and left.block is None:
            del free[bisect_left(free, (left.nbytes, left.offset))]
            left.nbytes += piece.nbytes
            left.right = right
            if right is not None:
                right.left = left
            piece = left
        if right is not None and right.block is None:
            del free[bisect_left(free, (right.nbytes, right.offset))]
            piece.nbytes += right.nbytes
            piece.right = right.right
            if right.right is not None:
                right.right.left = piece
        insort(free, (piece.nbytes, piece.offset, piece))

    def hand_over(self, old: Block, new: Block) -> None:
        piece = old.piece
        new.piece, new.offset, new.room = piece, old.offset, old.room
        old.piece, old.offset, old.room = None, -1, 0
        if piece is not None and piece.slots is None:
            piece.block = new

    # -- slots for small blocks ---------------------------------------------------------------------------------------

    def _put_in_slot(self, block: Block, need: int) -> bool:
        width = next((slot for slot in SLOTS if need <= slot), need)
        width = (width + self._mask) & ~self._mask
        slabs = self._slabs.setdefault(width, [])
        if not slabs:
            nbytes = width * SLOTS_OF_SLAB
            if self._in_slabs + nbytes > self.size >> 4:
                return False
            slab = self._take(nbytes, True, rightmost=True)
            if slab is None:
                return False
            slab.slots, slab.block = [slab.offset + width * i for i in reversed(range(SLOTS_OF_SLAB))], self._slab
            self._in_slabs += nbytes
            slabs.append(slab)
        slab = slabs[-1]
        assert slab.slots
        block.piece, block.offset, block.room = slab, slab.slots.pop(), width
        if not slab.slots:
            slabs.pop()
        return True

    def _give_slot(self, slab: Piece, width: int, offset: int) -> None:
        slots = slab.slots
        assert slots is not None
        if not slots:
            self._slabs[width].append(slab)
        slots.append(offset)
        if len(slots) == SLOTS_OF_SLAB:
            self._slabs[width].remove(slab)
            self._in_slabs -= slab.nbytes
            slab.slots = None
            self._give(slab)

    # -- looking ------------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """All pieces in address order."""
        piece: Piece | None = self.first
        while piece is not None:
            yield piece
            piece = piece.right

    def free_list(self) -> list[tuple[int, int, Piece]]:
        """(bytes, address, piece) of the free pieces, smallest first."""
        return list(self._free)

    def blocks(self) -> Iterator[Block]:
        piece: Piece | None = self.first
        while piece is not None:
            if piece.block is not None:
                yield piece.block
            piece = piece.right

    def beside(self, block: Block) -> int:
        piece, total = block.piece, 0
        for other in (piece.left, piece.right) if piece is not None else ():
            if other is not None and other.block is None:
                total += other.nbytes
        return total

    def window(self, need: int, price: Callable[[Block], float], now: float) -> tuple[list[Block] | None, int, int]:
        """The blocks of the cheapest stretch of at least `need` bytes without fixed pieces; None if there is no such stretch.

        Ties go to the leftmost. Also: how many blocks it looked at, and how many of these it had to price.

        Args:
            need: bytes, > 0.
            price: seconds against dropping a block, at least the block's own `seconds`. What counts is price over age.
            now: the clock.
        """
        best, best_first, best_last, seen, priced = float("inf"), None, None, 0, 0
        run: list[Piece] = []  # the stretch is run[start:], with what its pieces count
        counts: list[float] = []
        start, total, nbytes = 0, 0.0, 0
        piece: Piece | None = self.first
        while piece is not None:
            block, value = piece.block, 0.0
            if block is not None:
                if block.pins or not block.evictable:
                    value = best
                else:
                    seen += 1
                    age = (now - block.last) or MOMENT
                    value = block.seconds / age
                    if value < best:
                        priced += 1
                        value = price(block) / age
                if value >= best:  # in no stretch that is better
                    if start or counts:
                        run, counts, start, total, nbytes = [], [], 0, 0.0, 0
                    piece = piece.right
                    continue
                total += value
            run.append(piece)
            counts.append(value)
            nbytes += piece.nbytes
            while nbytes - run[start].nbytes >= need:
                nbytes -= run[start].nbytes
                value = counts[start]
                start += 1
                # a sum that loses its largest part by subtraction keeps only rounding errors: add it up anew
                total = sum(counts[start:]) if value > 0.5 * total else total - value
            if total < best and nbytes >= need:
                best, best_first, best_last = total, run[start], piece
            piece = piece.right
        if best_first is None:
            return None, seen, priced
        blocks, piece = [], best_first
        while piece is not None:
            if piece.block is not None:
                blocks.append(piece.block)
            piece = piece.right if piece is not best_last else None
        return blocks, seen, priced

    # -- sliding ------------------------------------------------------------------------------------------------------

    def slide(self, need: int, fixed: Callable[[Block], bool]) -> list[tuple[Block, int]] | None:
        """Push blocks together so that a free piece of `need` bytes appears: (block, old offset), leftmost first, or None.

        Takes the stretch without fixed pieces whose free bytes suffice and whose blocks are the fewest bytes. Every block
        moves to the left, over what was free or has moved before it: the ranges of one move may overlap.
        """
        best, best_run = float("inf"), None
        run: list[Piece] = []
        start = held = nbytes = 0
        piece: Piece | None = self.first
        while piece is not None:
            block = piece.block
            if block is None:
                nbytes += piece.nbytes
            elif fixed(block):
                run, start, held, nbytes = [], 0, 0, 0
                piece = piece.right
                continue
            else:
                held += piece.nbytes
            run.append(piece)
            while start < len(run) and (
                run[start].block is not None or nbytes - run[start].nbytes >= need
            ):  # begins at a free piece that it needs
                if run[start].block is None:
                    nbytes -= run[start].nbytes
                else:
                    held -= run[start].nbytes
                start += 1
            if nbytes >= need and held < best:
                best, best_run = held, run[start:]
            piece = piece.right
        return None if best_run is None else self._push_left(best_run)

    def _push_left(self, run: list[Piece]) -> list[tuple[Block, int]]:
        """Pieces of `run` (the first and the last are free): blocks to the left, one free piece after them."""
        moved = []
        left, right, offset = run[0].left, run[-1].right, run[0].offset
        gap = 0
        chain: list[Piece] = []
        for piece in run:
            if piece.block is None:
                del self._free[bisect_left(self._free, (piece.nbytes, piece.offset))]
                gap += piece.nbytes
                continue
            moved.append((piece.block, piece.offset))
            piece.offset = piece.block.offset = offset
            offset += piece.nbytes
            chain.append(piece)
        hole = Piece(offset, gap, None, None)
        chain.append(hole)
        for piece in chain:
            piece.left = left
            if left is None:
                self.first = piece
            else:
                left.right = piece
            left = piece
        hole.right = right
        if right is not None:
            right.left = hole
        insort(self._free, (gap, offset, hole))
        return moved
