"""The end of a limit: everything that the user still refers to comes back into torch's own memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch

from weft.memory.core import Block, Step
from weft.memory.core.blocks import BY_ORDER
from weft.memory.execute.backends import Count, Hold
from weft.memory.execute.calls import Call
from weft.memory.execute.online import Online
from weft.memory.private import below, fill, storage_of

__all__ = ["hand_back"]

RUN = Count().run


def hand_back(online: Online, budget: int) -> list[str]:
    """Everything the user still refers to is there when this returns, budget or not, and `online` manages nothing any more.

    Independent of the core, which an exception may have left in the middle of something. Raises nothing: whatever ended the
    limit is what the user must see. What cannot be made again holds NaN.

    Returns:
        what the user should know, in sentences.
    """
    online._busy = True  # what dies meanwhile is of no interest any more
    wanted = [block for block in online.bytes.dropped if type(block.payload) is Hold and block.payload() is not None]
    with below():
        _rebuild_all(wanted)
    gone, notes = [block for block in wanted if not block.resident], []
    for block in gone:
        with suppress(RuntimeError):  # no memory: reading it will raise
            fill(block.payload(), storage_of(torch.full((block.nbytes,), 255, dtype=torch.uint8, device=online.device)))
    if gone:
        notes.append(
            f"weft.memory.limit: {len(gone)} tensors could not be made again when the limit was left (the largest has "
            f"{max(block.nbytes for block in gone):,} bytes); they hold NaN"
        )
    held = sum(hold.block.nbytes for hold in online.owner.holds.values() if hold.block.payload is hold)
    if held > budget and wanted:
        notes.append(
            f"weft.memory.limit: tensors of {held:,} bytes were still referred to when the limit of {budget:,} was left; they "
            "are all there now. Delete what is not needed before leaving, or detach and reduce it"
        )
    online.leave()
    return notes


def _rebuild_all(wanted: Sequence[Block]) -> None:
    """Make what is not there again, in the order in which it was first made."""
    steps: dict[Step, None] = {}
    stack = [block.step for block in wanted]
    while stack:
        step = stack.pop()
        if step is not None and step not in steps:
            steps[step] = None
            stack.extend(read.step for read in step.reads if not read.resident)
    readers = Counter(read for step in steps for read in step.reads)
    for step in sorted(steps, key=BY_ORDER):
        if all(read.resident and read.payload is not None for read in step.reads):
            with suppress(RuntimeError, OSError):  # no memory, or the disk it was offloaded to
                _rebuild(step, readers)


def _rebuild(step: Step, readers: Counter[Block]) -> None:
    """One step of `hand_back`: its outputs that are not there come to lie in torch's own memory."""
    call: Call = step.payload
    made = call.again(RUN)
    for old, position in step.overwrites:
        made.insert(position, old.payload)
        old.payload = None
    for reference, storage in zip(step.outputs, made, strict=True):
        block = reference()
        if block is not None and not block.resident and storage is not None:
            block.resident, block.offset = True, -1
            if type(block.payload) is Hold:
                mine = block.payload()
                if mine is not None:
                    fill(mine, storage)
            else:
                block.payload = storage
    for read in step.reads:
        readers[read] -= 1
        if not readers[read] and type(read.payload) is not Hold:
            read.payload = None
