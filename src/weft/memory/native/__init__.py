"""The native library: torch's CPU allocations counted exactly, and put where a plan says. Optional; built on first use.

It is a c10 allocator put in front of torch's own (nothing else about torch changes): every allocation of every operator,
workspace included, passes it, on any thread. `problem()` says why there is none (no compiler, other platform, `WEFT_NATIVE=0`);
everything that needs the library raises `NativeUnavailable` with that sentence, and its callers have a fallback.

    from weft.memory import native

    native.problem() -> str | None              None if it works here. Builds on first use (seconds, then cached)
    book = native.ledger()                      the process's one `Ledger`; puts the allocator in place

Counting (bytes as asked for, without rounding)

    book.live                                   bytes of all blocks known to the ledger
    book.mark(); ...; peak, end = book.since()  around one operator: most bytes and bytes left, relative to the mark
    with book.log() as events: ...              every allocation and release: list of (address, +nbytes or -nbytes), in order
    with book.window(cap=None) as w:            a meter: counts what is allocated while it is open and what it is told to count
        w.count(tensor, "parameter")            count a tensor's storage (older than the window or not) under a category
        w.live, w.peak, w.reset_peak()
        w.by_category(), w.peak_by_category()   dict of bytes; the second exactly as it was at the moment of the peak
        w.cap = nbytes                          an allocation that would take w.live above it raises torch.OutOfMemoryError
                                                before it happens; None takes the cap away
    Not seen until counted: storages made without an operator (`torch.UntypedStorage(n)`, which deepcopy and load use) and memory
    of others (numpy, files, shared memory). Once counted their end is seen too.
    Windows nest and overlap freely (at most 64). Workspace is told from activations while `book.operators(True)`.

Placing (for executors): an arena is address space that is given out at offsets the caller names

    arena = native.Arena(nbytes, alignment=64, stray="arena")
    arena.expect([(nbytes, offset), ...], workspace=(offset, nbytes))   -> how many places are not free (0 is good)
    ... run one operator on this thread ...
    arena.done()                                -> 0 if all allocations went where expected; else a count: see `strays()`

    Between `expect` and `done` each allocation *of the calling thread* takes: the first unused place of exactly its nbytes; else
    the first hole of the workspace region; else, by `stray`: "arena" the first hole anywhere, "malloc" memory outside, "error"
    nothing. What fits nowhere raises torch.OutOfMemoryError saying how many bytes are free and the largest hole. Allocations
    at other times and on other threads go to torch's own allocator. A place that overlaps live bytes is never given out. An arena
    looks after one operator at a time.
    arena.strays() -> [(offset or -1, nbytes)]  of those allocations of the last operator that went elsewhere and still live
    arena.script(rows); arena.play(i)           a whole step at once: rows[i] = (places, workspace); play(i) = expect(*rows[i])

    arena.offset(storage) -> int                where a storage's bytes lie, -1 outside this arena
    arena.move(storage, offset)                 copy its bytes there (regions may overlap); the storage then points to them
    native.drop(storage)                        give its bytes back; the storage keeps its nbytes and has no data
    native.forbid(storage, why)                 reading or writing its bytes raises RuntimeError(why) until it is swapped
    arena.place(storage, nbytes, offset)        give a dropped storage bytes again (contents undefined)
    native.give(donor, storage)                 the donor's bytes become those of a dropped storage; the donor is left dropped
    arena.free, arena.largest_hole, arena.high  bytes; high = end of the highest byte ever given out
    arena.regions() -> [(offset, nbytes)]       what is taken, in address order
    arena.close()                               no more allocations; the memory goes back when its last block dies

`storage` is a `torch.UntypedStorage` (`tensor.untyped_storage()`) or its `_cdata`. Errors of use are `ValueError`. All calls
are safe from any thread and cost about a microsecond.
"""

from __future__ import annotations

from weft.memory.native.arena import Arena, Places, drop, forbid, give
from weft.memory.native.books import LABELS, Ledger, Window, ledger, problem
from weft.memory.native.build import NativeUnavailable

__all__ = [
    "LABELS",
    "Arena",
    "Ledger",
    "NativeUnavailable",
    "Places",
    "Window",
    "drop",
    "forbid",
    "give",
    "ledger",
    "problem",
]
