"""The oracle of lifetimes: what torch's profiler saw allocated and freed in a run without any recorder.

The profiler reports every allocation and release of the CPU allocator and every dispatched operator with their times. An operator
of a trace is found again as the first event of its name that starts after the one before has ended; what is called inside
it does not count.

torch itself runs another program under a dispatch mode in a few places: where it may not write a tensor subclass in place,
it does not do so under a mode either (the attention mask is then added out of place). A trace is of the program under a mode, the
one that `weft.memory.limit` runs; `plain=False` profiles under a mode that does nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from weft.memory.private import QuickMode
from weft.memory.record import Trace

__all__ = ["Seen", "profiled"]


class Seen(NamedTuple):
    """For each operator of a trace, bytes relative to the start of the run."""

    before: list[int]  # when the operator starts
    most: list[int]  # at most while it runs
    after: list[int]  # when it ends
    end: int  # when the run has ended


class Nothing(QuickMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def profiled(run: Callable[[], Any], trace: Trace, *, plain: bool = True) -> Seen:
    """Bytes around each operator of `trace` in an eager run of the same code. What `run` returns is held to the end."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        with nullcontext() if plain else Nothing():
            held = run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda c: c[0])
    times, live, total = [t for t, _ in changes], [0], 0
    for _, nbytes in changes:
        total += nbytes
        live.append(total)
    calls = sorted(
        ((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if "::" in e.name()),
        key=lambda c: (c[0], -c[1]),
    )
    seen, at, free_from = Seen([], [], [], total), 0, 0
    for index, op in enumerate(trace.ops):
        name = "::".join(op.name.split(".")[:2]).rstrip("_")
        while at < len(calls) and (calls[at][0] < free_from or calls[at][2].rstrip("_") != name):
            at += 1
        assert at < len(calls), f"operator {index} ({op.name}) did not run without the recorder"
        start, stop, _ = calls[at]
        first, last = bisect_left(times, start), bisect_right(times, stop)
        seen.before.append(live[first])
        seen.most.append(max(live[first : last + 1]))
        seen.after.append(live[last])
        free_from = stop
    del held
    return seen
