"""The first runs of an operator online: what does it take besides its outputs?

Outputs are foreseen (`sizes`), the workspace is not. So an operator met for the first time runs under a cap: the bytes of its
outputs and all that are free. An allocation beyond is refused by the native library before it happens; then room is made for
what was asked, and the operator begins anew. What it writes in place might be half done then: it is copied before if there is
room (running statistics, and the operators in `COPIED`). Other writers are not capped: they work element by element, or copy, and
take no workspace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import BudgetError
from weft.memory.core import Step
from weft.memory.execute.facts import Facts
from weft.memory.execute.random_state import about_to_draw
from weft.memory.execute.sizes import Size
from weft.memory.private import below

if TYPE_CHECKING:
    from weft.memory.execute.online import Online

__all__ = ["first_run"]

# they write in place, and take workspace: to sort indices, or for a matrix product
COPIED = frozenset(
    f"aten.{name}.default"
    for name in ("addbmm_", "addmm_", "baddbmm_", "embedding_renorm_", "index_add_", "index_put_", "_index_put_impl_")
)


def first_run(
    online: Online, step: Step, num_over: int, size: Size, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run an operator, learn what its signature takes, and make room for it first if that is more than there is.

    Raises:
        BudgetError: there is no room.
    """
    beside = step.workspace - size.workspace  # a generator's state, for a moment
    if online.gauge is not None and (not facts.written or facts.name in COPIED):
        result = _capped(online, step, num_over, size, facts, args, kwargs)
    else:
        result = _measured(online, step, num_over, size, facts, args, kwargs, -1)
    step.workspace = size.workspace + beside
    return result


def _capped(
    online: Online, step: Step, num_over: int, size: Size, facts: Facts, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run an operator within the bytes that are there for it; refused, begin anew when there are as many as it asked for."""
    core, made = online.core, sum(size.fresh or ())
    drawn = about_to_draw(args, kwargs, online.device) if facts.random and facts.draws(args, kwargs) else None
    positions = (*facts.statistics, *(at for at, _ in facts.written))
    written = [args[at] for at in positions if at < len(args) and args[at] is not None]
    copied = sum(tensor.nbytes for tensor in written)
    if copied and not _widened(online, step, step.workspace + copied):
        return _measured(online, step, num_over, size, facts, args, kwargs, -1)
    with below():
        copies = [tensor.clone() for tensor in written]
    while True:
        most = made + step.workspace - copied + core.arena.free
        try:
            return _measured(online, step, num_over, size, facts, args, kwargs, most)
        except torch.OutOfMemoryError:
            asked = online.gauge.since()[0]
            if asked <= most:  # somebody else has refused
                raise
        if drawn is not None:
            drawn.rewind()
        with below():
            for tensor, copy in zip(written, copies, strict=True):
                tensor.copy_(copy)
        before = step.workspace
        try:
            core.widen(step, asked - made + copied)
        except BudgetError:
            core.widen(step, before)
            if made + before - copied + core.arena.free < asked:
                raise  # else there are enough bytes in the arena, not in one place: it takes as many outside


def _widened(online: Online, step: Step, workspace: int) -> bool:
    """Take another workspace for a step that has begun; False, and as before, if there is no room."""
    before = step.workspace
    try:
        online.core.widen(step, workspace)
    except BudgetError:
        online.core.widen(step, before)
        return False
    return True


def _measured(
    online: Online,
    step: Step,
    num_over: int,
    size: Size,
    facts: Facts,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    most: int,
) -> Any:
    """Run an operator once, with at most `most` bytes more than there are (-1: any), and note what it has taken."""
    gauge, clock = online.gauge, online.clock
    if gauge is not None:
        gauge.mark(most)
    start = clock()
    try:
        result = online.execute(step, num_over, facts, args, kwargs)
        seconds = clock() - start
    finally:
        taken = gauge.since()[0] if gauge is not None else 0
    size.seconds = min(size.seconds, seconds) if size.runs else seconds
    size.runs += 1
    size.workspace = max(size.workspace, taken - sum(size.fresh or ()))
    return result
